"""Open a corpus by name or path: "speeches", "my_texts/", "my.jsonl", "my.parquet", "hf:user/name".

open_corpus("my_texts/")    the corpus
as_corpus("my_texts/")      the corpus, and the default folder for its store
recognise("my_texts/")      a function that opens it; a bad name fails before any work
"""

import difflib
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

from retro_nb.common.arrays import WORK
from retro_nb.common.digests import digest
from retro_nb.text.almanac import almanac
from retro_nb.text.docstrings import docstrings
from retro_nb.text.files import ENDINGS, TEXTS, choose_files, jsonl, text_folder
from retro_nb.text.sources import code
from retro_nb.text.speeches import speeches
from retro_nb.text.tables import hf_dataset, parquet, saved_to_disk

NAMED = {"speeches": speeches, "almanac": almanac, "docstrings": docstrings, "code": code}
HUB = "hf:"
OPTIONS = {"encoding": "utf-8", "text_field": "text", "title_field": "title"}  # with their defaults


def open_corpus(where: Any, *, glob: str | Sequence[str] | None = None, **options: str | None) -> Any:
    """The corpus that a name or a path means.

        "speeches", "almanac", "docstrings", "code"   the corpora that need no file, with their default arguments
        "hf:NAME", "hf:NAME:CONFIG"           a dataset of the Hugging Face hub, streamed: `hf_dataset`
        a .jsonl or a .parquet file           `jsonl`, `parquet`
        a folder                              saved by `datasets`: `hf_dataset`; with .parquet files: `parquet`;
                                              else `text_folder`
        any other object                      itself

    Write "./speeches" for a folder with one of these names.

    Args:
        where: the name or path, or a corpus.
        glob: pattern(s) of the texts in a folder, .txt and .md by default. If a given glob matches any file, the
            folder is opened as a `text_folder`, even with .parquet files in it.
        **options: `encoding` for `text_folder`; `text_field` and `title_field` for the other file formats.

    Raises:
        FileNotFoundError: no such name or path; the message suggests the closest name.
        NotADirectoryError: the path is a file of another kind.
        ValueError: this corpus does not have one of the options.
        TypeError: `where` is neither a name nor a path nor documents.
    """
    return recognise(where, glob=glob, **options)()


def recognise(where: Any, *, glob: str | Sequence[str] | None = None, **options: str | None) -> Callable[[], Any]:
    """A function that opens the corpus of `open_corpus`. Raises its errors, except those of the opening itself."""
    opening = _opening(where, glob)
    known = [name for name in OPTIONS if name in signature(opening.func).parameters]
    for name, value in options.items():
        if name not in OPTIONS:
            raise ValueError(f"unknown option {name!r}: open_corpus knows glob, {', '.join(OPTIONS)}")
        if name not in known and value != OPTIONS[name]:
            has = f"only {' and '.join(known)}" if known else "no such options"
            raise ValueError(f"{name} is {value!r}, but corpus {where} has {has}: leave it out")
    return partial(opening, **{name: value for name, value in options.items() if name in known})


def _default_work_dir(documents: Any, described: Any) -> Path:
    """One folder per corpus, so that no two overwrite each other."""
    return WORK / f"{type(documents).__name__}-{digest(described, 10)}"


def as_corpus(
    documents_path: Any, glob: Sequence[str] | str | None = None, **options: str | None
) -> tuple[Any, Path | None]:
    """The corpus that `documents_path` means (see `open_corpus`), and the default folder for its store.

    Each path with its options has one folder, so that changed files are built again in the same place. A corpus
    without a path has one folder per fingerprint; without either, the folder is None.
    """
    corpus = open_corpus(documents_path, glob=glob, **options)
    if is_path(documents_path):
        changed = {name: value for name, value in options.items() if value != OPTIONS[name]}
        named = [str(Path(documents_path).resolve()), glob or "**/*.txt", *([changed] if changed else [])]
        return corpus, _default_work_dir(corpus, named)  # the old default glob, to find existing stores
    fingerprint = getattr(corpus, "fingerprint", None)  # without one, corpora cannot be told apart
    return corpus, _default_work_dir(corpus, fingerprint()) if fingerprint else None


def is_path(where: Any) -> bool:
    """Whether `open_corpus` looks for `where` on disk."""
    return isinstance(where, Path) or (isinstance(where, str) and where not in NAMED and not where.startswith(HUB))


def _opening(where: Any, glob: str | Sequence[str] | None) -> partial:
    """The corpus's class with its required arguments."""
    if is_path(where):
        return _file(Path(where)) if not Path(where).is_dir() else _folder(Path(where), glob)
    if not isinstance(where, str):
        first = where[0] if isinstance(where, Sequence) and len(where) else None
        if not isinstance(where, Iterable) or not (first is None or hasattr(first, "text")):
            found = type(where).__name__ + (f" of {type(first).__name__}" if first is not None else "")
            raise TypeError(f"corpus {where!r:.40} is a {found}: pass a name, a path, or Documents")
        return partial(_itself, where)
    if where in NAMED:
        if Path(where).is_dir():
            message = f"{where!r} means the corpus of that name: pass './{where}' for the folder"
            warnings.warn(message, stacklevel=4)
        return partial(NAMED[where])
    name, _, config = where.removeprefix(HUB).partition(":")
    if not name.strip():
        raise FileNotFoundError(f"corpus {where!r} names no dataset: pass e.g. {HUB}user/name")
    return partial(hf_dataset, name, **({"name": config} if config else {}))


def _itself(corpus: Any) -> Any:
    return corpus


def _file(path: Path) -> partial:
    kind = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    if kind.suffix.lower() == ".jsonl":
        return partial(jsonl, path)
    if path.suffix.lower() == ".parquet":
        return partial(parquet, path)
    if path.exists():
        texts = path.suffix.lower() in ENDINGS
        mend = "pass the folder that holds it" if texts else "pass hf_dataset(…), which reads more kinds, or convert it"
        raise NotADirectoryError(f"{path} is a file, neither .jsonl nor .parquet: {mend}")
    close = difflib.get_close_matches(str(path), NAMED, 1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise FileNotFoundError(
        f"corpus {str(path)!r} is no folder, no .jsonl or .parquet file, nor {HUB}NAME or {' or '.join(NAMED)}{hint}"
    )


def _folder(folder: Path, glob: str | Sequence[str] | None) -> partial:
    if saved_to_disk(folder):
        return partial(hf_dataset, folder)
    texts = glob is not None and choose_files(folder, (), glob)[0]
    if not texts and choose_files(folder, (".parquet",))[0]:
        return partial(parquet, folder)
    return partial(text_folder, folder, TEXTS if glob is None else glob)
