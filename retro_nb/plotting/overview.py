"""Figures of notebook 00: RETRO in one picture, and what it finds."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from retro_nb.plotting.style import COLOURS, arrow, blank, box
from retro_nb.storage import ROOT

CHUNKS = (
    "…it is not the want of\nthat virtue which makes\nus seek their peace, but a\nconscientious desire…",
    "…to direct the energies of\nour nation to the multi-\nplication of the human\nrace, and not to its…",
    "…destruction. Unauthorized\nby the Constitution, without\nthe sanction of Congress,\nto go beyond…",
)
FOUND = (((11, "1849"), (31, "1960")), ((6, "1823"), (24, "1917")))  # cells of the database, and their years


def retro() -> Figure:
    """RETRO in one picture: every chunk finds neighbours, and the next chunk reads them."""
    figure, axes = blank(8, 4.75)
    muted, ink = COLOURS["muted"], COLOURS["ink"]
    lefts, wide, gap = (0.1, 2.9, 5.7), 1.72, 1.08
    middle = [left + wide + gap / 2 for left in lefts]  # between a chunk and the next

    box(axes, 0.1, 3.75, 7.32, 0.85, colour=COLOURS["model"], alpha=0.18)
    axes.text(0.22, 4.38, "decoder: predicts each token from those before it", color=ink, va="center", fontsize=9)
    for u, (left, words) in enumerate(zip(lefts, CHUNKS, strict=True)):
        box(axes, left, 2.75, wide, 0.78, colour=COLOURS["chunk"])
        axes.text(left + wide / 2, 3.14, words, ha="center", va="center", color="white", fontsize=7.5, linespacing=1.25)
        axes.text(left + 0.02, 3.63, f"chunk {u + 1}", color=COLOURS["chunk"], va="center", fontsize=8.5, weight="bold")
    cells = 46
    for cell in range(cells):
        axes.add_patch(plt.Rectangle((0.1 + cell * 0.16, 0.3), 0.145, 0.2, color="#D5DAE0", linewidth=0))
    axes.text(0.1, 0.13, "database: chunks of other documents, each with its vector", color=ink, va="center", fontsize=9)
    for u in range(2):
        _retrieve(axes, lefts[u] + wide / 2, middle[u], FOUND[u])
        box(axes, middle[u] - 0.34, 3.85, gap + wide - 0.3, 0.34, "chunked cross-attention", colour=COLOURS["model"])
        axes.texts[-1].set_fontsize(8.5)
    axes.text(7.5, 3.14, "…", color=muted, va="center", fontsize=16)
    return figure
