"""A FAISS index over vectors: chosen by size, tuned by measurement, searched with exclusions (notebook 03).

Distances are squared L2 throughout. The kinds of index differ in what they give up: Flat compares with every
vector and is exact; IVF looks into a few of many lists; HNSW walks a graph; SQ and PQ keep the vectors
themselves in fewer bytes.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import faiss
import numpy as np
from jaxtyping import Float, Int
from tqdm.auto import tqdm

from retro_nb.storage import PathLike, naming, replacing

if sys.platform == "darwin":
    faiss.omp_set_num_threads(1)  # FAISS and PyTorch each bring an OpenMP runtime; two of them crash there

NO_NEIGHBOUR = -1
FLAT_LIMIT = 100_000  # up to here exact search takes seconds; beyond, an inverted file pays
TRAINING_POINTS_PER_LIST = 64
BLOCK = 65536  # vectors held in memory at a time while an index is filled or searched exactly
RECALL_TARGET = 0.95

Distances = Float[np.ndarray, "b k"]
Neighbours = Int[np.ndarray, "b k"]
Vectors = Float[np.ndarray, "c d"]


# the index


def parse_bytes(size: str | int | None) -> int | None:
    """Bytes from "100m", "1G", 4096 or None."""
    if size is None or isinstance(size, int):
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)b?\s*", size.lower())
    if not match:
        raise ValueError(f"{size!r} is not a size in bytes: write e.g. 500m or 4G")
    return int(float(match[1]) * 1024 ** "_kmgt".index(match[2] or "_"))


def choose_index(count: int, dim: int, max_bytes: int | None = None) -> str:
    """An index-factory string for `count` vectors of width `dim`: the most exact that is fast and fits.

    Flat (exact) up to 100,000 vectors; above, an inverted file of about 4·√count lists. If `max_bytes` is
    set, vectors are kept in 8 bits a dimension, or product-quantised to a quarter or an eighth of that.

    Raises:
        ValueError: nothing fits into `max_bytes`.
    """
    lists = max(1, min(round(4 * count**0.5), count // TRAINING_POINTS_PER_LIST))
    ladder = [(f"IVF{lists},Flat", 4 * dim + 8), (f"IVF{lists},SQ8", dim + 8)]
    ladder += [(f"IVF{lists},PQ{dim // part}", dim // part + 8) for part in (4, 8) if dim % part == 0]
    if count <= FLAT_LIMIT:
        ladder.insert(0, ("Flat", 4 * dim))
    for spec, bytes_each in ladder:
        if max_bytes is None or count * bytes_each <= max_bytes:
            return spec
    raise ValueError(
        f"{count} vectors of width {dim} need {count * ladder[-1][1]} bytes in the smallest index, "
        f"{ladder[-1][0]}, but {max_bytes} are allowed: raise max_index_memory_usage or pass index=…"
    )


def build_index(vectors: Vectors, spec: str | None = None, *, progress: bool = False) -> faiss.Index:
    """Train and fill a FAISS index with squared L2 distance.

    Args:
        vectors: one row per chunk; row i gets id i. May be a memory map: it is read in blocks.
        spec: an index-factory string ("Flat", "HNSW32", "IVF256,Flat", "IVF256,PQ48", …), or None for the
            choice of `choose_index`.

    Raises:
        ValueError: there are no vectors, fewer than the index needs to be trained, or `spec` is no index.
    """
    count, dim = vectors.shape
    if not count:
        raise ValueError("no vectors to index: the chunk array is empty")
    spec = spec or choose_index(count, dim)
    try:
        index = faiss.index_factory(dim, spec, faiss.METRIC_L2)
        if not index.is_trained:
            index.train(_training_sample(vectors, index))
    except RuntimeError as error:
        reason = str(error).split(":")[-1].strip()
        raise ValueError(
            f"cannot make the index {spec!r} from {count} vectors of width {dim} ({reason}): an IVFn index "
            f"needs n vectors to train on, a PQ one 256; use 'Flat' for a small corpus"
        ) from error
    for start in tqdm(range(0, count, BLOCK), desc="indexing", disable=not progress):
        index.add(rows_of(vectors, slice(start, start + BLOCK)))
    _tune(index, vectors)
    return index


def rows_of(vectors: Vectors, rows: slice | np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(vectors[rows], dtype=np.float32)


def _training_sample(vectors: Vectors, index: faiss.Index) -> np.ndarray:
    """Enough evenly spaced vectors to train on: k-means gains nothing from more, and they lie in memory."""
    inner = innermost(index)
    lists = inner.nlist if isinstance(inner, faiss.IndexIVF) else 0
    wanted = max(TRAINING_POINTS_PER_LIST * lists, 65536)
    picks = np.linspace(0, len(vectors) - 1, min(wanted, len(vectors))).astype(np.int64)
    return rows_of(vectors, picks)


def innermost(index: faiss.Index) -> faiss.Index:
    index = faiss.downcast_index(index)
    return faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index


def _tune(index: faiss.Index, vectors: Vectors) -> None:
    """Double the effort of an approximate index until it finds 95 % of the true 10 nearest, or all it can."""
    inner = innermost(index)
    if isinstance(inner, faiss.IndexIVF):
        efforts, setting = [2**i for i in range(20) if 2**i < inner.nlist] + [inner.nlist], (inner, "nprobe")
    elif isinstance(inner, faiss.IndexHNSW):
        efforts, setting = [16, 32, 64, 128, 256, 512], (inner.hnsw, "efSearch")
    else:
        return
    queries = rows_of(vectors, np.linspace(0, len(vectors) - 1, min(200, len(vectors))).astype(np.int64))
    k = min(10, len(vectors))
    truth, _ = exact_search(vectors, queries, k)
    reached = -1.0
    for effort in efforts:
        setattr(*setting, effort)
        _, found = search(index, queries, k)
        before, reached = reached, recall(vectors, queries, found, truth)
        if reached >= RECALL_TARGET or 0 <= reached - before < 0.001:
            break


def write_index(index: faiss.Index, path: PathLike) -> None:
    """Save an index, atomically."""
    with replacing(path) as temporary, naming(Path(path)):
        try:
            faiss.write_index(index, str(temporary))
        except RuntimeError as error:  # FAISS does not say which system error it met
            raise OSError(0, str(error).split("Error:")[-1].strip()) from error


def read_index(path: PathLike) -> faiss.Index:
    """Load an index.

    Raises:
        FileNotFoundError: there is none at `path`.
        ValueError: the file is truncated or corrupt.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"there is no index at {path}: build it with chunks_to_index_and_embed")
    try:
        return faiss.read_index(str(path))
    except RuntimeError as error:
        raise ValueError(f"{path} is truncated or corrupt: delete it and build it again") from error


# the search


def search_parameters(index: faiss.Index, selector: faiss.IDSelector | None = None) -> faiss.SearchParameters:
    """FAISS search parameters that keep to the ids of `selector`, whatever the kind of index.

    The effort (lists probed by IVF, candidates kept by HNSW) stays the index's own.
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
    exclude: Sequence[tuple[int, int]] = (),
) -> tuple[Distances, Neighbours]:
    """The k nearest ids of each query, none of them in an excluded range.

    Args:
        index: what to search.
        queries: one vector per row.
        k: how many neighbours.
        exclude: ranges [first, stop) of ids that must not be found, e.g. the query's own document.

    Returns:
        Squared L2 distances, ascending, and ids; inf and −1 where fewer than k are found.

    Raises:
        ValueError: k is less than 1, or the queries have another width than the index.
    """
    if k < 1:
        raise ValueError(f"k = {k} neighbours: ask for 1 or more")
    if queries.shape[1] != index.d:
        raise ValueError(f"queries of width {queries.shape[1]} for an index of width {index.d}: another BERT?")
    selector = None
    for first, stop in exclude:
        others = faiss.IDSelectorNot(faiss.IDSelectorRange(int(first), int(stop)))
        selector = others if selector is None else faiss.IDSelectorAnd(selector, others)
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    distances, ids = index.search(queries, k, params=search_parameters(index, selector))
    return np.where(ids < 0, np.float32(np.inf), distances), ids


def exact_search(
    vectors: Vectors,
    queries: Float[np.ndarray, "b d"],
    k: int,
    *,
    exclude: Sequence[tuple[int, int]] = (),
) -> tuple[Distances, Neighbours]:
    """As `search`, by comparing every query with every vector: the measure of every index."""
    distances = np.full((len(queries), k), np.inf, dtype=np.float32)
    ids = np.full((len(queries), k), NO_NEIGHBOUR, dtype=np.int64)
    for start in range(0, len(vectors), BLOCK):
        block = rows_of(vectors, slice(start, start + BLOCK))
        flat = faiss.IndexFlatL2(block.shape[1])
        flat.add(block)
        shifted = [(first - start, stop - start) for first, stop in exclude]
        near, where = search(flat, queries, k, exclude=shifted)
        distances = np.concatenate([distances, near], axis=1)
        ids = np.concatenate([ids, np.where(where < 0, NO_NEIGHBOUR, where + start)], axis=1)
        best = np.argsort(distances, axis=1, kind="stable")[:, :k]
        distances, ids = (np.take_along_axis(a, best, axis=1) for a in (distances, ids))
    return distances, ids


def recall(vectors: Vectors, queries: np.ndarray, found: Neighbours, true_distances: Distances) -> float:
    """Share of the true neighbours that were found. Ties count: as near as the k-th is near enough."""
    hits = total = 0
    for query, ids, truth in zip(queries, found, true_distances, strict=True):
        truth = truth[np.isfinite(truth)]
        near = ((rows_of(vectors, ids[ids >= 0]) - query) ** 2).sum(axis=1)
        total += len(truth)
        hits += min(len(truth), int((near <= truth[-1:] * (1 + 1e-5) + 1e-6).sum())) if len(truth) else 0
    return hits / total if total else 1.0
