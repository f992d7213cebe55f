"""Figures of notebook 01: how a text is cut, and the number of chunks."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from retro_nb.plotting.style import COLOURS, blank, box, literal, subplots

Span = tuple[int, int]  # characters [start, stop)
NOTHING = "#E4E4E4"  # padding


def staircase(rows: Sequence[Sequence[str]]) -> Figure:
    """Chunk rows of m + 1 words, each under the place in the document where it starts; "" is padding.

    The last word of a row, in orange, is above the first word of the next row: both are the same token.
    """
    wide, high, step, left = 0.76, 0.34, 0.52, 0.72
    m = len(rows[0]) - 1
    figure, axes = blank(left + (len(rows) * m + 1) * wide, len(rows) * step + 0.05)
    for i, row in enumerate(rows):
        y = (len(rows) - 1 - i) * step + 0.05
        axes.text(0, y + high / 2, f"chunk {i}", va="center", color=COLOURS["muted"])
        for j, word in enumerate(row):
            x = left + (i * m + j) * wide
            colour = COLOURS["continuation" if j == m else "chunk"] if word else NOTHING
            box(axes, x, y, wide - 0.06, high, word, colour=colour)
        if i + 1 < len(rows) and row[m]:
            x = left + (i + 1) * m * wide + wide / 2 - 0.03
            axes.plot([x, x], [y, y - step + high], color=COLOURS["continuation"], linewidth=2)
    return figure


def _lines(text: str, start: int, stop: int, width: int) -> Iterator[Span]:
    """Break text[start:stop] at white space into lines of at most `width` characters."""
    while start < stop:
        if text[start].isspace():
            start += 1
            continue
        end = min(start + width, stop)
        if end < stop and (space := max(text.rfind(white, start, end + 1) for white in " \n")) > start:
            end = space
        yield start, end
        start = end


def cut_text(text: str, chunks: Sequence[Span], shared: Sequence[Span] = (), first: int = 0) -> Figure:
    """Original text with its chunks in two alternating shades; the `shared` tokens are framed.

    `chunks` and `shared` are characters [start, stop) of `text`; `first` is the number of the first chunk.
    """
    columns, high, wide, left = 92, 0.23, 0.0794, 0.45  # inches per line and, at 9.5 points, per character
    lines = list(_lines(text, chunks[0][0], chunks[-1][1], columns))
    figure, axes = blank(left + columns * wide, len(lines) * high + 0.1)

    def place(line: int, at: int) -> tuple[float, float]:
        return left + (at - lines[line][0]) * wide, (len(lines) - 1 - line) * high + 0.05

    def mark(span: Span, **look: Any) -> list[tuple[float, float]]:
        """Draw a rectangle over each line of a span; return their corners."""
        cut = [(i, max(a, span[0]), min(b, span[1])) for i, (a, b) in enumerate(lines)]
        parts = [(place(i, a), b - a) for i, a, b in cut if a < b]
        for corner, letters in parts:
            axes.add_patch(Rectangle(corner, letters * wide, high * 0.92, **look))
        return [corner for corner, _ in parts]

    for number, span in enumerate(chunks):
        corners = mark(span, facecolor=COLOURS["chunk"], alpha=(0.34, 0.13)[number % 2], linewidth=0)
        y = corners[0][1] + high / 2
        axes.text(left - 0.1, y, str(first + number), ha="right", va="center", color=COLOURS["chunk"])
    for span in shared:
        mark(span, facecolor="none", edgecolor=COLOURS["continuation"], linewidth=2)
    for i, (start, stop) in enumerate(lines):
        for word in re.finditer(r"\S+", text[start:stop]):
            x, y = place(i, start + word.start())
            axes.text(x, y + high * 0.42, literal(word[0]), family="monospace", fontsize=9.5, va="center_baseline")
    return figure


def chunks_by_year(
    years: Sequence[int], chunks: Sequence[int], named: dict[int, str], written: tuple[int, int]
) -> Figure:
    """Chunks of each document against its year. `named` labels some documents; the `written` years are shaded."""
    figure, axes = subplots(figsize=(8, 3.4))
    axes.axvspan(written[0] - 0.5, written[1] + 0.5, color=COLOURS["muted"], alpha=0.13, linewidth=0)
    axes.text(sum(written) / 2, 0.96 * max(chunks), "sent in writing", ha="center", color=COLOURS["muted"])
    axes.vlines(years, 0, chunks, color=COLOURS["chunk"], linewidth=1.4, alpha=0.75)
    for document, name in named.items():
        at = (years[document], chunks[document])
        text = literal(f"{name}, {at[1]}")
        label = axes.annotate(text, at, (0, 2), textcoords="offset points", ha="right", fontsize=8)
        label.set_path_effects([withStroke(linewidth=2, foreground="white")])  # readable across other lines
    axes.set(xlabel="year", ylabel="chunks", ylim=(0, 1.08 * max(chunks)), title="Letters are long, speeches are short")
    axes.grid(axis="x", visible=False)
    return figure


def padding(last: Sequence[int], chunk_size: int, shares: dict[str, float]) -> Figure:
    """Tokens in the documents' last chunks, and the share of padding in several arrays."""
    figure, (left, right) = subplots(1, 2, figsize=(8, 3), width_ratios=(3, 2))
    bins = np.linspace(0.5, chunk_size + 0.5, 17 if chunk_size % 16 == 0 else 9)
    left.hist(last, bins=bins, color=COLOURS["chunk"], edgecolor="white")
    left.axhline(len(last) / (len(bins) - 1), color=COLOURS["ink"], linewidth=1, linestyle="--")
    left.set(xlabel="tokens in a document's last chunk", ylabel="documents", title="Last chunks end anywhere")
    right.barh(list(shares), [100 * share for share in shares.values()], color=COLOURS["muted"])
    for row, share in enumerate(shares.values()):
        right.text(100 * share, row, f" {share:.1%}", va="center")
    right.set(xlabel="padding, % of the tokens", xlim=(0, 130 * max(shares.values())))
    right.set_title("Short documents waste more")
    right.invert_yaxis()
    right.grid(axis="y", visible=False)
    return figure
