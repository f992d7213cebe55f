"""Figures of notebook 08: what a chunk shares with its neighbours word for word, and what is gained without it."""

from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import HTML
from jaxtyping import Float, Int
from matplotlib.figure import Figure

from retro_nb.chunking import document_tokens
from retro_nb.corpus import Document
from retro_nb.leakage import State, SuffixAutomaton, shared_runs
from retro_nb.plotting.evaluation import CONDITIONS
from retro_nb.plotting.style import COLOURS, arrow, blank
from retro_nb.reading import pieces

# A model's line, where colours cannot be told apart.
LINES = {
    "on": {"marker": "o", "linewidth": 2},
    "off": {"marker": "v", "linestyle": ":"},
    "shuffled": {"marker": "x", "linestyle": "-."},
    "baseline": {"marker": "s", "linestyle": "--", "linewidth": 2},
}
GROUPS = (("chunk", "-"), ("neighbour", "--"), ("model", ":"))  # corpora, in their order
STRICTEST = 1 / 8  # the paper's least α: 8 tokens of 64

# The background of runs of at least so many tokens, the longer the darker. Shorter ones are everyday phrases.
SHADES = {least: COLOURS["neighbour"] + opacity for least, opacity in ((4, "26"), (8, "59"), (16, "A6"), (32, ""))}


def _percent(share: float, _: object = None) -> str:
    return f"{100 * share:g}%"


# how much is shared


def overlap_histogram(overlaps: Mapping[str, Float[np.ndarray, " any"]], title: str) -> Figure:
    """How many chunks share how much, in bins of four tokens of 64; the counts as shares, logarithmic."""
    figure, axes = plt.subplots(figsize=(8, 3.4))
    bins = np.append(0, np.arange(4, 65, 4) + 0.5) / 64  # up to 4 tokens, 5 to 8, 9 to 12, …
    for (name, values), (colour, line) in zip(overlaps.items(), GROUPS, strict=False):
        weights = np.full(len(values), 1 / max(len(values), 1))
        label = f"{name}: {(values > STRICTEST).mean():.1%} above 12.5%"
        style = {"histtype": "step", "linewidth": 2, "color": COLOURS[colour], "linestyle": line}
        axes.hist(values, bins, weights=weights, label=label, **style)
    axes.axvline(STRICTEST + 0.5 / 64, color=COLOURS["muted"], linestyle="--", linewidth=1.2)
    axes.set(title=title, yscale="log", xlim=(0, bins[-1]))
    axes.set(xlabel="r: longest run shared with a neighbour, as a share of the chunk", ylabel="share of chunks")
    axes.set_xticks(np.linspace(0, 1, 9))
    axes.xaxis.set_major_formatter(_percent)
    axes.yaxis.set_major_formatter(_percent)
    axes.legend()
    plt.close(figure)
    return figure


# what it is worth


def bits_by_overlap(curve: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """bpb(α) of every model, and below it the share of chunks that each α keeps (paper, Fig. 6).

    Args:
        curve: what `leakage.leakage_curve` returns.
        title: what is to be seen.
    """
    figure, (axes, below) = plt.subplots(2, 1, figsize=(8, 4.8), sharex=True, height_ratios=(3, 1))
    alphas = [point["alpha"] for point in curve]
    for name in curve[0]["bits_per_byte"]:
        bits = [point["bits_per_byte"][name] for point in curve]
        values = np.array([np.nan if value is None else value for value in bits])
        axes.plot(alphas, values, label=name, color=CONDITIONS.get(name), **LINES.get(name, {}))
    axes.set(title=title, ylabel="bits per byte")
    axes.legend(ncols=len(curve[0]["bits_per_byte"]))
    bars = below.bar(alphas, [point["chunks"] for point in curve], width=0.06, color=COLOURS["muted"])
    below.bar_label(bars, [f"{point['chunks']:.1%}" for point in curve], fontsize=8, padding=1)
    below.set(ylabel="chunks kept", ylim=(0, 1.3), yticks=[0, 0.5, 1], xlabel="α: only chunks with r ≤ α")
    below.set_xticks(alphas)
    below.xaxis.set_major_formatter(_percent)
    below.yaxis.set_major_formatter(_percent)
    plt.close(figure)
    return figure


def gain_by_overlap(
    alphas: Sequence[float],
    gains: Mapping[str, Sequence[tuple[float, float, float]]],
    title: str,
    chunks: str = "α: only chunks with r ≤ α",
) -> Figure:
    """Bits per byte that are saved on some chunks, each (value, low, high), with the intervals as bands.

    Args:
        alphas: where the values stand.
        gains: by corpus, or by what is compared with, which then has its own colour.
        title: what is to be seen.
        chunks: which chunks are counted at each α.
    """
    figure, axes = plt.subplots(figsize=(8, 3.4))
    for (name, points), (colour, line) in zip(gains.items(), GROUPS, strict=False):
        values, low, high = np.array(points).T
        shade = CONDITIONS.get(name, COLOURS[colour])
        axes.plot(alphas, values, f"o{line}", color=shade, linewidth=2, label=name)
        axes.fill_between(alphas, low, high, color=shade, alpha=0.18, linewidth=0)
    axes.axhline(0, color=COLOURS["ink"], linewidth=1.2)
    axes.set(title=title, xlabel=chunks, ylabel="bits per byte saved\n(band: 95 % interval)")
    axes.set_xticks(alphas)
    axes.xaxis.set_major_formatter(_percent)
    figure.legend(loc="outside lower right", ncols=len(gains))  # no line or band behind it
    plt.close(figure)
    return figure


# two texts


class Extract(NamedTuple):
    """Some tokens of a document in a row, and how each stands in the text, with the white space after it."""

    title: str
    ids: Int[np.ndarray, " n"]
    words: list[str]


def extract(document: Document, first: int, count: int = 64) -> Extract:
    """Tokens `first`, `first` + 1, … of a document; 0 is its [CLS]."""
    ids = np.concatenate([tokens.ids for tokens in document_tokens(document.text)])[first : first + count]
    words = [*pieces(document.text), ""][first : first + count]  # [SEP] stands for no text
    return Extract(document.title, ids, words)


def shared_text(chunk: Extract, neighbours: Sequence[Extract], whole: int = 0) -> HTML:
    """A chunk, coloured token by token by the longest run shared with its neighbours, beside the one that shares most.

    The number after a coloured stretch is the length of the run around it; the longest run of all is bold on both
    sides. With the mouse on a word one reads from whom its run is. `whole` is the longest run's length in the
    documents, if these extracts do not show all of it.
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
    told = f"{whole} tokens in a row, of which {longest} are shown" if whole > longest else f"{longest} tokens in a row"
    heads = head.format(escape(chunk.title)) + head.format(f"{escape(best.title)}, {told}")
    return HTML(f"<table><tr>{heads}</tr><tr>{cell.format(left)}{cell.format(right)}</tr></table>{_legend()}")


def said_before(
    documents: Sequence[Document], texts: Sequence[Sequence[int]], endings: Sequence[Sequence[int]]
) -> HTML:
    """The longest run that a document repeats, in its place and where it was first; its beginning if it is very long.

    Args:
        documents: in the order in which they were written.
        texts: their tokens, without [CLS] and [SEP].
        endings: for each token how long a run ends with it that an earlier one of the texts has, too.
    """
    later = max(range(len(texts)), key=lambda number: max(endings[number], default=0))
    stop = int(np.argmax(endings[later])) + 1
    told = ["".join(map(chr, text)) for text in texts]  # a token as a letter: then Python finds runs
    run = told[later][stop - endings[later][stop - 1] : stop]
    earlier = next(number for number, text in enumerate(told) if run in text)
    places = (later, stop - len(run)), (earlier, told[earlier].index(run))
    count = min(max(64, len(run) + 14), 160)  # from seven tokens before the run; in the document [CLS] comes first
    chunk, first = (extract(documents[number], max(place - 6, 1), count) for number, place in places)
    return shared_text(chunk, [first], len(run))


def _style(length: int) -> str:
    """The background of a run, with white letters where it is dark; nothing for an everyday phrase."""
    least = max((step for step in SHADES if step <= length), default=None)
    if least is None:
        return ""
    letters = ";color:white" if least == max(SHADES) else ""
    return f' style="background:{SHADES[least]}{letters}"'


def _shaded(words: Sequence[str], lengths: Sequence[int], sources: Sequence[str], longest: int) -> str:
    """Words as HTML, those around which a run has the same length and origin in one piece."""
    parts, tokens = [], zip(lengths, sources, words, strict=True)
    for (length, source), stretch in groupby(tokens, key=lambda token: token[:2]):
        text = "".join(word for _, _, word in stretch)
        words_only = escape(text.rstrip())
        space = " " * (len(text) > len(text.rstrip()))  # it keeps the page's own background
        if length and words_only:
            hint = f"{length} token{'s' * (length > 1)} in a row, also in {source}"
            number = f"<sub>{length}</sub>" if length >= min(SHADES) else ""
            mark = "b" if length == longest else "span"
            words_only = f'<{mark} title="{escape(hint)}"{_style(length)}>{words_only}{number}</{mark}>'
        parts.append(words_only + space)
    return "".join(parts)


def _legend() -> str:
    """What the backgrounds mean."""
    names = [f"{least} to {stop - 1}" for least, stop in pairwise(SHADES)] + [f"{max(SHADES)} and more"]
    boxes = [f"<span{_style(least)}>&nbsp;{name}&nbsp;</span>" for least, name in zip(SHADES, names, strict=True)]
    return f"<p>Tokens in the longest shared run around a word: {' '.join(boxes)}; the longest run is <b>bold</b>.</p>"


# the automaton


def automaton(words: Sequence[str]) -> Figure:
    """The suffix automaton of a text: which words lead on, `shorter` dashed, and the runs that each state stands for.

    In a circle is the length of the longest of them. The states of the text's beginnings stand in a line, and above
    it those that had to be split off.
    """
    names = list(dict.fromkeys(words))
    text, made = [names.index(word) for word in words], SuffixAutomaton()
    made.add(text)
    runs, circles, step = _runs_by_state(made.root, text), {}, 1.32
    beginnings = [made.root, *(next(s for s in runs if text[: i + 1] in runs[s]) for i in range(len(text)))]
    higher = [state for state in runs if state not in beginnings]
    below = 0.14 * max(map(len, runs.values()))  # the lists of runs
    line = below + 0.13 * len(text) + 0.3
    height = line + 0.17 * len(text) + (0.6 if higher else 0)
    figure, axes = blank(1.4 + step * len(text), height)
    for state in runs:
        x, y = 0.7 + step * state.length, line if state in beginnings else height - 0.3
        circles[state] = plt.Circle((x, y), 0.17, color=COLOURS["chunk"], zorder=3)
        axes.add_patch(circles[state])
        axes.text(x, y, state.length, color="white", ha="center", va="center", fontsize=9, zorder=4)
        told = "\n".join(" ".join(names[number] for number in run) for run in runs[state]) or "(nothing)"
        place = (x, below) if state in beginnings else (x + 0.24, y)
        sides = {"ha": "center", "va": "top"} if state in beginnings else {"ha": "left", "va": "center"}
        axes.text(*place, told, fontsize=7.5, color=COLOURS["ink"], **sides)
    for state, circle in circles.items():
        for number, after in state.next.items():
            _edge(axes, circle, circles[after], names[number])
        if state.shorter is not None:
            _edge(axes, circle, circles[state.shorter])
    return figure


def _runs_by_state(root: State, text: list[int]) -> dict[State, list[list[int]]]:
    """Every run of a text, the shortest first, under the state to which it leads; the empty one leads nowhere."""
    runs = {root: [[]]}
    for length in range(1, len(text) + 1):
        for start in range(len(text) - length + 1):
            state, run = root, text[start : start + length]
            for token in run:
                state = state.next[token]
            if run not in runs.setdefault(state, []):
                runs[state].append(run)
    return runs


def _edge(axes: plt.Axes, start: plt.Circle, end: plt.Circle, word: str = "") -> None:
    """A word that leads on, in an arc above the line if it skips a state; `shorter` has none, and hangs below it."""
    (x, y), (dx, dy) = start.center, np.subtract(end.center, start.center)
    # How far the middle is from the straight way: to the left of it, seen in the arrow's direction.
    bend = 0.0 if word and (dx < 1.4 or dy) else -0.1 if dy else -0.3
    style = {} if word else {"linestyle": (0, (4, 2)), "color": COLOURS["neighbour"], "linewidth": 1}
    arrow(axes, start.center, end.center, connectionstyle=f"arc3,rad={bend}", patchA=start, patchB=end, **style)
    if word:
        frame = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
        axes.text(x + dx / 2, y + dy / 2 - bend * dx / 2, word, ha="center", va="center", fontsize=9, bbox=frame)
