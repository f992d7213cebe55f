"""Style shared by all figures, and the map of the series."""

from collections.abc import Callable, Collection
from typing import Any

from retro_nb.common.extras import extra

with extra("notebooks"):
    import matplotlib
    import matplotlib.pyplot as plt
    from IPython import get_ipython
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

Number = float | int

# Okabe and Ito's palette. Each concept has the same colour in every notebook.
COLOURS = {
    "chunk": "#0072B2",  # blue: the text being read or written
    "neighbour": "#D55E00",  # vermilion: retrieved text
    "continuation": "#E69F00",  # orange: text that follows a neighbour
    "model": "#009E73",  # green
    "baseline": "#56B4E9",  # sky blue: without retrieval
    "control": "#CC79A7",  # pink: shuffled neighbours
    "muted": "#999999",
    "ink": "#222222",
}
SEQUENTIAL = "cividis"  # for values from low to high
DIVERGING = "PuOr"  # for values around zero

LONGEST = 400  # characters of an alternative text

PALE = {"chunk": "#D6E6F2", "neighbour": "#FADFD1", "continuation": "#FBEBCB", "model": "#D3EDE4", "muted": "#EDEDED"}
GREY = "#DDE3E8"  # boxes that are not the subject

STEPS = ["text", "chunks", "vectors", "neighbours", "RETRO", "training", "samples"]
NOTEBOOKS = ["", "01", "02", "03", "04", "05", "06"]


def use_style() -> None:
    """Set the style of every figure: readable at notebook width, light, without frames."""
    matplotlib.rcParams.update(
        {
            "figure.figsize": (8, 3.6),
            "figure.dpi": 90,
            "savefig.dpi": 90,
            "savefig.bbox": "tight",
            "figure.constrained_layout.use": True,
            "font.size": 10,
            "axes.titlesize": 11,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#E6E6E6",
            "axes.prop_cycle": plt.cycler(
                color=[COLOURS[name] for name in ("chunk", "neighbour", "model", "continuation", "control", "baseline")]
            ),
            "image.cmap": SEQUENTIAL,
            "legend.frameon": False,
        }
    )


def literal(text: object) -> str:
    """Text of a corpus for a figure; matplotlib would take what stands between two dollar signs for mathematics."""
    return str(text).replace("$", r"\$")


def subplots(rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """`plt.subplots`, closed: the figure is shown once, as the value of its cell, and takes no memory after that."""
    figure, axes = plt.subplots(rows, columns, **options)
    plt.close(figure)
    _describe_figures_in_notebooks()
    return figure, axes


def alternative_text(figure: Figure) -> str:
    """What a figure shows, for those who cannot see it: titles, axes and legends, or the words of a diagram."""
    parts = [figure.get_suptitle()]
    for axes in figure.axes:
        titles = (axes.get_title(loc) for loc in ("left", "center", "right"))
        parts += [title for title in titles if title]
        labels = {"horizontally": axes.get_xlabel(), "vertically": axes.get_ylabel()}
        parts += [f"{where}: {label}" for where, label in labels.items() if label]
        if legend := axes.get_legend():
            parts.append("lines: " + ", ".join(text.get_text() for text in legend.get_texts()))
    if not any(parts):
        texts = [
            text for axes in figure.axes for text in (*axes.texts, *axes.get_xticklabels(), *axes.get_yticklabels())
        ]
        words = dict.fromkeys(text.get_text() for text in texts)
        parts = ["Diagram: " + ", ".join(word for word in words if any(map(str.isalpha, word)))]
    whole = "; ".join(dict.fromkeys(" ".join(part.split()) for part in parts if part)).replace(r"\$", "$")
    return whole if len(whole) <= LONGEST else whole[: LONGEST - 2] + " …"


class _Described:
    """A figure's picture, as Jupyter draws it, with its alternative text."""

    def __init__(self, draw: Callable[[Figure], Any]) -> None:
        self.draw = draw

    def __call__(self, figure: Figure) -> tuple[Any, dict[str, str]]:
        return self.draw(figure), {"alt": alternative_text(figure)}


def _describe_figures_in_notebooks() -> None:
    """Let Jupyter keep the alternative text beside every figure's picture, for nbconvert and screen readers."""
    shell = get_ipython()
    if shell is None:
        return
    pictures = shell.display_formatter.formatters["image/png"]
    draw = pictures.type_printers.get(Figure)
    if draw and not isinstance(draw, _Described):
        pictures.for_type(Figure, _Described(draw))


def titled_row(names: Collection[str], title: str, height: float, **options: Any) -> tuple[Figure, list[Any]]:
    """Panels side by side, each under its name, and the figure's message above all."""
    figure, grid = subplots(1, len(names), figsize=(8, height), squeeze=False, **options)
    for axes, name in zip(grid[0], names, strict=True):
        axes.set_title(literal(name), fontsize=10, fontweight="normal")
    figure.suptitle(literal(title), x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure, list(grid[0])


def blank(width: Number, height: Number) -> tuple[Figure, Axes]:
    """A figure to draw on: no axes, one unit per inch, origin at the lower left."""
    figure, axes = subplots(figsize=(width, height), layout="constrained")
    axes.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    axes.axis("off")
    return figure, axes


def box(axes: Axes, x: Number, y: Number, w: Number, h: Number, text: str = "", *, colour: str, **style: Any) -> None:
    """A rounded box with its lower left corner at (x, y); `colour` fills it, and text is dark or white for contrast."""
    patch = FancyBboxPatch(
        (x, y), w, h, boxstyle="round,pad=0,rounding_size=0.06", facecolor=colour, edgecolor="none", **style
    )
    axes.add_patch(patch)
    red, green, blue, _ = matplotlib.colors.to_rgba(colour)
    light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.6
    ink = COLOURS["ink"] if light else "white"
    axes.text(x + w / 2, y + h / 2, literal(text), ha="center", va="center", color=ink)


def arrow(axes: Axes, start: tuple[Number, Number], end: tuple[Number, Number], **style: Any) -> None:
    """A thin arrow from start to end."""
    look: dict = {"arrowstyle": "-|>", "mutation_scale": 10, "color": COLOURS["muted"], "linewidth": 1.2, **style}
    axes.add_patch(FancyArrowPatch(start, end, shrinkA=0, shrinkB=0, **look))


def pipeline(step: str = "") -> Figure:
    """The pipeline from text to samples, one box per notebook, with this step coloured (default: all).

    Raises:
        ValueError: the step is unknown.
    """
    if step and step not in STEPS:
        raise ValueError(f"no step {step!r}; the steps are {', '.join(STEPS)}")
    width, gap = 1.14, 0.18
    figure, axes = blank(len(STEPS) * (width + gap) - gap + 0.1, 0.85)
    for i, (name, notebook) in enumerate(zip(STEPS, NOTEBOOKS, strict=True)):
        x = 0.05 + i * (width + gap)
        box(axes, x, 0.3, width, 0.45, name, colour=COLOURS["chunk"] if step in ("", name) else GREY)
        axes.text(x + width / 2, 0.12, notebook, ha="center", va="center", fontsize=8, color=COLOURS["muted"])
        if i:
            arrow(axes, (x - gap, 0.525), (x, 0.525))
    return figure
