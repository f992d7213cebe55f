"""Bytes, hours and comparisons for a corpus of any size, by arithmetic (notebook 11).

A corpus of 2.4 million tokens is searched exactly in seconds; the paper's has 1.8 trillion. Counts and bytes are
exact here; tests compare them with written files. Hours are counts divided by a rate. Rates are measured on some
machine and passed as arguments (`embedding_rates` and `search_rates` read those in benchmarks/results). The quality of
a search cannot be computed: recall is measured at a million vectors (`recall_runs`) and unknown at 28 billion.
"""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from retro_nb.common.arrays import SOURCE, PathLike
from retro_nb.planning.costs import HEADER, PROBED, comparisons, index_bytes
from retro_nb.store.chunking import MOST_CHUNKS
from retro_nb.store.index import choose_index

RESULTS = SOURCE / "benchmarks" / "results"


class Figure(NamedTuple):
    """A number from the paper, with its place there."""

    value: float
    what: str
    where: str


# Borgeaud et al. 2021, arXiv 2112.04426.
NOT_NOTED = "sizes of the indexes; the section was not noted"
PAPER = {
    "tokens": Figure(1792e9, "tokens of MassiveText, all of them the database", "table 4"),
    "keys": Figure(28e9, "chunks of 64 tokens, each with a key", "table 4"),
    "training tokens": Figure(600e9, "tokens of the database in training", "§2.1"),
    "evaluation tokens": Figure(1.75e12, "tokens of the database in evaluation", "§2.1"),
    "bytes": Figure(93e12, "bytes of the index of MassiveText", NOT_NOTED),
    "Wikipedia's tokens": Figure(4e9, "tokens of Wikipedia as a database", "table 4"),
    "Wikipedia's keys": Figure(0.06e9, "chunks of Wikipedia", "table 4"),
    "Wikipedia's bytes": Figure(215e9, "bytes of its index", NOT_NOTED),
    "kNN-LM's bytes": Figure(15e12, "bytes of an index of Wikipedia with a key for each token", NOT_NOTED),
    "query seconds": Figure(0.010, "to query the database of 2 trillion tokens, with SCaNN", "§2.3"),
}


# a plan


@dataclass(frozen=True)
class Plan:
    """A corpus with the settings that determine its bytes.

    tokens, documents   number of tokens, start and end included, and number of documents
    chunk_size          m
    dim                 d, the width of the vectors: 384 for MiniLM, 768 for bert-base
    knn                 k
    token_bytes         2 for a vocabulary of up to 65,536, else 4
    index               index factory string; None to use `choose_index`

    Raises ValueError for a number below 1, more documents than tokens, or ids of other than 2 or 4 bytes.
    """

    tokens: int
    documents: int = 1
    chunk_size: int = 64
    dim: int = 384
    knn: int = 2
    token_bytes: int = 2
    index: str | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "documents", "chunk_size", "dim", "knn"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is less than 1: pass a positive number")
        if self.documents > self.tokens:
            raise ValueError(f"{self.documents} documents of {self.tokens} tokens: each has one token at least")
        if self.token_bytes not in (2, 4):
            raise ValueError(f"token_bytes {self.token_bytes}: 2 for a vocabulary of up to 65,536, else 4")

    @cached_property
    def chunks(self) -> int:
        """⌈(L − 1) / m⌉ for one document of L tokens. Each further document leaves half a chunk empty, on average."""
        m = self.chunk_size
        whole = -(-int(self.tokens - self.documents) // m) + int((self.documents - 1) * (m - 1) / (2 * m))
        return max(int(self.documents), whole)

    @cached_property
    def spec(self) -> str:
        """The index factory string."""
        return self.index or choose_index(self.chunks, self.dim)

    @property
    def lists(self) -> int:
        """Number of inverted lists of the index; 0 if it is not an inverted file."""
        found = re.search(r"\bIVF(\d+)", self.spec)  # building half a million lists to count them takes long
        return int(found[1]) if found else 0

    # bytes

    @property
    def fits_int32(self) -> bool:
        """Whether int32 can number every chunk. This project's files hold int32; more chunks would need int64."""
        return self.chunks <= MOST_CHUNKS

    @cached_property
    def bytes(self) -> dict[str, int]:
        """Bytes of each file of a store, by file name, with ids as wide as necessary.

        Exact for the number of chunks, except for a compressing index (its tables: some kB, see `index_bytes`).
        Files that do not grow with the tokens alone are left out: the titles, the tokenizer, one id per sequence.
        """
        count, id_bytes = self.chunks, 4 if self.fits_int32 else 8
        rows = {
            "chunks.npy": (self.chunk_size + 1) * self.token_bytes,  # with the next token
            "chunks.spans.npy": 2 * 8,
            "chunks.bytes.npy": 4,
            "doc_ids.npy": 4 if self.documents <= MOST_CHUNKS else 8,
            "chunks.embedded.npy": 4 * self.dim,
            "chunks.knn.npy": id_bytes * self.knn,
        }
        return {name: HEADER + count * row for name, row in rows.items()} | {
            "knn.index": index_bytes(self.spec, count, self.dim)
        }

    # hours

    def embedding_hours(self, chunks_per_second: float | int, gpus: int = 1) -> float:
        """Hours to embed all chunks on `gpus` GPUs of this rate each, if they share the work without loss."""
        return self.chunks / (chunks_per_second * gpus) / 3600

    def comparisons(self, nprobe: int = PROBED) -> float:
        """Vectors compared with a query: all; with an inverted file, the lists' centres and those in `nprobe` lists."""
        return comparisons(self.chunks, self.lists, nprobe)

    def query_seconds(self, comparisons_per_second: float | int, nprobe: int = PROBED) -> float:
        """Seconds per query at this rate, with queries in batches."""
        return self.comparisons(nprobe) / comparisons_per_second

    def neighbour_hours(self, comparisons_per_second: float | int, nprobe: int = PROBED, machines: int = 1) -> float:
        """Hours to find the neighbours of all chunks; each machine has its own index and a share of the queries."""
        return self.chunks * self.query_seconds(comparisons_per_second, nprobe) / machines / 3600


def papers_plan(index: str | None = None) -> Plan:
    """The paper's database as this project would store it: keys of bert-base's width, ids of 4 bytes."""
    return Plan(int(PAPER["tokens"].value), dim=768, token_bytes=4, index=index)


# what was measured


def embedding_rates(folder: PathLike = RESULTS) -> dict[str, float]:
    """Chunks embedded per second on one processor, measured, by name: "embedding, GPU, MiniLM, bfloat16, NVIDIA …"."""
    rates = {}
    for name in ("embedding-cpu", "embedding-avx512-cpu", "embedding-gpu"):
        record = _results(name, "embedding", folder)
        for row in record["comparisons"]:
            rates[f"{row['what']}, {record['device']}"] = row["ours"]
    return rates


def embedding_rate(part: str, folder: PathLike = RESULTS) -> float:
    """The first of `embedding_rates` with `part` in its name, such as "GPU, bert-base".

    Raises:
        ValueError: no name has it.
    """
    rates = embedding_rates(folder)
    for name, rate in rates.items():
        if part in name:
            return rate
    raise ValueError(f"no rate was measured for {part!r}, but for: {'; '.join(rates)}. Say a part of one of these")


def recall_runs(folder: PathLike = RESULTS) -> list[dict[str, Any]]:
    """Measurements of each kind of index at a million vectors: bytes_per_vector, trials of effort and recall."""
    return _results("recall-cpu", "recall", folder)["runs"]


def search_rates(folder: PathLike = RESULTS) -> dict[str, float]:
    """Comparisons per second of Flat and of each inverted file, at the greatest effort measured.

    Measured on all cores of one machine, in batches: see `cpu` and `settings` in benchmarks/results/recall-cpu.json.
    """
    settings, rates = _results("recall-cpu", "recall", folder)["settings"], {}
    for run in recall_runs(folder):
        last, spec = run["trials"][-1], run["index"]
        if spec == "Flat" or "IVF" in spec:
            plan = Plan(settings["chunks"] * 64 + 1, dim=settings["width"], index=spec)
            rates[spec] = plan.comparisons(last["effort"] or 1) / (last["ms_per_query"] / 1000)
    return rates


def search_rate(spec: str, folder: PathLike = RESULTS) -> float:
    """Comparisons per second of the measured index that stores its vectors like `spec`.

    Raises:
        ValueError: no index of this kind was measured.
    """
    rates, kept = search_rates(folder), spec.rsplit(",", 1)[-1]
    for measured, rate in rates.items():
        if ("IVF" in measured) == ("IVF" in spec) and measured.rsplit(",", 1)[-1] == kept:
            return rate
    raise ValueError(f"no index like {spec!r} was measured, but {', '.join(rates)}: take one of these kinds")


def _results(name: str, benchmark: str, folder: PathLike) -> dict[str, Any]:
    path = Path(folder) / f"{name}.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is not there: measure with `python benchmarks/{benchmark}.py` in a checkout of the project "
            f"(a package that is installed alone has no results), or pass a rate of your own"
        )
    return json.loads(path.read_text(encoding="utf-8"))
