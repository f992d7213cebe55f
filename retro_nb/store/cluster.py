"""Build a store with Ray workers on one machine or several; the result is the same as one process's (notebook 11).

    chunk    workers read parts of the corpus and cut their documents; the results arrive in order
    embed    each worker has its own BERT and takes one block of chunks after another
    index    an inverted file is trained on a sample, workers fill shards of it, and the shards are merged on disk;
             an index of another kind is filled by this process
    search   workers memory-map the index and the vectors, and take blocks of chunks

Ray Data distributes the work, holds workers back while the writer is busy, restarts workers that die and repeats their
tasks. Only this process writes the store's arrays, a block at a time. A worker's death therefore costs its current
block (beyond TASKS blocks, a few). A stop of the whole build costs the blocks in progress, and the same call resumes
it. Only chunking starts again from the first document, as in one process.

Every machine must see the work folder under the same path (a shared file system), and have this package installed.
The corpus is divided if it has `split`, and read on the workers' machines. Results are equal to the last bit only on
the same kind of processor.

Memory of a worker, measured by `python benchmarks/cluster.py`. Not counted are Python with its libraries (0.3 to
0.5 GB of private memory, depending on the build of PyTorch) and mapped files, which the operating system caches while
memory is free:

    chunk    800,000 characters with their tokens and a few HANDFULs of results (0.2 GB), and the longest document
    embed    the BERT with its runtime, and a block of chunks with its vectors (0.4 GB for the default)
    index    the centroids, SHARD vectors with their ids, twice while they grow (0.8 GB for 384 dimensions), BLOCK more
    search   the lists' centroids, or the whole index if it is not an inverted file; BLOCK vectors (0.1 GB)

Finished results wait for the writer in Ray's object store. A cluster started here gives it STORE bytes per worker and
twice STORE for Ray itself; when it is full, workers wait.
"""

import logging
import os
import pickle
import shutil
import socket
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np
import torch
from tokenizers import Tokenizer

from retro_nb.common.arrays import PathLike, ResumableRows, inside, open_array, read_note, to_jsonable, write_json
from retro_nb.common.extras import extra
from retro_nb.store.chunking import ChunkedDocument, chunk_document, read_documents, store_tokenizer, write_chunks
from retro_nb.store.embedding import begin_block, check_bert, check_vectors, embedding_dim, sizes_on, write_vectors
from retro_nb.store.files import Files
from retro_nb.store.index import (
    BLOCK,
    Vectors,
    empty_index,
    merge_on_disk,
    read_index,
    rows_of,
    train_index,
    write_index,
)
from retro_nb.store.knn import (
    AT_A_TIME,
    choose_spec,
    document_ranges,
    index_settings,
    index_vectors,
    neighbours,
    write_neighbours,
)
from retro_nb.store.settings import StoreSettings
from retro_nb.store.splits import document_numbers
from retro_nb.store.store import choose_tokenizer
from retro_nb.text.document import Corpus
from retro_nb.text.tokens import SpecialIds, TextTokenizer

PIECES = 32  # parts of the corpus per worker: parts finished before their turn wait in Ray's object store
HANDFUL = 4_000_000  # bytes of results returned at a time
STORE = 2**27  # bytes of Ray's object store per worker, and twice as much for Ray itself
SHARD = 2**18  # vectors in a shard of the index
TASKS = 4096  # most tasks that Ray has to track; with more blocks, some share one
TRAINED = "trained.index"
ATTEMPTS = 5  # to start Ray
PATIENCE = 5  # seconds to wait for a cluster's answer


# the cluster


@contextmanager
def cluster(workers: int, address: str | None = None, *, progress: bool = True) -> Iterator[None]:
    """Join a running Ray cluster, or start one on this machine for the duration of the `with` block.

    Whoever reaches a Ray cluster may run code on it. One that is started here listens on 127.0.0.1 alone; one of
    several machines (`ray start`) must be in a network that only trusted machines reach.

    Args:
        workers: number of concurrent workers.
        address: address of a running cluster ("auto", "10.0.0.1:6379"); None to start one. A cluster that this
            process has already joined is used as it is.
        progress: show Ray's own progress and messages.

    Raises:
        ModuleNotFoundError: Ray is not installed.
        ConnectionError: no cluster answers at this address.
        ValueError: `workers` is less than 1, or more than the cluster has CPUs.
    """
    if workers < 1:
        raise ValueError(f"workers {workers}: pass 1 or more")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with extra("scale"):
        import ray.data
    joined = ray.is_initialized()
    if not joined:
        level = logging.INFO if progress else logging.ERROR
        _start(address, log_to_driver=progress, logging_level=level, **({} if address else _sizes(workers)))
    try:
        cpus = int(ray.cluster_resources().get("CPU", 0))
        if workers > cpus:  # the build would wait for workers without one
            raise ValueError(f"{workers} workers, but the cluster has {cpus} CPUs: ask for no more, or add machines")
        ray.data.DataContext.get_current().enable_progress_bars = progress
        logging.getLogger("ray.data").setLevel(logging.INFO if progress else logging.ERROR)
        yield
    finally:
        if not joined:
            ray.shutdown()


def _sizes(workers: int) -> dict[str, Any]:
    """Resources of a cluster started here: more CPUs than workers, for Ray's own tasks, and little memory.

    By default Ray would take a third of the machine's memory for its object store.
    """
    cpus = max(os.cpu_count() or 1, workers + 2)
    return {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": (workers + 2) * STORE}


def _start(address: str | None, **options: Any) -> None:
    """Call `ray.init`, with retries: on a busy machine one of Ray's processes may take longer than Ray waits."""
    import ray

    host, _, port = (address or "").rpartition(":")
    if host and port.isdecimal():  # Ray itself would retry for many minutes
        try:
            socket.create_connection((host.rpartition("/")[2], int(port)), timeout=PATIENCE).close()
        except OSError as error:
            raise ConnectionError(f"no Ray cluster at {address} ({error}): {MEND}") from error
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with nullcontext() if address else _on_loopback():
                ray.init(address or "local", **options)
            return
        except Exception as error:  # Ray raises no specific type; it waits 15 s (Ray issue 65983)
            ray.shutdown()
            if address:
                raise ConnectionError(f"no Ray cluster at {address} ({error}): {MEND}") from error
            if "timed out during startup" not in str(error) or attempt == ATTEMPTS:
                raise ConnectionError(f"Ray cannot be started here: {error}") from error


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Let Ray listen on 127.0.0.1 alone, as it does by itself on macOS and Windows: whoever reaches a port of Ray's may
    run code here. Warn if this version of Ray listens on every interface all the same.
    """
    import ray
    from ray._private import ray_constants

    name, switch = "ENABLE_RAY_CLUSTER", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
    before, variable = getattr(ray_constants, name, None), os.environ.get(switch)
    os.environ[switch] = "0"  # for Ray's processes
    setattr(ray_constants, name, False)
    try:
        yield
    finally:
        setattr(ray_constants, name, before)
        os.environ.pop(switch)
        os.environ |= {} if variable is None else {switch: variable}
    if (host := ray.util.get_node_ip_address()) != "127.0.0.1":
        warnings.warn(f"Ray listens on {host}: whoever reaches this machine may run code here meanwhile", stacklevel=5)


MEND = "`ray start --head` starts one and says its address; without an address, it is started here"


def _results(
    worker: "type[_Worker]", arguments: dict, items: list[dict], workers: int, *, in_order: bool = False
) -> Iterator[Any]:
    """Yield the workers' results for the items, as they arrive or in order.

    Raises:
        ChildProcessError: Ray gives up, as it does after half an hour without progress.
    """
    import ray.data

    if not items:
        return
    context, workers = ray.data.DataContext.get_current(), min(workers, len(items))
    context.execution_options.preserve_order = in_order
    context.target_max_block_size = HANDFUL  # else Ray gathers 128 MB of a worker's results before it passes them on
    gpus = _gpu_share(workers, ray.cluster_resources().get("GPU", 0)) if issubclass(worker, _Embed) else 0
    made = ray.data.from_items(items, override_num_blocks=min(len(items), TASKS)).map_batches(
        worker,
        fn_constructor_kwargs={"where": os.getcwd(), "arguments": arguments},
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=1,
        num_gpus=gpus,
    )  # workers that die are restarted without limit: Ray's default for such a pool
    try:
        for batch in made.iter_batches(batch_size=None, prefetch_batches=1):
            for data in batch["data"]:
                result = pickle.loads(data)
                if isinstance(result, _Failure):
                    raise result.error from RuntimeError(f"in a worker:\n{result.trace}")
                yield result
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ChildProcessError(f"Ray gave up ({reason}). What was finished is kept: run it again") from error


def _gpu_share(workers: int, gpus: int | float) -> int | float:
    """Share of a GPU per worker, so that no worker has to wait for one; 0 without GPUs."""
    return 1 / -(-workers // int(gpus)) if gpus >= 1 else 0


# the workers


class _Failure(NamedTuple):
    """An error in a worker, with its traceback."""

    error: Exception
    trace: str


class _Worker:
    """Base of the workers, which Ray creates in other processes and calls with one item at a time.

    `open` receives the arguments before the first item; `work` receives an item and yields results. Errors are returned
    as results: Ray would report a constructor's error without its cause, and reword others.
    """

    def __init__(self, where: str, arguments: dict) -> None:
        self.where, self.arguments, self.opened = where, arguments, False

    open: Callable[..., None]
    work: Callable[..., Iterator[Any]]

    def __call__(self, items: dict) -> Iterator[dict]:
        try:
            if not self.opened:
                with suppress(OSError):  # a machine without this folder can still do work that needs no path in it
                    os.chdir(self.where)
                self.open(**self.arguments)
                self.opened = True
            for result in self.work(**{name: int(column[0]) for name, column in items.items()}):
                yield {"data": [pickle.dumps(result)]}
        except Exception as error:
            yield {"data": [pickle.dumps(_Failure(error, traceback.format_exc()))]}


class _Chunk(_Worker):
    """Reads parts of a corpus and cuts their documents."""

    def open(self, parts: list[Corpus], chunk_size: int, rules: str, ids: tuple[int, int, int]) -> None:
        self.parts, self.chunk_size = parts, chunk_size
        self.tokenizer = TextTokenizer(Tokenizer.from_str(rules), SpecialIds(*ids))

    def work(self, part: int) -> Iterator[list[ChunkedDocument]]:
        handful, size = [], 0
        for document in self.parts[part]:
            chunked = chunk_document(document, self.chunk_size, self.tokenizer)
            handful.append(chunked)
            size += sum(array.nbytes for array in (chunked.rows, chunked.spans, chunked.bytes)) + 500
            if size > HANDFUL:
                yield handful
                handful, size = [], 0
        yield handful


Block = tuple[int, int, np.ndarray]  # start and stop of the rows, and their values


class _Embed(_Worker):
    """Embeds blocks of a chunk array."""

    def open(self, chunks_path: Path, bert: PathLike | None, use_cls_repr: bool) -> None:
        self.chunks, self.path = open_array(chunks_path), chunks_path
        tokenizer = store_tokenizer(chunks_path, bert)
        self.embed = partial(begin_block, tokenizer=tokenizer, use_cls_repr=use_cls_repr, bert=bert)

    def work(self, start: int, stop: int) -> Iterator[Block]:
        vectors = self.embed(self.chunks[start:stop, :-1])()
        check_vectors(vectors, start, self.path)
        yield start, stop, vectors


class _Fill(_Worker):
    """Fills shards of an inverted file."""

    def open(self, folder: Path, vectors_path: Path) -> None:
        self.folder, self.vectors = folder, open_array(vectors_path)

    def work(self, start: int, stop: int) -> Iterator[Path]:
        index = read_index(self.folder / TRAINED)
        for first in range(start, stop, BLOCK):
            rows = np.arange(first, min(first + BLOCK, stop))
            index.add_with_ids(rows_of(self.vectors, rows), rows)
        write_index(index, _shard(self.folder, start))
        yield _shard(self.folder, start)


def _shard(folder: Path, start: int) -> Path:
    """File of the shard that begins with the vector `start`."""
    return folder / f"{start}.index"


class _Search(_Worker):
    """Finds the neighbours of blocks of chunks."""

    def open(self, index_path: Path, vectors_path: Path, doc_ids_path: Path, k: int, options: dict[str, Any]) -> None:
        self.vectors, self.doc_ids = open_array(vectors_path), open_array(doc_ids_path)
        self.find = partial(neighbours, read_index(index_path, mapped=True), self.vectors, self.doc_ids, k, **options)

    def work(self, start: int, stop: int) -> Iterator[Block]:
        yield start, stop, self.find(rows=range(start, stop)).astype(np.int32)


# the store


def build_store(
    documents: Corpus,
    folder: PathLike,
    settings: StoreSettings,
    *,
    workers: int = 2,
    address: str | None = None,
    progress: bool = True,
) -> None:
    """Build chunks, vectors, index and neighbours, which `Store.build` with the same settings then reuses.

    Args:
        documents: the corpus.
        folder: the store's folder, which all machines must see.
        settings: see `StoreSettings`.
        workers: number of concurrent workers; on GPUs, the number that embed at once.
        address: address of a running cluster; None to start one on this machine.
        progress: show Ray's progress.

    Raises:
        ModuleNotFoundError, ConnectionError, ValueError: there is no such cluster (see `cluster`).
        ChildProcessError: Ray gives up, as it does after half an hour without progress.
        Errors of a build in one process.
    """
    files = Files.of(Path(folder).resolve())
    check_bert(settings.bert)
    if settings.index:
        empty_index(settings.index, embedding_dim(settings.bert))
    tokenizer = choose_tokenizer(settings, documents, folder, progress)
    with cluster(workers, address, progress=progress):
        _chunk(documents, files, replace(settings, tokenizer=tokenizer), workers)
        _embed(files, settings, workers)
        _index(files, settings, workers)
        _search(
            files, settings, document_numbers(settings.keep_out, read_documents(files.chunks), files.kept_out), workers
        )


def _chunk(documents: Corpus, files: Files, settings: StoreSettings, workers: int) -> None:
    tokenizer = settings.cutter

    def cut() -> Iterator[ChunkedDocument]:
        parts = documents.split(PIECES * workers) if hasattr(documents, "split") else [documents]
        rules = {"rules": tokenizer.backend.to_str(), "ids": tuple(tokenizer.ids)}
        items = [{"part": number} for number in range(len(parts))]
        arguments = {"parts": parts, "chunk_size": settings.chunk_size, **rules}
        for handful in _results(_Chunk, arguments, items, workers, in_order=True):
            yield from handful

    write_chunks(documents, files, settings, cut=cut)


def _write_blocks(rows: ResumableRows, block: int, worker: type[_Worker], arguments: dict, workers: int) -> None:
    """Let workers compute the missing blocks, and write each as it arrives."""
    items = [{"start": part.start, "stop": part.stop} for part in rows.blocks(block)]
    for start, stop, values in _results(worker, arguments, items, workers):
        rows.write(slice(start, stop), values)


def _embed(files: Files, settings: StoreSettings, workers: int) -> None:
    import ray

    device = torch.device("cuda" if ray.cluster_resources().get("GPU", 0) else "cpu")
    arguments = {"chunks_path": files.chunks, "bert": settings.bert, "use_cls_repr": settings.use_cls_repr}

    def fill(rows: ResumableRows) -> None:
        _write_blocks(rows, sizes_on(device).block, _Embed, arguments, workers)

    write_vectors(files.chunks, files.vectors, settings, fill=fill, device=device)


def _index(files: Files, settings: StoreSettings, workers: int) -> None:
    """Train on a sample, let workers fill shards and merge them; an index without inverted lists is filled here."""
    shards = inside(files.index.parent, "shards")

    def merge(vectors: Vectors, spec: str) -> None:
        merge_on_disk(*_shards(shards, files.vectors, spec, workers), vectors, files.index)

    if "IVF" in choose_spec(*open_array(files.vectors).shape, **settings.of_index()):
        index_vectors(files, settings, write=merge, separate_lists=True)
    else:
        index_vectors(files, settings, progress=False)
    shutil.rmtree(shards, ignore_errors=True)


def _shards(folder: Path, vectors_path: Path, spec: str, workers: int) -> tuple[faiss.Index, list[Path]]:
    """Trained empty index and the files of its filled shards; those of an interrupted build are reused."""
    vectors, settings = open_array(vectors_path), to_jsonable(index_settings(vectors_path, spec))
    note, settings = folder / "settings.json", settings | {"shard": SHARD}
    if read_note(note) != settings:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_index(train_index(vectors, spec), folder / TRAINED)
        write_json(note, settings)
    starts = range(0, len(vectors), SHARD)
    items = [
        {"start": start, "stop": min(start + SHARD, len(vectors))}
        for start in starts
        if not _shard(folder, start).exists()
    ]
    for _ in _results(_Fill, {"folder": folder, "vectors_path": vectors_path}, items, workers):
        pass
    return read_index(folder / TRAINED), [_shard(folder, start) for start in starts]


def _search(files: Files, settings: StoreSettings, kept_out: list[int], workers: int) -> None:
    exclude = document_ranges(open_array(files.doc_ids), kept_out)
    options: dict[str, Any] = {"exclude": exclude, "max_similarity": settings.max_similarity}
    paths = {"index_path": files.index, "vectors_path": files.vectors, "doc_ids_path": files.doc_ids}

    def fill(rows: ResumableRows, _: Any) -> None:
        _write_blocks(rows, AT_A_TIME, _Search, {**paths, "k": settings.knn, "options": options}, workers)

    write_neighbours(files, settings, kept_out, fill=fill)
