"""What an index finds for the bytes it takes, measured on a million real vectors: the curve of notebook 11.

    python benchmarks/recall.py                              a million chunks; minutes with a GPU and 16 cores
    python benchmarks/recall.py --chunks 5000 --out /tmp/recall.json          a trial for two cores

The text is Python source, of which every machine has plenty: the .py files beside the libraries installed here, equal
ones once, in an order drawn with seed 0. It is chunked, embedded with a BERT, and indexed in every way of SPECS. The
chunks asked for are evenly spaced; as in a build, the other chunks of their own file do not count. The truth is exact
search under the same exclusion, k = 10; equally near is near enough, since sources repeat themselves.

All inverted files share one set of lists, trained once and filled once (`lists` in the results), so that they differ
in how they keep the vectors alone. `train_seconds` and `add_seconds` of each come on top. What is rotated first (OPQ)
has lists of its own, and a rotation learnt in 10 rounds, since FAISS's 50 take many minutes. `ms_per_query` is that of
a batch of 1000 queries on all cores, without an exclusion.

Results are written after every index. Those that are there already, of the same vectors, are not measured again.
"""

import argparse
import hashlib
import json
import os
import statistics
import sysconfig
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import faiss
import numpy as np
from growth import peak_memory
from measure import RESULTS, cpu_name, where

from retro_nb.common.arrays import WORK, ArrayWriter, open_array, to_jsonable, write_json
from retro_nb.common.digests import digest
from retro_nb.reference import chunks_to_embeddings_, documents_to_chunks_
from retro_nb.store.embedding import bert_fingerprint
from retro_nb.store.index import BLOCK, exact_search, innermost, recall, rows_of, search, usual_lists
from retro_nb.store.knn import own_ranges
from retro_nb.text.document import Document
from retro_nb.text.tokens import get_tokenizer

K, M = 10, 64  # neighbours, tokens of a chunk
ASKED, TIMED, REPEATS = 2000, 1000, 3
LARGEST = 2**20  # bytes of a file: a larger one is data that somebody wrote as Python
BYTES_PER_CHUNK = 270  # of Python source, on the safe side
PARTS = 16  # chunked apart from one another, so that every core has something to do
TRAINING_POINTS_PER_LIST, OPQ_ROUNDS = 64, 10
NPROBES = (1, 4, 16, 64, 256)
EF_SEARCH = (16, 32, 64, 128, 256, 512)
# L stands for the number of lists. What takes long to build comes late.
SPECS = """Flat IVF{L},Flat IVF{L},SQ8 IVF{L},SQ4 IVF{L},RaBitQ IVF{L},PQ96 IVF{L},PQ48 HNSW32 IVF{L},PQ192 IVF{L},PQ24
OPQ48,IVF{L},PQ48""".split()


# text


class sources:
    """Some Python files as a corpus, in the order given; what cannot be decoded is counted."""

    def __init__(self, folder: Path, paths: list[str]) -> None:
        self.folder, self.paths = folder, paths

    def __iter__(self) -> Iterator[Document]:
        for path in self.paths:
            data = (self.folder / path).read_bytes()
            text = data.decode("utf-8", errors="replace")
            yield Document(text, path, path, replaced=text.count("\ufffd") - data.count("\ufffd".encode()))

    def fingerprint(self) -> dict:
        files = [[path, (self.folder / path).stat().st_size] for path in self.paths]
        return {"corpus": "sources", "files": digest(files)}


def python_files(folder: Path, wanted: int) -> tuple[list[str], dict]:
    """Different .py files with so many bytes together, drawn with seed 0, and what was passed over."""
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py") if path.is_file())
    paths = [path for path in paths if not any(ord(letter) > 0xD7FF for letter in path)]  # names that are no UTF-8
    np.random.default_rng(0).shuffle(paths)
    seen, taken, counts = set(), [], {"bytes": 0, "equal": 0, "too_large": 0}
    for path in paths:
        if counts["bytes"] >= wanted:
            break
        data = (folder / path).read_bytes()
        content = hashlib.sha256(data).digest()
        if len(data) > LARGEST or content in seen:
            counts["too_large" if len(data) > LARGEST else "equal"] += 1
            continue
        seen.add(content)
        taken.append(path)
        counts["bytes"] += len(data)
    return taken, counts | {"files": len(taken)}


def chunk_part(folder: Path, paths: list[str], to: Path, bert: str | None) -> dict:
    files = {f"{name}_memmap_path": to / f"{name}.npy" for name in ("chunks", "seqs", "doc_ids")}
    corpus, tokenizer = sources(folder, paths), get_tokenizer(bert)
    return documents_to_chunks_(corpus, **files, chunk_size=M, seq_len=M, tokenizer=tokenizer, progress=False)


def chunk(folder: Path, count: int, to: Path, bert: str | None) -> dict:
    """`count` chunks of the files in `folder`, with their documents, into `to`."""
    paths, about = python_files(folder, count * BYTES_PER_CHUNK)
    parts = [paths[i::PARTS] for i in range(min(PARTS, len(paths)))]
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process for each core is parallel enough
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(chunk_part, folder, part, to / f"{i}", bert) for i, part in enumerate(parts)]
        stats = [job.result() for job in jobs]
    there = sum(each["chunks"] for each in stats)
    if there < count:
        raise SystemExit(f"{folder} has {there} chunks: pass --chunks {there} or fewer, or another --folder")
    with (
        ArrayWriter(to / "chunks.npy", np.uint16, (M + 1,)) as chunks,
        ArrayWriter(to / "doc_ids.npy", np.int32) as doc_ids,
    ):
        documents = 0
        for i, each in enumerate(stats):
            rows = min(each["chunks"], count - chunks.rows)
            chunks.append(open_array(to / f"{i}" / "chunks.npy")[:rows])
            doc_ids.append(open_array(to / f"{i}" / "doc_ids.npy")[:rows] + documents)
            documents += each["docs"]
    about |= {"undecodable": sum(each["replaced_characters"] for each in stats)}
    return about | {"documents": int(open_array(to / "doc_ids.npy")[-1]) + 1}


# vectors


def in_threads(find, queries: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """find(queries, own), in as many threads as there are cores: queries of different documents are searched apart."""
    parts = np.array_split(np.arange(len(queries)), min(len(queries), 4 * (os.cpu_count() or 1)))
    with ThreadPoolExecutor(os.cpu_count(), initializer=lambda: faiss.omp_set_num_threads(1)) as pool:
        found = list(pool.map(lambda rows: find(queries[rows], own[rows]), parts))
    return tuple(np.concatenate(each) for each in zip(*found, strict=True))


def training_sample(vectors: np.ndarray, lists: int) -> np.ndarray:
    wanted = max(TRAINING_POINTS_PER_LIST * lists, 65536)
    return rows_of(vectors, np.linspace(0, len(vectors) - 1, min(wanted, len(vectors))).astype(np.int64))


def make_lists(vectors: np.ndarray, lists: int) -> tuple[np.ndarray, np.ndarray, dict]:
    """The centroids of an inverted file, the list that each vector belongs to, and the seconds that both took."""
    started = time.perf_counter()
    index = faiss.index_factory(vectors.shape[1], f"IVF{lists},Flat")
    index.train(training_sample(vectors, lists))
    trained = time.perf_counter()
    starts = range(0, len(vectors), BLOCK)
    near = [index.quantizer.search(rows_of(vectors, slice(i, i + BLOCK)), 1)[1][:, 0] for i in starts]
    centroids = index.quantizer.reconstruct_n(0, lists)
    seconds = {"train_seconds": trained - started, "assign_seconds": time.perf_counter() - trained}
    return centroids, np.concatenate(near), seconds


# one index


def build(spec: str, vectors: np.ndarray, centroids: np.ndarray, members: np.ndarray) -> tuple[faiss.Index, dict]:
    """An index, and the seconds that it took to train and to fill."""
    index, started = faiss.index_factory(vectors.shape[1], spec, faiss.METRIC_L2), time.perf_counter()
    inner, shared = innermost(index), spec.startswith("IVF")
    if hasattr(inner, "do_polysemous_training"):
        inner.do_polysemous_training = False  # as build_index does
    if shared:
        inner.quantizer.add(centroids)
    elif spec.startswith("OPQ"):
        faiss.downcast_VectorTransform(index.chain.at(0)).niter = OPQ_ROUNDS
    if not index.is_trained:
        index.train(training_sample(vectors, len(centroids)))
    trained = time.perf_counter()
    for start in range(0, len(vectors), BLOCK):
        block = rows_of(vectors, slice(start, start + BLOCK))
        if shared:
            where_to = np.ascontiguousarray(members[start : start + BLOCK])
            inner.add_core(len(block), faiss.swig_ptr(block), None, faiss.swig_ptr(where_to))
        else:
            index.add(block)
    return index, {"train_seconds": trained - started, "add_seconds": time.perf_counter() - trained}


def efforts(index: faiss.Index) -> Iterator[int | None]:
    """Set the effort of a search to one value after another."""
    inner = innermost(index)
    if isinstance(inner, faiss.IndexIVF):
        for inner.nprobe in (each for each in NPROBES if each <= inner.nlist):
            yield inner.nprobe
    elif isinstance(inner, faiss.IndexHNSW):
        for inner.hnsw.efSearch in EF_SEARCH:
            yield inner.hnsw.efSearch
    else:
        yield None


def try_out(index: faiss.Index, vectors: np.ndarray, asked: np.ndarray, own: np.ndarray, truth: np.ndarray) -> dict:
    """Recall and time, at the index's present effort."""
    queries = rows_of(vectors, asked)
    _, found = in_threads(lambda rows, own: search(index, rows, K, own=own), queries, own)
    batch, seconds = queries[:: -(-len(queries) // TIMED)], []
    for _ in range(REPEATS):
        started = time.perf_counter()
        index.search(batch, K)
        seconds.append(time.perf_counter() - started)
    return {
        f"recall@{K}": recall(vectors, queries, found, truth),
        "ms_per_query": 1000 * statistics.median(seconds) / len(batch),
    }


def measure(spec: str, folder: Path, vectors: np.ndarray, lists: tuple, asked: tuple) -> dict:
    """Build, write and search one index."""
    with peak_memory() as memory:
        index, seconds = build(spec, vectors, *lists)
        faiss.write_index(index, str(folder / "index"))
        size = (folder / "index").stat().st_size
        (folder / "index").unlink()
        trials = [{"effort": effort, **try_out(index, vectors, *asked)} for effort in efforts(index)]
    about = {"index": spec, "bytes": size, "bytes_per_vector": size / len(vectors), **seconds}
    return about | {"peak_MB": max(memory) - memory[0], "trials": trials}


# all of them


def prepare(options: argparse.Namespace, folder: Path, record: dict) -> tuple[np.ndarray, np.ndarray]:
    """The vectors and their documents; what they are and how long they took goes into the record."""
    started = time.perf_counter()
    record["text"] = chunk(options.folder, options.chunks, folder, options.bert)
    chunked = time.perf_counter()
    stats = chunks_to_embeddings_(
        num_chunks=options.chunks,
        chunks_memmap_path=folder / "chunks.npy",
        embeddings_memmap_path=folder / "chunks.embedded.npy",
        chunk_size=M,
        bert=options.bert,
    )
    seconds = {"chunk": chunked - started, "embed": time.perf_counter() - chunked}
    record["seconds"], record["embedded_in"] = seconds, stats["dtype"]
    print(f"{options.chunks} chunks: {json.dumps(record['text'])}, seconds {json.dumps(seconds)}", flush=True)
    return open_array(folder / "chunks.embedded.npy"), np.array(open_array(folder / "doc_ids.npy"))


def find_truth(vectors: np.ndarray, doc_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict]:
    """Which chunks are asked for, their documents' ranges, their true neighbours, and how near these are."""
    asked = np.linspace(0, len(vectors) - 1, min(ASKED, len(vectors))).astype(np.int64)
    own, started = own_ranges(doc_ids, asked), time.perf_counter()
    distances, truth = in_threads(
        lambda queries, own: exact_search(vectors, queries, K, own=own), rows_of(vectors, asked), own
    )
    norms = (rows_of(vectors, asked) ** 2).sum(axis=1)
    about = {
        "seconds": time.perf_counter() - started,
        "share with an equal chunk elsewhere": float((distances[:, 0] <= 1e-4 * norms).mean()),
        "median squared distance to neighbours 1 and 10": np.median(distances[:, [0, -1]], axis=0).tolist(),
        "median squared norm": float(np.median(norms)),
    }
    print(json.dumps(about), flush=True)
    return asked, own, truth, about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=1_000_000)
    parser.add_argument("--lists", type=int, help="of the inverted files; 4·√chunks, as a power of two, if left out")
    parser.add_argument("--specs", nargs="*", default=SPECS, help="index-factory strings, {L} for the number of lists")
    parser.add_argument("--folder", type=Path, default=Path(sysconfig.get_paths()["purelib"]), help="with .py files")
    parser.add_argument("--bert", help="a folder or a name; the default BERT if left out")
    parser.add_argument("--minutes", type=float, default=8, help="no index is begun later than that")
    parser.add_argument("--out", type=Path, default=RESULTS / "recall-cpu.json", help="the results file")
    options, begun = parser.parse_args(), time.perf_counter()
    lists = options.lists or usual_lists(options.chunks)
    folder = WORK / f"recall-{options.chunks}"
    folder.mkdir(parents=True, exist_ok=True)

    command = f"python benchmarks/recall.py --chunks {options.chunks} --lists {lists}"  # paths here mean nothing there
    record = {"command": command, **where(), "cpu": cpu_name()}
    vectors, doc_ids = prepare(options, folder, record)
    settings = {"chunks": options.chunks, "width": vectors.shape[1], "lists": lists, "k": K, "asked": ASKED}
    settings |= {"timed": TIMED, "bert": bert_fingerprint(options.bert), "text": digest(record["text"])}
    settings |= {"efforts": {"nprobe": NPROBES, "efSearch": EF_SEARCH}, "cores": os.cpu_count()}
    *asked, truth = find_truth(vectors, doc_ids)
    centroids, members, seconds = make_lists(vectors, lists)
    print(f"{lists} lists: {json.dumps(seconds)}", flush=True)
    record |= {"settings": to_jsonable(settings), "truth": truth, "lists": seconds, "runs": []}
    if options.out.exists():  # go on: what was chunked and embedded then took longer than to find it again
        before = json.loads(options.out.read_text(encoding="utf-8"))
        record = before if before["settings"] == record["settings"] else record
    for spec in (each.replace("{L}", str(lists)) for each in options.specs):
        if spec in [run["index"] for run in record["runs"]]:
            continue
        if time.perf_counter() - begun > 60 * options.minutes:
            print(f"{spec}: left out, since {options.minutes:g} minutes are over")
            continue
        run = measure(spec, folder, vectors, (centroids, members), asked)
        record["runs"].append(run)
        write_json(options.out, record)
        print(json.dumps({name: value for name, value in run.items() if name != "trials"}))
        print("   ", *(f"{t['effort']}: {t[f'recall@{K}']:.4f} {t['ms_per_query']:.3f} ms" for t in run["trials"]))
        print(f"    {time.perf_counter() - begun:.0f} s since the start", flush=True)


if __name__ == "__main__":
    main()
