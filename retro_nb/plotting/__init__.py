"""Every figure of the notebooks, one module for each subject.

A figure function takes plain values, returns a matplotlib Figure and shows nothing by itself: as the last
value of a cell it is displayed once. Colours are those of Okabe and Ito, which the colour-blind can tell apart.
"""

from retro_nb.plotting.style import COLOURS, pipeline, use_style

__all__ = ["COLOURS", "pipeline", "use_style"]
