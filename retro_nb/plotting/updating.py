"""Figure of notebook 10: chunks whose neighbours change when a document is added or removed."""

import numpy as np
from jaxtyping import Float, Integer
from matplotlib.figure import Figure
from matplotlib.patches import Circle

from retro_nb.plotting.style import COLOURS, subplots

DOT = {"s": 60, "zorder": 3, "linewidths": 0}


def who_searches(
    points: Float[np.ndarray, "c 2"], found: Integer[np.ndarray, "c k"], new: Float[np.ndarray, "2"], gone: int
) -> Figure:
    """Chunks as points. Left: a new chunk, and circles around the others out to their last neighbours. Right: a removed
    chunk, with arrows from the chunks that had it as a neighbour. Chunks to search again are vermilion.
    """
    figure, (left, right) = subplots(1, 2, figsize=(8, 4.2))
    reach = np.linalg.norm(points - points[found[:, -1]], axis=1)
    nearer, had = np.linalg.norm(points - new, axis=1) < reach, (found == gone).any(axis=1)
    for axes, affected, title in ((left, nearer, "One comes"), (right, had, "One goes")):
        colours = np.where(affected, COLOURS["neighbour"], COLOURS["chunk"])
        stay = np.arange(len(points)) != gone if axes is right else slice(None)
        axes.scatter(*points[stay].T, color=colours[stay], **DOT)
        axes.set(title=f"{title}: {affected.sum()} of {len(colours[stay])} search again", xticks=(), yticks=())
        axes.set_aspect("equal")
        axes.grid(False)
        axes.spines[:].set_visible(False)
    for point, radius, inside in zip(points, reach, nearer, strict=True):
        colour, wide = (COLOURS["neighbour"], 1.4) if inside else ("#CDD4DB", 0.8)
        left.add_patch(Circle(point, radius, fill=False, edgecolor=colour, linewidth=wide, zorder=1 + inside))
    left.scatter(*new, color=COLOURS["model"], **DOT | {"s": 170, "marker": "*"})
    left.annotate("new", new, (9, 3), textcoords="offset points", color=COLOURS["model"])
    for point in points[had]:
        line = {"arrowstyle": "-|>", "color": COLOURS["neighbour"], "linewidth": 1.4, "shrinkA": 4, "shrinkB": 6}
        right.annotate("", points[gone], point, arrowprops=line)
    right.scatter(*points[gone], color=COLOURS["muted"], **DOT | {"s": 90, "marker": "X"})
    right.annotate("gone", points[gone], (-9, -4), ha="right", textcoords="offset points", color=COLOURS["ink"])
    low, high = points.min(axis=0), points.max(axis=0)
    edge = 0.12 * (high - low).max()
    for axes in (left, right):
        axes.set(xlim=(low[0] - edge, high[0] + edge), ylim=(low[1] - edge, high[1] + edge))
    return figure
