"""Figures of notebook 05: losses, the learning rate, and the time of a step by phase."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from retro_nb.plotting.style import COLOURS, literal, subplots
from retro_nb.training.log import History


def losses(
    histories: Mapping[str, History], lines: Mapping[str, float], title: str, top: float | None = None
) -> Figure:
    """Training losses, smoothed over five steps, and held-out losses (dots); dashed `lines` to compare with.

    Args:
        histories: name -> the run's records; the first has the model's colour, the second the baseline's.
        lines: name -> a loss reached without a network.
        title: the figure's message.
        top: end of the y axis; by default above the first loss.
    """
    figure, axes = subplots(figsize=(8, 3.6))
    colours = [COLOURS["model"], COLOURS["baseline"], COLOURS["control"]]
    sizes = (9, 5, 3)  # later dots are smaller, so that equal losses hide none
    for (name, history), colour, size in zip(histories.items(), colours, sizes, strict=False):
        steps, values = history.curve("loss")
        width = min(5, len(values))
        smooth = np.convolve(values, np.ones(width) / width, mode="valid")
        axes.plot(steps[width - 1 :], smooth, color=colour, linewidth=1.2, label=f"{literal(name)}, training")
        axes.plot(*history.curve("valid_loss"), "o", color=colour, markersize=size, label=f"{literal(name)}, held out")
    middle = sum(axes.get_ylim()) / 2
    for name, value in lines.items():  # the curve falls from the upper left, so low lines have room for labels there
        axes.axhline(value, color=COLOURS["muted"], linestyle="--", linewidth=1)
        x, side = (0.01, "left") if value < middle else (0.99, "right")
        axes.annotate(f"{literal(name)}: {value:.2f}", (x, value), (0, -4), ha=side, va="top", fontsize=9,
                      xycoords=("axes fraction", "data"), textcoords="offset points", color=COLOURS["ink"])  # fmt: skip
    low, high = axes.get_ylim()
    axes.set(xlabel="step", ylabel="loss, nats per word piece", title=title, ylim=(low - 0.3, top or high))
    axes.legend(loc="upper right" if top else "center right")
    return figure


def schedule(rates: Sequence[float], warmup_steps: int) -> Figure:
    """Learning rate of every step from step 1; the end of the warm-up and the last rate are marked."""
    figure, axes = subplots(figsize=(8, 2.8))
    steps = range(1, len(rates) + 1)
    axes.plot(steps, rates, color=COLOURS["model"])
    for step, words in ((warmup_steps, "peak"), (len(rates), "a tenth of it")):
        axes.plot(step, rates[step - 1], "o", color=COLOURS["neighbour"])
        axes.annotate(words, (step, rates[step - 1]), (8, 4), textcoords="offset points", va="bottom", ha="left")
    axes.set(xlabel="step", ylabel="learning rate", ylim=(0, max(rates) * 1.15), xlim=(0, len(rates) * 1.14))
    axes.set_title(f"{warmup_steps} steps up a line, then half a cosine down")
    return figure


def step_time(seconds: Mapping[str, float]) -> Figure:
    """Time of one step by phase (phase -> seconds) as one bar, with shares."""
    figure, axes = subplots(figsize=(8, 1.7))
    total, left = sum(seconds.values()), 0.0
    for (name, spent), colour in zip(seconds.items(), ("chunk", "model", "neighbour", "continuation"), strict=False):
        axes.barh(0, spent, left=left, color=COLOURS[colour], label=f"{name}  {100 * spent / total:.0f} %")
        left += spent
    longest = max(seconds, key=seconds.__getitem__)
    axes.set(yticks=[], xlabel="seconds in one step", xlim=(0, total))
    axes.set_title(f"{longest.capitalize()} takes most of a step")
    axes.grid(False)
    axes.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.45), fontsize=9)
    return figure
