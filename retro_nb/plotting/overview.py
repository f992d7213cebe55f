"""Figures of notebook 00: RETRO in one picture, a neighbour that it finds, and its first training steps."""

import math
import textwrap
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from retro_nb.common.arrays import ROOT, replacing
from retro_nb.plotting.style import COLOURS, arrow, blank, box, literal, subplots, use_style

# The picture's example: a message to Congress of 1801, and the years of its chunks' neighbours.
CHUNKS = (
    "…a conscientious desire\nto direct the energies\nof our nation to the",
    "multiplication of the\nhuman race, and not\nto its destruction.",
    "Unauthorized by the\nConstitution, without the\nsanction of Congress…",
)
FOUND = ((("1849", 12), ("1960", 18)), (("1917", 25), ("1968", 34)))  # year, its cell in the database
DOCUMENTS = (6, 3, 8, 4, 7, 5, 6, 4, 4)  # number of cells of each document


def _database(axes: Axes, y: float) -> list[float]:
    """Draw a strip with one cell per chunk, grouped by document; return the left edge of each cell."""
    lefts, x = [], 0.1
    for chunks in DOCUMENTS:
        for _ in range(chunks):
            axes.add_patch(Rectangle((x, y), 0.13, 0.2, color="#CDD4DB", linewidth=0))
            lefts.append(x)
            x += 0.15
        x += 0.1
    return lefts


def _retrieve(axes: Axes, chunk: float, gap: float, found: Sequence[tuple[str, int]], cells: list[float]) -> None:
    """Draw the path from a chunk (at `chunk`) to the database and up to its neighbours and encoder (at `gap`)."""
    arrow(axes, (chunk, 2.72), (chunk, 2.27))
    box(axes, chunk - 0.5, 1.95, 1, 0.3, "frozen BERT", colour=COLOURS["muted"])
    arrow(axes, (chunk, 1.93), (chunk, 0.67))
    axes.text(chunk - 0.06, 1.5, "nearest", ha="right", va="center", fontsize=8.5, color=COLOURS["ink"])
    for row, (year, cell) in enumerate(found):
        y = 1.05 + 0.32 * row
        for name, side, dx in (("neighbour", cell, -0.52), ("continuation", cell + 1, 0.02)):
            axes.add_patch(Rectangle((cells[side], 0.42), 0.13, 0.2, color=COLOURS[name], linewidth=0))
            box(axes, gap + dx, y, 0.5, 0.26, year if dx < 0 else "next", colour=COLOURS[name])
        axes.plot([cells[cell] + 0.14, gap - 0.01], [0.64, 1.04], color=COLOURS["neighbour"], linewidth=1, zorder=0)
    arrow(axes, (gap, 1.66), (gap, 1.93))
    box(axes, gap - 0.5, 1.95, 1, 0.3, "encoder", colour=COLOURS["model"])
    arrow(axes, (gap, 2.27), (gap, 3.9), color=COLOURS["model"], linewidth=1.8)


def retro() -> Figure:
    """RETRO in one picture: a chunk finds neighbours, and the model reads them while writing the next chunk."""
    figure, axes = blank(8, 4.6)
    wide, gap, lefts = 1.75, 1.13, (0.1, 2.98, 5.86)
    box(axes, 0.1, 3.82, 7.8, 0.73, colour=COLOURS["model"], alpha=0.16)
    axes.text(0.22, 4.39, "decoder: predicts each token from those before it", va="center", color=COLOURS["ink"])
    cells = _database(axes, 0.42)
    for u, (left, words) in enumerate(zip(lefts, CHUNKS, strict=True)):
        box(axes, left, 2.74, wide, 0.66, words, colour=COLOURS["chunk"])
        axes.texts[-1].set(fontsize=8.5, linespacing=1.2)
        axes.text(left + 0.02, 3.52, f"chunk {u + 1}", va="center", fontsize=9, color=COLOURS["chunk"], weight="bold")
        arrow(axes, (left + wide / 2, 3.42), (left + wide / 2, 3.8), color=COLOURS["chunk"])
    for u, found in enumerate(FOUND):
        between = lefts[u] + wide + gap / 2
        _retrieve(axes, lefts[u] + wide / 2, between, found, cells)
        box(axes, between - 0.2, 3.92, wide + gap / 2 + 0.1, 0.28, "chunked cross-attention", colour=COLOURS["model"])
    title = "database: chunks of other documents, found by their vectors"
    axes.text(0.1, 0.2, title, va="center", color=COLOURS["ink"])
    legend = "each neighbour comes with\nits continuation, the chunk\nthat follows it"
    axes.text(5.9, 1.35, legend, va="center", fontsize=8.5, color=COLOURS["ink"])
    return figure


def save_retro_picture() -> None:
    """Save `retro` as docs/retro.png for the README, at 120 dots per inch. Call this after changing `retro`."""
    use_style()
    with replacing(ROOT / "docs" / "retro.png") as temporary:
        retro().savefig(temporary, format="png", dpi=120)


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), 44)


def _page(axes: Axes, x: float, top: float, title: str, parts: Sequence[tuple[str, str]]) -> None:
    """A titled column of text 3.7 inches wide, in parts of (colour name, text) with coloured backgrounds.

    If there are several parts, the name of its colour is above each.
    """
    axes.text(x, top, literal(title), va="center", weight="bold", color=COLOURS[parts[0][0]])
    y = top - 0.2
    for colour, text in parts:
        lines = _wrap(text)
        height = 0.19 * len(lines) + 0.14
        if len(parts) > 1:
            axes.text(x, y - 0.07, colour, va="center", fontsize=9, color=COLOURS["ink"])
            y -= 0.17
        box(axes, x, y - height, 3.7, height, colour=COLOURS[colour], alpha=0.16)
        look: dict = {"fontsize": 10, "family": "serif", "linespacing": 1.3, "va": "top", "color": COLOURS["ink"]}
        axes.text(x + 0.1, y - 0.08, literal("\n".join(lines)), **look)
        y -= height + 0.08


def finding(title: str, passage: str, found_in: str, text: str, continuation: str) -> Figure:
    """A passage beside the neighbour found for it, with the neighbour's continuation."""
    lines = [len(_wrap(words)) for words in (passage, text, continuation)]
    tall = 0.19 * max(lines[0], lines[1] + lines[2]) + 1.1
    figure, axes = blank(8, tall)
    _page(axes, 0.05, tall - 0.15, title, [("chunk", passage)])
    _page(axes, 4.25, tall - 0.15, found_in, [("neighbour", text), ("continuation", continuation)])
    y = tall - 0.4 - 0.095 * min(lines[:2])
    arrow(axes, (3.8, y), (4.2, y), color=COLOURS["neighbour"], linewidth=1.8)
    return figure


def first_steps(losses: Sequence[float], vocabulary: int) -> Figure:
    """Training loss of each step, compared with guessing at random among all tokens."""
    figure, axes = subplots(figsize=(8, 3))
    axes.plot(range(1, len(losses) + 1), losses, color=COLOURS["model"], marker=".")
    axes.axhline(math.log(vocabulary), color=COLOURS["muted"], linestyle="--", linewidth=1)
    axes.annotate(f"guessing: ln {vocabulary:,}", (len(losses), math.log(vocabulary)), (0, -12), ha="right",
                  textcoords="offset points", color=COLOURS["muted"])  # fmt: skip
    axes.set(xlabel="step", ylabel="loss, nats a token", title="It learns; a few steps do not teach it English")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure
