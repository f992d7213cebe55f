"""Does retrieval help? Bits per byte of held-out text under several conditions (notebook 07).

    on         every chunk's own neighbours
    off        no neighbours, RETRO[OFF]
    shuffled   neighbours of a chunk in another document: the gain from reading anything at all
    N only     the retrieved chunks without their continuations
    F only     only the continuations
    oracle     the chunk that comes next, with its continuation: the result of a perfect retriever

A model that ignores its neighbours scores the same on "on" and "shuffled". A model that gains nothing from the oracle
cannot read, so it tells nothing about retrieval. [CLS] is given and [SEP] is not text, so neither is counted: the bits
are those of the text, and the bytes those of the original.

Shapes: c chunks of the corpus, m tokens in each; e evaluated documents.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int, Int64
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from retro_nb.common.arrays import PathLike, open_array
from retro_nb.common.devices import few_cpu_threads
from retro_nb.model.base import ChunkedLM, evaluating
from retro_nb.store.chunking import document_tokens
from retro_nb.store.dataset import RETRODataset
from retro_nb.store.files import companion
from retro_nb.store.index import NO_NEIGHBOUR
from retro_nb.store.splits import of_documents
from retro_nb.text.document import Document
from retro_nb.text.tokens import TextTokenizer
from retro_nb.training.runs import check_store

MODES = ("on", "off", "shuffled", "N only", "F only", "oracle")
RESAMPLES = 10_000

# token by token


def token_losses(
    retro: ChunkedLM,
    dataset: RETRODataset,
    documents: Sequence[int],
    mode: str = "on",
    *,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = True,
) -> Float32[np.ndarray, "c m"]:
    """Loss in nats of every token of these documents, at its place in the chunk array; NaN everywhere else.

    Args:
        retro: the model; it keeps its device and its mode.
        dataset: sequences and neighbours; `dataset.with_neighbours(…)` replaces the neighbours.
        documents: numbers of the documents.
        mode: one of `MODES`.
        seed: seed of "shuffled".

    Raises:
        ValueError: an unknown mode, a store of another chunk size or tokenizer, a document without a sequence, or
            only one document to shuffle.
        FloatingPointError: a loss is not finite; the message names the document and the mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is unknown: choose one of {', '.join(MODES)}")
    check_store(retro, dataset)
    if mode == "shuffled":
        dataset = dataset.with_neighbours(shuffled(dataset.knns, dataset.doc_ids, documents, seed))
    elif mode == "oracle":
        dataset = dataset.with_neighbours(next_chunks(dataset.doc_ids))
    sequences = of_documents(dataset, documents)
    if missing := set(documents) - set(dataset.sequence_documents.tolist()):
        raise ValueError(f"document {min(missing)} is not in this corpus: pass numbers of its documents")
    losses = np.full((dataset.num_chunks, dataset.chunk_size), np.nan, np.float32)
    batches = DataLoader(sequences, batch_size, generator=torch.Generator())
    firsts = iter(dataset.first_chunks(sequences.indices).tolist())
    # `fit` may be running: eager execution is faster than compiling again
    few_threads = few_cpu_threads(retro.to_logits.weight.device)
    with evaluating(retro), few_threads, torch.compiler.set_stance("force_eager"):
        for seq, retrieved in tqdm(batches, desc=mode, unit="batch", disable=not progress):
            nats_of_batch = retro.token_losses(seq, _read(retrieved, mode, dataset.pad_id)).cpu().float()
            for nats, row in zip(nats_of_batch, seq, strict=True):
                first, text = next(firsts), (row[1:] != dataset.eos_id) & (row[1:] != dataset.pad_id)
                _check_finite(nats[text], dataset.doc_ids[first], mode)
                _put(losses, nats, text, first)
    return losses


def _read(retrieved: Int[Tensor, "b l k r"], mode: str, pad_id: int) -> Int[Tensor, "b l k r"] | None:
    """The neighbours that the model may read in this mode; hidden parts are padding."""
    if mode == "off":
        return None
    m = retrieved.shape[-1] // 2
    if mode == "N only":
        retrieved[..., m:] = pad_id
    elif mode == "F only":
        retrieved[..., :m] = pad_id
    return retrieved


def _check_finite(nats: Float32[Tensor, " _"], document: int | np.integer, mode: str) -> None:
    """Reject non-finite losses of text, because NaN in the array means that a token is not counted."""
    if not nats.isfinite().all():
        raise FloatingPointError(
            f"document {document}, mode {mode!r}: a token's loss is {nats[~nats.isfinite()][0]}, so the model's logits "
            f"are not finite; look at its weights, or evaluate it in float32"
        )


def _put(losses: np.ndarray, nats: Float32[Tensor, " n"], text: Bool[Tensor, " n"], first: int) -> None:
    """Write the nats of text labels for a sequence that begins with chunk `first`: label i is token i + 1."""
    places = first * losses.shape[1] + 1 + text.nonzero()[:, 0]
    losses.reshape(-1)[places.numpy()] = nats[text].numpy()


def next_chunks(doc_ids: Int[np.ndarray, " c"]) -> Int[np.ndarray, "c 1"]:
    """The next chunk in the document, which a perfect retriever would find; −1 for a document's last chunk."""
    follows = np.append(doc_ids[1:] == doc_ids[:-1], False)
    return np.where(follows, np.arange(1, len(doc_ids) + 1), NO_NEIGHBOUR)[:, None].astype(np.int32)


def shuffled(
    knns: Int[np.ndarray, "c k"], doc_ids: Int[np.ndarray, " c"], documents: Sequence[int], seed: int = 0
) -> Int[np.ndarray, "c k"]:
    """Give each chunk of these documents the neighbours of a random chunk in another of them.

    Neighbours from the chunk's own document, which the other chunk may have found, are left out.

    Raises:
        ValueError: there is only one document.
    """
    if len(set(documents)) < 2:
        raise ValueError(f"documents {list(documents)}: shuffling needs two, to take neighbours of another one")
    rows = np.flatnonzero(np.isin(doc_ids, list(documents)))
    own = doc_ids[rows]
    first, stop = (np.searchsorted(own, own, side) for side in ("left", "right"))
    draw = (np.random.default_rng(seed).random(len(rows)) * (len(rows) - (stop - first))).astype(np.int64)
    taken = knns[rows[np.where(draw < first, draw, draw + stop - first)]]
    mixed = np.array(knns)
    mixed[rows] = np.where(doc_ids[taken] == own[:, None], NO_NEIGHBOUR, taken)
    return mixed


# document by document


def bits_per_byte(
    nats: Float64[np.ndarray, "*any"] | np.floating, size: Int[np.ndarray, "*any"] | np.integer
) -> Float64[np.ndarray, "*any"] | np.floating:
    """Bits per byte for a loss in nats over a number of bytes."""
    return nats / math.log(2) / size


@dataclass(frozen=True)
class Score:
    """The loss of one model in one mode on e documents."""

    nats: Float64[np.ndarray, " e"]
    tokens: Int64[np.ndarray, " e"]
    bytes: Int64[np.ndarray, " e"]

    @property
    def bits_per_byte(self) -> float:
        return float(bits_per_byte(self.nats.sum(), self.bytes.sum()))

    @property
    def perplexity(self) -> float:
        """Perplexity per token, comparable only between models with the same tokenizer."""
        return float(np.exp(self.nats.sum() / self.tokens.sum()))


def score(
    losses: Float32[np.ndarray, "c m"],
    documents: Sequence[int],
    doc_ids: Int[np.ndarray, " c"],
    chunk_bytes: Int[np.ndarray, " c"],
) -> Score:
    """Sum token losses over each document.

    Raises:
        ValueError: the arrays are of unlike corpora, there is no document, or one without a loss.
    """
    if not len(losses) == len(doc_ids) == len(chunk_bytes):
        sizes = f"losses of {len(losses)} chunks, {len(doc_ids)} doc_ids, {len(chunk_bytes)} chunk_bytes"
        raise ValueError(f"{sizes}: pass those of one corpus")
    if not len(documents):
        raise ValueError("no document to score: pass the numbers of those that `token_losses` measured")
    sides = (np.searchsorted(doc_ids, list(documents), side) for side in ("left", "right"))
    edges = [slice(first, stop) for first, stop in zip(*sides, strict=True)]
    parts = [(losses[rows].astype(np.float64), chunk_bytes[rows]) for rows in edges]
    tokens = np.array([np.count_nonzero(~np.isnan(nats)) for nats, _ in parts])
    if not tokens.all():
        unscored = documents[int(tokens.argmin())]
        raise ValueError(f"document {unscored} has no loss: pass it to `token_losses`, or leave it out here")
    nats = np.array([np.nansum(nats) for nats, _ in parts])
    return Score(nats, tokens, np.array([sizes.sum(dtype=np.int64) for _, sizes in parts]))


def bytes_of_chunks(chunks_memmap_path: PathLike) -> Int[np.ndarray, " c"]:
    """Bytes of text from each chunk's start to the next chunk's start."""
    return open_array(companion(Path(chunks_memmap_path), "bytes.npy"))


def interval(first: Score, second: Score | None = None, *, share: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Confidence interval of bits per byte or, with a second score, of the difference first − second.

    It is a bootstrap over documents, drawn with replacement `RESAMPLES` times, the same ones for both scores.

    Raises:
        ValueError: the scores are not of the same documents, or the share is not between 0 and 1.
    """
    if second is not None and not np.array_equal(first.bytes, second.bytes):
        raise ValueError(f"scores of {len(first.bytes)} and {len(second.bytes)} documents: pass those of the same ones")
    if not 0 < share < 1:
        raise ValueError(f"share {share} of the resamplings is not between 0 and 1: pass e.g. 0.95")
    rng, count = np.random.default_rng(seed), len(first.nats)
    picks = rng.integers(count, size=(RESAMPLES, count))
    nats = first.nats if second is None else first.nats - second.nats
    values = bits_per_byte(nats[picks].sum(axis=1), first.bytes[picks].sum(axis=1))
    low, high = np.quantile(values, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


# the almanac


def fact_tokens(
    corpus: Iterable[Document],
    doc_ids: Int[np.ndarray, " c"],
    m: int,
    tokenizer: PathLike | TextTokenizer | None = None,
) -> Bool[np.ndarray, "c m"]:
    """Mask of the tokens in the chunk array that tell a fact of the almanac, whose documents record the facts' places.

    For a fact of several tokens, only the first is marked. `tokenizer` is the one of the chunk array.

    Raises:
        ValueError: the chunk array is of another corpus, by its numbers of documents and of each one's chunks.
    """
    mask = np.zeros((len(doc_ids), m), dtype=bool)
    number = -1
    for number, document in enumerate(corpus):
        spans = np.concatenate([tokens.spans for tokens in document_tokens(document.text, tokenizer=tokenizer)])
        # The first token that ends after the fact's start; it may start earlier, with the space.
        places = np.searchsorted(spans[:, 1], [start for start, _ in document.facts], side="right")
        first, stop = np.searchsorted(doc_ids, [number, number + 1]).tolist()
        chunks = math.ceil((len(spans) - 1) / m)
        if document.facts and chunks != stop - first:
            raise ValueError(
                f"document {number}, {document.title!r}, has {chunks} chunks of {m} tokens, but the chunk array has "
                f"{stop - first}: pass the corpus and the tokenizer that it was built with"
            )
        mask[first + places // m, places % m] = True
    if len(doc_ids) and doc_ids[-1] > number:
        raise ValueError(f"{number + 1} documents, but the chunk array has {doc_ids[-1] + 1}: pass the whole corpus")
    return mask


def found_twins(knns: Int[np.ndarray, "c k"], doc_ids: Int[np.ndarray, " c"]) -> Bool[np.ndarray, " c"]:
    """Whether a chunk of the almanac has a neighbour about its own town; documents 2t and 2t + 1 are about town t."""
    return ((doc_ids[knns] // 2 == doc_ids[:, None] // 2) & (knns >= 0)).any(axis=1)


# several models


def evaluate(
    models: Mapping[str, tuple[ChunkedLM, str]],
    dataset: RETRODataset,
    documents: Sequence[int],
    chunk_bytes: Int[np.ndarray, " c"],
    **options: Any,
) -> dict[str, Any]:
    """Score models and modes on the same documents.

    Args:
        models: a model and one of `MODES` by name: {"on": (retro, "on"), "baseline": (other, "off")}.
        dataset, documents: the corpus, and its documents that the models have not seen.
        chunk_bytes: see `bytes_of_chunks`.
        **options: `seed`, `batch_size`, `progress` of `token_losses`.

    Returns:
        A summary for JSON: counts, and for each name bits_per_byte, perplexity and the interval. All but the first
        also have `more_than_<first>`, the difference in bits per byte with its interval.
    """
    scores = {
        name: score(token_losses(retro, dataset, documents, mode, **options), documents, dataset.doc_ids, chunk_bytes)
        for name, (retro, mode) in models.items()
    }
    return summary(scores)


def summary(scores: Mapping[str, Score]) -> dict[str, Any]:
    """Summarize scores, as `evaluate` returns them."""
    reference, *others = scores
    first = scores[reference]
    made: dict[str, Any] = {
        "documents": len(first.nats),
        "tokens": int(first.tokens.sum()),
        "bytes": int(first.bytes.sum()),
    }
    for name, each in scores.items():
        made[name] = {
            "bits_per_byte": each.bits_per_byte,
            "perplexity": each.perplexity,
            "interval": interval(each),
        }
    for name in others:
        made[name][f"more_than_{reference}"] = {
            "bits_per_byte": scores[name].bits_per_byte - first.bits_per_byte,
            "interval": interval(scores[name], first),
        }
    return made
