"""Figures of notebook 06: choosing a token, time per token, the effect of neighbours, and a page of generated text."""

import html
from collections.abc import Mapping, Sequence

import numpy as np
from IPython.display import HTML
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from retro_nb.plotting.style import COLOURS, PALE, literal, subplots, titled_row
from retro_nb.store.retrieval import Passage


def page(passages: Sequence[Passage], words: int = 34) -> HTML:
    """A text chunk by chunk, each beside the neighbours that it found, cut to `words` words."""

    def cut(text: str) -> str:
        parts = text.split()
        return html.escape(" ".join(parts[:words])) + (" …" if len(parts) > words else "")

    left = "text-align:left;vertical-align:top;color:#222;border-top:2px solid white"
    rows = [f'<tr><th style="{left}">chunk</th><th style="{left}">found when it was complete</th></tr>']
    for u, passage in enumerate(passages):
        found = [
            f'<div style="background:{PALE["neighbour"]};margin-bottom:4px"><b>{html.escape(near.title)}</b>, '
            f"d² = {near.distance:.2f}: {cut(near.text)}</div>"
            for near in passage.neighbours
        ]
        beside = "".join(found) or "<i>nothing was looked up: no token follows</i>"
        text = f'<td style="{left};width:48%;background:{PALE["chunk"]}"><b>{u}.</b> {html.escape(passage.text)}</td>'
        rows.append(f'<tr>{text}<td style="{left}">{beside}</td></tr>')
    return HTML(f'<table style="width:100%;font-size:90%">{"".join(rows)}</table>')


def bars(words: Sequence[str], panels: Mapping[str, Sequence[float]], title: str) -> Figure:
    """Probabilities of a few tokens, one panel per sampling method; filtered tokens are marked."""
    figure, row = titled_row(panels, title, 2.6, sharey=True)
    for axes, probabilities in zip(row, panels.values(), strict=True):
        values = np.asarray(probabilities, dtype=float)
        axes.bar(range(len(values)), values, color=COLOURS["model"])
        for i in np.flatnonzero(values == 0):
            axes.text(i, 0.02, "✕", ha="center", color=COLOURS["neighbour"])
        axes.set_xticks(range(len(values)), map(literal, words), rotation=45, ha="right")
        axes.grid(axis="x", visible=False)
    row[0].set(ylabel="probability", ylim=(0, 1.05))
    return figure


def drawn(words: Sequence[str], expected: Sequence[float], shares: Sequence[float], draws: int) -> Figure:
    """Shares of tokens in many draws, beside their probabilities with two standard errors."""
    figure, axes = subplots(figsize=(8, 2.6))
    at, p = np.arange(len(words)), np.asarray(expected, dtype=float)
    error = 2 * np.sqrt(p * (1 - p) / draws)
    axes.bar(at - 0.2, p, 0.4, yerr=error, capsize=4, color=COLOURS["muted"], label="softmax, ± 2 standard errors")
    axes.bar(at + 0.2, shares, 0.4, color=COLOURS["model"], label=f"{draws:,} draws with Gumbel noise")
    axes.set_xticks(at, map(literal, words))
    axes.set(ylabel="share", title="The argmax of noisy logits falls where softmax says")
    axes.grid(axis="x", visible=False)
    axes.legend()
    return figure


def token_times(seconds: Mapping[str, tuple[Sequence[int], Sequence[float]]], chunk_size: int) -> Figure:
    """Milliseconds per new token, by position; dotted lines show where neighbours are looked up."""
    figure, axes = subplots(figsize=(8, 3.2))
    last = 0
    for (name, (positions, times)), colour in zip(seconds.items(), ("baseline", "model"), strict=False):
        axes.plot(positions, 1000 * np.asarray(times), ".", markersize=4, color=COLOURS[colour], label=name)
        last = max(last, *positions)
    for end in range(chunk_size, last + 1, chunk_size):
        axes.axvline(end, color=COLOURS["neighbour"], linewidth=1, linestyle=":", zorder=0)
    axes.set(yscale="log", xlabel="position of the new token", ylabel="milliseconds, log scale")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title("With kept keys and values, a token costs the same wherever it stands")
    axes.legend(loc="upper left", frameon=True, edgecolor="none", markerscale=2)
    return figure


def divergence(kl: Mapping[str, Sequence[float]], chunk_size: int) -> Figure:
    """KL divergence of the next-token distribution at every position when neighbours are replaced, in nats."""
    figure, axes = subplots(figsize=(8, 3.2))
    n, peak = 0, 0.0
    for (name, nats), colour in zip(kl.items(), ("control", "muted", "neighbour"), strict=False):
        values, n = np.asarray(nats, dtype=float), len(nats)
        peak = max(peak, values.max())
        mean = values[chunk_size - 1 :].mean()
        axes.plot(values, color=COLOURS[colour], linewidth=1, label=f"{literal(name)}: mean {mean:.3f}")
    axes.axvspan(0, chunk_size - 1, color="#EDEDED", zorder=0)
    axes.text((chunk_size - 1) / 2, 0.5, "reads\nnothing", ha="center", va="center", fontsize=9,
              transform=axes.get_xaxis_transform(), color=COLOURS["ink"])  # fmt: skip
    axes.set_xticks(range(0, n + 1, chunk_size))
    axes.set(xlabel="position, one tick a chunk", ylabel="KL divergence, nats", ylim=(0, 1.3 * peak), xlim=(0, n))
    axes.set_title("Other neighbours move the next token a little, and only after the first chunk")
    axes.legend(loc="upper right")
    return figure
