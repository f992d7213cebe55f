"""What becomes of the neighbours when the corpus grows: time, bytes, memory and recall of the kinds of index.

    python benchmarks/growth.py 10_000 100_000 1_000_000        writes benchmarks/results/growth-….json, row by row

Every index is built and searched in a process of its own, so that the peak of its memory is its own. The first
index of each size is the one that `choose_index` picks; it has to find 95 of 100 true neighbours.

The vectors are those of the speeches, as far as they reach (37,207). A larger corpus is made of *editions* of
them: a vector of an edition is a random combination Σ cᵢvᵢ, Σ cᵢ = 1, of a real vector and its AROUND nearest
ones of other documents. So it keeps the real clusters, the real documents and the real local directions. The
share of the vector itself is LIKENESS, the squares of the others' random parts add up to SPREAD. These two were
chosen so that four editions of a quarter of the speeches resemble all the speeches: in the distances to the 1st,
10th and 100th neighbour, and in the recall that an inverted file reaches with so many of its lists (a little
lower, so that nothing is made easier). Every run measures this again; it is `likeness` in the results.

`peak_MB` is the process with its libraries (`MB_before`), the index (while it grows up to a third more than
its file), and the training sample or one block of vectors, whichever is there at the time. Pages of the mapped
vectors come on top in `peak_MB_with_files`; the system takes them back when it needs them.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from measure import write_results
from neighbours import speeches_store
from tqdm.auto import tqdm

from retro_nb.common.arrays import WORK, ArrayWriter, open_array
from retro_nb.store.index import (
    BLOCK,
    build_index,
    choose_index,
    exact_search,
    recall,
    rows_of,
    search,
    usual_lists,
    write_index,
)
from retro_nb.store.knn import neighbours, own_ranges

K = 2
LIKENESS, SPREAD, AROUND = 0.5, 0.9, 20
ASKED = 2000  # chunks, evenly spaced, on which recall is measured
TIMED, REPEATS = 1000, 5  # successive chunks, which a build asks for together
HNSW_PER_CORE = 70_000  # vectors that a core adds to a graph in about ten minutes
TARGET = 0.95


# vectors


def editions(vectors: np.ndarray, doc_ids: np.ndarray, count: int, seed: int = 0) -> Iterator[np.ndarray]:
    """`count` vectors that are like these, in blocks: row i is made from row i modulo their number."""
    near = neighbours(build_index(vectors, "Flat"), vectors, doc_ids, AROUND)
    family = np.concatenate([np.arange(len(vectors))[:, None], near], axis=1)
    rng = np.random.default_rng(seed)
    for rows in tqdm(np.array_split(np.arange(count), -(-count // 4096)), desc="making vectors"):
        noise = rng.normal(size=(len(rows), AROUND))
        noise -= noise.mean(axis=1, keepdims=True)
        noise *= SPREAD**0.5 / np.linalg.norm(noise, axis=1, keepdims=True)
        shares = np.concatenate([np.full((len(rows), 1), LIKENESS), noise + (1 - LIKENESS) / AROUND], axis=1)
        yield np.einsum("bk,bkd->bd", shares.astype(np.float32), vectors[family[rows % len(vectors)]])


def owners(doc_ids: np.ndarray, count: int) -> np.ndarray:
    """The documents of `count` such vectors: each edition has its own."""
    rows = np.arange(count)
    return doc_ids[rows % len(doc_ids)] + rows // len(doc_ids) * (doc_ids[-1] + 1)


def write_vectors(vectors: np.ndarray, doc_ids: np.ndarray, count: int, folder: Path) -> None:
    """`count` vectors and their documents: the first of the real ones, or editions of all of them."""
    np.save(folder / "doc_ids.npy", owners(doc_ids, count))
    with ArrayWriter(folder / "vectors.npy", np.float32, (vectors.shape[1],)) as file:
        for block in [vectors[:count]] if count <= len(vectors) else editions(vectors, doc_ids, count):
            file.append(block)


def likeness(vectors: np.ndarray, doc_ids: np.ndarray) -> dict[str, dict]:
    """What all vectors, and four editions of a quarter of the documents, have in common."""
    quarter = doc_ids % 4 == 0
    count, asked = 4 * int(quarter.sum()), np.arange(0, len(vectors), 37)
    made = np.concatenate(list(editions(vectors[quarter], doc_ids[quarter], count)))
    pairs = {"real": (vectors, doc_ids), "made": (made, owners(doc_ids[quarter], count))}
    found = {}
    for name, (those, documents) in pairs.items():
        rows = asked[asked < len(those)]
        own = own_ranges(documents, rows)
        distances, truth = exact_search(those, those[rows], 100, own=own)
        found[name] = {f"distance to neighbour {n}": float(np.median(distances[:, n - 1])) for n in (1, 10, 100)}
        index = build_index(those, "IVF512,Flat")
        for index.nprobe in (1, 4, 16, 32, 64):
            _, ids = search(index, those[rows], K, own=own)
            found[name][f"recall@{K}, {index.nprobe} of 512 lists"] = recall(those, those[rows], ids, truth[:, :K])
    return found


# one index, in a process of its own


def megabytes(field: str) -> float:
    """Memory of this process: `VmHWM`, the most that was resident, or `RssAnon`, what is no page of a file now.

    Only Linux tells the two apart. (There getrusage would count the parent's memory before the start as well.)
    """
    if sys.platform == "linux":
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(fields[field].split()[0]) * 1024 / 1e6
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 1e6 if sys.platform == "darwin" else most * 1024 / 1e6


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """MB of memory that is no page of a file, looked up 50 times a second."""
    seen, done = [megabytes("RssAnon")], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            seen.append(megabytes("RssAnon"))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()
        seen.append(megabytes("RssAnon"))


def measure(spec: str, folder: Path) -> dict:
    """Build, write and search one index; how long, how large, how good."""
    vectors, doc_ids, truth = (open_array(folder / f"{name}.npy") for name in ("vectors", "doc_ids", "truth"))
    start = time.perf_counter()
    with peak_memory() as memory:
        index = build_index(vectors, spec)
    build_seconds, resident = time.perf_counter() - start, megabytes("VmHWM")
    write_index(index, folder / "index")
    size = (folder / "index").stat().st_size
    (folder / "index").unlink()

    asked, timed = sample(len(vectors)), np.arange(TIMED) + (len(vectors) - TIMED) // 2
    _, found = search(index, rows_of(vectors, asked), K, own=own_ranges(doc_ids, asked))
    queries, own, seconds = rows_of(vectors, timed), own_ranges(doc_ids, timed), []
    for _ in range(REPEATS):
        start = time.perf_counter()
        search(index, queries, K, own=own)
        seconds.append(time.perf_counter() - start)
    return {
        "build_seconds": build_seconds,
        "index_MB": size / 1e6,
        "search_seconds_per_1000": statistics.median(seconds) * 1000 / TIMED,
        f"recall@{K}": recall(vectors, rows_of(vectors, asked), found, truth),
        "peak_MB": max(memory),
        "MB_before": memory[0],
        "peak_MB_with_files": resident,
        "effort": getattr(index, "nprobe", None) or getattr(getattr(index, "hnsw", None), "efSearch", None),
    }


def sample(count: int) -> np.ndarray:
    return np.linspace(0, count - 1, min(ASKED, count)).astype(np.int64)


# all of them


def specs(count: int, dim: int) -> list[str]:
    """The chosen index first, then the others that can be built in reasonable time."""
    lists = usual_lists(count)
    others = ["Flat", f"IVF{lists},Flat", f"IVF{lists},SQ8", f"IVF{lists},PQ{dim // 4}"]
    if count <= HNSW_PER_CORE * (os.cpu_count() or 1):
        others.append("HNSW32")
    return list(dict.fromkeys([choose_index(count, dim), *others]))


def grow(count: int, vectors: np.ndarray, doc_ids: np.ndarray) -> Iterator[dict]:
    """Measure every kind of index at one size, each in a process of its own."""
    with tempfile.TemporaryDirectory(dir=WORK) as temporary:
        folder = Path(temporary)
        write_vectors(vectors, doc_ids, count, folder)
        larger, asked = open_array(folder / "vectors.npy"), sample(count)
        own = own_ranges(open_array(folder / "doc_ids.npy"), asked)
        np.save(folder / "truth.npy", exact_search(larger, rows_of(larger, asked), K, own=own)[1])
        for number, spec in enumerate(specs(count, larger.shape[1])):
            command = [sys.executable, __file__, "--measure", spec, temporary]
            printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            yield {"chunks": count, "index": spec, "chosen": not number, **json.loads(printed)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", type=int, nargs="*", default=[10_000, 100_000], help="numbers of chunks")
    parser.add_argument("--measure", nargs=2, metavar=("INDEX", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return print(json.dumps(measure(options.measure[0], Path(options.measure[1]))))
    vectors, doc_ids = speeches_store()
    settings = {"k": K, "width": vectors.shape[1], "block": BLOCK, "asked": ASKED, "cores": os.cpu_count()}
    settings |= {"likeness": LIKENESS, "spread": SPREAD, "around": AROUND}
    alike, runs = likeness(vectors, doc_ids), []
    print(json.dumps(alike, indent=2), flush=True)
    for count in options.sizes:
        for run in grow(count, vectors, doc_ids):
            runs.append(run)
            print({name: round(value, 3) if isinstance(value, float) else value for name, value in run.items()})
            write_results("growth", [], settings, likeness=alike, runs=runs)
    for run in runs:
        assert not run["chosen"] or run[f"recall@{K}"] >= TARGET, run


if __name__ == "__main__":
    main()
