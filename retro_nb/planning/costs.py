"""Cost of a build on this machine, estimated beforehand: seconds, bytes on disk and memory of each step.

Bytes follow from counts. Seconds follow from the numbers of tokens, chunks and comparisons, divided by this machine's
rates, which `measure` takes from a small sample. A comparison is one distance between two vectors. Exact search needs
one for each pair of chunks of different documents. An inverted file of s lists (IVFs) needs

    to build       10·T·s for k-means on T vectors, and one for each vector with each list
    per query      s with the lists' centres, then the vectors of 64 lists: 32 or 64 were needed for the target recall
                   with 10,000 to 1,000,000 vectors (benchmarks/results/growth-cpu.json)

Lists are read one vector at a time, several times slower than the matrix products of the other steps. Product
quantisation (PQ) is as slow. With each of its 256 centroids it needs 25·T' comparisons for k-means on T' vectors, at
most 65,536, and one for each vector.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import faiss
import numpy as np
import psutil
import torch
from jaxtyping import Int

from retro_nb.common.arrays import PathLike
from retro_nb.common.devices import best_device
from retro_nb.store.embedding import bert_embed, frames_for_bert, sizes_on
from retro_nb.store.index import (
    BLOCK,
    GROUP,
    PQ_CENTROIDS,
    TRAINING_POINTS_PER_LIST,
    build_index,
    exact_search,
    innermost,
    search,
    write_index,
)
from retro_nb.store.knn import own_ranges
from retro_nb.text.tokens import TextTokenizer, get_tokenizer

HEADER = 128  # bytes of a .npy file before its rows
KMEANS_ROUNDS, PQ_ROUNDS = 10, 25  # FAISS's for an inverted file, and for product quantisation
PROBED = 64  # lists that a query reads
OF_A_DOCUMENT = 3  # memory of chunking a document, in multiples of its size (benchmarks/chunking_memory.py)
VECTORS, QUERIES = 16384, 2 * GROUP  # used to measure the search
LISTS, READ = 64, 16  # of the inverted file measured: its lists, and how many a query reads
EMBEDDING_SECONDS = 3.0  # of measuring the embedding, or one batch if that takes longer


class Size(NamedTuple):
    """The counts of a corpus that its costs depend on."""

    documents: int  # without those that have no token
    bytes: int  # of text, in UTF-8
    tokens: int
    chunks: int
    seqs: int
    pairs: int  # of chunks of different documents; (a, b) and (b, a) count as two
    longest: int  # bytes of the longest document
    titles: int  # bytes of documents.jsonl, roughly


class Rates(NamedTuple):
    """Amounts per second on this machine."""

    tokens: float  # read, tokenised and cut
    chunks: float  # embedded
    comparisons: float  # by matrix products: of exact search, k-means and filling an inverted file
    queries: float  # of exact search without its comparisons: the overhead of short documents
    listed: float  # comparisons in the lists of an inverted file
    indexed: float  # bytes copied into an index and written


class Step(NamedTuple):
    """An estimate for one step of a build."""

    name: str
    seconds: float
    disk: int  # bytes of the files written
    memory: int  # peak in bytes, roughly


# the model


def lists_of(spec: str, dim: int) -> int:
    """Number of inverted lists of an index factory string; 0 if it is not an inverted file.

    Raises:
        ValueError: `spec` is not a factory string.
    """
    index = _empty(spec, dim)  # owns the inner index, so it must outlive that
    inner = innermost(index)
    return inner.nlist if isinstance(inner, faiss.IndexIVF) else 0


def _empty(spec: str, dim: int) -> faiss.Index:
    try:
        return faiss.index_factory(dim, spec, faiss.METRIC_L2)
    except RuntimeError as error:
        raise ValueError(f"{spec!r} is no index: pass e.g. Flat or IVF256,Flat; None chooses one by size") from error


def index_bytes(spec: str, count: int, dim: int) -> int:
    """Bytes of an index of `count` vectors: exact for Flat and IVF…,Flat; a few kB too low for others."""
    index = _empty(spec, dim)
    inner = innermost(index)
    size = len(faiss.serialize_index(index)) + count * getattr(inner, "code_size", 4 * dim)
    if isinstance(inner, faiss.IndexIVF):  # ids; centres and lengths of the lists
        size += 8 * count + inner.nlist * (4 * dim + 8)
    if isinstance(inner, faiss.IndexHNSW):  # links, and their offsets
        size += (4 * inner.hnsw.nb_neighbors(0) + 16) * count
    return size


def index_seconds(spec: str, count: int, dim: int, rates: Rates) -> float:
    """Seconds to train, fill and write a Flat or IVF… index. HNSW is not modelled and takes far longer."""
    lists = lists_of(spec, dim)
    trained_on = min(count, max(TRAINING_POINTS_PER_LIST * lists, BLOCK))
    compared = lists * (KMEANS_ROUNDS * trained_on + count)
    compared += GROUP * count if lists else 0  # exact neighbours, to choose the number of lists to read
    slow, index = 0, _empty(spec, dim)
    if isinstance(innermost(index), faiss.IndexIVFPQ):
        slow = PQ_CENTROIDS * (PQ_ROUNDS * min(count, PQ_CENTROIDS**2) + count)
    return compared / rates.comparisons + slow / rates.listed + index_bytes(spec, count, dim) / rates.indexed


def comparisons(count: int, lists: int, probed: int = PROBED) -> float:
    """Vectors compared with a query: all; with an inverted file, the lists' centres and the vectors in some lists."""
    return lists + count * min(1.0, probed / lists) if lists else float(count)


def search_seconds(spec: str, count: int, dim: int, pairs: int, rates: Rates) -> float:
    """Seconds to find the neighbours of every chunk, without `max_similarity`, which requests more neighbours."""
    if lists := lists_of(spec, dim):
        return count * comparisons(count, lists) / rates.listed
    return count / rates.queries + pairs / rates.comparisons


def steps(
    size: Size, rates: Rates, *, chunk_size: int, knn: int, dim: int, index: str, tokenizer: TextTokenizer
) -> tuple[Step, ...]:
    """Estimates for chunking, embedding, indexing and searching.

    Bytes on disk are exact for the arrays, and for the index if it is Flat. Memory includes what this process uses
    now: call this once the libraries and the BERT are loaded.
    """
    count, now, block = size.chunks, psutil.Process().memory_info().rss, BLOCK * 4 * dim
    row = (chunk_size + 1) * tokenizer.dtype.itemsize + 16 + 4 + 4  # chunk, span, bytes, document
    chunked = 5 * HEADER + count * row + 4 * size.seqs
    chunked += size.titles + len(tokenizer.backend.to_str().encode())
    indexed = index_bytes(index, count, dim)
    sample = min(count, max(TRAINING_POINTS_PER_LIST * lists_of(index, dim), BLOCK)) * 4 * dim
    growing = indexed + max(indexed // 3, min(block, 4 * dim * count), sample)
    searching = indexed + min(block, 4 * dim * count) + 4 * count
    seconds = index_seconds(index, count, dim, rates), search_seconds(index, count, dim, size.pairs, rates)
    return (
        Step("chunk", size.tokens / rates.tokens, chunked, now + OF_A_DOCUMENT * size.longest),
        Step("embed", count / rates.chunks, HEADER + 4 * dim * count, now + count),  # one mark of a byte per chunk
        Step("index", seconds[0], indexed, now + growing),
        Step("search", seconds[1], HEADER + 4 * knn * count, now + searching),
    )


# the measurement


def measure(
    rows: Int[np.ndarray, "c m"],
    tokenizer: TextTokenizer,
    *,
    bert: PathLike | None,
    dim: int,
    knn: int,
    tokens_per_second: float,
    chunks_per_document: float,
    lists: bool,
) -> Rates:
    """Measure rates: embed chunks of the corpus, and search random vectors in documents of its mean length.

    Takes about five seconds on a laptop, one of them for an inverted file if `lists` is true.
    """
    vectors = np.random.default_rng(0).normal(size=(VECTORS, dim)).astype(np.float32)
    queries = vectors[:QUERIES]
    own = own_ranges(np.arange(VECTORS) // max(1, round(chunks_per_document)), range(QUERIES))
    pair = _seconds(lambda: exact_search(vectors, queries, knn)) / (QUERIES * VECTORS)
    alone = _seconds(lambda: exact_search(vectors[:QUERIES], queries, knn, own=own)) / QUERIES
    listed = 1 / pair
    if lists:
        index = build_index(vectors, f"IVF{LISTS},Flat")
        index.nprobe = READ
        few = slice(QUERIES // 4)
        read = LISTS + VECTORS * READ // LISTS
        listed = queries[few].shape[0] * read / _seconds(lambda: search(index, queries[few], knn, own=own[few]))
    with tempfile.TemporaryDirectory() as folder:
        copied = _seconds(lambda: write_index(build_index(vectors, "Flat"), Path(folder) / "index"))
    return Rates(
        tokens=tokens_per_second,
        chunks=_embedding_rate(rows, tokenizer, bert),
        comparisons=1 / pair,
        queries=1 / max(alone - QUERIES * pair, pair),
        listed=listed,
        indexed=vectors.nbytes / copied,
    )


def _seconds(work: Callable[[], object]) -> float:
    """The shorter of two timings, because another process may disturb one."""
    times = []
    for _ in range(2):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def _embedding_rate(rows: Int[np.ndarray, "c m"], tokenizer: TextTokenizer, bert: PathLike | None) -> float:
    """Chunks embedded per second, in batches of similar length as in the build.

    Extrapolates from some of the batches by their tokens, padding included.
    """
    size, pad = sizes_on(best_device()).batch, get_tokenizer(bert).ids.pad
    frames = frames_for_bert(torch.from_numpy(rows), tokenizer, bert=bert)
    frames = frames.repeat(-(-4 * size // len(frames)), 1)  # four batches at least
    lengths, order = (frames != pad).sum(dim=1).sort(stable=True)
    batches = [frames[rows, :longest] for rows, longest in _batches(order, lengths, size)]
    bert_embed(batches[-1], pad_id=pad, bert=bert)  # the first call loads the BERT and warms up
    tokens, started, seconds = 0, time.perf_counter(), 0.0
    for number in np.random.default_rng(0).permutation(len(batches)):
        bert_embed(batches[number], pad_id=pad, bert=bert)
        tokens, seconds = tokens + batches[number].numel(), time.perf_counter() - started
        if seconds > EMBEDDING_SECONDS:
            break
    return tokens / seconds * len(frames) / sum(batch.numel() for batch in batches)


def _batches(order: torch.Tensor, lengths: torch.Tensor, size: int) -> list[tuple[torch.Tensor, int]]:
    """(rows, longest length) of batches of rows of similar length."""
    return [(rows, int(own[-1])) for rows, own in zip(order.split(size), lengths.split(size), strict=True)]
