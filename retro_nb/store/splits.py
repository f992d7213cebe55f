"""Held-out documents, and the sequences on both sides of the split."""

import difflib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
from jaxtyping import Int
from torch.utils.data import Dataset, Subset

DocumentName = int | np.integer | str | Mapping[str, str]  # a number, a title, or an `identity`


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


def identity(about: Mapping[str, Any]) -> dict[str, str]:
    """Title of a document and digest of its text: they stay when its number changes with the corpus.

    Args:
        about: its metadata, an element of `Store.documents`.
    """
    return {"title": about["title"], "digest": about.get("digest", "")}


def find_documents(names: Iterable[DocumentName], documents: Sequence[Mapping[str, Any]]) -> list[int]:
    """Numbers of the documents that these names stand for, in their order; several for a title that they share.

    Args:
        names: numbers, titles, or what `identity` gives.
        documents: the metadata of all, `Store.documents`.

    Raises:
        KeyError: there is no such document; the message names the closest titles.
    """
    known: dict[Any, list[int]] = defaultdict(list)
    for number, about in enumerate(documents):
        for key in (number, about["title"], tuple(identity(about).values())):
            known[key].append(number)
    return [number for name in names for number in _known(name, known, documents)]


def _known(name: DocumentName, known: Mapping[Any, list[int]], documents: Sequence[Mapping[str, Any]]) -> list[int]:
    key = (name["title"], name["digest"]) if isinstance(name, Mapping) else name
    if key in known and not isinstance(key, bool):
        return known[key]
    if isinstance(name, Mapping) and name["title"] in known:
        raise KeyError(f"the text of document {name['title']!r} has changed since it was noted: put it back")
    title, titles = name["title"] if isinstance(name, Mapping) else name, [about["title"] for about in documents]
    near = difflib.get_close_matches(str(title), titles, n=3) or titles[:3]
    raise KeyError(f"no document {title!r} among {len(titles)}; there are e.g. {near}")


def document_numbers(
    keep_out: float | int | Sequence[DocumentName], documents: Sequence[Mapping[str, Any]]
) -> list[int]:
    """Turn `keep_out` into numbers of documents, ascending.

    Args:
        keep_out: documents by number, title or identity; or the share of all that `hold_out` is to draw with seed 0;
            0 for none.
        documents: the metadata of all, `Store.documents`.

    Raises:
        KeyError: there is no such document.
    """
    if isinstance(keep_out, Sequence):
        return sorted(set(find_documents(keep_out, documents)))
    return hold_out(np.arange(len(documents)), keep_out).tolist() if keep_out else []


def split_by_document(dataset: Dataset, valid_share: float = 0.1, seed: int = 0) -> tuple[Subset, Subset]:
    """Split sequences into (train, valid) so that no document has sequences on both sides.

    `dataset.sequence_documents` holds one document id per sequence. `valid_share` of the documents, drawn
    with `seed`, go to validation; each side gets at least one. Fewer than two documents raise a ValueError.
    """
    documents = hold_out(np.unique(_documents_of(dataset)), valid_share, seed).tolist()
    return without_documents(dataset, documents), of_documents(dataset, documents)


def of_documents(dataset: Dataset, documents: Iterable[int]) -> Subset:
    """The sequences of these documents (see `split_by_document`)."""
    chosen = np.isin(_documents_of(dataset), list(documents))
    return Subset(dataset, np.flatnonzero(chosen).tolist())


def without_documents(dataset: Dataset, documents: Iterable[int]) -> Subset:
    """The sequences of all other documents."""
    chosen = np.isin(_documents_of(dataset), list(documents))
    return Subset(dataset, np.flatnonzero(~chosen).tolist())


def _documents_of(dataset: Dataset) -> Int[np.ndarray, " sequences"]:
    return np.asarray(dataset.sequence_documents)  # type: ignore[attr-defined]  # a RETRODataset, or one that has them
