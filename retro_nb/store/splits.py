"""Held-out documents, and the sequences on both sides of the split."""

import difflib
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
    """What a document is known by when its corpus changes, as JSON can hold it: its title and its text's digest.

    Args:
        about: its metadata, an element of `Store.documents`.
    """
    return {"title": about["title"], "digest": about.get("digest", "")}


def find_document(name: DocumentName, documents: Sequence[Mapping[str, Any]]) -> list[int]:
    """Numbers of the documents that a name stands for: one, or several with the same title.

    Args:
        name: a number, a title, or an `identity`.
        documents: the metadata of all, `Store.documents`.

    Raises:
        KeyError: there is none; the message names the closest titles.
    """
    titles = [about["title"] for about in documents]
    if isinstance(name, Mapping):
        found = [number for number, about in enumerate(documents) if identity(about) == dict(name)]
    elif isinstance(name, str):
        found = [number for number, title in enumerate(titles) if title == name]
    else:
        found = [int(name)] if not isinstance(name, bool) and 0 <= name < len(titles) else []
    if found:
        return found
    if isinstance(name, Mapping) and name["title"] in titles:
        raise KeyError(f"the text of document {name['title']!r} has changed since it was noted: put it back")
    wanted = name["title"] if isinstance(name, Mapping) else name
    near = difflib.get_close_matches(str(wanted), titles, n=3) or titles[:3]
    raise KeyError(f"no document {wanted!r} among {len(titles)}; there are e.g. {near}")


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
        return sorted({number for name in keep_out for number in find_document(name, documents)})
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
