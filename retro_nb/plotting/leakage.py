"""Figures of notebook 08: text that a chunk shares with its neighbours word for word, and the gain without it."""

from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import numpy as np
from IPython.display import HTML
from jaxtyping import Float, Int
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.lib.stride_tricks import sliding_window_view

from retro_nb.measure.leakage import shared_runs
from retro_nb.measure.memory import pieces
from retro_nb.plotting.evaluation import CONDITIONS
from retro_nb.plotting.style import COLOURS, literal, subplots
from retro_nb.store.chunking import document_tokens
from retro_nb.text.document import Document

# Line styles of the models, for readers who cannot tell the colours apart.
LINES: dict[str, dict[str, Any]] = {
    "on": {"marker": "o", "linewidth": 2},
    "off": {"marker": "v", "linestyle": ":"},
    "shuffled": {"marker": "x", "linestyle": "-."},
    "baseline": {"marker": "s", "linestyle": "--", "linewidth": 2},
}
GROUPS = (("chunk", "-"), ("neighbour", "--"), ("model", ":"))  # corpora, in their order
STRICTEST = 1 / 8  # the paper's least α: 8 tokens of 64

# Minimum run length -> background, darker for longer runs. Shorter runs are everyday phrases.
SHADES = {least: COLOURS["neighbour"] + opacity for least, opacity in ((4, "26"), (8, "59"), (16, "A6"), (32, ""))}


def _percent(share: float, _: object = None) -> str:
    return f"{100 * share:g}%"


# how much is shared


def overlap_histogram(overlaps: Mapping[str, Float[np.ndarray, " any"]], title: str) -> Figure:
    """Histogram of the overlap in bins of four tokens of 64, as shares of chunks on a logarithmic axis."""
    figure, axes = subplots(figsize=(8, 3.4))
    bins = [0, *((np.arange(4, 65, 4) + 0.5) / 64)]  # up to 4 tokens, 5 to 8, 9 to 12, …
    for (name, values), (colour, line) in zip(overlaps.items(), GROUPS, strict=False):
        weights = np.full(len(values), 1 / max(len(values), 1))
        label = f"{literal(name)}: {(values > STRICTEST).mean():.1%} above 12.5%"
        look: dict = {"histtype": "step", "linewidth": 2, "color": COLOURS[colour], "linestyle": line}
        axes.hist(values, bins, weights=weights, label=label, **look)
    axes.axvline(STRICTEST + 0.5 / 64, color=COLOURS["muted"], linestyle="--", linewidth=1.2)
    axes.set(title=title, yscale="log", xlim=(0, bins[-1]))
    axes.set(xlabel="r: longest run shared with a neighbour, as a share of the chunk", ylabel="share of chunks")
    axes.set_xticks(np.linspace(0, 1, 9))
    axes.xaxis.set_major_formatter(_percent)
    axes.yaxis.set_major_formatter(_percent)
    axes.legend()
    return figure


def suffix_table(lengths: Int[np.ndarray, "m r"], chunk: Sequence[str], text: Sequence[str]) -> Figure:
    """Table of common suffixes with a row for each word of the chunk; frames mark the words of the longest run."""
    figure, axes = subplots(figsize=(1 + 0.62 * len(text), 0.6 + 0.3 * len(chunk)))
    axes.imshow(lengths, LinearSegmentedColormap.from_list("runs", ["white", COLOURS["neighbour"]]), aspect="auto")
    i, j = np.unravel_index(lengths.argmax(), lengths.shape)
    run = [(i - back, j - back) for back in range(lengths.max())]
    for (row, column), length in np.ndenumerate(lengths):
        look = {"color": COLOURS["ink"]} if length else {"color": COLOURS["muted"], "fontsize": 8}
        axes.text(column, row, length, ha="center", va="center", **look)
        if (row, column) in run:
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, linewidth=2, clip_on=False))
    axes.set_xticks(range(len(text)), map(literal, text))
    axes.set_yticks(range(len(chunk)), map(literal, chunk))
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    return figure


# what it is worth


def bits_by_overlap(curve: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """bpb(α) of every model, and below it the share of chunks kept by each α (paper, Fig. 6).

    Args:
        curve: the result of `leakage.leakage_curve`.
        title: the figure's message.
    """
    figure, (axes, below) = subplots(2, 1, figsize=(8, 4.8), sharex=True, height_ratios=(3, 1))
    alphas = [point["alpha"] for point in curve]
    for name in curve[0]["bits_per_byte"]:
        bits = [point["bits_per_byte"][name] for point in curve]
        values = np.array([np.nan if value is None else value for value in bits])
        axes.plot(alphas, values, label=literal(name), color=CONDITIONS.get(name), **LINES.get(name, {}))
    axes.set(title=title, ylabel="bits per byte")
    axes.legend(ncols=len(curve[0]["bits_per_byte"]))
    bars = below.bar(alphas, [point["chunks"] for point in curve], width=0.06, color=COLOURS["muted"])
    below.bar_label(bars, [f"{point['chunks']:.1%}" for point in curve], fontsize=8, padding=1)
    below.set(ylabel="chunks kept", ylim=(0, 1.3), yticks=[0, 0.5, 1], xlabel="α: only chunks with r ≤ α")
    below.set_xticks(alphas)
    below.xaxis.set_major_formatter(_percent)
    below.yaxis.set_major_formatter(_percent)
    return figure


def gain_by_overlap(
    alphas: Sequence[float],
    gains: Mapping[str, Sequence[tuple[float, float, float]]],
    title: str,
    chunks: str = "α: only chunks with r ≤ α",
) -> Figure:
    """Bits per byte saved on some chunks, each (value, low, high), with the intervals as bands.

    Args:
        alphas: places of the values on the x axis.
        gains: by corpus, or by the condition compared with, which then has its usual colour.
        title: the figure's message.
        chunks: the chunks counted at each α, as the label of the x axis.
    """
    figure, axes = subplots(figsize=(8, 3.4))
    for (name, points), (colour, line) in zip(gains.items(), GROUPS, strict=False):
        values, low, high = np.array(points).T
        shade = CONDITIONS.get(name, COLOURS[colour])
        axes.plot(alphas, values, f"o{line}", color=shade, linewidth=2, label=literal(name))
        axes.fill_between(alphas, low, high, color=shade, alpha=0.18, linewidth=0)
    axes.axhline(0, color=COLOURS["ink"], linewidth=1.2)
    axes.set(title=title, xlabel=chunks, ylabel="bits per byte saved\n(band: 95 % interval)")
    axes.set_xticks(alphas)
    axes.xaxis.set_major_formatter(_percent)
    figure.legend(loc="outside lower right", ncols=len(gains))  # no line or band behind it
    return figure


# two texts


class Extract(NamedTuple):
    """Consecutive tokens of a document, each with its text and the white space after it."""

    title: str
    ids: Int[np.ndarray, " n"]
    words: list[str]


def extract(document: Document, first: int, count: int = 64) -> Extract:
    """Tokens `first`, `first` + 1, … of a document; 0 is its [CLS]."""
    words = [*pieces(document.text), ""][first : first + count]  # [SEP] has no text
    return Extract(document.title, _ids(document)[first : first + count], words)


def _ids(document: Document) -> Int[np.ndarray, " n"]:
    return np.concatenate([tokens.ids for tokens in document_tokens(document.text)])


def shared_text(chunk: Extract, neighbours: Sequence[Extract], whole: int = 0) -> HTML:
    """A chunk beside the neighbour that shares most; each token's colour shows the longest run shared with a neighbour.

    The number after a coloured passage is the length of the run around it; the longest run is bold on both sides.
    Pointing at a word shows the source of its run. `whole` is the length of the longest run in the documents, if
    these extracts do not show all of it.
    """
    each = np.stack([shared_runs(chunk.ids, [neighbour.ids]) for neighbour in neighbours])
    lengths, origins = each.max(axis=0), each.argmax(axis=0)
    longest = int(lengths.max())
    best = neighbours[origins[lengths.argmax()]]
    left = _shaded(chunk.words, lengths.tolist(), [neighbours[origin].title for origin in origins], longest)
    back = shared_runs(best.ids, [chunk.ids]).tolist()
    right = _shaded(best.words, back, [chunk.title] * len(back), longest)
    head = '<th style="text-align:left; width:50%">{}</th>'
    cell = '<td style="text-align:left; vertical-align:top; line-height:1.7">{}</td>'
    run = f"{max(whole, longest)} tokens in a row" + (f", of which {longest} are shown" if whole > longest else "")
    heads = head.format(escape(chunk.title)) + head.format(f"{escape(best.title)}, {run}")
    return HTML(f"<table><tr>{heads}</tr><tr>{cell.format(left)}{cell.format(right)}</tr></table>{_legend()}")


def longest_shared(new: Document, old: Document) -> HTML:
    """The longest run that two documents share, in its context in both; only the beginning of a very long run."""
    ids, others = _ids(new), _ids(old)
    lengths = shared_runs(ids, [others])
    first, length = int(lengths.argmax()), int(lengths.max())
    run = ids[first : first + length]
    place = int((sliding_window_view(others, length) == run).all(axis=1).argmax())
    count = min(max(64, length + 14), 160)  # starts six tokens before the run, but after [CLS]
    chunk, neighbour = (extract(*side, count) for side in ((new, max(first - 6, 1)), (old, max(place - 6, 1))))
    return shared_text(chunk, [neighbour], length)


def _style(length: int) -> str:
    """Background of a run, with white letters if it is dark; empty for an everyday phrase."""
    least = max((step for step in SHADES if step <= length), default=None)
    if least is None:
        return ""
    letters = ";color:white" if least == max(SHADES) else ""
    return f' style="background:{SHADES[least]}{letters}"'


def _shaded(words: Sequence[str], lengths: Sequence[int], sources: Sequence[str], longest: int) -> str:
    """Words as HTML; adjacent words with the same run length and source form one element."""
    parts, tokens = [], zip(lengths, sources, words, strict=True)
    for (length, source), stretch in groupby(tokens, key=lambda token: token[:2]):
        text = "".join(word for _, _, word in stretch)
        words_only = escape(text.rstrip())
        space = " " * (len(text) > len(text.rstrip()))  # spaces keep the page's background
        if length and words_only:
            hint = f"{length} token{'s' * (length > 1)} in a row, also in {source}"
            number = f"<sub>{length}</sub>" if length >= min(SHADES) else ""
            mark = "b" if length == longest else "span"
            words_only = f'<{mark} title="{escape(hint)}"{_style(length)}>{words_only}{number}</{mark}>'
        parts.append(words_only + space)
    return "".join(parts)


def _legend() -> str:
    """Legend of the backgrounds."""
    names = [f"{least} to {stop - 1}" for least, stop in pairwise(SHADES)] + [f"{max(SHADES)} and more"]
    boxes = [f"<span{_style(least)}>&nbsp;{name}&nbsp;</span>" for least, name in zip(SHADES, names, strict=True)]
    return f"<p>Tokens in the longest shared run around a word: {' '.join(boxes)}; the longest run is <b>bold</b>.</p>"
