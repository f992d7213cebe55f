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

import faiss
import numpy as np
from jaxtyping import Float, Int
from tqdm.auto import tqdm

from retro_nb.common.arrays import PathLike, ResumableRows, file_record, open_array
from retro_nb.common.manifest import array_key, cached, read_manifest
from retro_nb.store.embedding import chunks_to_embeddings_
from retro_nb.store.files import INDEX, companion, knn_path
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


def chunks_to_index_and_embed(
    *,
    num_chunks: int,
    chunk_size: int,
    chunk_memmap_path: PathLike,
    use_cls_repr: bool = False,
    max_rows_per_file: int = AT_A_TIME,
    chunks_to_embeddings_batch_size: int | None = None,
    embed_dim: int | None = None,
    index_file: str = INDEX,
    index: str | None = None,
    max_index_memory_usage: str | int | None = None,
    current_memory_available: str | int | None = None,
    bert: PathLike | None = None,
    force_reprocess: bool = False,
    progress: bool = True,
) -> tuple[faiss.Index, Float[np.ndarray, "c d"]]:
    """Embed a chunk array and index the vectors; both are saved next to it and reused while nothing changes.

    Args:
        num_chunks, chunk_size, chunk_memmap_path: the chunk array.
        use_cls_repr, chunks_to_embeddings_batch_size, embed_dim, bert: see `chunks_to_embeddings_`.
        max_rows_per_file: the reference's block size; it has no effect, since blocks here are fixed.
        index_file: name of the index, in the chunk array's folder.
        index: an index-factory string; None for the choice of `choose_index`.
        max_index_memory_usage, current_memory_available: bytes, or "100m": the index takes no more than
            the smaller of the two, at the cost of exactness (see `choose_index`).

    Returns:
        The index and the vectors (read-only): row i of the vectors has id i in the index.
    """
    folder = Path(chunk_memmap_path).parent
    embeddings_path = companion(chunk_memmap_path, "embedded.npy")
    stats = chunks_to_embeddings_(
        num_chunks=num_chunks,
        chunks_memmap_path=chunk_memmap_path,
        embeddings_memmap_path=embeddings_path,
        chunk_size=chunk_size,
        embed_dim=embed_dim,
        batch_size=chunks_to_embeddings_batch_size,
        use_cls_repr=use_cls_repr,
        bert=bert,
        force_reprocess=force_reprocess,
        progress=progress,
    )
    vectors = open_array(embeddings_path, shape=(num_chunks, stats["dim"]))
    spec = choose_spec(num_chunks, stats["dim"], index, max_index_memory_usage, current_memory_available)

    def build() -> dict:
        started = time.perf_counter()
        write_index(build_index(vectors, spec, progress=progress), folder / index_file)
        lists_path(folder / index_file).unlink(missing_ok=True)  # of an index that a cluster built
        return index_stats(folder / index_file, spec, num_chunks, started)

    cached(folder / index_file, index_settings(embeddings_path, spec), build, force_reprocess=force_reprocess)
    return read_index(folder / index_file), vectors


def choose_spec(
    count: int,
    dim: int,
    index: str | None = None,
    max_index_memory_usage: str | int | None = None,
    current_memory_available: str | int | None = None,
) -> str:
    """Index-factory string that these options of `chunks_to_index_and_embed` give for `count` vectors of this width."""
    limits = [parse_bytes(size) for size in (max_index_memory_usage, current_memory_available)]
    return index or choose_index(count, dim, min((size for size in limits if size is not None), default=None))


def index_settings(embeddings_path: PathLike, spec: str) -> dict:
    """Everything that an index depends on, as recorded in the manifest."""
    return {"embeddings": array_key(embeddings_path), "index": spec}


def index_stats(path: Path, spec: str, count: int, started: float) -> dict:
    """Statistics of an index for the manifest: its kind, number of vectors, bytes, and seconds since `started`."""
    size = sum(file.stat().st_size for file in index_files(path))
    return {"index": spec, "vectors": count, "bytes": size, "seconds": time.perf_counter() - started}


def check_similarity(max_similarity: float | int | None) -> None:
    """Reject a limit that no cosine can have."""
    if max_similarity is not None and not -1 < max_similarity <= 1:
        raise ValueError(f"max_similarity {max_similarity} is a cosine: give something above −1 and up to 1, e.g. 0.95")


def chunks_to_precalculated_knn_(
    *,
    num_nearest_neighbors: int,
    num_chunks: int,
    chunk_size: int,
    chunk_memmap_path: PathLike,
    doc_ids_memmap_path: PathLike,
    max_rows_per_file: int = AT_A_TIME,
    num_extra_neighbors: int = 0,
    keep_out: Sequence[int] = (),
    max_similarity: float | int | None = None,
    force_reprocess: bool = False,
    index_file: str = INDEX,
    progress: bool = True,
    **index_kwargs: object,
) -> tuple[Path, faiss.Index]:
    """Embed, index and search; write the k nearest chunks of other documents for every chunk to disk.

    The neighbours are int32, num_chunks × k, ascending by distance, −1 where there is none. Their recall is
    measured if the index is not exact, and recorded in the folder's manifest (`knn_stats`).

    Args:
        num_nearest_neighbors: k.
        num_chunks, chunk_size, chunk_memmap_path, doc_ids_memmap_path: the chunk array and its documents.
        max_rows_per_file: chunks searched and saved at a time.
        num_extra_neighbors: no effect: the reference fetches this many more and drops those of the chunk's own
            document; here the exclusion is exact.
        keep_out: numbers of documents outside the database: they get neighbours, but are never retrieved.
        max_similarity: leave out near-duplicates: chunks with a cosine above this.
        force_reprocess: rebuild in any case.
        index_file, **index_kwargs: see `chunks_to_index_and_embed`.

    Returns:
        The path of the neighbours, and the index.
    """
    if num_nearest_neighbors < 1:
        raise ValueError(f"num_nearest_neighbors {num_nearest_neighbors}: ask for 1 or more")
    check_similarity(max_similarity)
    doc_ids = open_array(doc_ids_memmap_path, shape=(num_chunks,))
    exclude = document_ranges(doc_ids, keep_out)
    index, vectors = chunks_to_index_and_embed(
        num_chunks=num_chunks,
        chunk_size=chunk_size,
        chunk_memmap_path=chunk_memmap_path,
        index_file=index_file,
        force_reprocess=force_reprocess,
        progress=progress,
        **index_kwargs,
    )
    path, k = knn_path(chunk_memmap_path, exclude), num_nearest_neighbors
    without = {"exclude": exclude, "max_similarity": max_similarity}

    def fill(rows: ResumableRows) -> None:
        with tqdm(total=num_chunks, initial=rows.done, desc="searching", unit=" chunks", disable=not progress) as bar:
            for block in rows.blocks(max_rows_per_file):
                part = range(block.start, block.stop)
                rows.write(block, neighbours(index, vectors, doc_ids, k, rows=part, **without))
                bar.update(len(part))

    settings = knn_settings(path.parent / index_file, doc_ids_memmap_path, k, max_similarity)
    write_neighbours(path, fill, settings, index, vectors, doc_ids, force_reprocess=force_reprocess, **without)
    return path, index


def knn_settings(
    index_path: PathLike, doc_ids_memmap_path: PathLike, k: int, max_similarity: float | int | None
) -> dict:
    """Everything that the neighbours of chunks depend on, as recorded in the manifest."""
    return {
        "index": array_key(index_path),
        "doc_ids": file_record(doc_ids_memmap_path),
        "k": k,
        "max_similarity": max_similarity,
    }


def write_neighbours(
    path: Path,
    fill: Callable[[ResumableRows], None],
    settings: dict,
    index: faiss.Index,
    vectors: Vectors,
    doc_ids: Int[np.ndarray, " c"],
    *,
    exclude: Ranges = (),
    max_similarity: float | int | None = None,
    force_reprocess: bool = False,
) -> dict:
    """Store the neighbours of every chunk, as `fill` finds them, unless they are already stored.

    Args:
        path: the file to write.
        fill: writes all missing rows.
        settings: from `knn_settings`.
        index, vectors, doc_ids, exclude, max_similarity: what `fill` searches; recall is measured on it.
        force_reprocess: rebuild in any case.

    Returns:
        `k`, `recall` (at k), `missing` neighbours, `seconds`.
    """

    def build() -> dict:
        started, k = time.perf_counter(), settings["k"]
        rows = ResumableRows(path, (len(vectors), k), np.int32, settings)
        fill(rows)
        rows.finish()
        found, without = open_array(path), {"exclude": exclude, "max_similarity": max_similarity}
        return {
            "k": k,
            "recall": 1.0 if is_exact(index) else measure_recall(vectors, doc_ids, found, **without),
            "missing": int((found < 0).sum()),
            "seconds": time.perf_counter() - started,
        }

    return cached(path, settings, build, force_reprocess=force_reprocess)


def knn_stats(chunk_memmap_path: PathLike, index_file: str = INDEX, exclude: Ranges = ()) -> dict:
    """Statistics of the build: `index`, `vectors`, `bytes`, `k`, `recall` (at k), `missing` neighbours, `seconds`."""
    paths = Path(chunk_memmap_path).parent / index_file, knn_path(chunk_memmap_path, exclude)
    index, found = (read_manifest(path.parent)[path.name]["stats"] for path in paths)
    return {**index, **found, "seconds": index["seconds"] + found["seconds"]}
