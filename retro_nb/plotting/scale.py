"""Figures of notebook 11: recall of an index against its bytes, bytes and hours against tokens, and workers."""

from collections.abc import Mapping, Sequence
from math import log10

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator, PercentFormatter
from matplotlib.transforms import Bbox

from retro_nb.plotting.style import COLOURS, GREY, arrow, blank, box, subplots

Number = float | int
HUES = ("chunk", "neighbour", "model", "control", "continuation", "baseline")
DASHES = ("-", "--", "-.", (0, (1, 1.5)), (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))
BESIDE = [(9, -3, "left"), (-9, -3, "right"), (0, 9, "center"), (0, -16, "center"), (9, 8, "left"), (-9, 8, "right")]
BESIDE += [(9, -15, "left"), (-9, -15, "right"), (0, 21, "center"), (0, -28, "center")]  # points from a mark
# Look of an index by the encoding of its vectors: (start of the factory string's last part, colour, marker).
KINDS = (("PQ", "neighbour", "s"), ("SQ", "model", "D"), ("RaBitQ", "control", "^"), ("HNSW", "continuation", "v"))

# For each stage of a build: the workers' input, their work, the work of the writing process, and the file.
STAGES = {
    "chunk": ("the corpus", "cuts documents", "puts in order", "chunks.npy"),
    "embed": ("chunks.npy", "embeds a block", "writes each block", "chunks.embedded.npy"),
    "index": ("chunks.embedded.npy", "fills a shard", "trains first, merges last", "knn.index"),
    "search": ("knn.index, vectors", "searches a block", "writes each block", "chunks.knn.npy"),
}

DURATIONS = {"1 ms": 1e-3 / 3600, "1 second": 1 / 3600, "1 minute": 1 / 60, "1 hour": 1, "1 day": 24, "1 month": 730}
DURATIONS |= {"1 year": 8766, "100 years": 876_600, "10,000 years": 87_660_000}  # in hours


def short(number: Number, unit: str = "") -> str:
    """Format a number with a unit prefix: 93 T, 2.4 M."""
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g} {letter}{unit}"
    return f"{number:.3g}{' ' * bool(unit)}{unit}"


def recall_against_bytes(runs: Sequence[Mapping], k: int, vectors: int) -> Figure:
    """Best recall of each index against its bytes per vector; `runs` come from benchmarks/recall.py."""
    figure, axes = subplots(figsize=(8, 4.6))
    points = []
    for run in runs:
        colour, marker = kind_of(run["index"])
        x, y = run["bytes_per_vector"], max(trial[f"recall@{k}"] for trial in run["trials"])
        axes.plot([x], [y], marker, color=COLOURS[colour], markersize=8, linestyle="None")
        points.append((x, y, run["index"], COLOURS[colour]))
    lowest = min(y for _, y, *_ in points)
    sizes = [x for x, *_ in points]
    axes.set(xscale="log", xlim=(min(sizes) / 1.8, max(sizes) * 1.8), ylim=(lowest - 0.12, 1.07))
    axes.set(xlabel="bytes for each vector, ids and tables included", ylabel=f"recall@{k}, at the greatest effort")
    axes.set(title=f"What is found for the bytes that are kept, of {short(vectors)} vectors")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_yticks([tick / 10 for tick in range(11) if lowest - 0.12 <= tick / 10 <= 1])
    label(figure, axes, points)
    return figure


def kind_of(spec: str) -> tuple[str, str]:
    """Colour and marker of an index."""
    kept = spec.rsplit(",", 1)[-1]
    return next(((colour, marker) for start, colour, marker in KINDS if kept.startswith(start)), ("chunk", "o"))


def label(figure: Figure, axes: Axes, points: Sequence[tuple[Number, Number, str, str]]) -> None:
    """Write each mark's label beside it, where it overlaps no other mark or label."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # computes the positions
    marks = [axes.transData.transform(point[:2]) for point in points]
    taken: list[Bbox] = []
    for x, y, text, colour in points:
        for dx, dy, side in BESIDE:
            style: dict = {"textcoords": "offset points", "ha": side, "fontsize": 9, "color": colour}
            note = axes.annotate(text, (x, y), (dx, dy), **style)
            box = note.get_window_extent(canvas.get_renderer()).padded(1)
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1
            if inside and not any(box.overlaps(other) for other in taken) and not any(box.contains(*m) for m in marks):
                break
            note.remove()
        else:
            note = axes.annotate(text, (x, y), BESIDE[0][:2], **style)  # crowded: an overlap beats no label
        taken.append(note.get_window_extent(canvas.get_renderer()))


def bytes_by_tokens(
    tokens: Sequence[Number],
    lines: Mapping[str, Sequence[Number]],
    levels: Mapping[str, Number],
    papers: tuple[str, Number, Number],
) -> Figure:
    """Bytes against tokens on logarithmic axes: a line per file, a level per machine, and the paper's point.

    Args:
        tokens: tokens in each corpus.
        lines: name -> bytes for each corpus.
        levels: machine -> bytes that it holds.
        papers: the paper's numbers: name, tokens, bytes.
    """
    figure, axes = _growing(tokens, lines, levels)
    name, x, y = papers
    axes.plot(x, y, "*", color=COLOURS["ink"], markersize=15, markeredgecolor="white")
    axes.annotate(name, (x, y), (-11, 6), textcoords="offset points", ha="right", color=COLOURS["ink"], fontsize=9)
    axes.set_ylim(top=max(axes.get_ylim()[1], 20 * y))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value, "B")))
    axes.set(title="What has to be kept grows as the tokens do", ylabel="bytes")
    return figure


def hours_by_tokens(tokens: Sequence[Number], lines: Mapping[str, Sequence[Number]], title: str) -> Figure:
    """Hours against tokens on logarithmic axes, labelled in seconds, days or years."""
    figure, axes = _growing(tokens, lines, {})
    low, high = axes.get_ylim()
    within = {name: hours for name, hours in DURATIONS.items() if low <= hours <= high}
    axes.set_yticks(list(within.values()), list(within))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set(title=title, ylabel="time")
    return figure


def _growing(
    tokens: Sequence[Number], lines: Mapping[str, Sequence[Number]], levels: Mapping[str, Number]
) -> tuple[Figure, Axes]:
    """Lines against tokens, labelled at their right ends, and grey levels, labelled at the left."""
    figure, axes = subplots(figsize=(8, 4.8))
    for name, level in levels.items():
        axes.axhline(level, color=COLOURS["muted"], linewidth=1, linestyle=":", zorder=1)
        axes.annotate(
            name, (0, level), (4, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
            fontsize=8, color="#666666",
        )  # fmt: skip
    hues = [COLOURS[hue] for hue in HUES]
    for values, colour, dashes in zip(lines.values(), hues, DASHES, strict=False):
        axes.plot(tokens, values, linestyle=dashes, color=colour, linewidth=2)
    axes.set(xscale="log", yscale="log", xlabel="tokens in the corpus", xlim=(min(tokens), max(tokens)))
    axes.xaxis.set_major_locator(LogLocator(numticks=12))
    axes.yaxis.set_major_locator(LogLocator(base=100 if _decades(axes) > 9 else 10, numticks=20))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_minor_formatter(NullFormatter())
    ends = apart([values[-1] for values in lines.values()], 10 ** (_decades(axes) / 19))
    for name, values, end, colour in zip(lines, lines.values(), ends, hues, strict=False):
        where: dict = {"xycoords": ("axes fraction", "data"), "textcoords": ("axes fraction", "data"), "va": "center"}
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 0}
        axes.annotate(name, (1, values[-1]), (1.04, end), color=colour, fontsize=9, arrowprops=line, **where)
    return figure, axes


def _decades(axes: Axes) -> float:
    """Number of powers of ten that the y axis spans."""
    low, high = axes.get_ylim()
    return log10(high / low)


def apart(values: Sequence[Number], factor: float) -> list[Number]:
    """Places for labels: the values, moved up until each is at least `factor` times the one below it."""
    places, below = list(values), 0.0
    for number in sorted(range(len(values)), key=lambda i: values[i]):
        places[number] = below = max(values[number], below * factor)
    return places


def workers(count: int) -> Figure:
    """Division of labour while `count` workers build a store; from above: input, work, and written files."""
    width, gap, step = 2.05, 0.2, 0.42
    height = 2.75 + step * count
    figure, axes = blank(len(STAGES) * (width + gap) + 0.1, height)
    bottom = height - 1.15 - step * count  # lower edge of the last worker
    box(axes, 0.05, bottom - 0.75, len(STAGES) * (width + gap) - gap, 0.5, colour=COLOURS["ink"])
    small: dict = {"ha": "center", "va": "center", "fontsize": 9}
    for column, (stage, (read, work, written, file)) in enumerate(STAGES.items()):
        x = 0.05 + column * (width + gap)
        middle = x + width / 2
        axes.text(middle, height - 0.15, stage, ha="center", va="center", fontweight="bold", color=COLOURS["ink"])
        box(axes, x, height - 0.72, width, 0.36, read, colour=GREY)
        arrow(axes, (middle, height - 0.72), (middle, height - 0.95))
        for number in range(count):
            y = height - 1.15 - step * (number + 1) + 0.2
            box(axes, x, y, width, step - 0.08, f"worker {number + 1} {work}", colour=COLOURS["chunk"])
        arrow(axes, (middle, bottom + 0.2), (middle, bottom - 0.25))
        axes.text(middle, bottom - 0.5, written, color="white", **small)
        arrow(axes, (middle, bottom - 0.75), (middle, bottom - 1.0))
        box(axes, x, bottom - 1.36, width, 0.36, file, colour=COLOURS["continuation"])
    note = "the black bar is one process: it alone writes into the store"
    axes.text(0.05, 0.1, note, fontsize=9, va="center", color="#666666")
    return figure
