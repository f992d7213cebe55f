"""Will retrieval help a corpus? A cheap answer, before anything is trained.

A language model without weights forecasts some documents that were left out: an n-gram of all other documents, mixed
with a copier of what the document itself has said before. Then it is given the pages that a RETRO would read, and a
second copier. What the pages save is what they tell that neither the corpus at large nor the document itself has told.

It is no bound. A trained model forecasts better than an n-gram, and leaves less to be saved by copying; but it also
copies what is put differently. experiments/prediction.py compares predictions with trained models.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int, Int64, Integer, UInt64
from tqdm.auto import tqdm

from retro_nb.measure.evaluation import RESAMPLES
from retro_nb.measure.leakage import shared_runs
from retro_nb.store.chunking import special_ids
from retro_nb.store.dataset import knn_to_retrieved_chunks
from retro_nb.store.index import NO_NEIGHBOUR
from retro_nb.store.splits import hold_out
from retro_nb.store.store import Store
from retro_nb.text.tokens import SpecialIds

ORDER = 4  # tokens of the longest n-gram, and one more than the copiers look up
STEPS = 30  # of expectation maximisation, which chooses the weights
LEAST = 8  # documents that must be left out: half of them choose the weights for the other half
RUNS = {"<8": (0, 7), "8-15": (8, 15), "16-31": (16, 31), ">=32": (32, math.inf)}  # shared tokens in a row

_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # 2⁶⁴ divided by the golden ratio: spreads the hashes of n-grams


@dataclass(frozen=True)
class Prediction:
    """What the neighbours are predicted to save on e documents that are not in the database.

    documents       their numbers
    without, with_pages     the loss of each in nats, by the model without weights
    tokens          that were counted
    by_overlap      gain, and share of the tokens, by the longest run of tokens that a chunk shares with its neighbours
    """

    documents: Int64[np.ndarray, " e"]
    without: Float64[np.ndarray, " e"]
    with_pages: Float64[np.ndarray, " e"]
    tokens: int
    by_overlap: dict[str, tuple[float, float]]

    @property
    def gain(self) -> float:
        """The share of the loss that the neighbours save."""
        return float(1 - self.with_pages.sum() / self.without.sum())

    @property
    def interval(self) -> tuple[float, float]:
        """Where the gain lies with 95 % confidence: a bootstrap over the documents."""
        picks = np.random.default_rng(0).integers(len(self.documents), size=(RESAMPLES, len(self.documents)))
        drawn = 1 - self.with_pages[picks].sum(axis=1) / self.without[picks].sum(axis=1)
        low, high = np.quantile(drawn, [0.025, 0.975])
        return float(low), float(high)

    def __str__(self) -> str:
        low, high = self.interval
        lines = [
            f"{len(self.documents)} documents of {self.tokens:,} tokens, left out of the database: their neighbours "
            f"save {self.gain:.1%} ({low:.1%} … {high:.1%}) of what a model without weights loses."
        ]
        lines += [
            f"  {name:>5} tokens in a row shared with a neighbour: {share:4.0%} of the tokens, saves {gain:.1%}"
            for name, (gain, share) in self.by_overlap.items()
        ]
        return "\n".join(lines)


def predict(
    store: Store, k: int | None = None, share: float = 0.05, seed: int = 0, progress: bool = True
) -> Prediction:
    """Predict what the k neighbours in a store are worth, on a random `share` of its documents.

    Raises:
        ValueError: the share leaves out fewer than 8 documents, or k is more than the store has.
    """
    knns = store.dataset(k).knns
    left_out = hold_out(np.arange(len(store.documents)), share, seed)
    return predict_arrays(store.chunks, store.doc_ids, knns, left_out, special_ids(store.files.chunks), progress)


def predict_arrays(
    chunks: Integer[np.ndarray, "c m_plus_1"],
    doc_ids: Int[np.ndarray, " c"],
    knns: Int[np.ndarray, "c k"],
    left_out: Int[np.ndarray, " e"],
    special: SpecialIds,
    progress: bool = True,
) -> Prediction:
    """`predict` for arrays: the chunks' neighbours, and the documents that are left out.

    A neighbour in a document that is left out is not read. The n-grams are counted in all other documents.

    Raises:
        ValueError: fewer than 8 documents are left out, or all are.
    """
    measured = np.isin(doc_ids, left_out)
    if len(left_out) < LEAST or measured.all():
        raise ValueError(
            f"{len(left_out)} of {len(np.unique(doc_ids))} documents are left out: {LEAST} or more are needed, and "
            f"others beside them; pass a larger share, or a larger corpus"
        )
    rows = np.flatnonzero(measured)
    allowed = np.where(np.isin(doc_ids[knns], left_out), NO_NEIGHBOUR, knns)
    model = NGrams(_text(chunks[~measured], special), size=int(chunks.max()) + 1)
    parts = [
        _forecasts(chunks, doc_ids, allowed, rows[doc_ids[rows] == number], model, special)
        for number in tqdm(left_out, desc="predicting", unit=" documents", disable=not progress)
    ]
    forecast = Forecasts(*(np.concatenate(each) for each in zip(*parts, strict=True)))
    halves = np.isin(forecast.document, left_out[::2])
    without, with_pages = (cross_fitted(forecast, halves, pages) for pages in (False, True))
    places = np.searchsorted(left_out, forecast.document)
    before, after = (np.bincount(places, nats, len(left_out)) for nats in (without, with_pages))
    groups = _by_overlap(forecast, without, with_pages)
    return Prediction(np.asarray(left_out, np.int64), before, after, len(without), groups)


def _by_overlap(
    forecast: "Forecasts", without: Float64[np.ndarray, " t"], with_pages: Float64[np.ndarray, " t"]
) -> dict[str, tuple[float, float]]:
    groups = {}
    for name, (least, most) in RUNS.items():
        chosen = (forecast.shared >= least) & (forecast.shared <= most)
        if chosen.any():
            groups[name] = (float(1 - with_pages[chosen].sum() / without[chosen].sum()), float(chosen.mean()))
    return groups


# the n-gram


def _text(rows: Integer[np.ndarray, "c m_plus_1"], special: SpecialIds) -> Int64[np.ndarray, " n"]:
    """The tokens of some chunks, one after another, without padding."""
    tokens = rows[:, :-1].ravel().astype(np.int64)
    return tokens[tokens != special.pad]


def _hashes(tokens: Int64[np.ndarray, " n"], n: int) -> UInt64[np.ndarray, " g"]:
    """A hash of every n tokens in a row, in order."""
    found = np.zeros(max(len(tokens) - n + 1, 0), np.uint64)
    for place in range(n):
        found = (found + tokens[place : place + len(found)].astype(np.uint64) + np.uint64(1)) * _FACTOR
        found ^= found >> np.uint64(29)
    return found


class NGrams:
    """How likely a token is after the tokens before it: Witten–Bell smoothing over the orders 1 … `ORDER`.

    With c(h) how often the context h was followed by a token, T(h) by how many different ones, and h' the context
    without its first token: p(w | h) = (c(hw) + T(h) · p(w | h')) / (c(h) + T(h)).

    Args:
        tokens: the text.
        size: v, the entries of the vocabulary; before anything is counted all are equally likely.
    """

    def __init__(self, tokens: Int64[np.ndarray, " n"], size: int) -> None:
        self.size, self.orders = size, []
        for n in range(1, ORDER + 1):
            keys, first, counts = np.unique(_hashes(tokens, n), return_index=True, return_counts=True)
            contexts, inverse = np.unique(_hashes(tokens, n - 1)[first], return_inverse=True)  # where the grams begin
            self.orders.append((keys, counts, contexts, np.bincount(inverse, counts), np.bincount(inverse)))

    def probabilities(self, tokens: Int64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
        """Of each token, given those before it."""
        p = np.full(len(tokens), 1 / self.size)
        for n, (keys, counts, contexts, seen, kinds) in enumerate(self.orders, start=1):
            grams = _hashes(tokens, n)
            before, shorter = _hashes(tokens, n - 1)[: len(grams)], p[n - 1 :]
            tables = ((grams, keys, counts), (before, contexts, seen), (before, contexts, kinds))
            count, total, kind = (_looked_up(*table) for table in tables)
            p[n - 1 :] = np.where(total > 0, (count + kind * shorter) / np.maximum(total + kind, 1), shorter)
        return p


def _looked_up(
    wanted: UInt64[np.ndarray, " n"], keys: UInt64[np.ndarray, " g"], values: np.ndarray
) -> Float64[np.ndarray, " n"]:
    """The value of each key, 0 for keys that are not there. `keys` ascend."""
    if not len(keys):
        return np.zeros(len(wanted))
    places = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0).astype(np.float64)


# the copiers


class Copier:
    """What followed the last tokens wherever they stood before: the longest context that was seen decides."""

    def __init__(self) -> None:
        self.followed: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)

    def read(self, tokens: Sequence[int], start: int = 0) -> None:
        """Remember a text, from the token at `start` on."""
        for i in range(start, len(tokens)):
            for n in range(1, min(i, ORDER - 1) + 1):
                self.followed[tuple(tokens[i - n : i])][tokens[i]] += 1

    def forecast(self, tokens: Sequence[int], i: int) -> tuple[int, float]:
        """How many tokens before place i were found, 0 for none, and how likely they make the token at i."""
        for n in range(min(i, ORDER - 1), 0, -1):
            if seen := self.followed.get(tuple(tokens[i - n : i])):
                return n, seen[tokens[i]] / seen.total()
        return 0, 0.0


@dataclass(frozen=True)
class Forecasts:
    """Of t tokens: how likely the n-gram and both copiers make them, and by contexts of which length."""

    ngram: Float64[np.ndarray, " t"]
    own: Float64[np.ndarray, " t"]
    own_length: Int64[np.ndarray, " t"]
    page: Float64[np.ndarray, " t"]
    page_length: Int64[np.ndarray, " t"]
    shared: Int64[np.ndarray, " t"]
    document: Int64[np.ndarray, " t"]


def _forecasts(
    chunks: Integer[np.ndarray, "c m_plus_1"],
    doc_ids: Int[np.ndarray, " c"],
    knns: Int[np.ndarray, "c k"],
    rows: Int[np.ndarray, " u"],
    model: NGrams,
    special: SpecialIds,
) -> tuple[np.ndarray, ...]:
    """The fields of `Forecasts` for one document, whose chunks are `rows`."""
    tokens = _text(chunks[rows], special)
    listed, own, made = tokens.tolist(), Copier(), []
    near = knn_to_retrieved_chunks(knns[rows], chunks, pad_id=special.pad, doc_ids=doc_ids)
    m, counted = chunks.shape[1] - 1, np.isin(tokens, special, invert=True)
    for u in range(len(rows)):
        pages = Copier()
        for text in near[u - 1] if u else ():  # the chunk before has found them
            pages.read([token for token in text.tolist() if token != special.pad])
        shared = int(shared_runs(chunks[rows[u], :-1], near[u], special).max(initial=0))
        for i in range(u * m, min((u + 1) * m, len(listed))):
            made.append((*own.forecast(listed, i), *pages.forecast(listed, i), shared))
            own.read(listed[: i + 1], i)
    own_length, own_chance, page_length, page_chance, shared = np.array(made, dtype=np.float64).T[:, counted]
    document = np.full(int(counted.sum()), doc_ids[rows[0]], np.int64)
    lengths = (each.astype(np.int64) for each in (own_length, page_length, shared))
    own_length, page_length, shared = lengths
    return model.probabilities(tokens)[counted], own_chance, own_length, page_chance, page_length, shared, document


# the mixture


def cross_fitted(forecast: Forecasts, half: Bool[np.ndarray, " t"], pages: bool) -> Float64[np.ndarray, " t"]:
    """The loss of each token in nats, by weights that the documents of the other half chose.

    There is a set of weights for every pair of contexts' lengths that the two copiers found; with `pages` False, the
    copier of the pages says nothing.
    """
    parts = np.stack([forecast.ngram, forecast.own, forecast.page if pages else np.zeros(len(half))])
    cells = forecast.own_length * ORDER + (forecast.page_length if pages else 0)
    losses = np.empty(len(half))
    for measured in (half, ~half):
        weights = _fitted(parts[:, ~measured], cells[~measured])
        losses[measured] = -np.log((weights[:, cells[measured]] * parts[:, measured]).sum(axis=0))
    return losses


def _fitted(parts: Float64[np.ndarray, "3 t"], cells: Int64[np.ndarray, " t"]) -> Float64[np.ndarray, "3 cells"]:
    """Weights of the parts in each cell, by expectation maximisation; the n-gram always keeps a little."""
    weights = np.full((3, ORDER * ORDER), 1 / 3)
    for _ in range(STEPS):
        shares = weights[:, cells] * parts
        shares /= shares.sum(axis=0)
        sums = np.stack([np.bincount(cells, each, ORDER * ORDER) for each in shares])
        weights = (sums + np.array([[1.0], [0.1], [0.1]])) / (sums.sum(axis=0) + 1.2)
    return weights
