"""All figures of the notebooks, one module per subject.

A figure function takes plain values and returns a matplotlib Figure without showing it, so that the last value of a
cell is displayed once. Colours are from the palette of Okabe and Ito, which colour-blind readers can tell apart.
"""

from retro_nb.plotting.style import COLOURS, pipeline, use_style

__all__ = ["COLOURS", "pipeline", "use_style"]
