"""Figures of notebook 09: RETROfit's additions to a language model, and how it learns to read."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from retro_nb.plotting.style import COLOURS, GREY, arrow, blank, box, subplots

LOOKS = {"RETROfit": ("model", "-"), "RETRO from scratch": ("chunk", "--")}


def anatomy(depth: int, readers: Sequence[int]) -> Figure:
    """A frozen language model (grey) with the added encoder and chunked cross-attention (green)."""
    width, gap = 1.5, 0.35
    figure, axes = blank(max(depth * (width + gap), 6.0), 2.9)
    for number in range(1, depth + 1):
        x = (number - 1) * (width + gap) + 0.05
        box(axes, x, 0.35, width, 0.45, "attention", colour=GREY)
        box(axes, x, 1.35, width, 0.45, "feed-forward", colour=GREY)
        axes.text(x + width / 2, 0.13, f"layer {number}", ha="center", va="center", fontsize=8, color=COLOURS["ink"])
        if number in readers:
            box(axes, x, 0.85, width, 0.45, "CCA", colour=COLOURS["model"])
            arrow(axes, (x + width + gap / 2, 2.35), (x + width + gap / 2, 1.07), color=COLOURS["neighbour"])
            arrow(axes, (x + width + gap / 2, 1.07), (x + width, 1.07), color=COLOURS["neighbour"])
        if number > 1:
            arrow(axes, (x - gap, 1.57), (x, 0.57))
    right = (depth - 1) * (width + gap) + width + gap / 2
    box(axes, 0.05, 2.35, right, 0.45, "encoder: reads the neighbours", colour=COLOURS["model"])
    return figure


def weights(frozen: Mapping[str, int], added: Mapping[str, int]) -> Figure:
    """Number of frozen weights (grey) and of added, trained weights (green)."""
    figure, axes = subplots(figsize=(8, 1.9))
    left, total = 0, sum(frozen.values()) + sum(added.values())
    for parts, shades in ((frozen, ("#C3CAD1", GREY)), (added, (COLOURS["model"], "#66C4A6"))):
        for number, (name, count) in enumerate(parts.items()):
            axes.barh(0, count, left=left, color=shades[number % 2], edgecolor="white")
            label = f"{name}\n{count:,}"
            axes.text(left + count / 2, 0 if count > total / 8 else 0.5, label, ha="center", va="center", fontsize=8)
            left += count
    share = sum(added.values()) / total
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set(ylim=(-0.5, 0.75), yticks=(), xlabel="weights", title=f"{share:.0%} of the weights are trained")
    axes.grid(False)
    axes.spines["left"].set_visible(False)
    return figure


def learning(
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    tenths: Mapping[str, Sequence[float]],
    level: tuple[str, float],
    title: str,
) -> Figure:
    """Loss on facts over the training tokens seen, one line per seed; diamonds are full runs on a tenth of them.

    Args:
        runs: for each model and seed, `curves["on"][1]` and the `tokens` at these points.
        tenths: for each model, the final losses of runs planned for a tenth of the tokens.
        level: name and loss of the language model alone.
        title: the figure's title.
    """
    figure, axes = subplots(figsize=(8, 3.6))
    for name, each in runs.items():
        colour, dashes = LOOKS[name]
        for number, run in enumerate(each):
            millions = np.asarray(run["tokens"]) / 1e6
            label = name if number == 0 else None
            axes.plot(millions, run["curves"]["on"][1], dashes, color=COLOURS[colour], linewidth=1.6, label=label)
        tenth = max(each[0]["tokens"]) / 1e7
        reached = tenths[name]
        axes.plot([tenth] * len(reached), reached, "D", color=COLOURS[colour], markeredgecolor="white", zorder=4)
    axes.plot([], [], "D", color=COLOURS["muted"], label="a training of a tenth")
    axes.axhline(level[1], color=COLOURS["baseline"], label=f"{level[0]}: {level[1]:.2f}")
    axes.set(xlabel="training tokens seen with retrieval, millions", ylabel="nats per fact")
    axes.set(ylim=(0, 6), xlim=(0, None))
    axes.set_title(title)
    axes.legend(frameon=True, edgecolor="none")
    return figure
