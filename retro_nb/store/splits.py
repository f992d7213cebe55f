"""Held-out documents, and the sequences on both sides of the split."""

import difflib
import glob
import json
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from torch.utils.data import Dataset, Subset

from retro_nb.common.arrays import READ_ONLY, read_json, to_jsonable, write_json
from retro_nb.common.manifest import folder_lock

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
    if isinstance(name, Mapping) and not {"title", "digest"} <= {*name}:
        raise KeyError(f"{dict(name)} is no document: an identity has a title and a digest, as in Store.documents")
    key = (name["title"], name["digest"]) if isinstance(name, Mapping) else name
    if key in known and not isinstance(key, bool):
        if isinstance(name, str) and len(known[key]) > 1:
            warnings.warn(
                f"{len(known[key])} documents have the title {name!r}, first {known[key][:3]}, and all are meant: pass "
                f"a number, or an element of Store.documents, for one of them",
                stacklevel=4,
            )
        return known[key]
    if isinstance(name, Mapping) and name["title"] in known:
        raise KeyError(f"the text of document {name['title']!r} has changed since it was noted: put it back")
    title, titles = name["title"] if isinstance(name, Mapping) else name, [about["title"] for about in documents]
    near = difflib.get_close_matches(str(title), titles, n=3) or titles[:3]
    raise KeyError(f"no document {title!r} among {len(titles)}; there are e.g. {near}")


def document_numbers(
    keep_out: float | int | Sequence[DocumentName], documents: Sequence[Mapping[str, Any]], note: Path | None = None
) -> list[int]:
    """Turn `keep_out` into numbers of documents, ascending.

    Args:
        keep_out: documents by number, title or identity; or the share of all that `hold_out` is to draw with seed 0;
            0 for none.
        documents: the metadata of all, `Store.documents`.
        note: file that remembers which documents a share or numbers stood for at first (`note_documents`). A share
            stays with the documents that it drew, also if their number, their title or their text has changed.

    Raises:
        KeyError: there is no such document.
        ValueError: a number stands for another document than it did, or none of those that a share drew is left; or
            the note is damaged.
    """
    noted = _read_note(note).get(_key(keep_out)) if note else None
    if not isinstance(keep_out, Sequence):
        if noted is None:
            return hold_out(np.arange(len(documents)), keep_out).tolist() if keep_out else []
        if found := find_again(noted, documents):
            return found
        raise ValueError(
            f"none of the {len(noted)} documents that the share {keep_out} kept out is left, first "
            f"{noted[0]['title']!r}: delete {note} to draw others"
        )
    found = sorted(set(find_documents(keep_out, documents)))
    for was, number in zip(noted or (), _numbers_in(keep_out), strict=False):
        if identity(documents[number]) != was:
            raise ValueError(
                f"keep_out {keep_out}: document {number} was {was['title']!r} when this was first built; now it is "
                f"{documents[number]['title']!r}, or has another text. Pass titles instead of numbers, or delete {note}"
            )
    return found


def _numbers_in(keep_out: Sequence[DocumentName]) -> list[int]:
    return sorted({int(name) for name in keep_out if isinstance(name, int | np.integer)})


def _key(keep_out: float | int | Sequence[DocumentName]) -> str:
    return json.dumps(to_jsonable(keep_out), sort_keys=True)


def note_documents(
    note: Path, keep_out: float | int | Sequence[DocumentName], found: Sequence[int], documents: Sequence[Mapping]
) -> None:
    """Note the documents that a share or numbers stand for, for `document_numbers`; earlier ones stay noted.

    In a folder that may not be written, where nothing can change, nothing is noted.

    Args:
        note: the file.
        keep_out: a share, or names of documents, of which the numbers are noted.
        found: what `document_numbers` made of it.
        documents: the metadata of all.
    """
    numbers = _numbers_in(keep_out) if isinstance(keep_out, Sequence) else found
    notes, now = _read_note(note), [identity(documents[number]) for number in numbers]
    before = notes.get(_key(keep_out), [])
    if all(each in before for each in now):
        return
    try:
        with folder_lock(note.parent):
            for left in note.parent.glob(f"{glob.escape(note.name)}.*.tmp"):  # by a kill
                left.unlink()
            write_json(note, notes | {_key(keep_out): before + [each for each in now if each not in before]})
    except OSError as error:
        if error.errno not in READ_ONLY:
            raise


def _read_note(note: Path) -> dict[str, list[dict[str, str]]]:
    if not note.exists():
        return {}
    notes = read_json(note)
    try:
        return {key: [identity(each) for each in noted] for key, noted in notes.items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{note} does not hold titles and digests of documents ({error!r}): delete it") from error


def find_again(noted: Iterable[Mapping[str, str]], documents: Sequence[Mapping[str, Any]]) -> list[int]:
    """Numbers of the documents with these identities, ascending; of those with another text by title, or the reverse.

    Documents that are gone are left out.
    """
    places: dict[str, dict[str, list[int]]] = {name: defaultdict(list) for name in ("both", "digest", "title")}
    for number, about in enumerate(documents):
        for name, value in {"both": json.dumps(identity(about)), **identity(about)}.items():
            places[name][value].append(number)
    found: set[int] = set()
    for each in noted:
        names = {"both": json.dumps(each), "digest": each["digest"], "title": each["title"]}
        found.update(next((places[name][value] for name, value in names.items() if value in places[name]), ()))
    return sorted(found)


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
