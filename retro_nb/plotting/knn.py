"""Figures of notebook 03: a chunk beside its neighbours, the cost of a search, and which chunks find which."""

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from IPython.display import HTML
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter

from retro_nb.plotting.style import COLOURS, subplots

WORD = re.compile(r"[^\W\d_]{5,}")  # content words: five letters or more


def _marked(text: str, words: set[str]) -> str:
    """Text as HTML, with `words` in bold on a tint of the neighbours' colour."""
    style = f"background:{COLOURS['neighbour']}33"
    parts, end = [], 0
    for match in WORD.finditer(text):
        if match[0].lower() in words:
            parts += [escape(text[end : match.start()]), f'<b style="{style}">{escape(match[0])}</b>']
            end = match.end()
    return "".join(parts) + escape(text[end:])


def side_by_side(question: tuple[str, str], answers: Sequence[tuple[str, str]]) -> HTML:
    """A chunk at the left and its neighbours to the right, each (title, text); shared words are marked."""

    def words(text: str) -> set[str]:
        return {word.lower() for word in WORD.findall(text)}

    asked = words(question[1])
    shared = [asked & words(text) for _, text in answers]
    columns = [(*question, set().union(*shared)), *((*pair, own) for pair, own in zip(answers, shared, strict=True))]
    width = f"width:{100 // len(columns)}%"
    heads = "".join(f'<th style="text-align:left; {width}">{escape(title)}</th>' for title, _, _ in columns)
    cell = '<td style="text-align:left; vertical-align:top">{}</td>'
    cells = "".join(cell.format(_marked(text, marked)) for _, text, marked in columns)
    return HTML(f"<table><tr>{heads}</tr><tr>{cells}</tr></table>")


def own_by_rank(shares: Float[np.ndarray, " rank"], chance: float) -> Figure:
    """Share of chunks whose first, second, … nearest chunk is from the same speech; rank 0 is the chunk itself."""
    figure, axes = subplots(figsize=(8, 3.2))
    axes.bar(0, shares[0], color=COLOURS["control"], label="the chunk itself")
    axes.bar(range(1, len(shares)), shares[1:], color=COLOURS["chunk"], label="another chunk of the same speech")
    axes.axhline(chance, color=COLOURS["ink"], linewidth=1.2, linestyle="--", label="if neighbours were drawn by lot")
    axes.set(title="The nearest chunks of all are one's own", ylabel="share of chunks", ylim=(0, 1.05))
    axes.set(xlabel="rank by distance", xticks=range(len(shares)))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.legend()
    return figure


def margins(needed: Mapping[str, Int[np.ndarray, " any"]], usual: int) -> Figure:
    """Share of chunks with too few neighbours for each margin, from the margin that each chunk needs."""
    figure, axes = subplots(figsize=(8, 3.2))
    for (name, values), colour in zip(needed.items(), ("chunk", "neighbour"), strict=False):
        steps = np.arange(0, 31)
        axes.plot(steps, [(values > step).mean() for step in steps], color=COLOURS[colour], linewidth=2, label=name)
    axes.axvline(usual, color=COLOURS["muted"], linestyle="--", linewidth=1.2, label=f"a margin of {usual}")
    axes.set(title="A margin that suits short documents starves a long one", xlim=(0, 30), ylim=(0, None))
    axes.set(xlabel="chunks fetched beyond k", ylabel="chunks left with\nfewer than k neighbours")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.legend()
    return figure


def recall_against_time(trials: Sequence[Mapping[str, Any]], k: int) -> Figure:
    """Recall against search time, one line per index; each trial has index, effort, ms and recall."""
    figure, axes = subplots(figsize=(8, 4.4))
    names = list(dict.fromkeys(trial["index"] for trial in trials))
    for name, colour in zip(names, ("ink", "chunk", "model", "neighbour", "continuation"), strict=False):
        points = [trial for trial in trials if trial["index"] == name]
        beside = (-4, 6) if name.startswith("HNSW") else (5, -11)  # its line runs along the top
        xs, ys = ([point[key] for point in points] for key in ("ms", "recall"))
        axes.plot(xs, ys, "o-", color=COLOURS[colour], linewidth=1.8, label=name)
        for x, y, effort in zip(xs, ys, [point["effort"] for point in points], strict=True):
            axes.annotate(effort or "", (x, y), beside, textcoords="offset points", fontsize=8, color=COLOURS[colour])
    axes.set(title="What is given up, and what for", xscale="log")
    axes.set(xlabel="milliseconds for a query", ylabel=f"recall@{k}")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.legend(loc="lower right")
    return figure


def decade_map(shares: Float[np.ndarray, "a a"], decades: Sequence[int]) -> Figure:
    """Decades of chunks (rows) and of their neighbours (columns). Each row sums to 1."""
    figure, axes = subplots(figsize=(7.2, 6))
    image = axes.imshow(shares, vmin=0)
    ticks = range(0, len(decades), 3)
    labels = [f"{decades[tick]}s" for tick in ticks]
    axes.set(xticks=ticks, xticklabels=labels, yticks=ticks, yticklabels=labels)
    axes.tick_params(axis="x", rotation=45)
    axes.set(title="Each age asks its own", ylabel="a chunk of the …", xlabel="finds neighbours in the …")
    axes.grid(False)
    figure.colorbar(image, label="share of the row's neighbours", format=PercentFormatter(1, decimals=0), aspect=30)
    return figure


def gaps_and_distances(
    gaps: Mapping[str, Int[np.ndarray, " any"]], distances: Mapping[str, Float[np.ndarray, " any"]]
) -> Figure:
    """Histograms of the years between a chunk and its neighbour, and of their squared distance."""
    figure, (left, right) = subplots(1, 2, figsize=(8.4, 3.4))
    for axes, groups, bins in ((left, gaps, np.arange(0, 241, 10)), (right, distances, np.linspace(0, 16, 65))):
        for (name, values), colour in zip(groups.items(), ("neighbour", "muted", "chunk"), strict=False):
            axes.hist(values, bins, density=True, histtype="step", linewidth=2, color=COLOURS[colour], label=name)
        axes.set(yticks=[])
        axes.legend(fontsize=9)
    left.set(title="How many years apart?", xlabel="years between the two", ylabel="share of pairs")
    right.set(title="How near?", xlabel="squared distance d²")
    return figure


def hubs(times: Int[np.ndarray, " c"], lengths: Float[np.ndarray, " c"], even: float) -> Figure:
    """How often each chunk is retrieved, by rank and against the length of its vector."""
    figure, (left, right) = subplots(1, 2, figsize=(8.4, 3.4))
    left.plot(np.sort(times)[::-1], color=COLOURS["neighbour"], linewidth=2)
    left.axhline(even, color=COLOURS["muted"], linestyle="--", linewidth=1.2, label="if all were retrieved alike")
    left.set(title="A few are found by many", xlabel="chunks, most retrieved first", ylabel="times retrieved")
    left.legend(fontsize=9)
    right.scatter(lengths, times, s=7, color=COLOURS["chunk"], alpha=0.5, linewidths=0)
    right.set(title="They have short vectors", xlabel="length ‖v‖ (logarithmic)", ylabel="times retrieved")
    right.set(xscale="log", xticks=[2, 3, 4, 6, 8], xticklabels=[2, 3, 4, 6, 8])
    right.xaxis.set_minor_locator(NullLocator())
    return figure
