"""The figure of notebook 10 on updates: it marks whose neighbours really change, and is shown once."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.patches import Circle

from retro_nb.plotting import updating as figures
from retro_nb.plotting import use_style
from retro_nb.plotting.style import COLOURS


def nearest(points, k=2):
    """Ids of the k nearest others, by sorting all distances."""
    everybody = range(len(points))
    far = [[np.hypot(*(points[i] - points[j])) if i != j else np.inf for j in everybody] for i in everybody]
    return np.array([sorted(everybody, key=row.__getitem__)[:k] for row in far])


def scene(seed):
    points = np.random.default_rng(seed).uniform(size=(12, 2))
    found, new = nearest(points), np.array([0.5, 0.5])
    return points, found, new, int(np.bincount(found.ravel()).argmax())


def vermilion(axes) -> set[tuple[float, float]]:
    """Where the points stand that must search again."""
    dots = axes.collections[0]
    marked = [to_hex(colour).upper() == COLOURS["neighbour"] for colour in dots.get_facecolors()]
    return {tuple(place) for place, mark in zip(dots.get_offsets().tolist(), marked, strict=True) if mark}


def title(axes) -> str:
    return axes.get_title(loc="center") + axes.get_title(loc="left")


@pytest.mark.parametrize("seed", range(4))
def test_those_are_marked_whose_neighbours_change(seed):
    points, found, new, gone = scene(seed)
    left, right = figures.who_searches(points, found, new, gone).axes
    comes = (nearest(np.vstack([points, new]))[:12] != found).any(axis=1)
    stay = np.delete(np.arange(12), gone)
    goes = (stay[nearest(points[stay])] != found[stay]).any(axis=1)
    assert vermilion(left) == set(map(tuple, points[comes].tolist()))
    assert vermilion(right) == set(map(tuple, points[stay[goes]].tolist()))
    assert title(left) == f"One comes: {comes.sum()} of 12 search again"
    assert title(right) == f"One goes: {goes.sum()} of 11 search again"


def test_a_circle_reaches_out_to_the_last_neighbour():
    points, found, new, gone = scene(0)
    left, right = figures.who_searches(points, found, new, gone).axes
    circles = [patch for patch in left.patches if isinstance(patch, Circle)]
    np.testing.assert_array_equal([circle.center for circle in circles], points)
    np.testing.assert_allclose([circle.radius for circle in circles], np.hypot(*(points - points[found[:, -1]]).T))
    assert not right.patches


def test_it_is_closed_and_cuts_nothing_off():
    with rc_context():
        use_style()
        figure = figures.who_searches(*scene(0))
        assert not plt.get_fignums()
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    width, height = figure.get_size_inches() * figure.dpi
    for axes in figure.axes:
        for text in [*axes.texts, axes.title, axes._left_title]:
            box = text.get_window_extent(canvas.get_renderer())
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, text
