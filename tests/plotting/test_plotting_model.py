"""Figures of notebook 04 are drawn in any style."""

import matplotlib

from retro_nb.plotting.model import rotary_distances


def test_rotary_distances_need_no_style():
    with matplotlib.rc_context({"figure.constrained_layout.use": False}):
        rotary_distances(8, farthest=4).canvas.draw()
