"""How fast workers build a store with Ray, and what memory each of them takes; the store must be one process's.

    python benchmarks/cluster.py                                      one and two workers, 10 minutes on two cores
    python benchmarks/cluster.py --workers 1 2 4 --documents 120      where there are the cores
    python benchmarks/cluster.py --documents 12 --max-chars 8000      a trial, which writes nothing

Every worker computes with one thread, as does the process that is compared with them. A rate counts from the result
by which each worker has had its first to the last: what Ray and each stage take to start is in `seconds`, of the
stage as a whole. The index is an inverted file; its rate is that of filling the shards, and its seconds are those of
training, filling, merging and tuning. A worker's memory is the most that was its own (USS), looked up ten times a
second; that of an idle one is Python with the libraries. Blocks and shards are smaller than in earnest, so that there
are some for each worker.
"""

import argparse
import hashlib
import os
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ["OMP_NUM_THREADS"] = "1"  # before torch and FAISS are imported, here and in the workers

import psutil
from measure import write_results

from retro_nb.common.manifest import read_manifest
from retro_nb.reference import chunks_to_index_and_embed, chunks_to_precalculated_knn_, documents_to_chunks_
from retro_nb.store import cluster, embedding
from retro_nb.store.cluster import _results, _Worker, build_store
from retro_nb.store.embedding import embedding_dim, get_bert
from retro_nb.store.index import BLOCK
from retro_nb.store.settings import StoreSettings
from retro_nb.text.speeches import speeches

SIZES = {"chunk_size": 64, "seq_len": 2048}
K, INDEX, SHARDS, TOGETHER = 2, "IVF64,Flat", 16, 256
STAGES = {"_chunk": "chunk", "_embed": "embed", "_index": "index", "_search": "search"}
WORKERS = {"_Idle": "idle", "_Chunk": "chunk", "_Embed": "embed", "_Fill": "index", "_Search": "search"}
ENOUGH = 5000  # chunks, below which a run is a trial


class _Idle(_Worker):
    """Has imported what a worker imports, and does nothing."""

    def open(self) -> None: ...

    def work(self, item: int) -> Iterator[int]:
        time.sleep(1)
        yield item


class Clock:
    """The seconds of each stage of a build, and when its results came."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.came: dict[str, list[float]] = defaultdict(list)

    def timed(self, stage: str, work: Callable) -> Callable:
        def run(*arguments: Any) -> Any:
            begun = time.perf_counter()
            done = work(*arguments)
            self.seconds[stage] = time.perf_counter() - begun
            return done

        return run

    def noted(self, worker: type, *arguments: Any, **options: Any) -> Iterator[Any]:
        for result in _results(worker, *arguments, **options):
            self.came[WORKERS[worker.__name__]].append(time.perf_counter())
            yield result

    def rate(self, stage: str, chunks: int, workers: int) -> float | None:
        """Chunks a second, once each worker has handed something in."""
        came = self.came[stage]
        if len(came) < 2 * workers:
            return None
        return chunks * (len(came) - workers) / len(came) / (came[-1] - came[workers - 1])


@contextmanager
def workers_memory() -> Iterator[dict[str, float]]:
    """MB that the largest worker of each stage has for itself."""
    peaks, done = defaultdict(float), threading.Event()

    def look() -> None:
        while not done.wait(0.1):
            for process in psutil.process_iter(["cmdline"]):
                title = " ".join(process.info["cmdline"] or ())
                for name, stage in WORKERS.items():
                    if title.startswith("ray::") and f"({name})" in title:
                        try:
                            peaks[stage] = max(peaks[stage], process.memory_full_info().uss / 1e6)
                        except psutil.Error:
                            pass  # it has ended

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peaks
    finally:
        done.set()
        thread.join()


def digests(folder: Path) -> dict[str, str]:
    """What the arrays of a store hold."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.npy"))}


def build_alone(documents: speeches, folder: Path) -> tuple[int, dict[str, float]]:
    """Build in this process; the number of chunks, and the seconds of each stage."""
    get_bert()  # loaded before anything is timed
    names = {f"{name}_memmap_path": folder / f"{name}.npy" for name in ("chunks", "seqs", "doc_ids")}
    begun = time.perf_counter()
    chunks = documents_to_chunks_(documents, **names, **SIZES, progress=False)["chunks"]
    cut = time.perf_counter()
    sizes = {"num_chunks": chunks, "chunk_size": SIZES["chunk_size"], "chunk_memmap_path": folder / "chunks.npy"}
    chunks_to_index_and_embed(**sizes, index=INDEX, progress=False)
    embedded = time.perf_counter()
    more = {"num_nearest_neighbors": K, "doc_ids_memmap_path": folder / "doc_ids.npy", "max_rows_per_file": TOGETHER}
    chunks_to_precalculated_knn_(**sizes, **more, index=INDEX, progress=False)
    index, found = (read_manifest(folder)[name]["stats"]["seconds"] for name in ("knn.index", "chunks.knn.npy"))
    return chunks, {"chunk": cut - begun, "embed": embedded - cut - index, "index": index, "search": found}


def build_with(documents: speeches, workers: int, chunks: int, folder: Path) -> list[dict[str, Any]]:
    """Build with so many workers, on a cluster of their own; a row for each stage."""
    clock, begun = Clock(), time.perf_counter()
    stages = {name: clock.timed(stage, getattr(cluster, name)) for name, stage in STAGES.items()}
    small = {"AT_A_TIME": TOGETHER, "SHARD": -(-chunks // SHARDS)}
    with (
        cluster.cluster(workers, progress=False),
        workers_memory() as memory,
        patch.multiple(cluster, **stages, **small, _results=clock.noted),
    ):
        print(f"{workers} workers: Ray has started in {time.perf_counter() - begun:.0f} s", flush=True)
        list(_results(_Idle, {}, [{"item": 1}], 1))
        settings = StoreSettings(**SIZES, knn=K, index=INDEX)
        build_store(documents, folder, settings, workers=workers, progress=False)
    rates = {stage: clock.rate(stage, chunks, workers) for stage in clock.seconds}
    return [
        {"workers": workers, "stage": stage, "chunks_per_second": rate, "seconds": clock.seconds[stage]}
        | {"worker_MB": memory[stage], "idle_MB": memory["idle"], "stated_MB": stated(small["SHARD"])[stage]}
        for stage, rate in rates.items()
    ]


def stated(shard: int) -> dict[str, float]:
    """MB beside an idle worker's that `retro_nb.store.cluster` says one of each stage takes, with these sizes."""
    vector = 4 * embedding_dim()
    sizes = {
        "chunk": 200e6,
        "embed": 400e6,
        "index": 2 * shard * (vector + 8) + min(shard, BLOCK) * vector,
        "search": BLOCK * vector,
    }
    return {stage: size / 1e6 for stage, size in sizes.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--documents", type=int, default=50, help="so many of the 249 speeches")
    parser.add_argument("--max-chars", type=int, help="only the opening of each")
    options = parser.parse_args()
    documents = speeches(options.documents, options.max_chars)
    embedding.ON_CPU = embedding.ON_CPU._replace(block=TOGETHER)
    with tempfile.TemporaryDirectory() as temporary:
        alone = Path(temporary, "alone")
        chunks, seconds = build_alone(documents, alone)
        settings = {"chunks": chunks, "documents": len(documents), "cores": os.cpu_count(), "k": K, "index": INDEX}
        settings |= {"together": TOGETHER, "shards": SHARDS}
        rates = {stage: None if stage == "index" else chunks / taken for stage, taken in seconds.items()}
        rows = [
            {"workers": 0, "stage": stage, "chunks_per_second": rate, "seconds": seconds[stage]}
            for stage, rate in rates.items()
        ]
        print(settings, *rows, sep="\n", flush=True)
        for workers in options.workers:
            folder = Path(temporary, str(workers))
            made = build_with(documents, workers, chunks, folder)
            print(*made, sep="\n", flush=True)
            rows += made
            differing = [name for name, digest in digests(alone).items() if digests(folder)[name] != digest]
            assert not differing, f"{workers} workers built other arrays than one process: {differing}"
            if chunks >= ENOUGH:
                equal = f"all {len(digests(folder))} arrays, to the last bit"
                write_results("cluster", [], settings, equal=equal, runs=rows)


if __name__ == "__main__":
    main()
