"""A corpus with its longer documents cut into parts."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from retro_nb.text.document import Document

GAPS = [re.compile(gap) for gap in (r"\n[^\S\n]*\n", r"\n", r"\s")]  # blank line, line end, space


class parts:
    """A corpus with its longer documents cut into parts, "title (1/7)", "title (2/7)" and so on.

    Neighbours never come from a chunk's own document, so the chunks of one huge document have none. Cut into
    chapters, they find one another. Each part ends after the last blank line in the second half of its `max_chars`
    characters, else after the last line end there, else after the last space, else at `max_chars`. The concatenated
    parts equal the document's text. Undecodable pieces are counted in the first part.

    corpus     any other; if it lacks `split` or `fingerprint`, so does this one
    max_chars  maximum characters of a part; shorter documents stay whole

    Raises ValueError for `max_chars` below 1. Iterating raises it for a long document with facts, since their spans
    refer to the whole text.
    """

    def __init__(self, corpus: Iterable[Document], max_chars: int) -> None:
        if max_chars < 1:
            raise ValueError(f"max_chars {max_chars} is less than 1: pass e.g. 100_000")
        self.corpus: Any = corpus  # with or without split and fingerprint
        self.max_chars = max_chars

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

    # Properties, so that `hasattr` is false for what the corpus lacks.

    @property
    def split(self) -> "Callable[[int], list[parts]]":
        """`split(count)`: divide the documents, in order, into at most `count` corpora of similar size."""
        divide = self.corpus.split
        return lambda count: [parts(some, self.max_chars) for some in divide(count)]

    @property
    def fingerprint(self) -> Callable[[], dict]:
        """`fingerprint()`: the fingerprint of the corpus, and `max_chars`."""
        of_corpus = self.corpus.fingerprint
        return lambda: {"corpus": "parts", "max_chars": self.max_chars, "of": of_corpus()}


def _pieces(text: str, max_chars: int) -> Iterator[str]:
    """Cut a text into pieces of at most `max_chars` characters."""
    start = 0
    while len(text) - start > max_chars:
        stop = _cut(text, start, max_chars)
        yield text[start:stop]
        start = stop
    yield text[start:]


def _cut(text: str, start: int, max_chars: int) -> int:
    """End of the piece that begins at `start`."""
    for gap in GAPS:
        ends = [found.end() for found in gap.finditer(text, start + max_chars // 2, start + max_chars)]
        if ends:
            return ends[-1]
    return start + max_chars
