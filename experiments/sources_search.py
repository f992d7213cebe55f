"""Nearest chunks for experiments/sources.py: exact, on a GPU or a CPU, by MiniLM's vectors or by BM25.

Scores of a block of queries and a tile of the database are computed at once; the lower, the nearer. Of each `GROUP`
scores only the lowest is looked at first: the k lowest scores lie in the k groups with the lowest minima.
"""

import warnings
from typing import Protocol

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Float32, Int, Integer
from torch import Tensor
from tqdm.auto import tqdm

from retro_nb.store.index import NO_NEIGHBOUR
from retro_nb.text.tokens import SpecialIds

GROUP = 64
TILES = {"cuda": (2048, 2**17), "cpu": (256, 2**14)}  # queries and database chunks compared at a time
K1, B = 1.5, 0.75  # BM25's usual parameters: how soon a word's repetitions stop to count, and how much length does


class Compared(Protocol):
    """A database on a device, in tiles."""

    def queries(self, rows: Int[np.ndarray, " b"]) -> Tensor:
        """What is compared of some chunks."""

    def scores(self, queries: Tensor, tile: int) -> Float[Tensor, "b _"]:
        """Of each query with each chunk of a tile."""


def nearest(
    vectors: Float32[np.ndarray, "c d"],
    queries: Int[np.ndarray, " e"],
    database: Int[np.ndarray, " _"],
    doc_ids: Int[np.ndarray, " c"],
    k: int,
    device: torch.device,
) -> tuple[Float32[np.ndarray, "e k"], Int[np.ndarray, "e k"]]:
    """Squared distances and ids of the nearest chunks in the database, none of the query's own document.

    `queries` and `database` are ascending chunk ids. Where there are fewer than k, ids are −1.
    """
    found, near = search(Vectors(vectors, database, device), queries, database, doc_ids, k, device)
    return found + np.square(vectors[queries]).sum(axis=1, keepdims=True), near


def best_matches(
    chunks: Integer[np.ndarray, "c m"],
    v: int,
    special: SpecialIds,
    queries: Int[np.ndarray, " e"],
    database: Int[np.ndarray, " _"],
    doc_ids: Int[np.ndarray, " c"],
    k: int,
    device: torch.device,
) -> tuple[Float32[np.ndarray, "e k"], Int[np.ndarray, "e k"]]:
    """As `nearest`, by BM25 (Robertson and Zaragoza 2009): scores, the highest first.

    Words are the v tokens but the special ones. RETRO gains more from such a retriever (Doostmohammadi et al. 2023).
    """
    found, near = search(BM25(chunks, v, special, database, device), queries, database, doc_ids, k, device)
    return -found, near


class Vectors:
    """Scores are squared distances, less the query's own square."""

    def __init__(self, vectors: Float32[np.ndarray, "c d"], database: Int[np.ndarray, " _"], device: torch.device):
        self.vectors, self.device, tile = vectors, device, TILES[device.type][1]
        self.tiles = torch.from_numpy(vectors[database]).to(device).split(tile)
        self.norms = [each.square().sum(dim=1) for each in self.tiles]

    def queries(self, rows: Int[np.ndarray, " b"]) -> Float32[Tensor, "b d"]:
        return torch.from_numpy(np.asarray(self.vectors[rows])).to(self.device)

    def scores(self, queries: Float32[Tensor, "b d"], tile: int) -> Float32[Tensor, "b _"]:
        return torch.addmm(self.norms[tile], queries, self.tiles[tile].T, alpha=-2)


class BM25:
    """Scores are −Σ over the query's words of idf(w) · f / (f + k1 · (1 − b + b · length / mean length))."""

    def __init__(
        self,
        chunks: Integer[np.ndarray, "c m"],
        v: int,
        special: SpecialIds,
        database: Int[np.ndarray, " _"],
        device: torch.device,
    ) -> None:
        self.chunks, self.v, self.special, self.device, tile = chunks, v, special, device, TILES[device.type][1]
        counts = [self._counts(database[i : i + tile]) for i in range(0, len(database), tile)]
        having, words = (sum(each.sum(dim=0).to_dense() for each in side) for side in (map(_ones, counts), counts))
        self.idf = torch.log1p((len(database) - having + 0.5) / (having + 0.5))
        mean = words.sum() / len(database)
        self.tiles = [self._weighted(each, mean) for each in counts]

    def _counts(self, rows: Int[np.ndarray, " b"]) -> Tensor:
        """How often each word stands in each of these chunks, a sparse (b, v) matrix."""
        tokens = torch.from_numpy(self.chunks[rows].astype(np.int64)).to(self.device)
        row, place = (~is_special(tokens, self.special)).nonzero(as_tuple=True)
        ones = torch.ones(len(row), device=self.device)
        return _sparse(torch.stack([row, tokens[row, place]]), ones, (len(rows), self.v))

    def _weighted(self, counts: Tensor, mean: Tensor) -> Tensor:
        (row, word), f = counts.indices(), counts.values()
        length = counts.sum(dim=1).to_dense()[row]
        weights = self.idf[word] * f / (f + K1 * (1 - B + B * length / mean))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")  # of products, all that is used
            return _sparse(counts.indices(), weights, counts.shape).to_sparse_csr()

    def queries(self, rows: Int[np.ndarray, " b"]) -> Float32[Tensor, "v b"]:
        return self._counts(rows).to_dense().T.contiguous()

    def scores(self, queries: Float32[Tensor, "v b"], tile: int) -> Float32[Tensor, "b _"]:
        return -(self.tiles[tile] @ queries).T.contiguous()


def _sparse(places: Int[Tensor, "2 _"], values: Float[Tensor, " _"], shape: tuple[int, int] | torch.Size) -> Tensor:
    """A sparse matrix; values of the same place are added."""
    return torch.sparse_coo_tensor(places, values, shape, check_invariants=False).coalesce()


def _ones(matrix: Tensor) -> Tensor:
    return _sparse(matrix.indices(), torch.ones_like(matrix.values()), matrix.shape)


def search(
    compared: Compared,
    queries: Int[np.ndarray, " e"],
    database: Int[np.ndarray, " _"],
    doc_ids: Int[np.ndarray, " c"],
    k: int,
    device: torch.device,
) -> tuple[Float32[np.ndarray, "e k"], Int[np.ndarray, "e k"]]:
    """The k lowest scores of each query and whose they are, its own document left out."""
    block, tile = TILES[device.type]
    ids = torch.from_numpy(database).to(device).split(tile)
    owners = torch.from_numpy(np.asarray(doc_ids[database])).to(device).split(tile)
    found = []
    for start in tqdm(range(0, len(queries), block), desc="searching", unit=" blocks", mininterval=5):
        rows = queries[start : start + block]
        own = torch.from_numpy(np.asarray(doc_ids[rows])).to(device)
        q, best = compared.queries(rows), nothing_found(len(rows), k, device)
        for number in range(len(ids)):
            scores = compared.scores(q, number)
            _hide_own(scores, own, owners[number])
            best = merged(best, lowest(scores, ids[number], k), k)
        found.append([each.cpu().numpy() for each in best])
    scores, near = map(np.concatenate, zip(*found, strict=True))
    return scores, np.where(np.isinf(scores), NO_NEIGHBOUR, near)


def _hide_own(scores: Float[Tensor, "b t"], own: Int[Tensor, " b"], owners: Int[Tensor, " t"]) -> None:
    """Leave the chunks of the queries' own documents out. Only columns that may be some are looked at."""
    columns = ((owners >= own.min()) & (owners <= own.max())).nonzero()[:, 0]
    if len(columns):
        span = slice(int(columns[0]), int(columns[-1]) + 1)  # documents are contiguous in an ascending database
        scores[:, span].masked_fill_(owners[span] == own[:, None], torch.inf)


Best = tuple[Float[Tensor, "b k"], Int[Tensor, "b k"]]  # lowest scores, and whose they are


def nothing_found(count: int, k: int, device: torch.device) -> Best:
    return torch.full((count, k), torch.inf, device=device), torch.full((count, k), NO_NEIGHBOUR, device=device)


def lowest(scores: Float[Tensor, "b t"], ids: Int[Tensor, " t"], k: int) -> Best:
    """The k lowest of each row, or all; `ids` are the columns' names."""
    padding = -scores.shape[1] % GROUP
    scores = torch.nn.functional.pad(scores, (0, padding), value=torch.inf) if padding else scores
    grouped = rearrange(scores, "b (g s) -> b g s", s=GROUP)
    groups = grouped.amin(dim=2).topk(min(k, grouped.shape[1]), largest=False).indices
    few = grouped.gather(1, groups[..., None].expand(-1, -1, GROUP)).flatten(1)
    found = few.topk(min(k, few.shape[1]), largest=False)
    places = groups.gather(1, found.indices // GROUP) * GROUP + found.indices % GROUP
    return found.values, ids[places.clamp(max=len(ids) - 1)]  # padding has no name, and is infinitely far


def merged(one: Best, other: Best, k: int) -> Best:
    scores, ids = (torch.cat(each, dim=1) for each in zip(one, other, strict=True))
    found = scores.topk(k, largest=False)
    return found.values, ids.gather(1, found.indices)


def is_special(tokens: Int[Tensor, "*any"], special: SpecialIds) -> Bool[Tensor, "*any"]:
    return torch.isin(tokens, torch.tensor(special, device=tokens.device))


# neighbours replaced on purpose


def mixed(
    knns: Int[np.ndarray, "c k"],
    doc_ids: Int[np.ndarray, " c"],
    database: Int[np.ndarray, " _"],
    random: float,
    own: float,
    seed: int,
) -> Int[np.ndarray, "c k"]:
    """Neighbours of which a share is replaced, all k of a chunk, drawn once (Hostnik and Robnik-Šikonja 2024).

    A share `random` of the database's chunks gets chunks of other documents. A share `own` gets earlier chunks of its
    own document: their continuation is at most the chunk itself, so that nothing tells what comes next. A document's
    first chunk has none and keeps its neighbours.
    """
    rng, changed = np.random.default_rng(seed), knns.copy()
    draw, shape = rng.random(len(database)), (len(database), knns.shape[1])
    first, stop = (np.searchsorted(doc_ids[database], doc_ids[database], side) for side in ("left", "right"))
    others = (rng.random(shape) * (len(database) - (stop - first))[:, None]).astype(np.int64)
    others = database[np.where(others < first[:, None], others, others + (stop - first)[:, None]) % len(database)]
    before = np.arange(len(database)) - first
    earlier = database[first[:, None] + (rng.random(shape) * before[:, None]).astype(np.int64)]
    for rows, taken in ((draw < random, others), ((draw >= 1 - own) & (before > 0), earlier)):
        changed[database[rows]] = taken[rows]
    return changed
