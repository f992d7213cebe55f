"""Search the vectors for each chunk's nearest neighbours (notebook 03).

RET(C) are the k chunks nearest to C in squared L2 distance of their vectors, none from C's own document
(paper, §2.3): a chunk's own continuation would give the answer away. A document's chunks are contiguous, so
excluding it is one range of ids, applied inside the search: however many near chunks the document holds,
the search returns k others if they exist.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from jaxtyping import Int
from tqdm.auto import tqdm

from retro_nb.common.arrays import PathLike, ResumableRows, file_record, open_array
from retro_nb.common.manifest import array_key, cached, read_manifest
from retro_nb.store.files import INDEX, Files, knn_path
from retro_nb.store.index import (
    NO_NEIGHBOUR,
    Distances,
    Neighbours,
    Ranges,
    Vectors,
    build_index,
    choose_index,
    exact_search,
    index_files,
    innermost,
    is_exact,
    lists_path,
    parse_bytes,
    read_index,
    recall,
    rows_of,
    search,
    write_index,
)
from retro_nb.store.settings import StoreSettings

AT_A_TIME = 1024  # chunks searched and saved together
RECALL_QUERIES = 2000
MOST_AT_ONCE = 2**23  # neighbours held in memory while near-duplicates are filtered out

# the neighbours of every chunk


def own_ranges(doc_ids: Int[np.ndarray, " c"], rows: np.ndarray | range) -> Int[np.ndarray, "b 2"]:
    """For each chunk in `rows`, the range [first, stop) of its document's chunk ids.

    Raises:
        ValueError: a document's chunks are not contiguous.
    """
    doc_ids = np.asarray(doc_ids)
    if np.any(np.diff(doc_ids) < 0):
        where = int(np.argmax(np.diff(doc_ids) < 0)) + 1
        raise ValueError(f"chunk {where} goes back to document {doc_ids[where]}: a document's chunks lie together")
    return np.stack([np.searchsorted(doc_ids, doc_ids[rows], side) for side in ("left", "right")], axis=1)


def document_ranges(doc_ids: Int[np.ndarray, " c"], documents: Sequence[int]) -> list[tuple[int, int]]:
    """Ranges [first, stop) of these documents' chunk ids, adjacent ranges joined.

    Raises:
        ValueError: a document has no chunk.
    """
    ranges: list[tuple[int, int]] = []
    for document in sorted(set(documents)):
        first, stop = (int(np.searchsorted(doc_ids, document, side)) for side in ("left", "right"))
        if first == stop:
            raise ValueError(f"document {document} has no chunk: the documents are 0 … {doc_ids[-1]}")
        if ranges and ranges[-1][1] == first:
            first = ranges.pop()[0]
        ranges.append((first, stop))
    return ranges


Find = Callable[..., tuple[Distances, Neighbours]]  # search(index, …) or exact_search(vectors, …)


def _find_others(
    find: Find, vectors: Vectors, rows: np.ndarray, own: np.ndarray, k: int, max_similarity: float | int | None
) -> Neighbours:
    """Find k ids per row outside its own range and not too similar; fetch more until `find` has no more."""
    out = np.full((len(rows), k), NO_NEIGHBOUR, dtype=np.int64)
    left, fetch = np.arange(len(rows)), min(k, len(vectors))
    while len(left):
        more = []  # rows that could still be filled
        for part in np.array_split(left, -(-len(left) * fetch // MOST_AT_ONCE)):
            queries = rows_of(vectors, rows[part])
            _, found = find(queries, fetch, own=own[part])
            seen_all = found[:, -1] < 0
            if max_similarity is not None:
                found = _drop_similar(vectors, queries, found, max_similarity)
            out[part, :fetch] = found[:, :k]
            more.append(part[~seen_all & (found[:, : min(k, fetch)] < 0).any(axis=1)])
        left, fetch = np.concatenate(more), min(max(4 * fetch, 64), len(vectors))
    return out


def _drop_similar(vectors: Vectors, queries: np.ndarray, ids: Neighbours, max_similarity: float) -> Neighbours:
    """Remove neighbours whose cosine with the query exceeds the limit; the others move up."""
    kept = np.full_like(ids, NO_NEIGHBOUR)
    for query, row, out in zip(queries, ids, kept, strict=True):
        row = row[row >= 0]
        near = rows_of(vectors, row)
        cosine = near @ query / (np.linalg.norm(near, axis=1) * np.linalg.norm(query) + 1e-12)
        row = row[np.minimum(cosine, 1) <= max_similarity]  # rounding may leave a cosine above 1
        out[: len(row)] = row
    return kept


def neighbours(
    index: faiss.Index,
    vectors: Vectors,
    doc_ids: Int[np.ndarray, " c"],
    k: int,
    *,
    exclude: Ranges = (),
    max_similarity: float | int | None = None,
    rows: range | np.ndarray | None = None,
) -> Neighbours:
    """Find the k nearest chunks of other documents, for every chunk or for some.

    Where an approximate index finds fewer than k, exact search replaces it.

    Args:
        index: filled with `vectors`.
        vectors: one row per chunk.
        doc_ids: the document of each chunk, ascending.
        k: neighbours per chunk.
        exclude: ranges [first, stop) of chunks that are never found: the rest is the database.
        max_similarity: leave out chunks whose cosine with the query is above this (near-duplicates).
        rows: the chunks to find neighbours for, ascending; all if left out.

    Returns:
        Chunk ids by ascending distance; −1 only where no candidate is left.
    """
    picked = np.arange(len(vectors)) if rows is None else np.asarray(rows, dtype=np.int64)
    own = own_ranges(doc_ids, picked)
    out = _find_others(partial(search, index, exclude=exclude), vectors, picked, own, k, max_similarity)
    missing = np.flatnonzero((out < 0).any(axis=1))
    if len(missing) and not isinstance(innermost(index), faiss.IndexFlat):
        find = partial(exact_search, vectors, exclude=exclude)
        out[missing] = _find_others(find, vectors, picked[missing], own[missing], k, max_similarity)
    return out


def measure_recall(
    vectors: Vectors,
    doc_ids: Int[np.ndarray, " c"],
    found: Neighbours,
    *,
    exclude: Ranges = (),
    max_similarity: float | int | None = None,
) -> float:
    """Recall@k of stored neighbours against exact search with the same exclusions, on up to 2000 chunks."""
    sample = np.linspace(0, len(vectors) - 1, min(RECALL_QUERIES, len(vectors))).astype(np.int64)
    find, own = partial(exact_search, vectors, exclude=exclude), own_ranges(doc_ids, sample)
    truth = _find_others(find, vectors, sample, own, found.shape[1], max_similarity)
    return recall(vectors, rows_of(vectors, sample), found[sample], truth)


# to disk


def index_vectors(
    files: Files,
    settings: StoreSettings,
    *,
    write: Callable[[Vectors, str], None] | None = None,
    separate_lists: bool = False,
    force_reprocess: bool = False,
    progress: bool = True,
) -> None:
    """Index a store's vectors on disk, unless it is done: row i of the vectors has id i in the index.

    Args:
        files, settings: the store's; `settings.of_index()` chooses the index.
        write: makes the index of these vectors and this factory string at `files.index`, if the caller makes it.
        separate_lists: `write` stores the inverted lists in a file beside it.
        force_reprocess: build in any case.
        progress: show a progress bar.
    """
    vectors, lists = open_array(files.vectors), lists_path(files.index)
    spec = choose_spec(*vectors.shape, **settings.of_index())

    def build() -> dict:
        started = time.perf_counter()
        if write:
            write(vectors, spec)
        else:
            write_index(build_index(vectors, spec, progress=progress), files.index)
        if not separate_lists:
            lists.unlink(missing_ok=True)  # of an index that a cluster built
        size = sum(file.stat().st_size for file in index_files(files.index))
        seconds = time.perf_counter() - started
        return {"index": spec, "vectors": len(vectors), "bytes": size, "seconds": seconds}

    described, beside = index_settings(files.vectors, spec), (lists,) if separate_lists else ()
    cached(files.index, described, build, files=beside, force_reprocess=force_reprocess)


def choose_spec(
    count: int,
    dim: int,
    index: str | None = None,
    max_index_memory_usage: str | int | None = None,
    current_memory_available: str | int | None = None,
) -> str:
    """Index-factory string that these settings of a store give for `count` vectors of this width."""
    limits = [parse_bytes(size) for size in (max_index_memory_usage, current_memory_available)]
    return index or choose_index(count, dim, min((size for size in limits if size is not None), default=None))


def index_settings(embeddings_path: PathLike, spec: str) -> dict:
    """Everything that an index depends on, as recorded in the manifest."""
    return {"embeddings": array_key(embeddings_path), "index": spec}


def write_neighbours(
    files: Files,
    settings: StoreSettings,
    keep_out: Sequence[int] = (),
    *,
    fill: Callable[[ResumableRows, Callable[..., Neighbours]], None] | None = None,
    rows_at_a_time: int = AT_A_TIME,
    force_reprocess: bool = False,
    progress: bool = True,
) -> Path:
    """Write the k nearest chunks of other documents for every chunk of an indexed store; return the file's path.

    The neighbours are int32, c × k, ascending by distance, −1 where there is none. Their recall is measured if the
    index is not exact, and recorded in the folder's manifest (`knn_stats`).

    Args:
        files, settings: the store's; its `knn` and `max_similarity` are used.
        keep_out: numbers of documents outside the database: they get neighbours, but are never retrieved.
        fill: writes all missing rows, if the caller finds them. It may call its second argument, `neighbours` of this
            store, with rows.
        rows_at_a_time: chunks searched and saved together.
        force_reprocess: search in any case.
        progress: show a progress bar.
    """
    index, vectors = read_index(files.index, mapped=True), open_array(files.vectors)
    doc_ids = open_array(files.doc_ids, shape=(len(vectors),))
    exclude, k = document_ranges(doc_ids, keep_out), settings.knn
    path = knn_path(files.chunks, exclude)
    without: dict[str, Any] = {"exclude": exclude, "max_similarity": settings.max_similarity}
    find = partial(neighbours, index, vectors, doc_ids, k, **without)

    def build() -> dict:
        started, rows = time.perf_counter(), ResumableRows(path, (len(vectors), k), np.int32, described)
        if fill:
            fill(rows, find)
        else:
            search_blocks(rows, find, rows_at_a_time, progress)
        rows.finish()
        found = open_array(path)
        return {
            "k": k,
            "recall": 1.0 if is_exact(index) else measure_recall(vectors, doc_ids, found, **without),
            "missing": int((found < 0).sum()),
            "seconds": time.perf_counter() - started,
        }

    described = {
        "index": array_key(files.index),
        "doc_ids": file_record(files.doc_ids),
        "k": k,
        "max_similarity": settings.max_similarity,
    }
    cached(path, described, build, force_reprocess=force_reprocess)
    return path


def search_blocks(
    rows: ResumableRows,
    find: Callable[..., Neighbours],
    size: int,
    progress: bool,
    chunks: Int[np.ndarray, " n"] | None = None,
) -> None:
    """Find and write the missing rows, `size` at a time; row i is that of chunk i, or of `chunks[i]`."""
    with tqdm(total=rows.shape[0], initial=rows.done, desc="searching", unit=" chunks", disable=not progress) as bar:
        for block in rows.blocks(size):
            rows.write(block, find(rows=range(block.start, block.stop) if chunks is None else chunks[block]))
            bar.update(block.stop - block.start)


def knn_stats(chunk_memmap_path: PathLike, index_file: str = INDEX, exclude: Ranges = ()) -> dict:
    """Statistics of the build: `index`, `vectors`, `bytes`, `k`, `recall` (at k), `missing` neighbours, `seconds`."""
    paths = Path(chunk_memmap_path).parent / index_file, knn_path(chunk_memmap_path, exclude)
    index, found = (read_manifest(path.parent)[path.name]["stats"] for path in paths)
    return {**index, **found, "seconds": index["seconds"] + found["seconds"]}
