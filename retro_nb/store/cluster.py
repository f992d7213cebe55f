"""A store built by many workers on one machine or several, with Ray; what comes out is what one process builds
(notebook 11).

    chunk    workers read parts of the corpus and cut their documents; the results come back in order
    embed    each worker has its own BERT and takes a block of chunks after the other
    index    an inverted file is trained on a sample, workers fill shards of it, and these are merged on disk;
             an index of another kind is filled by this process
    search   workers open index and vectors where they lie and take blocks of chunks

Ray Data hands out the work, holds back what the writer cannot take yet, starts a worker that died anew, and repeats
what it had in hand. This process alone writes into the store, a block at a time, so that a worker's death costs that
worker's block (beyond TASKS blocks, a few), and a stop of the whole costs the blocks in hand: the same call goes on.
Chunks alone are cut again from the first, as in one process.

Every machine must see the work folder under the same path (a shared file system), and have this package installed.
The corpus is divided if it can be (`split`), and read by the machines that the workers run on. What is the same to the
last bit is what the same kind of processor computes.

Memory of a worker, beside Python with its libraries (0.3 to 0.5 GB of its own, by the build of PyTorch) and what the
operating system keeps of mapped files as long as nobody else wants it; `python benchmarks/cluster.py` measures it:

    chunk    800,000 characters with their tokens and some handfuls of results (0.2 GB), and the longest document
    embed    the BERT with what runs it, and a block of chunks with its vectors (0.4 GB for the default)
    index    the centroids, SHARD vectors with their ids, twice while they grow (0.8 GB for 384 dimensions), BLOCK more
    search   the lists' centroids or, of an index that is not an inverted file, the index; BLOCK vectors (0.1 GB)

What workers have finished and the writer has not taken yet lies in Ray's object store. A cluster started here gives it
STORE bytes for each worker, and two more; when it is full, workers wait.
"""

import json
import logging
import os
import pickle
import shutil
import socket
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import faiss
import numpy as np
import torch
from tokenizers import Tokenizer

from retro_nb.common.arrays import PathLike, ResumableRows, open_array, to_jsonable, write_json
from retro_nb.common.extras import extra
from retro_nb.common.manifest import cached
from retro_nb.store.chunking import ChunkedDocument, chunk_document, store_tokenizer, write_chunks
from retro_nb.store.embedding import (
    begin_block,
    check_vectors,
    embedding_dim,
    embedding_settings,
    embedding_stats,
    sizes_on,
)
from retro_nb.store.files import Files, knn_path
from retro_nb.store.index import (
    BLOCK,
    Ranges,
    build_index,
    lists_path,
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
    index_stats,
    knn_settings,
    neighbours,
    write_neighbours,
)
from retro_nb.store.splits import document_numbers
from retro_nb.store.store import StoreSettings, choose_tokenizer
from retro_nb.text.document import Corpus
from retro_nb.text.tokens import SpecialIds, TextTokenizer

PIECES = 32  # parts of the corpus for each worker: what is done before its turn has to wait, in Ray's object store
HANDFUL = 4_000_000  # bytes of results that go back at a time
STORE = 2**27  # bytes of Ray's object store for each worker, and as much for Ray's own use twice
SHARD = 2**18  # vectors in a shard of the index
TASKS = 4096  # that Ray has to keep account of; where there are more blocks, some share one
TRAINED = "trained.index"
ATTEMPTS = 5  # to start Ray
PATIENCE = 5  # seconds that a cluster has to answer


# the cluster


@contextmanager
def cluster(workers: int, address: str | None = None, *, progress: bool = True) -> Iterator[None]:
    """Join a running Ray cluster, or start one on this machine for as long as this lasts.

    Args:
        workers: how many are to work at once.
        address: of a running cluster ("auto", "10.0.0.1:6379"); None for one of its own. One that this process has
            joined already is used as it is.
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
        if workers > cpus:  # those without one would be waited for
            raise ValueError(f"{workers} workers, but the cluster has {cpus} CPUs: ask for no more, or add machines")
        ray.data.DataContext.get_current().enable_progress_bars = progress
        logging.getLogger("ray.data").setLevel(logging.INFO if progress else logging.ERROR)
        yield
    finally:
        if not joined:
            ray.shutdown()


def _sizes(workers: int) -> dict[str, Any]:
    """What a cluster of one's own has: more CPUs than workers, for what Ray itself does, and little memory.

    Without a word Ray would take a third of the machine's memory for its object store.
    """
    cpus = max(os.cpu_count() or 1, workers + 2)
    return {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": (workers + 2) * STORE}


def _start(address: str | None, **options: Any) -> None:
    """`ray.init`, and again if need be: on a busy machine one of Ray's processes may take longer than Ray waits."""
    import ray

    host, _, port = (address or "").rpartition(":")
    if host and port.isdecimal():  # Ray itself would try for many minutes
        try:
            socket.create_connection((host.rpartition("/")[2], int(port)), timeout=PATIENCE).close()
        except OSError as error:
            raise ConnectionError(f"no Ray cluster at {address} ({error}): {MEND}") from error
    for attempt in range(1, ATTEMPTS + 1):
        try:
            ray.init(address or "local", **options)
            return
        except Exception as error:  # Ray raises no kind of its own; it waits 15 s (its issue 65983)
            ray.shutdown()
            if address:
                raise ConnectionError(f"no Ray cluster at {address} ({error}): {MEND}") from error
            if "timed out during startup" not in str(error) or attempt == ATTEMPTS:
                raise ConnectionError(f"Ray cannot be started here: {error}") from error


MEND = "`ray start --head` starts one and says its address; without an address, it is started here"


def _results(
    worker: "type[_Worker]", arguments: dict, items: list[dict], workers: int, *, in_order: bool = False
) -> Iterator[Any]:
    """What workers yield for the items, as it comes or in order.

    Raises:
        ChildProcessError: Ray gives up, as it does when nothing gets done for half an hour.
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
    )  # a worker that dies is started again as often as it takes: Ray's default for such a pool
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
    """The part of a GPU that each worker gets, so that none has to wait for one; 0 where there are none."""
    return 1 / -(-workers // int(gpus)) if gpus >= 1 else 0


# the workers


class _Failure(NamedTuple):
    """What went wrong in a worker: the error, and where."""

    error: Exception
    trace: str


class _Worker:
    """What Ray makes in another process, and calls with one item at a time.

    `open` gets the arguments when the first item comes, `work` gets the item and yields results. An error comes back
    as a result: Ray would bring one from a constructor without its cause, and others with words of its own.
    """

    def __init__(self, where: str, arguments: dict) -> None:
        self.where, self.arguments, self.opened = where, arguments, False

    def __call__(self, items: dict) -> Iterator[dict]:
        try:
            if not self.opened:
                with suppress(OSError):  # a machine without this folder can still do what names no path in it
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


Block = tuple[int, int, np.ndarray]  # first row, the row after the last, and the rows


class _Embed(_Worker):
    """Embeds blocks of a chunk array."""

    def open(self, chunks_path: Path, bert: PathLike | None, use_cls_repr: bool) -> None:
        self.chunks, self.path = open_array(chunks_path), chunks_path
        options = {"use_cls_repr": use_cls_repr, "bert": bert}
        self.embed = partial(begin_block, tokenizer=store_tokenizer(chunks_path, bert), **options)

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
    """The file of the shard that begins with this vector."""
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
    """Build what `Store.build` with the same settings then finds built: chunks, vectors, index and neighbours.

    Args:
        documents: the corpus.
        folder: where to; all machines see it.
        settings: see `StoreSettings`.
        workers: how many work at once; on GPUs, how many embed at once.
        address: of a running cluster; None for one on this machine.
        progress: show Ray's progress.

    Raises:
        ModuleNotFoundError, ConnectionError, ValueError: there is no such cluster (see `cluster`).
        ChildProcessError: Ray gives up, as it does when nothing gets done for half an hour.
        What building in one process raises.
    """
    files = Files.of(Path(folder).resolve())
    tokenizer = choose_tokenizer(settings, documents, folder, progress)
    with cluster(workers, address, progress=progress):
        stats = _chunk(documents, files, replace(settings, tokenizer=tokenizer), workers)
        _embed(files, stats["chunks"], settings, workers)
        _index(files, choose_spec(stats["chunks"], embedding_dim(settings.bert), **settings.of_index()), workers)
        kept_out = document_numbers(settings.keep_out, stats["docs"])
        exclude = document_ranges(open_array(files.doc_ids), kept_out)
        _search(files, settings.knn, exclude, settings.max_similarity, workers)


def _chunk(documents: Corpus, files: Files, settings: StoreSettings, workers: int) -> dict:
    tokenizer = settings.tokenizer

    def cut() -> Iterator[ChunkedDocument]:
        parts = documents.split(PIECES * workers) if hasattr(documents, "split") else [documents]
        rules = {"rules": tokenizer.backend.to_str(), "ids": tuple(tokenizer.ids)}
        items = [{"part": number} for number in range(len(parts))]
        arguments = {"parts": parts, "chunk_size": settings.chunk_size, **rules}
        for handful in _results(_Chunk, arguments, items, workers, in_order=True):
            yield from handful

    return write_chunks(cut, documents, [files.chunks, files.seqs, files.doc_ids], tokenizer, **settings.of_chunks())


def _write_blocks(rows: ResumableRows, block: int, worker: type[_Worker], arguments: dict, workers: int) -> None:
    """Let workers compute the blocks that are missing, and write each as it comes."""
    items = [{"start": part.start, "stop": part.stop} for part in rows.blocks(block)]
    for start, stop, values in _results(worker, arguments, items, workers):
        rows.write(slice(start, stop), values)


def _embed(files: Files, count: int, settings: StoreSettings, workers: int) -> None:
    import ray

    path, bert, dim = files.vectors, settings.bert, embedding_dim(settings.bert)
    described = embedding_settings(files.chunks, count, bert, settings.use_cls_repr)
    device = torch.device("cuda") if ray.cluster_resources().get("GPU", 0) else torch.device("cpu")

    def build() -> dict:
        rows = ResumableRows(path, (count, dim), np.float32, described)
        arguments = {"chunks_path": files.chunks, "bert": bert, "use_cls_repr": settings.use_cls_repr}
        _write_blocks(rows, sizes_on(device).block, _Embed, arguments, workers)
        rows.finish()
        return embedding_stats(count, dim, device)

    cached(path, described, build)


def _index(files: Files, spec: str, workers: int) -> None:
    """Train on a sample, let workers fill shards, and merge these; what has no lists is filled here."""
    path, shards = files.index, files.index.with_name("shards")
    vectors, settings = open_array(files.vectors), index_settings(files.vectors, spec)

    def build() -> dict:
        started = perf_counter()
        if "IVF" in spec:
            merge_on_disk(*_shards(shards, files.vectors, spec, workers), vectors, path)
        else:
            write_index(build_index(vectors, spec), path)
        return index_stats(path, spec, len(vectors), started)

    cached(path, settings, build, files=(lists_path(path),) if "IVF" in spec else ())
    shutil.rmtree(shards, ignore_errors=True)


def _shards(folder: Path, vectors_path: Path, spec: str, workers: int) -> tuple[faiss.Index, list[Path]]:
    """An index trained on these vectors, and the files of its shards; those of an interrupted build are kept."""
    vectors, settings = open_array(vectors_path), to_jsonable(index_settings(vectors_path, spec))
    note, settings = folder / "settings.json", settings | {"shard": SHARD}
    if not note.exists() or json.loads(note.read_text(encoding="utf-8")) != settings:
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


def _search(files: Files, k: int, exclude: Ranges, max_similarity: float | int | None, workers: int) -> None:
    options = {"exclude": exclude, "max_similarity": max_similarity}
    paths = {"index_path": files.index, "vectors_path": files.vectors, "doc_ids_path": files.doc_ids}

    def fill(rows: ResumableRows) -> None:
        _write_blocks(rows, AT_A_TIME, _Search, {**paths, "k": k, "options": options}, workers)

    settings = knn_settings(files.index, files.doc_ids, k, max_similarity)
    index, vectors, doc_ids = read_index(files.index, mapped=True), open_array(files.vectors), open_array(files.doc_ids)
    write_neighbours(knn_path(files.chunks, exclude), fill, settings, index, vectors, doc_ids, **options)
