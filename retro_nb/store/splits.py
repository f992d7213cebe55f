"""Held-out documents, and the sequences on both sides of the split."""

from collections.abc import Iterable, Sequence
from numbers import Real

import numpy as np
from jaxtyping import Int
from torch.utils.data import Dataset, Subset


def hold_out(
    documents: Int[np.ndarray, " documents"], share: float | int, seed: int = 0
) -> Int[np.ndarray, " held_out"]:
    """Draw a random share of these documents, at least one, in ascending order.

    Raises:
        ValueError: the share is not between 0 and 1, or there are fewer than two documents.
    """
    if isinstance(share, bool) or not isinstance(share, Real) or not 0 < share < 1:
        raise ValueError(f"the share {share!r} of documents to hold out is not between 0 and 1: pass e.g. 0.1")
    if len(documents) < 2:
        raise ValueError(
            f"{len(documents)} document(s) cannot be split by document: pass a larger corpus, or the share 0 to hold "
            f"none out"
        )
    count = min(max(1, round(share * len(documents))), len(documents) - 1)
    return np.sort(np.random.default_rng(seed).permutation(documents)[:count])


def document_numbers(keep_out: float | int | Sequence[int], documents: int) -> list[int]:
    """Turn `keep_out` into numbers of documents, ascending.

    Args:
        keep_out: numbers of documents, or the share of all that `hold_out` is to draw with seed 0; 0 for none.
        documents: number of documents in the corpus.
    """
    if isinstance(keep_out, Sequence):
        return sorted(set(keep_out))
    return hold_out(np.arange(documents), keep_out).tolist() if keep_out else []


def split_by_document(dataset: Dataset, valid_share: float = 0.1, seed: int = 0) -> tuple[Subset, Subset]:
    """Split sequences into (train, valid) so that no document has sequences on both sides.

    `dataset.sequence_documents` holds one document id per sequence. `valid_share` of the documents, drawn
    with `seed`, go to validation; each side gets at least one. Fewer than two documents raise a ValueError.
    """
    documents = hold_out(np.unique(np.asarray(dataset.sequence_documents)), valid_share, seed).tolist()
    return without_documents(dataset, documents), of_documents(dataset, documents)


def of_documents(dataset: Dataset, documents: Iterable[int]) -> Subset:
    """The sequences of these documents (see `split_by_document`)."""
    chosen = np.isin(np.asarray(dataset.sequence_documents), list(documents))
    return Subset(dataset, np.flatnonzero(chosen).tolist())


def without_documents(dataset: Dataset, documents: Iterable[int]) -> Subset:
    """The sequences of all other documents."""
    chosen = np.isin(np.asarray(dataset.sequence_documents), list(documents))
    return Subset(dataset, np.flatnonzero(~chosen).tolist())
