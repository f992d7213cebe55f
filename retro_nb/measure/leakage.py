"""How much of a chunk its neighbours contain word for word, and how much gain remains without it (notebook 08).

A model with retrieval may merely copy. So the paper (§2.6) measures, for each evaluated chunk, the longest run of
tokens that it shares with its nearest neighbours, and evaluates the model on the chunks that share little.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float64, Int, Int64, Integer
from tqdm.auto import tqdm

from retro_nb.measure.evaluation import Score, bits_per_byte, interval
from retro_nb.store.dataset import knn_to_retrieved_chunks
from retro_nb.text.tokens import BERTS_IDS, SpecialIds

ALPHAS = (1 / 8, 2 / 8, 3 / 8, 4 / 8, 5 / 8, 6 / 8, 7 / 8, 1)  # limits of r: 8, 16, … of 64 tokens


def shared_runs(
    chunk: Integer[np.ndarray, " m"],
    texts: Sequence[Integer[np.ndarray, " _"]] | Integer[np.ndarray, "k r"],
    special: SpecialIds = BERTS_IDS,
) -> Int64[np.ndarray, " m"]:
    """Length of the longest run around each token of the chunk that also occurs in one of the texts.

    The maximum is s, the longest common substring (§2.6). Padding, [CLS] and [SEP] are in no run; `special`
    holds these ids for another tokenizer. Time grows with m · Σ r, memory with m + Σ r.

    The table of common suffixes has a row for each token of the chunk and a column for each token of the texts. A
    cell holds the length of the longest run that ends there in both; only one row is kept at a time:

              not  to  be
        to      0   1   0    equal tokens: one more than in the cell above left
        be      0   0   2    s = 2, "to be"
        or      0   0   0    unequal tokens: 0
    """
    padding = [special.pad]  # around each text, so that no run extends into the next one
    text = np.concatenate([padding, *(part for each in texts for part in (each, padding))], dtype=np.int64)
    row, longest = np.zeros(len(text) + 1, np.int64), np.zeros(len(chunk), np.int64)
    for i, token in enumerate(chunk.tolist()):
        row[1:] = 0 if token in special else (row[:-1] + 1) * (text == token)
        length = row.max()
        run = longest[i + 1 - length : i + 1]  # the longest run that ends here
        np.maximum(run, length, out=run)
    return longest


def overlaps(
    chunks: Integer[np.ndarray, "c m_plus_1"],
    rows: Int[np.ndarray, " e"],
    neighbours: Int[np.ndarray, "e k"],
    doc_ids: Int[np.ndarray, " c"],
    *,
    special: SpecialIds = BERTS_IDS,
    progress: bool = True,
) -> Float64[np.ndarray, " e"]:
    """r(C) of the e chunks `rows`: the longest run shared with a neighbour, as a share of the chunk (§2.6).

    `neighbours` are chunk ids, 10 in the paper, −1 for none; each is compared as the model reads it, N and F. The
    paper divides by m. Here the length of a chunk leaves out padding, [CLS] and [SEP], because the few tokens at the
    end of a document can also be copied in full. A chunk without text has r = 0. `special` are the ids of a tokenizer
    other than BERT's (`chunking.special_ids`).

    Raises:
        ValueError: the sizes do not match.
        IndexError: a row or a neighbour is outside the chunk array.
    """
    if len(rows) != len(neighbours) or len(chunks) != len(doc_ids):
        sizes = f"{len(rows)} rows, {len(neighbours)} of neighbours; {len(chunks)} chunks, {len(doc_ids)} doc_ids"
        raise ValueError(f"{sizes}: pass neighbours for each row, a document for each chunk")
    if rows.size and not 0 <= rows.min() <= rows.max() < len(chunks):
        raise IndexError(f"rows {rows.min()} … {rows.max()} of {len(chunks)} chunks: of another corpus?")
    found = np.zeros(len(rows))
    for i, row in enumerate(tqdm(rows, desc="comparing", unit=" chunks", disable=not progress)):
        texts = knn_to_retrieved_chunks(neighbours[i], chunks, pad_id=special.pad, doc_ids=doc_ids)
        chunk = chunks[row, :-1]
        length = np.isin(chunk, special, invert=True).sum()
        found[i] = shared_runs(chunk, texts, special).max(initial=0) / max(length, 1)
    return found


def leakage_curve(
    overlap: Float[np.ndarray, " e"],
    nats: dict[str, Float64[np.ndarray, " e"]],
    sizes: Int[np.ndarray, " e"],
    alphas: Sequence[float | int] = ALPHAS,
) -> list[dict]:
    """bpb(α) = Σ ℓ(C) / Σ N(C) over the chunks with r(C) ≤ α: bits per byte where little is shared (§2.6).

    Args:
        overlap: r(C), see `overlaps`.
        nats: each model's loss, summed over each chunk's tokens; its bits are ℓ(C).
        sizes: N(C), the bytes of each chunk in the original text.
        alphas: limits α; 1 keeps every chunk.

    Returns:
        For each α: `alpha`, the shares of `chunks` and `bytes` kept, and `bits_per_byte` by model, None if no byte is
        kept.

    Raises:
        ValueError: the sizes do not match, there are no bytes at all, or a share is not in 0 … 1.
    """
    counts = {"overlap": len(overlap), "sizes": len(sizes), **{name: len(losses) for name, losses in nats.items()}}
    if len(set(counts.values())) > 1:
        raise ValueError(f"values for unequal numbers of chunks, {counts}: pass one for each evaluated chunk")
    if sizes.sum() <= 0:
        raise ValueError(f"{len(sizes)} chunks of {sizes.sum()} bytes: pass chunks with text in them")
    for name, shares in ("overlap", overlap), ("alphas", alphas):
        if outside := [float(share) for share in shares if not 0 <= share <= 1]:
            raise ValueError(f"{name} has {outside[0]}: pass shares from 0 to 1")
    curve = []
    for alpha in map(float, alphas):
        kept = overlap <= alpha
        size = sizes[kept].sum()
        bits = {name: float(bits_per_byte(each[kept].sum(), size)) if size else None for name, each in nats.items()}
        share = {"chunks": float(kept.mean()), "bytes": float(size / sizes.sum())}
        curve.append({"alpha": alpha, **share, "bits_per_byte": bits})
    return curve


def gain_curve(
    overlap: Float[np.ndarray, " e"],
    worse: Float64[np.ndarray, " e"],
    better: Float64[np.ndarray, " e"],
    sizes: Int[np.ndarray, " e"],
    documents: Int[np.ndarray, " e"],
    alphas: Sequence[float | int] = ALPHAS,
) -> list[tuple[float, float, float]]:
    """Bits per byte that a better model saves on the chunks with r(C) ≤ α: (value, low, high) for each α.

    low and high bound the 95 % confidence interval. It is a bootstrap over the documents that have such chunks (see
    `evaluation.interval`), because the chunks of one document are not independent.

    Args:
        overlap, sizes, alphas: as for `leakage_curve`.
        worse, better: two models' losses in nats, summed over each chunk's tokens.
        documents: each chunk's document.

    Returns:
        One triple for each α; three NaN where no byte is kept.
    """
    gains = []
    for alpha in alphas:
        kept = overlap <= alpha
        if not sizes[kept].sum():
            gains.append((math.nan,) * 3)
            continue
        own = np.unique(documents[kept], return_inverse=True)[1]
        lengths = np.bincount(own, sizes[kept]).astype(np.int64)
        first, second = (Score(np.bincount(own, nats[kept]), 0 * lengths, lengths) for nats in (worse, better))
        gains.append((first.bits_per_byte - second.bits_per_byte, *interval(first, second)))
    return gains
