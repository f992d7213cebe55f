"""Figures of notebook 02: the input of BERT, and the vectors of the chunks."""

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from IPython.display import HTML
from jaxtyping import Float, Int
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from retro_nb.plotting.style import COLOURS, GREY, SEQUENTIAL, blank, box, literal, subplots

# Special tokens in their own colours, words in the chunks' blue.
TOKEN_COLOURS = {"[CLS]": COLOURS["neighbour"], "[SEP]": COLOURS["continuation"], "[PAD]": GREY}


def quotes(rows: Sequence[tuple[str, str]], heads: tuple[str, str] = ("", "")) -> HTML:
    """A table with two columns, such as titles and texts."""
    cell = '<td style="text-align:left; vertical-align:top; padding:4px 12px 4px 0; {}">{}</td>'
    lines = []
    if any(heads):
        lines.append("".join(f'<th style="text-align:left">{escape(head)}</th>' for head in heads))
    for left, right in rows:
        width = "min-width:9em; font-weight:bold"
        lines.append(cell.format(width, escape(left)) + cell.format("", escape(right)))
    return HTML("<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>")


def framings(rows: Mapping[str, Sequence[str]]) -> Figure:
    """Rows of tokens as boxes, each row with its name at the left; averaged tokens are underlined.

    BERT gives a vector for each token; the mean leaves out the first token and the padding.
    """
    width, label = 0.82, 2.4
    longest = max(map(len, rows.values()))
    figure, axes = blank(label + longest * width, 0.5 * len(rows) + 0.1)
    for row, (name, tokens) in enumerate(rows.items()):
        y = 0.5 * (len(rows) - 1 - row) + 0.1
        axes.text(0, y + 0.17, literal(name), va="center", fontsize=9)
        for i, token in enumerate(tokens):
            x = label + i * width
            box(axes, x, y, width - 0.06, 0.32, token, colour=TOKEN_COLOURS.get(token, COLOURS["chunk"]))
            if i and token != "[PAD]":
                axes.plot([x, x + width - 0.06], [y - 0.05] * 2, color=COLOURS["ink"], linewidth=1.5)
    return figure


def vector_map(
    points: Float[np.ndarray, "c 2"], years: Int[np.ndarray, " c"], marked: Mapping[str, Sequence[float]], title: str
) -> Figure:
    """Chunk vectors in the plane, coloured in periods of 40 years, with some labelled points."""
    figure, axes = subplots(figsize=(8, 5.6))
    periods = BoundaryNorm(range(1790, 2031, 40), 256)
    # Without antialiasing the picture takes a quarter of the bytes.
    xs, ys = points.T
    dots = axes.scatter(xs, ys, c=years, s=8, cmap=SEQUENTIAL, norm=periods, linewidths=0, antialiased=False)
    for name, (x, y) in marked.items():
        axes.plot(x, y, "o", markersize=7, markerfacecolor="white", markeredgecolor=COLOURS["neighbour"], mew=2)
        frame = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
        axes.annotate(literal(name), (x, y), (6, 6), textcoords="offset points", fontsize=9, bbox=frame)
    axes.set(title=literal(title), xlabel="first principal component", ylabel="second principal component")
    figure.colorbar(dots, label="year", aspect=30)
    return figure


def similarity(cosines: Float[np.ndarray, "a b"], rows: str, columns: str, title: str) -> Figure:
    """Cosine of every chunk of one speech with every chunk of another; the highest is framed."""
    figure, axes = subplots(figsize=(6.4, 5))
    image = axes.imshow(cosines, vmin=0, vmax=1)
    best = np.unravel_index(np.argmax(cosines), cosines.shape)
    frame: dict = {"fill": False, "edgecolor": COLOURS["neighbour"], "linewidth": 2.5}
    axes.add_patch(Rectangle((best[1] - 0.5, best[0] - 0.5), 1, 1, **frame))
    axes.set(title=literal(title), ylabel=literal(f"chunk of {rows}"), xlabel=literal(f"chunk of {columns}"))
    axes.grid(False)
    figure.colorbar(image, label="cosine", aspect=30)
    return figure


def distances(groups: Mapping[str, Float[np.ndarray, " any"]], title: str) -> Figure:
    """Squared distances of pairs of chunks, one histogram of area 1 per group."""
    figure, axes = subplots()
    top = max(float(np.quantile(values, 0.97)) for values in groups.values())
    bins = np.linspace(0, top, 80).tolist()
    for (name, values), colour in zip(groups.items(), ("neighbour", "continuation", "chunk"), strict=False):
        axes.hist(values, bins, density=True, histtype="step", linewidth=2, color=COLOURS[colour], label=name)
        axes.axvline(float(np.median(values)), color=COLOURS[colour], linewidth=1, linestyle=":")
    axes.set(title=title, xlabel="squared distance d²", ylabel="density of pairs", xlim=(0, top))
    axes.legend()
    return figure


def norms(words: Int[np.ndarray, " c"], lengths: Float[np.ndarray, " c"], nearest: Float[np.ndarray, " c"]) -> Figure:
    """Length of a chunk's vector, and distance to its nearest neighbour, against its number of tokens."""
    figure, (left, right) = subplots(1, 2, figsize=(8.4, 3.4))
    spread = np.random.default_rng(0).uniform(-0.4, 0.4, len(words))  # otherwise full chunks would lie on one line
    for axes, values, label in ((left, lengths, "length of the vector ‖v‖"), (right, nearest, "d² to the nearest")):
        axes.scatter(words + spread, values, s=6, color=COLOURS["chunk"], alpha=0.4, linewidths=0)
        axes.set(xlabel="tokens in the chunk", ylabel=label, ylim=(0, None))
    left.set_title("Short chunks have long vectors …")
    right.set_title("… and nobody near them")
    return figure
