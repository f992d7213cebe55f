"""Figures of notebook 07: a model's answers, its attention, and the gain from its neighbours, seed by seed."""

from collections.abc import Mapping, Sequence
from html import escape

import matplotlib
import numpy as np
from IPython.display import HTML
from jaxtyping import Float
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter

from retro_nb.plotting.style import COLOURS, DIVERGING, literal, subplots, titled_row

# The conditions under which a model is measured, and their colours.
CONDITIONS = {
    "baseline": COLOURS["baseline"],
    "on": COLOURS["model"],
    "off": COLOURS["muted"],
    "shuffled": COLOURS["control"],
    "N only": COLOURS["neighbour"],
    "F only": COLOURS["continuation"],
    "oracle": COLOURS["chunk"],
}
FULL = 3.0  # nats at which a token has its full colour
TELLING = 0.5  # nats from which a token is bold or slanted, for readers who see no colour
Spread = tuple[float, float, float]  # a value, and the ends of its interval

# one text


def answers(panels: Mapping[str, Mapping[str, float]], marked: Mapping[str, str], title: str) -> Figure:
    """The likeliest words for one blank with their probabilities, one panel per input.

    `marked` gives some words a colour, named as in COLOURS; these words are also bold.
    """
    figure, row = titled_row(panels, title, 2.5, sharex=True)
    for axes, chances in zip(row, panels.values(), strict=True):
        rows = range(len(chances))
        axes.barh(rows, list(chances.values()), color=[COLOURS[marked.get(word, "muted")] for word in chances])
        for y, chance in enumerate(chances.values()):
            axes.text(chance, y, f" {chance:.0%}", va="center", fontsize=9)
        axes.set_yticks(rows, map(literal, chances))
        for label, word in zip(axes.get_yticklabels(), chances, strict=True):
            label.set_fontweight("bold" if word in marked else "normal")
        axes.invert_yaxis()
        axes.set(xlim=(0, 1.25), xticks=(0, 0.5, 1), xlabel="probability")
        axes.grid(False)
    return figure


def coloured(
    pieces: Sequence[str], on: Float[np.ndarray, " n"], off: Float[np.ndarray, " n"], *, font: str = "inherit"
) -> HTML:
    """A text with tokens in bold purple if neighbours made them likelier, in slanted orange if less likely.

    Args:
        pieces: the text of each token, with the white space that follows it.
        on, off: loss of each token with and without neighbours, in nats; NaN where it is not predicted.
        font: CSS font family; "monospace" for code.
    """
    parts = []
    for piece, with_them, without in zip(pieces, on.tolist(), off.tolist(), strict=True):
        word, gain = piece.rstrip(), without - with_them
        text, space = escape(word), _indented(piece[len(word) :])
        if not np.isnan(gain):
            before, after = np.exp(-without), np.exp(-with_them)
            hint = f"{without:.2f} nats without, {with_them:.2f} with; p {before:.1%} → {after:.1%}"
            tag = "b" if gain >= TELLING else "i" if gain <= -TELLING else "span"
            text = f'<{tag} title="{hint}" style="background:{_shade(gain)}">{text}</{tag}>'
        parts.append(text + space)
    around = f"white-space:pre-wrap;line-height:1.7;max-width:50em;color:#222;font-family:{font}"
    return HTML(f'{_legend()}<div style="{around}">{"".join(parts)}</div>')


def _indented(space: str) -> str:
    """White space in HTML, kept by nbconvert, which strips the beginnings of lines."""
    first, *lines = space.split("\n")
    return first + "".join("<br>" + line.replace(" ", "&nbsp;") for line in lines)


def _shade(gain: float) -> str:
    """Background of a token, from the middle half of the colour map, on which dark letters are readable."""
    return to_hex(matplotlib.colormaps[DIVERGING](0.5 + 0.25 * np.clip(gain / FULL, -1, 1)))


def _legend() -> str:
    """Legend of the colours, with their range."""
    steps = [(-FULL, f"{FULL:.0f} nats dearer"), (-FULL / 3, "1"), (0.0, "as dear"), (FULL / 3, "1")]
    steps.append((FULL, f"{FULL:.0f} nats cheaper with neighbours"))
    boxes = [f'<span style="background:{_shade(gain)};padding:2px 8px">{name}</span>' for gain, name in steps]
    words = f"From {TELLING} nats on, <b>cheaper is bold</b>, <i>dearer is slanted</i>; point at a token for numbers."
    return f'<p style="color:#222">{"".join(boxes)}<br>{words}</p>'


def attention_map(
    weights: Float[np.ndarray, "a b"], rows: Sequence[str], columns: Sequence[str], marked: int, title: str
) -> Figure:
    """Attention of text tokens (rows) to retrieved tokens (columns); a frame shows the `marked` column."""
    figure, axes = subplots(figsize=(8.4, 1.6 + 0.21 * len(rows)))
    image = axes.imshow(weights, vmin=0, aspect="auto", interpolation="nearest")
    axes.set_xticks(range(len(columns)), map(literal, columns), rotation=90, fontsize=8)
    axes.set_yticks(range(len(rows)), map(literal, rows), fontsize=8)
    frame: dict = {"fill": False, "edgecolor": COLOURS["neighbour"], "linewidth": 2}
    axes.add_patch(Rectangle((marked - 0.5, -0.5), 1, len(rows), **frame))
    axes.set(title=literal(title), xlabel="retrieved token", ylabel="token that reads")
    axes.grid(False)
    figure.colorbar(image, label="weight", aspect=30, fraction=0.03)
    return figure


def rewritings(chances: Float[np.ndarray, "a a"], words: Sequence[str], title: str) -> Figure:
    """Probability of each answer (columns) for each word in the memory (rows); on the diagonal they agree."""
    figure, axes = subplots(figsize=(6.6, 5.6))
    image = axes.imshow(chances, vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks(range(len(words)), map(literal, words), rotation=90, fontsize=7)
    axes.set_yticks(range(len(words)), map(literal, words), fontsize=7)
    axes.set(xlabel="answer", ylabel="what the memory says", title=literal(title))
    axes.grid(False)
    figure.colorbar(image, label="probability", aspect=40, fraction=0.03)
    return figure


# many texts


def bars(
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    ylabel: str,
    title: str,
    *,
    intervals: Mapping[str, Mapping[str, tuple[float, float]]] | None = None,
    line: tuple[str, float] | None = None,
) -> Figure:
    """Mean of each condition with its seeds as dots, one panel per corpus.

    `intervals` adds whiskers to the conditions that have one, `line` a dashed line at a value to compare with.
    """
    figure, row = titled_row(panels, title, 3.4, sharey=True)
    for axes, (name, values) in zip(row, panels.items(), strict=True):
        whiskers = (intervals or {}).get(name, {})
        for x, (condition, seeds) in enumerate(values.items()):
            mean, (low, high) = float(np.mean(seeds)), whiskers.get(condition, (np.mean(seeds),) * 2)
            axes.bar(x, mean, 0.7, color=CONDITIONS[condition])
            beside = x + 0.12 * (np.arange(len(seeds)) - (len(seeds) - 1) / 2)
            axes.plot(beside, seeds, "o", color=COLOURS["ink"], markersize=3)
            if condition in whiskers:
                axes.plot([x, x], [low, high], "_-", color=COLOURS["ink"], linewidth=1.2)
            end, up = (min(low, *seeds), -1) if mean < 0 else (max(high, *seeds), 1)
            axes.annotate(f"{mean:.2f}".replace("-", "−"), (x, end), (0, 3 * up), textcoords="offset points",
                          ha="center", va="bottom" if up > 0 else "top", fontsize=9)  # fmt: skip
        axes.set_xticks(range(len(values)), map(literal, values))
        axes.grid(axis="x", visible=False)
        axes.axhline(0, color=COLOURS["ink"], linewidth=0.8)
        axes.margins(y=0.12)
        if line is not None:
            axes.axhline(line[1], color=COLOURS["ink"], linestyle="--", linewidth=1)
            axes.annotate(f" {line[0]}", (1, line[1]), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    row[0].set_ylabel(ylabel)
    return figure


def resampled(values: Float[np.ndarray, " any"], interval: tuple[float, float], xlabel: str, title: str) -> Figure:
    """Values of many resamplings, and the interval with most of them; a line at 0 if 0 is near."""
    figure, axes = subplots(figsize=(8, 2.8))
    axes.hist(values, 40, color=COLOURS["model"])
    axes.axvspan(*interval, color=COLOURS["model"], alpha=0.15, linewidth=0, label="95 % of them")
    for end in interval:
        axes.axvline(end, color=COLOURS["ink"], linewidth=1)
    low, high = axes.get_xlim()
    if low - (high - low) / 2 < 0 < high + (high - low) / 2:
        axes.axvline(0, color=COLOURS["neighbour"], linewidth=1.6, linestyle="--", label="no difference")
    axes.set(xlabel=xlabel, ylabel="resamplings", title=title)
    axes.legend()
    return figure


def copying(
    tokens: Sequence[int], losses: Mapping[str, Sequence[Sequence[float]]], guessing: float, title: str
) -> Figure:
    """Loss on facts over the training tokens seen, one line per seed; a line marks half the loss of `guessing`."""
    figure, axes = subplots(figsize=(8, 3.6))
    millions = np.asarray(tokens) / 1e6
    for condition, seeds in losses.items():
        for number, values in enumerate(seeds):
            name = condition if number == 0 else None
            axes.plot(millions, values, color=CONDITIONS[condition], linewidth=1.6, label=name)
    axes.axhline(guessing, color=COLOURS["ink"], linestyle="--", linewidth=1, label=f"guessing: {guessing:.2f}")
    halved = np.flatnonzero(np.mean(losses["on"], axis=0) < guessing / 2)
    if len(halved):
        moment = millions[halved[0]]
        axes.axvline(moment, color=COLOURS["neighbour"], linewidth=1.2, linestyle=":")
        axes.annotate(f"half at {moment:.3g} M", (moment, 0.5), (5, 0), textcoords="offset points", va="center",
                      xycoords=("data", "axes fraction"), color=COLOURS["ink"])  # fmt: skip
    axes.set(xlabel="training tokens seen, millions", ylabel="nats per fact token", ylim=(0, None))
    axes.set_title(title)
    axes.legend(loc="upper right", frameon=True, edgecolor="none")
    return figure


def hit_rates(rates: Mapping[str, Sequence[float]]) -> Figure:
    """How often chunks find their document's town, by chunk number, for one or more databases."""
    figure, axes = subplots(figsize=(8, 3))
    looks = zip(("model", "neighbour", "chunk"), "os^", strict=True)
    for (name, values), (colour, shape) in zip(rates.items(), looks, strict=False):
        axes.plot(range(len(values)), values, f"{shape}-", color=COLOURS[colour], label=literal(name))
    longest = max(map(len, rates.values()))
    axes.set(xlabel="chunk of the document", ylabel="finds the town", ylim=(0, 1.05), xticks=range(longest))
    axes.set_title("How often is the right town among the neighbours?")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.legend(loc="lower left")
    return figure


def gains(panels: Mapping[str, Mapping[str, Spread]], ylabel: str, title: str) -> Figure:
    """Gain and interval for each group of chunks, one panel per grouping.

    A dot is filled if its interval excludes 0.
    """
    figure, row = titled_row(panels, title, 3.4, sharey=True)
    for axes, groups in zip(row, panels.values(), strict=True):
        for x, (mean, low, high) in enumerate(groups.values()):
            fill = COLOURS["model"] if low > 0 or high < 0 else "white"
            axes.plot([x, x], [low, high], "_-", color=COLOURS["model"], linewidth=1.4)
            axes.plot(x, mean, "o", color=COLOURS["model"], markerfacecolor=fill, markersize=6)
        axes.axhline(0, color=COLOURS["ink"], linewidth=0.8)
        turned = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"} if len(groups) > 6 else {}
        axes.set_xticks(range(len(groups)), map(literal, groups), fontsize=8, **turned)
        axes.set_xlim(-0.5, len(groups) - 0.5)
        axes.grid(axis="x", visible=False)
    row[0].set_ylabel(ylabel)
    return figure


def sweeps(
    panels: Mapping[str, Mapping[str, Sequence[float]]], baseline: Sequence[float], ylabel: str, title: str
) -> Figure:
    """A measure against each of several settings: mean, and range over the seeds, with the baseline to compare."""
    figure, row = titled_row([""] * len(panels), title, 3.2, sharey=True)
    for axes, (name, values) in zip(row, panels.items(), strict=True):
        means = np.array([np.mean(seeds) for seeds in values.values()])
        ends = np.array([(min(seeds), max(seeds)) for seeds in values.values()])
        ranges = np.abs(ends.T - means)
        axes.errorbar(range(len(values)), means, ranges, fmt="o-", color=COLOURS["model"], capsize=4, label="RETRO")
        axes.axhspan(min(baseline), max(baseline), color=COLOURS["baseline"], alpha=0.25, linewidth=0)
        axes.axhline(np.mean(baseline), color=COLOURS["baseline"], linestyle="--", label="baseline")
        axes.set_xticks(range(len(values)), map(literal, values))
        axes.set(xlabel=literal(name), xlim=(-0.5, len(values) - 0.5))
        axes.grid(axis="x", visible=False)
    row[0].set_ylabel(ylabel)
    row[0].legend()
    return figure
