"""Figures of notebook 10: length of a corpus's documents, time of a build, gains predicted and measured."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, PercentFormatter

from retro_nb.planning.costs import Step
from retro_nb.planning.survey import Survey, as_size, as_time
from retro_nb.plotting.style import COLOURS, literal, subplots

DOES = {"chunk": "cut into chunks", "embed": "embed", "index": "index", "search": "search neighbours"}
LEAST = 0.01  # seconds; a shorter bar would have no length on the logarithmic axis
SAVED = (-0.01, 0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4)  # ticks of shares of a loss
TICKS = {"0.1 s": 0.1, "1 s": 1, "10 s": 10, "1 min": 60, "10 min": 600, "1 h": 3600, "10 h": 36000}
TICKS |= {"4 days": 4 * 86400, "40 days": 40 * 86400, "1 year": 365 * 86400, "10 years": 3650 * 86400}


def lengths(found: Survey) -> Figure:
    """Histogram of document lengths, one bar per doubling; an arrow shows the longest document and its share."""
    figure, axes = subplots(figsize=(8, 3.2))
    counts = np.array(found.lengths)
    edges = np.concatenate([[0.5], 2.0 ** np.arange(len(counts))])  # empty documents to the left of 1 character
    axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color=COLOURS["chunk"], edgecolor="white")
    if counts[0]:
        axes.patches[0].set_color(COLOURS["muted"])
        axes.annotate(f"{counts[0]:,} empty", (0.5**0.5, counts[0]), (0, 3), textcoords="offset points", ha="center")
    axes.annotate(
        f"the longest: {found.longest_share:.1%} of all text\n{literal(found.longest_title[:40])}",
        (found.longest, 0),
        (0.98, 0.98),
        textcoords="axes fraction",
        ha="right",
        va="top",
        color=COLOURS["neighbour"],
        arrowprops={"arrowstyle": "-|>", "color": COLOURS["neighbour"], "linewidth": 1.5},
    )
    first = edges[np.flatnonzero(counts)[0]]
    axes.set(xscale="log", xlim=(first / 2, 2.8 * edges[-1]), ylim=(0, counts.max() * 1.45))
    axes.set(title=f"How long are the {found.documents:,} documents?", ylabel="documents", xlabel="characters")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    return figure


def times(steps: Sequence[Step]) -> Figure:
    """Estimated time of each step as a bar, in order from the top, with its bytes on disk."""
    figure, axes = subplots(figsize=(8, 2.3))
    seconds = [max(step.seconds, LEAST) for step in steps]
    names = [DOES[step.name] for step in steps]
    bars = axes.barh(names, seconds, left=0, color=[COLOURS[name] for name in ("chunk", "model", "muted", "neighbour")])
    labels = [f" {as_time(step.seconds)}, {as_size(step.disk)}" for step in steps]
    axes.bar_label(bars, labels)
    whole = sum(step.seconds for step in steps)
    axes.set(xscale="log", xlim=(LEAST / 2, max(seconds) * 60), title=f"A build will take about {as_time(whole)}")
    axes.set(xlabel="time (logarithmic)")
    shown = {name: at for name, at in TICKS.items() if at < max(seconds) * 20}  # leaves room for the last label
    axes.set_xticks(list(shown.values()), list(shown), fontsize=9 if len(shown) < 8 else 8)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    return figure


def predictions(points: Mapping[str, tuple[float, float]], mine: float | None = None) -> Figure:
    """What was predicted that neighbours save, and what trained models then saved; both as shares of the loss.

    Args:
        points: predicted and measured, by the name of what they are about.
        mine: a prediction of which nothing is measured yet.
    """
    figure, axes = subplots(figsize=(6.4, 4.2))
    axes.plot([-0.01, 0.7], [-0.01, 0.7], color=COLOURS["muted"], linestyle="--", label="as predicted")
    for name, (predicted, measured) in points.items():
        axes.plot(predicted, measured, "o", color=COLOURS["model"])
        axes.annotate(name, (predicted, measured), (7, -4), textcoords="offset points", fontsize=9, va="center")
    if mine is not None:
        axes.axvline(mine, color=COLOURS["neighbour"], label=f"here: {mine:.1%} predicted")
    axes.set_xscale("symlog", linthresh=0.02)
    axes.set_yscale("symlog", linthresh=0.02)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(FixedLocator(SAVED))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(PercentFormatter(1, 0))
    axes.set(xlabel="predicted to be saved", ylabel="saved by trained models", xlim=(-0.01, 0.9), ylim=(-0.012, 0.7))
    axes.legend(loc="upper left")
    axes.set_title("What copying promises, and what was gained")
    return figure
