"""The figures of notebook 04: RETRO's layers, which tokens read which, positions, causality, sizes."""

import html
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from IPython.display import HTML
from jaxtyping import Float, Int
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor, nn

from retro_nb.model.layers import rotary
from retro_nb.model.retro import RETRO
from retro_nb.plotting.style import COLOURS, PALE, SEQUENTIAL, arrow, blank, box, subplots


def ripples(changes: Mapping[str, Float[Tensor, " n"]], firsts: Sequence[int], chunk_size: int) -> Figure:
    """Largest change of the logits at every position, one panel per change; exact zeros lie on a separate floor.

    Args:
        changes: panel title -> largest |Δ logit| at every position.
        firsts: the first position that may move, for each panel.
        chunk_size: m; chunks are marked on the axis.
    """
    figure, panels = subplots(len(changes), 1, figsize=(8, 2.1 * len(changes)), sharex=True)
    for axes, (title, change), first in zip(np.atleast_1d(panels), changes.items(), firsts, strict=True):
        values = change.numpy()
        moved, still = np.flatnonzero(values), np.flatnonzero(values == 0)
        floor = 10.0 ** (math.floor(math.log10(values[moved].min())) - 1)
        axes.scatter(still, np.full(len(still), floor), s=5, color=COLOURS["muted"], label="exactly 0")
        axes.scatter(moved, values[moved], s=5, color=COLOURS["model"], label="moved")
        axes.axvline(first, color=COLOURS["neighbour"], linewidth=1, label=f"position {first}")
        axes.set_title(f"{title}: nothing before {first}")
        axes.set(yscale="log", ylabel="largest |Δ logit|", xlim=(-4, len(values) + 3))
        axes.set_ylim(floor / 3, values.max() * 3)
        ticks = [tick for tick in axes.get_yticks() if floor < tick <= values.max() * 3]
        axes.set_yticks([floor, *ticks], ["0", *(f"$10^{{{round(math.log10(tick))}}}$" for tick in ticks)])
        axes.minorticks_off()
        axes.legend(loc="center left", fontsize=8, markerscale=2, frameon=True, framealpha=1, edgecolor="none")
    axes.set_xticks(range(0, len(values) + 1, chunk_size))
    axes.set_xlabel("position in the text, in tokens; one tick a chunk")
    return figure


def training_example(
    title: str, chunk: str, attending: str, neighbours: Sequence[tuple[str, str, str]], u: int
) -> HTML:
    """A chunk, its neighbours (title, N, F) and the attending chunk that reads them, as a table."""
    pale, esc, left = PALE, html.escape, "text-align:left;vertical-align:top"
    row = f'<tr><td style="{left};width:15%"><b>{{0}}</b></td>{{1}}</tr>'
    cell = f'<td colspan="{{0}}" style="{left};background:{{1}};color:#222">{{2}}</td>'
    rows = [row.format(f"chunk {u} retrieves", cell.format(2, pale["chunk"], f"<i>{esc(title)}:</i> {esc(chunk)}"))]
    for j, (origin, text, following) in enumerate(neighbours):
        halves = cell.format(1, pale["neighbour"], f"<i>N, {esc(origin)}:</i> {esc(text)}")
        halves += cell.format(1, pale["continuation"], f"<i>F, what follows:</i> {esc(following)}")
        rows.append(row.format(f"neighbour {j}", halves))
    rows.append(row.format(f"attending chunk {u} reads", cell.format(2, pale["model"], esc(attending))))
    return HTML(f'<table style="width:100%;font-size:90%">{"".join(rows)}</table>')


def architecture(depth: int, layers: Sequence[int]) -> Figure:
    """The decoder from left to right, the encoder below; `layers` is P, counted from 1."""
    cca = [("CCA", "neighbour")]
    blocks = [[("ATTN", "chunk"), *cca * (i in layers), ("FFW", "model")] for i in range(1, depth + 1)]
    w, gap, y, low = 0.62, 0.14, 1.75, 0.25
    figure, axes = blank(0.95 + sum(len(b) * w + gap + 0.12 for b in blocks) + 0.75, 2.75)
    x = 0.1
    attn_at: dict[int, float] = {}
    cca_at: dict[int, float] = {}
    box(axes, x, y, 0.7, 0.5, "tokens", colour=PALE["muted"])
    x += 0.7 + 0.2
    for i, parts in enumerate(blocks, start=1):
        arrow(axes, (x - 0.2, y + 0.25), (x - 0.02, y + 0.25))
        box(axes, x - 0.02, y - 0.08, len(parts) * w + 0.04, 0.66, "", colour=PALE["muted"])
        for part, colour in parts:
            {"ATTN": attn_at, "CCA": cca_at}.get(part, {})[i] = x + w / 2
            box(axes, x + 0.02, y, w - 0.04, 0.5, part, colour=COLOURS[colour])
            x += w
        name = f"layer {i}" + " ∈ P" * (i in layers)
        axes.text(x - len(parts) * w / 2, y + 0.74, name, ha="center", fontsize=9, color=COLOURS["muted"])
        x += gap + 0.1
    arrow(axes, (x - 0.22, y + 0.25), (x - 0.04, y + 0.25))
    box(axes, x - 0.02, y, 0.68, 0.5, "logits", colour=PALE["muted"])
    left, first = attn_at[min(layers)] - 0.35, min(layers)
    right = max(cca_at.values()) + 0.25
    box(axes, left, low, right - left, 0.5, "encoder: reads N and F in both directions", colour=COLOURS["ink"])
    box(axes, 0.1, low, 1.25, 0.5, "neighbours N F", colour=PALE["neighbour"])
    arrow(axes, (1.35, low + 0.25), (left, low + 0.25))
    arrow(axes, (attn_at[first], y), (attn_at[first], low + 0.5))
    axes.text(attn_at[first] - 0.08, 1.2, "$H_u$", ha="right", va="center")
    for place in cca_at.values():
        arrow(axes, (place, low + 0.5), (place, y))
        axes.text(place + 0.08, 1.2, "$E_u$", ha="left", va="center")
    return figure


def rotary_distances(dim: int, farthest: int = 128) -> Figure:
    """Effect of a rotary distance: the cosine of every feature pair, and their mean."""
    cos = rotary(torch.arange(farthest + 1), dim)[0, :, : dim // 2]
    figure, (phase, decay) = subplots(1, 2, figsize=(8, 3), width_ratios=(1.25, 1))
    figure.set_layout_engine("constrained", wspace=0.1)
    image = phase.imshow(cos.T.numpy(), aspect="auto", cmap="PuOr", vmin=-1, vmax=1, interpolation="nearest")
    phase.grid(False)
    distance = "distance p − p′, tokens"
    phase.set(title="Fast pairs see steps, slow pairs see miles", xlabel=distance, ylabel="feature pair")
    figure.colorbar(image, ax=phase, label="cos of the angle", shrink=0.9)
    decay.plot(cos.mean(dim=1).numpy(), color=COLOURS["model"])
    decay.axhline(0, color=COLOURS["muted"], linewidth=0.8)
    decay.set(title="Together they fade", xlabel=distance, ylabel="q · k for q = k, |q| = 1", ylim=(-0.1, 1.05))
    return figure


def alignment(m: int, l: int) -> Figure:
    """The tokens of a sequence, its chunks above, its attending chunks below, and the neighbours that they read."""
    w = 7.6 / (l * m)
    figure, axes = blank(8, 3.35)
    for i in range(l * m):
        colour = COLOURS["chunk"] if (i // m) % 2 == 0 else COLOURS["baseline"]
        box(axes, 0.2 + i * w + 0.03, 2.25, w - 0.06, 0.45, str(i), colour=colour)

    def bracket(first: int, stop: int, y: float, up: float, colour: str) -> float:
        a, b = 0.2 + first * w + 0.06, 0.2 + stop * w - 0.06
        axes.plot([a, a, b, b], [y, y + up, y + up, y], color=COLOURS[colour], linewidth=1.5)
        return (a + b) / 2

    for u in range(l):
        middle = bracket(u * m, (u + 1) * m, 2.78, 0.1, "chunk")
        axes.text(middle, 2.95, f"chunk {u}", ha="center", va="bottom")
        first, stop = (u + 1) * m - 1, min((u + 2) * m - 1, l * m)
        middle = bracket(first, stop, 2.15, -0.1, "neighbour")
        text = f"attending chunk {u}" if stop - first > 1 else f"att. {u}"
        axes.text(middle, 1.98, text, ha="center", va="top", fontsize=9, color=COLOURS["neighbour"])
        x = min(0.2 + (u + 0.5) * m * w, 8 - 1.0)
        box(axes, x - 0.8, 0.35, 0.78, 0.4, "N", colour=COLOURS["neighbour"])
        box(axes, x + 0.02, 0.35, 0.78, 0.4, "F", colour=COLOURS["continuation"])
        axes.text(x, 0.15, f"neighbours of chunk {u}", ha="center", va="center", fontsize=9)
        arrow(axes, (x, 0.8), (middle, 1.76), color=COLOURS["neighbour"])
    middle = bracket(0, m - 1, 2.15, -0.1, "muted")
    axes.text(middle, 1.98, "read nothing", ha="center", va="top", fontsize=9, color=COLOURS["muted"])
    return figure


def joint_softmax(weights: Float[Tensor, "m _"], k: int, first: int = 0) -> Figure:
    """Attention weights of one attending chunk over the null key and k neighbours; `first` is its first token."""
    m, columns = weights.shape
    r = (columns - 1) // k
    figure, axes = subplots(figsize=(8, 2.3))
    image = axes.imshow(weights.detach().numpy(), aspect="auto", cmap=SEQUENTIAL, vmin=0)
    for edge in range(k):
        axes.axvline(0.5 + edge * r, color="white", linewidth=2)
    labels = ["∅", *[str(i) for _ in range(k) for i in range(r)]]
    axes.set_xticks(range(columns), labels)
    axes.set_yticks(range(m), [f"token {first + i}, at {m - 1 + i}" for i in range(m)])
    for j in range(k):
        axes.text(0.5 + (j + 0.5) * r, m + 0.6, f"neighbour {j}, tokens at 0 … {r - 1}", ha="center", va="center")
    axes.text(0, m + 0.6, "null", ha="center", va="center")
    axes.set_title("One softmax over the null key and all neighbours: every row sums to 1")
    axes.grid(False)
    figure.colorbar(image, ax=axes, label="weight")
    return figure


def query_positions(positions: Mapping[str, Int[Tensor, " m"]], r: int, dim: int = 32) -> Figure:
    """Match of each query with each retrieved token by position alone, for several placements of the queries.

    Args:
        positions: name -> position of each of the m queries of an attending chunk.
        r: number of retrieved tokens per neighbour, at 0 … r−1.
        dim: number of rotated features per head.
    """
    figure, panels = subplots(1, len(positions), figsize=(8, 3), sharey=True)
    cos_k, sin_k = rotary(torch.arange(r), dim)
    for axes, (name, places) in zip(panels, positions.items(), strict=True):
        cos_q, sin_q = rotary(places, dim)
        match = (cos_q @ cos_k.T + sin_q @ sin_k.T) / dim  # mean of cos((p − p′)·θ)
        image = axes.imshow(match.numpy(), aspect="auto", cmap=SEQUENTIAL, vmin=0, vmax=1, interpolation="nearest")
        axes.set(title=name, xlabel="place p′ in the neighbour, tokens")
        axes.grid(False)
    panels[0].set_ylabel("query i of the attending chunk")
    figure.colorbar(image, ax=panels, label="match by position alone")
    return figure


def causality(token: Float[Tensor, "n n"], neighbour: Float[Tensor, "l n"], chunk_size: int) -> Figure:
    """Largest |Δ logit| at every position, for every changed token and for the neighbours of every chunk.

    White is exactly 0. The line shows where changes may begin if the model is causal.
    """
    n, l, m = token.shape[1], len(neighbour), chunk_size
    moved = torch.cat((token.flatten(), neighbour.flatten()))
    scale = LogNorm(moved[moved > 0].min().item(), moved.max().item())
    figure, panels = subplots(1, 2, figsize=(8, 3.6))
    names = ("Token j: nothing before j", "Neighbour of u: nothing before (u+1)m−1")
    for axes, matrix, name in zip(panels, (token, neighbour), names, strict=True):
        image = axes.imshow(
            matrix.where(matrix > 0, torch.nan).numpy(), norm=scale, cmap=SEQUENTIAL, aspect="auto",
            interpolation="nearest",
        )  # fmt: skip
        axes.set(title=name, xlabel="position of the logits, tokens", xticks=range(0, n, m))
        axes.grid(False)
    panels[0].set(ylabel="changed token j", yticks=range(0, n, m))
    panels[1].set(ylabel="chunk u", yticks=range(l))
    edges = np.arange(n)
    panels[0].step(edges - 0.5, edges - 0.5, where="post", color=COLOURS["neighbour"], linewidth=1)
    starts = [(u + 1) * m - 1.5 for u in range(l)]
    panels[1].vlines(starts, np.arange(l) - 0.5, np.arange(l) + 0.5, color=COLOURS["neighbour"], linewidth=2)
    figure.colorbar(image, ax=panels, label="largest |Δ logit|")
    return figure


def _parts(retro: RETRO) -> dict[str, int]:
    """Number of parameters of each kind, without embeddings."""
    layers = retro.decoder.layers
    kinds: dict[str, list[nn.Module]] = {
        "self-attention": [layer.attn for layer in layers],
        "feed-forward": [layer.ff for layer in layers],
        "cross-attention": [layer.cross_attn for layer in layers if layer.cross_attn is not None],
        "encoder": [retro.encoder],
    }
    return {kind: sum(p.numel() for part in parts for p in part.parameters()) for kind, parts in kinds.items()}


def parameter_shares(models: Mapping[str, RETRO]) -> Figure:
    """One bar per model, divided into its parts' shares; the numbers are millions of parameters."""
    counts = {name: _parts(retro) for name, retro in models.items()}
    figure, axes = subplots(figsize=(8, 0.55 * len(counts) + 1.3))
    parts = list(next(iter(counts.values())))
    colours = [COLOURS[c] for c in ("chunk", "model", "neighbour", "ink")]
    for row, sizes in enumerate(counts.values()):
        total, left = sum(sizes.values()), 0.0
        for part, colour in zip(parts, colours, strict=True):
            share = 100 * sizes[part] / total
            axes.barh(row, share, left=left, color=colour, label=part if row == 0 else None)
            if share > 4:
                axes.text(left + share / 2, row, f"{sizes[part] / 1e6:,.0f}", ha="center", va="center", color="white")
            left += share
    axes.set_yticks(range(len(counts)), list(counts))
    axes.invert_yaxis()
    axes.grid(False)
    axes.set(xlabel="share of the parameters, % (numbers: millions)", xlim=(0, 100))
    axes.set_title("The larger the decoder, the cheaper the retrieval")
    figure.legend(loc="outside lower center", ncols=len(parts), fontsize=9)
    return figure


def copying_race(losses: Mapping[str, Sequence[float]], *, m: int, l: int, v: int) -> Figure:
    """Loss of copying models, between guessing one of v tokens and copying all tokens but the first m − 1."""
    figure, axes = subplots(figsize=(8, 3))
    for (name, curve), colour in zip(losses.items(), ("model", "control"), strict=False):
        axes.plot(range(1, len(curve) + 1), curve, color=COLOURS[colour], linewidth=2, label=name)
    guess, best = math.log(v), math.log(v) * (m - 1) / (m * l)
    levels = ((guess, f"guessing: ln {v}", 0.05), (best, f"best possible: {m - 1}/{m * l} · ln {v}", -0.35))
    for level, name, above in levels:
        axes.axhline(level, color=COLOURS["muted"], linestyle="--", linewidth=1)
        axes.text(len(curve), level + above, name, color=COLOURS["muted"], fontsize=9, ha="right")
    axes.set(title="Who knows its place can copy", xlabel="training step", ylabel="loss, nats per token")
    axes.set_ylim(0, None)
    axes.legend(loc="center right")
    return figure
