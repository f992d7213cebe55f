"""A FAISS index over vectors: chosen by size, tuned by measurement, searched with exclusions (notebook 03).

Distances are squared L2 throughout. The kinds of index differ in what they give up: Flat compares with every
vector and is exact; IVF probes a few of many inverted lists; HNSW walks a graph; SQ and PQ store the vectors in
fewer bytes.
"""

import errno
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

import faiss
import numpy as np
from faiss.contrib.ondisk import merge_ondisk
from jaxtyping import Float, Int
from tqdm.auto import tqdm

from retro_nb.common.arrays import PathLike, explain_write_errors, replacing

if sys.platform == "darwin":
    faiss.omp_set_num_threads(1)  # FAISS and PyTorch each bring an OpenMP runtime; two of them crash there
if hasattr(os, "register_at_fork"):  # a forked child lacks OpenMP's threads and would wait for them for ever
    os.register_at_fork(after_in_child=lambda: faiss.omp_set_num_threads(1))

NO_NEIGHBOUR = -1
FLAT_LIMIT = 100_000  # up to here exact search takes seconds; beyond, an inverted file pays off
TRAINING_POINTS_PER_LIST = 64
BLOCK = 65536  # vectors held in memory at a time while an index is filled or searched exactly
GROUP = 400  # queries compared together: as a matrix product they take a tenth of the time
RECALL_TARGET = 0.95
PQ_CENTROIDS = 256  # per part of a vector: one byte encodes a part
USUAL = "e.g. 'Flat', 'IVF256,Flat', 'IVF256,PQ48' or 'HNSW32', or None for a choice by size"
OVERHEAD = 4096  # bytes of an index file besides its vectors and tables
# Kinds that exclude ids during the search; the others are asked for more ids, and excluded ones are dropped.
SELECTIVE = (faiss.IndexFlat, faiss.IndexIVF, faiss.IndexHNSW, faiss.IndexScalarQuantizer)

# Kinds that build, and then cannot search without some ids, or to which ids are not given by `add`.
REFUSED = (
    faiss.IndexIVFAdditiveQuantizer,
    faiss.IndexIVFAdditiveQuantizerFastScan,
    faiss.IndexIVFSpectralHash,
    faiss.IndexIVFPQR,
    faiss.Index2Layer,
    faiss.IndexIDMap,
)

Distances = Float[np.ndarray, "b k"]
Neighbours = Int[np.ndarray, "b k"]
Ranges = Sequence[tuple[int, int]]
Run = tuple[slice, tuple[int, int]]  # queries of one document: their rows, and its range of ids
Vectors = Float[np.ndarray, "c d"]


# the index


def parse_bytes(size: str | int | None) -> int | None:
    """Number of bytes in a size such as "100m", "1G", 4096 or None."""
    if size is None or isinstance(size, int):
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)b?\s*", size.lower())
    if not match:
        raise ValueError(f"{size!r} is not a size in bytes: write e.g. 500m or 4G")
    return int(float(match[1]) * 1024 ** "_kmgt".index(match[2] or "_"))


def usual_lists(count: int) -> int:
    """Number of inverted lists for `count` vectors: the power of two nearest 4·√count."""
    return 2 ** round(math.log2(4 * max(count, 1) ** 0.5))


def choose_index(count: int, dim: int, max_bytes: int | None = None) -> str:
    """An index-factory string for `count` vectors of width `dim`: the most exact that is fast and fits.

    Flat (exact) up to 100,000 vectors; above, an inverted file of about 4·√count lists, a power of two, so that
    an index can grow for a while before the choice changes. If `max_bytes` requires it, vectors are stored in 8 bits
    a dimension, or product-quantised to a quarter or an eighth of that.

    Raises:
        ValueError: nothing fits into `max_bytes`.
    """
    lists = max(1, min(usual_lists(count), count // TRAINING_POINTS_PER_LIST))
    tables = OVERHEAD + lists * (4 * dim + 8)  # the lists' centroids and lengths
    ladder = [(f"IVF{lists},Flat", tables + count * (4 * dim + 8))]
    ladder += [(f"IVF{lists},SQ8", tables + 8 * dim + count * (dim + 8))]
    if count >= PQ_CENTROIDS:
        pq = tables + 4 * PQ_CENTROIDS * dim
        ladder += [(f"IVF{lists},PQ{dim // p}", pq + count * (dim // p + 8)) for p in (4, 8) if dim % p == 0]
    if count <= FLAT_LIMIT:
        ladder.insert(0, ("Flat", OVERHEAD + count * 4 * dim))
    for spec, size in ladder:
        if max_bytes is None or size <= max_bytes:
            return spec
    spec, size = min(ladder, key=lambda step: step[1])
    raise ValueError(
        f"{count} vectors of width {dim} need {size} bytes in the smallest index, {spec}, but {max_bytes} are "
        f"allowed: raise max_index_memory_usage or pass index=…"
    )


def empty_index(spec: str, dim: int) -> faiss.Index:
    """The index of a factory string, untrained, for vectors of this width.

    Raises:
        ValueError: FAISS does not know the string for this width, or the index could not leave ids out of a search.
    """
    try:
        index = faiss.index_factory(dim, spec, faiss.METRIC_L2)
    except RuntimeError as error:
        reason = str(error).split(":")[-1].strip()
        raise ValueError(f"{spec!r} is no index for vectors of width {dim} ({reason}): pass {USUAL}") from error
    if isinstance(innermost(index), REFUSED):
        kind = type(innermost(index)).__name__
        raise ValueError(f"{spec!r} makes an {kind}, which cannot leave documents out of a search: pass {USUAL}")
    return index


def build_index(vectors: Vectors, spec: str | None = None, *, progress: bool = False) -> faiss.Index:
    """Train and fill a FAISS index with squared L2 distance.

    Besides the index, memory holds the training vectors (64 per inverted list, at least 65,536), and then one block
    of 65,536 vectors at a time.

    Args:
        vectors: one row per chunk; row i gets id i. May be a memory map: it is read in blocks.
        spec: an index-factory string ("Flat", "HNSW32", "IVF256,Flat", "IVF256,PQ48", …), or None for the
            choice of `choose_index`.

    Raises:
        ValueError: there are no vectors, too few to train the index, or `spec` is not an index-factory string.
        FloatingPointError: a vector is not finite, as in stores whose vectors were not checked.
    """
    with _explaining(spec, vectors):
        index = train_index(vectors, spec)
        for start in tqdm(range(0, len(vectors), BLOCK), desc="indexing", disable=not progress):
            rows = rows_of(vectors, slice(start, start + BLOCK))
            if not np.isfinite(rows).all():
                _refuse_not_finite(vectors)
            index.add(rows)
        tune(index, vectors)
    return index


def _refuse_not_finite(vectors: Vectors) -> NoReturn:
    """Name the chunks whose vectors are not finite: no distance to them means anything."""
    blocks = range(0, len(vectors), BLOCK)
    bad = [start + np.flatnonzero(~np.isfinite(vectors[start : start + BLOCK]).all(axis=1)) for start in blocks]
    numbers = np.concatenate(bad)
    raise FloatingPointError(
        f"{len(numbers)} of {len(vectors)} vectors are not finite, the first is that of chunk {numbers[0]}: embed the "
        f"chunks again (REPROCESS=1)"
    )


def train_index(vectors: Vectors, spec: str | None = None) -> faiss.Index:
    """Train an empty index on these vectors: the first step of `build_index`."""
    count, dim = vectors.shape
    if not count:
        raise ValueError("no vectors to index: the chunk array is empty")
    with _explaining(spec, vectors):
        index = empty_index(spec or choose_index(count, dim), dim)
        if hasattr(innermost(index), "do_polysemous_training"):
            innermost(index).do_polysemous_training = False  # takes seconds per PQ byte, for a search not used here
        if not index.is_trained:
            sample = _training_sample(vectors, index)
            if not np.isfinite(sample).all():
                _refuse_not_finite(vectors)
            index.train(sample)
    return index


@contextmanager
def _explaining(spec: str | None, vectors: Vectors) -> Iterator[None]:
    """Replace FAISS's errors, which name places in its code, with one that names the index, the vectors and a fix."""
    try:
        yield
    except RuntimeError as error:
        (count, dim), reason = vectors.shape, str(error).split(":")[-1].strip()
        spec = spec or choose_index(count, dim)
        raise ValueError(
            f"cannot make the index {spec!r} from {count} vectors of width {dim} ({reason}): an IVFn index "
            f"needs n vectors to train on, a PQ one {PQ_CENTROIDS}; use 'Flat' for a small corpus"
        ) from error


def rows_of(vectors: Vectors, rows: slice | np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(vectors[rows], dtype=np.float32)


def _training_sample(vectors: Vectors, index: faiss.Index) -> np.ndarray:
    """Evenly spaced vectors to train on; more would take memory without improving k-means."""
    inner = innermost(index)
    lists = inner.nlist if isinstance(inner, faiss.IndexIVF) else 0
    wanted = max(TRAINING_POINTS_PER_LIST * lists, 65536)
    picks = np.linspace(0, len(vectors) - 1, min(wanted, len(vectors))).astype(np.int64)
    return rows_of(vectors, picks)


def innermost(index: faiss.Index) -> faiss.Index:
    index = faiss.downcast_index(index)
    return faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index


def tune(index: faiss.Index, vectors: Vectors) -> None:
    """Double the search effort of an approximate index until recall@10 reaches 95 %.

    An index that never reaches it (its vectors are too coarse) keeps the least effort within 0.01 of its best recall.
    """
    inner = innermost(index)
    if isinstance(inner, faiss.IndexIVF):
        efforts, setting = [2**i for i in range(20) if 2**i < inner.nlist] + [inner.nlist], (inner, "nprobe")
    elif isinstance(inner, faiss.IndexHNSW):
        efforts, setting = [16, 32, 64, 128, 256, 512], (inner.hnsw, "efSearch")
    else:
        return
    queries = rows_of(vectors, np.linspace(0, len(vectors) - 1, min(GROUP, len(vectors))).astype(np.int64))
    k, recalls = min(10, len(vectors)), {}
    _, truth = exact_search(vectors, queries, k)
    for effort in efforts:
        setattr(*setting, effort)
        _, found = search(index, queries, k)
        recalls[effort] = recall(vectors, queries, found, truth)
        if recalls[effort] >= RECALL_TARGET:
            return
    enough = max(recalls.values()) - 0.01
    setattr(*setting, min(effort for effort in efforts if recalls[effort] >= enough))


def write_index(index: faiss.Index, path: PathLike) -> None:
    """Save an index, atomically."""
    with replacing(path) as temporary, explain_write_errors(Path(path)):
        try:
            faiss.write_index(index, str(temporary))
        except RuntimeError as error:  # FAISS has the system's error in a text of its own
            full = os.strerror(errno.ENOSPC)
            known = (errno.ENOSPC, full) if full in str(error) else (0, str(error).split("Error:")[-1].strip())
            raise OSError(*known) from error


def index_files(path: PathLike) -> list[Path]:
    """Files of an index: one, or two if the inverted lists are stored separately (`retro_nb.store.cluster`)."""
    return [file for file in (Path(path), lists_path(path)) if file.exists()]


def lists_path(path: PathLike) -> Path:
    """Path of an index's inverted lists if they are stored separately."""
    return Path(f"{path}.lists")


def merge_on_disk(trained: faiss.Index, shards: Sequence[PathLike], vectors: Vectors, path: PathLike) -> None:
    """Merge shards into one inverted file, tune it and save it, with its lists in a separate file.

    Neither the shards nor the lists have to fit into memory.

    Args:
        trained: the empty index that every shard was made from. It becomes the merged one.
        shards: the shards' files, in order of their ids.
        vectors: the vectors of all shards.
        path: the index file; the lists go to `lists_path(path)`.
    """
    path = Path(path).resolve()
    with replacing(lists_path(path)) as temporary, explain_write_errors(path):
        merge_ondisk(trained, [str(shard) for shard in shards], str(temporary))
        tune(trained, vectors)
    lists = faiss.downcast_InvertedLists(faiss.extract_index_ivf(trained).invlists)
    lists.filename = lists_path(path).name  # without a folder, so that a store can be moved
    write_index(trained, path)


def read_index(path: PathLike, *, mapped: bool = False) -> faiss.Index:
    """Load an index; separately stored lists stay on disk and are memory-mapped.

    Args:
        path: the index file.
        mapped: memory-map the vectors too, read-only.

    Raises:
        FileNotFoundError: there is none at `path`.
        ValueError: the file is truncated or corrupt.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"there is no index at {path}: build it with chunks_to_index_and_embed")
    try:
        if not lists_path(path).exists():
            return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if mapped else 0)
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)  # leaves separate lists to us
        _map_lists(index, lists_path(path))
        return index
    except (RuntimeError, MemoryError) as error:  # a corrupt length asks for too much memory
        raise ValueError(f"{path} is truncated or corrupt: delete it and build it again") from error


def _map_lists(index: faiss.Index, path: Path) -> None:
    """Memory-map the inverted lists in this file, read-only, if the index refers to it.

    FAISS's IO_FLAG_ONDISK_SAME_DIR would open the file for writing, and print its path each time.
    """
    inner = innermost(index)
    lists = faiss.downcast_InvertedLists(inner.invlists) if isinstance(inner, faiss.IndexIVF) else None
    if isinstance(lists, faiss.OnDiskInvertedLists) and lists.filename == path.name:
        if path.stat().st_size != lists.totsize:
            raise RuntimeError(f"{path} has another size")  # reading beyond a mapped file's end kills the process
        lists.filename, lists.read_only = str(path), True
        lists.do_mmap()


# the search


def search_parameters(index: faiss.Index, selector: faiss.IDSelector | None = None) -> faiss.SearchParameters:
    """FAISS search parameters that restrict any kind of index to the ids of `selector`.

    They keep the index's search effort (lists probed by IVF, candidates kept by HNSW).
    """
    if isinstance(faiss.downcast_index(index), faiss.IndexPreTransform):
        return faiss.SearchParametersPreTransform(index_params=search_parameters(innermost(index), selector))
    index = innermost(index)
    if isinstance(index, faiss.IndexIVF):
        return faiss.SearchParametersIVF(sel=selector, nprobe=index.nprobe)
    if isinstance(index, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(sel=selector, efSearch=index.hnsw.efSearch)
    return faiss.SearchParameters(sel=selector)


def search(
    index: faiss.Index,
    queries: Float[np.ndarray, "b d"],
    k: int,
    *,
    exclude: Ranges = (),
    own: Int[np.ndarray, "b 2"] | None = None,
) -> tuple[Distances, Neighbours]:
    """Find the k nearest ids of each query outside the excluded ranges.

    Args:
        index: the index to search.
        queries: one vector per row.
        k: number of neighbours.
        exclude: ranges [first, stop) of ids that must not be found.
        own: one more such range per query, that of its own document. Consecutive queries with the same range are
            searched together.

    Returns:
        Squared L2 distances as the index computes them, ascending, and ids; inf and −1 where fewer than k are found.

    Raises:
        ValueError: k is less than 1, or queries and index differ in width.
    """
    if k < 1:
        raise ValueError(f"k = {k} neighbours: ask for 1 or more")
    if queries.shape[1] != index.d:
        raise ValueError(f"queries of width {queries.shape[1]} for an index of width {index.d}: another BERT?")
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    if is_exact(index):
        stored = faiss.rev_swig_ptr(faiss.downcast_index(index).get_xb(), index.ntotal * index.d)
        return exact_search(stored.reshape(-1, index.d), queries, k, exclude=exclude, own=own)
    if own is None or not len(own):
        return _search_outside(index, queries, k, exclude)
    found = [_search_outside(index, queries[rows], k, [*exclude, document]) for rows, document in _runs(own)]
    distances, ids = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return distances, ids


def is_exact(index: faiss.Index) -> bool:
    """Whether a search compares each query with all the vectors themselves (a flat L2 index)."""
    whole = faiss.downcast_index(index)
    return isinstance(whole, faiss.IndexFlat) and whole.metric_type == faiss.METRIC_L2


def _runs(own: Int[np.ndarray, "b 2"]) -> list[Run]:
    """Runs of consecutive queries with the same own range."""
    edges = [0, *(np.flatnonzero(np.any(own[1:] != own[:-1], axis=1)) + 1), len(own)]
    return [(slice(int(start), int(stop)), tuple(own[start].tolist())) for start, stop in pairwise(edges)]


def _search_outside(index: faiss.Index, queries: np.ndarray, k: int, exclude: Ranges) -> tuple[Distances, Neighbours]:
    if not exclude:
        distances, ids = index.search(queries, k)
    elif isinstance(innermost(index), SELECTIVE):
        selector = None
        for first, stop in exclude:
            others = faiss.IDSelectorNot(faiss.IDSelectorRange(int(first), int(stop)))
            selector = others if selector is None else faiss.IDSelectorAnd(selector, others)
        distances, ids = index.search(queries, k, params=search_parameters(index, selector))
    else:
        more = sum(max(0, int(stop) - int(first)) for first, stop in exclude)
        distances, ids = index.search(queries, min(k + more, max(k, index.ntotal)))
        dropped = np.any([(ids >= first) & (ids < stop) for first, stop in exclude], axis=0)
        order = np.argsort(dropped, axis=1, kind="stable")[:, :k]  # dropped ids to the end, the others in order
        ids = np.take_along_axis(np.where(dropped, NO_NEIGHBOUR, ids), order, axis=1)
        distances = np.take_along_axis(distances, order, axis=1)
    return np.where(ids < 0, np.float32(np.inf), distances), ids


def exact_search(
    vectors: Vectors,
    queries: Float[np.ndarray, "b d"],
    k: int,
    *,
    exclude: Ranges = (),
    own: Int[np.ndarray, "b 2"] | None = None,
) -> tuple[Distances, Neighbours]:
    """Search like `search`, but compare each query with every vector that is not excluded: the ground truth.

    A distance is |q|² + |v|² − 2q·v in float32: exact to about a millionth of |q|² + |v|². Ties go to the lower id.
    """
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    distances = np.full((len(queries), k), np.inf, dtype=np.float32)
    ids = np.full((len(queries), k), NO_NEIGHBOUR, dtype=np.int64)
    comparisons = list(_comparisons(len(queries), len(vectors), exclude, own))
    for start in range(0, len(vectors), BLOCK):
        block = rows_of(vectors, slice(start, start + BLOCK))
        for rows, stretches in comparisons:
            for first, stop in stretches:
                first, stop = max(first - start, 0), min(stop - start, len(block))
                if first < stop:
                    near, where = faiss.knn(queries[rows], block[first:stop], min(k, stop - first))
                    where[where >= 0] += start + first
                    _keep_nearest(distances[rows], ids[rows], near, where)
    return np.where(ids < 0, np.float32(np.inf), distances), ids


def _comparisons(
    queries: int, count: int, exclude: Ranges, own: Int[np.ndarray, "b 2"] | None
) -> Iterator[tuple[slice, Ranges]]:
    """Rows of queries, each with the ranges of the `count` vectors to compare them with.

    The queries of a group of documents are compared together with all vectors outside the group; then those of each
    document with the rest of the group.
    """
    if own is None or not queries:
        yield slice(0, queries), _outside(count, exclude)
        return
    for runs in _groups(own):
        first, stop = min(document[0] for _, document in runs), max(document[1] for _, document in runs)
        yield slice(runs[0][0].start, runs[-1][0].stop), _outside(count, [*exclude, (first, stop)])
        for rows, document in runs:
            yield rows, _outside(count, [*exclude, document, (0, first), (stop, count)])


def _groups(own: Int[np.ndarray, "b 2"]) -> Iterator[list[Run]]:
    """Group consecutive documents so that each group has at least GROUP queries, if there are that many."""
    group, begun = [], 0
    for rows, document in _runs(own):
        group.append((rows, document))
        if rows.stop == len(own) or min(rows.stop - begun, len(own) - rows.stop) >= GROUP:  # enough is left
            yield group
            group, begun = [], rows.stop


def _outside(count: int, ranges: Ranges) -> list[tuple[int, int]]:
    """The parts of 0 … count − 1 that no range covers."""
    stretches, free = [], 0
    for first, stop in sorted((int(first), int(stop)) for first, stop in [*ranges, (count, count + 1)]):
        if first < stop:
            if free < min(first, count):
                stretches.append((free, min(first, count)))
            free = max(free, stop)
    return stretches


def _keep_nearest(distances: Distances, ids: Neighbours, near: np.ndarray, where: np.ndarray) -> None:
    """Merge new candidates into the nearest found so far, in place."""
    near, where = np.concatenate([distances, near], axis=1), np.concatenate([ids, where], axis=1)
    best = np.lexsort((where, near))[:, : distances.shape[1]]
    distances[:], ids[:] = (np.take_along_axis(found, best, axis=1) for found in (near, where))


def recall(vectors: Vectors, queries: Float[np.ndarray, "b d"], found: Neighbours, truth: Neighbours) -> float:
    """Share of the true neighbours that were found. Ties count: any id as near as the true k-th is a hit."""
    hits = total = 0
    for query, ids, true in zip(queries, found, truth, strict=True):
        near, nearest = (((rows_of(vectors, row[row >= 0]) - query) ** 2).sum(axis=1) for row in (ids, true))
        total += len(nearest)
        hits += min(len(nearest), int((near <= nearest.max(initial=0) * (1 + 1e-5)).sum()))
    return hits / total if total else 1.0
