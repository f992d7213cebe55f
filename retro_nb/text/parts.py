"""A corpus whose longer documents are cut into several."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from retro_nb.text.document import Document

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
