"""A store built by many workers on one machine or several, with Ray; what comes out is what one process builds
(notebook 11).

    chunk    workers read parts of the corpus and cut their documents; the results come back in order
    embed    each worker has its own BERT and takes a block of chunks after the other
    index    an inverted file is trained on a sample, workers fill shards of it, and these are merged on disk;
             an index of another kind is filled by this process
    search   workers open index and vectors where they lie and take blocks of chunks

Ray Data hands out the work, holds back what the writer cannot take yet, starts a worker that died anew, and repeats
what it had in hand. This process alone writes into the store, a block at a time, so that a worker's death costs that
worker's block, and a stop of the whole costs the blocks in hand: the same call goes on.

Every machine must see the work folder under the same path (a shared file system), and have this package installed.
The corpus is divided if it can be (`split`), and read by the machines that the workers run on.

Memory of a worker, beside Python with its libraries (about 0.5 GB) and what the operating system keeps of mapped
files as long as nobody else wants it:

    chunk    the longest document with its tokens, and about HANDFUL bytes of results
    embed    the BERT (90 MB for the default), and a block of chunks with its vectors (3 MB on a CPU)
    index    the centroids, SHARD vectors with their ids (0.4 GB for 384 dimensions), BLOCK vectors more
    search   the lists' centroids or, of an index that is not an inverted file, the index; BLOCK vectors (100 MB)
"""

import json
import logging
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import faiss
import numpy as np
import torch
from tokenizers import Tokenizer

from retro_nb.chunking import ChunkedDocument, chunk_document, store_tokenizer, write_chunks
from retro_nb.corpus import Corpus
from retro_nb.embedding import begin_block, embedding_dim, embedding_settings, embedding_stats, sizes_on
from retro_nb.index import (
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
from retro_nb.knn import (
    choose_spec,
    document_ranges,
    index_settings,
    index_stats,
    knn_path,
    knn_settings,
    neighbours,
    write_neighbours,
)
from retro_nb.manifest import cached
from retro_nb.storage import PathLike, ResumableRows, open_array, plain, write_json
from retro_nb.tokens import SpecialIds, TextTokenizer

PIECES = 8  # parts of the corpus for each worker: few enough to be large, enough to share them evenly
HANDFUL = 4_000_000  # bytes of chunks that go back at a time
SHARD = 2**18  # vectors in a shard of the index
AT_A_TIME = 1024  # chunks searched together
TRAINED = "trained.index"
ATTEMPTS = 5  # to start Ray


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
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray.data
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Ray is not installed: in a clone, pip install -e '.[scale]'") from error
    ray.data.DataContext.get_current().enable_progress_bars = progress
    joined = ray.is_initialized()
    if not joined:
        # More CPUs than workers, or Ray's own tasks, which hand out the work, would wait for ever.
        sizes = {} if address else {"num_cpus": max(os.cpu_count() or 1, workers + 2), "include_dashboard": False}
        level = logging.INFO if progress else logging.ERROR
        _start(address=address or "local", log_to_driver=progress, logging_level=level, **sizes)
    try:
        yield
    finally:
        if not joined:
            ray.shutdown()


def _start(**options: Any) -> None:
    """`ray.init`, and again if need be: on a busy machine one of Ray's processes may take longer than Ray waits."""
    import ray

    for attempt in range(1, ATTEMPTS + 1):
        try:
            ray.init(**options)
            return
        except Exception as error:  # Ray raises no kind of its own; it waits 15 s (its issue 65983)
            ray.shutdown()
            if "timed out during startup" not in str(error) or attempt == ATTEMPTS:
                raise ConnectionError(f"no Ray cluster ({options['address']}): {error}") from error


def _results(
    worker: type, arguments: dict, items: list[dict], workers: int, *, in_order: bool = False
) -> Iterator[dict]:
    """What workers make of the items, as it comes or in order. `worker(**arguments)` is called with one item."""
    import ray.data

    if not items:
        return
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = in_order
    data = ray.data.from_items(items, override_num_blocks=min(len(items), 64 * workers))
    gpus = min(1, ray.cluster_resources().get("GPU", 0) / workers) if worker is _Embed else 0
    pool = ray.data.ActorPoolStrategy(size=min(workers, len(items)))
    made = data.map_batches(
        worker, fn_constructor_kwargs=arguments, batch_size=1, compute=pool, num_cpus=1, num_gpus=gpus
    )
    try:
        for batch in made.iter_batches(batch_size=None, prefetch_batches=1):
            for row in range(len(batch["data"])):
                yield {name: column[row] for name, column in batch.items()}
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error  # what went wrong in the worker, and not how Ray brought it here


# the workers


class _Chunk:
    """Reads parts of a corpus and cuts their documents."""

    def __init__(self, parts: list[Corpus], chunk_size: int, rules: str, ids: tuple[int, int, int]) -> None:
        self.parts, self.chunk_size = parts, chunk_size
        self.tokenizer = TextTokenizer(Tokenizer.from_str(rules), SpecialIds(*ids))

    def __call__(self, items: dict) -> Iterator[dict]:
        for number in items["part"]:
            handful, size = [], 0
            for document in self.parts[number]:
                chunked = chunk_document(document, self.chunk_size, self.tokenizer)
                handful.append(chunked)
                size += sum(array.nbytes for array in (chunked.rows, chunked.spans, chunked.bytes)) + 500
                if size > HANDFUL:
                    yield {"data": [pickle.dumps(handful)]}
                    handful, size = [], 0
            yield {"data": [pickle.dumps(handful)]}


class _Embed:
    """Embeds blocks of a chunk array."""

    def __init__(self, chunks_path: Path, bert: PathLike | None, use_cls_repr: bool) -> None:
        self.chunks = open_array(chunks_path)
        options = {"use_cls_repr": use_cls_repr, "bert": bert}
        self.embed = partial(begin_block, tokenizer=store_tokenizer(chunks_path, bert), **options)

    def __call__(self, items: dict) -> Iterator[dict]:
        for start, stop in zip(items["start"], items["stop"], strict=True):
            vectors = self.embed(self.chunks[start:stop, :-1])()
            yield {"start": [start], "stop": [stop], "data": [vectors.tobytes()]}


class _Fill:
    """Fills shards of an inverted file."""

    def __init__(self, folder: Path, vectors_path: Path) -> None:
        self.folder, self.vectors = folder, open_array(vectors_path)

    def __call__(self, items: dict) -> Iterator[dict]:
        for number in items["shard"]:
            index, stop = read_index(self.folder / TRAINED), min((number + 1) * SHARD, len(self.vectors))
            for start in range(number * SHARD, stop, BLOCK):
                rows = np.arange(start, min(start + BLOCK, stop))
                index.add_with_ids(rows_of(self.vectors, rows), rows)
            write_index(index, self.folder / f"{number}.index")
            yield {"data": [b""]}


class _Search:
    """Finds the neighbours of blocks of chunks."""

    def __init__(
        self, index_path: Path, vectors_path: Path, doc_ids_path: Path, k: int, options: dict[str, Any]
    ) -> None:
        self.vectors, self.doc_ids = open_array(vectors_path), open_array(doc_ids_path)
        self.find = partial(neighbours, read_index(index_path, mapped=True), self.vectors, self.doc_ids, k, **options)

    def __call__(self, items: dict) -> Iterator[dict]:
        for start, stop in zip(items["start"], items["stop"], strict=True):
            found = self.find(rows=range(start, stop)).astype(np.int32)
            yield {"start": [start], "stop": [stop], "data": [found.tobytes()]}


# the store


def build_store(
    documents: Corpus,
    work_dir: PathLike,
    tokenizer: TextTokenizer,
    *,
    chunk_size: int,
    seq_len: int,
    knn: int,
    workers: int = 2,
    address: str | None = None,
    keep_out: Callable[[int], list[int]] = lambda documents: [],
    max_chunks: int | None = None,
    max_seqs: int | None = None,
    bert: PathLike | None = None,
    use_cls_repr: bool = False,
    max_similarity: float | int | None = None,
    progress: bool = True,
    **index_options: Any,
) -> None:
    """Build what `TrainingWrapper` with the same settings then finds built: chunks, vectors, index and neighbours.

    Args:
        documents: the corpus.
        work_dir: where to; a folder that all machines see.
        tokenizer: what cuts the texts.
        chunk_size, seq_len, knn: m, n and k.
        workers: how many work at once; on GPUs, how many embed at once.
        address: of a running cluster; None for one on this machine.
        keep_out: which of so many documents nobody is to retrieve.
        max_chunks, max_seqs, bert, use_cls_repr, max_similarity: as for `TrainingWrapper`.
        progress: show Ray's progress.
        **index_options: `index`, `max_index_memory_usage`, `current_memory_available`.

    Raises:
        ModuleNotFoundError: Ray is not installed.
        ValueError: `workers` is less than 1; and what building in one process raises.
    """
    if workers < 1:
        raise ValueError(f"workers {workers}: pass 1 or more")
    folder = Path(work_dir).resolve()
    with cluster(workers, address, progress=progress):
        stats = _chunk(documents, folder, tokenizer, workers, chunk_size, seq_len, max_chunks, max_seqs)
        _embed(folder, stats["chunks"], bert, use_cls_repr, workers)
        spec = choose_spec(stats["chunks"], embedding_dim(bert), **index_options)
        _index(folder, spec, workers)
        exclude = document_ranges(open_array(folder / "doc_ids.npy"), keep_out(stats["docs"]))
        _search(folder, knn, exclude, max_similarity, workers)


def _chunk(
    documents: Corpus,
    folder: Path,
    tokenizer: TextTokenizer,
    workers: int,
    chunk_size: int,
    seq_len: int,
    max_chunks: int | None,
    max_seqs: int | None,
) -> dict:
    def cut() -> Iterator[ChunkedDocument]:
        parts = documents.split(PIECES * workers) if hasattr(documents, "split") else [documents]
        rules = {"rules": tokenizer.backend.to_str(), "ids": tuple(tokenizer.ids)}
        items = [{"part": number} for number in range(len(parts))]
        arguments = {"parts": parts, "chunk_size": chunk_size, **rules}
        for result in _results(_Chunk, arguments, items, workers, in_order=True):
            yield from pickle.loads(result["data"])

    return write_chunks(
        cut,
        documents,
        [folder / name for name in ("chunks.npy", "seqs.npy", "doc_ids.npy")],
        tokenizer,
        chunk_size=chunk_size,
        seq_len=seq_len,
        max_chunks=max_chunks,
        max_seqs=max_seqs,
    )


def _write_blocks(rows: ResumableRows, block: int, worker: type, arguments: dict, workers: int) -> None:
    """Let workers compute the blocks that are missing, and write each as it comes."""
    items = [{"start": part.start, "stop": part.stop} for part in rows.blocks(block)]
    for result in _results(worker, arguments, items, workers):
        values = np.frombuffer(result["data"], rows.dtype).reshape(-1, *rows.shape[1:])
        rows.write(slice(int(result["start"]), int(result["stop"])), values)


def _embed(folder: Path, count: int, bert: PathLike | None, use_cls_repr: bool, workers: int) -> None:
    import ray

    chunks_path, path, dim = folder / "chunks.npy", folder / "chunks.embedded.npy", embedding_dim(bert)
    settings = embedding_settings(chunks_path, count, bert, use_cls_repr)
    device = torch.device("cuda") if ray.cluster_resources().get("GPU", 0) else torch.device("cpu")

    def build() -> dict:
        rows = ResumableRows(path, (count, dim), np.float32, settings)
        arguments = {"chunks_path": chunks_path, "bert": bert, "use_cls_repr": use_cls_repr}
        _write_blocks(rows, sizes_on(device).block, _Embed, arguments, workers)
        rows.finish()
        return embedding_stats(count, dim, device)

    cached(path, settings, build)


def _index(folder: Path, spec: str, workers: int) -> None:
    """Train on a sample, let workers fill shards, and merge these; what has no lists is filled here."""
    path, vectors_path = folder / "knn.index", folder / "chunks.embedded.npy"
    vectors, settings = open_array(vectors_path), index_settings(vectors_path, spec)

    def build() -> dict:
        started = perf_counter()
        if "IVF" in spec:
            merge_on_disk(*_shards(folder / "shards", vectors_path, spec, workers), vectors, path)
        else:
            write_index(build_index(vectors, spec), path)
        return index_stats(path, spec, len(vectors), started)

    cached(path, settings, build, files=(lists_path(path),) if "IVF" in spec else ())
    shutil.rmtree(folder / "shards", ignore_errors=True)


def _shards(folder: Path, vectors_path: Path, spec: str, workers: int) -> tuple[faiss.Index, list[Path]]:
    """An index trained on these vectors, and the files of its shards; those of an interrupted build are kept."""
    vectors, settings = open_array(vectors_path), plain(index_settings(vectors_path, spec))
    note = folder / "settings.json"
    if not note.exists() or json.loads(note.read_text(encoding="utf-8")) != settings:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_index(train_index(vectors, spec), folder / TRAINED)
        write_json(note, settings)
    shards = [folder / f"{number}.index" for number in range(-(-len(vectors) // SHARD))]
    items = [{"shard": number} for number, shard in enumerate(shards) if not shard.exists()]
    for _ in _results(_Fill, {"folder": folder, "vectors_path": vectors_path}, items, workers):
        pass
    return read_index(folder / TRAINED), shards


def _search(folder: Path, k: int, exclude: Ranges, max_similarity: float | int | None, workers: int) -> None:
    index_path, vectors_path, doc_ids_path = (
        folder / name for name in ("knn.index", "chunks.embedded.npy", "doc_ids.npy")
    )
    options = {"exclude": exclude, "max_similarity": max_similarity}
    files = {"index_path": index_path, "vectors_path": vectors_path, "doc_ids_path": doc_ids_path}

    def fill(rows: ResumableRows) -> None:
        _write_blocks(rows, AT_A_TIME, _Search, {**files, "k": k, "options": options}, workers)

    settings = knn_settings(index_path, doc_ids_path, k, max_similarity)
    index, vectors, doc_ids = read_index(index_path, mapped=True), open_array(vectors_path), open_array(doc_ids_path)
    write_neighbours(knn_path(folder / "chunks.npy", exclude), fill, settings, index, vectors, doc_ids, **options)
