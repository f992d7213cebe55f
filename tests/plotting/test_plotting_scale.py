"""The figures of notebook 11: what is drawn is what they are given, nothing is cut off, and each is shown once."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from retro_nb.plotting import scale as figures
from retro_nb.plotting import use_style
from retro_nb.plotting.style import COLOURS

RUNS = {
    "Flat": (1536, 1.0),
    "IVF4096,Flat": (1551, 0.99),
    "IVF4096,SQ8": (398, 0.985),
    "IVF4096,SQ4": (206, 0.95),
    "IVF4096,PQ192": (208, 0.93),
    "IVF4096,PQ48": (64, 0.66),
    "OPQ48,IVF4096,PQ48": (65, 0.66),
    "IVF4096,RaBitQ": (71, 0.66),
    "HNSW32": (1808, 0.997),
}
TOKENS = [2e6, 2e9, 2e12]
BYTES = {"vectors": [5e7, 5e10, 5e13], "chunks": [4e6, 4e9, 4e12], "neighbours": [3e6, 3e9, 5e12]}
LEVELS = {"a laptop's disk": 1e12, "a server's disks": 6e13}
PAPERS = ("the paper's index", 1.8e12, 9.3e13)


def recall_against_bytes():
    runs = [
        {"index": name, "bytes_per_vector": size, "trials": [{"recall@10": 0.1}, {"recall@10": most}]}
        for name, (size, most) in RUNS.items()
    ]
    return figures.recall_against_bytes(runs, 10, 1_000_000)


FIGURES = {
    "recall": recall_against_bytes,
    "bytes": lambda: figures.bytes_by_tokens(TOKENS, BYTES, LEVELS, PAPERS),
    "workers": lambda: figures.workers(3),
    "hours": lambda: figures.hours_by_tokens(TOKENS, {"1 GPU": [1e-5, 1e-2, 90], "8 GPUs": [1e-6, 1e-3, 9]}, "Hours"),
}


def drawn(draw):
    """A figure in the house style, and the canvas that it has been drawn on."""
    with rc_context():
        use_style()
        figure = draw()
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    return figure, canvas


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_a_figure_is_closed_and_cuts_nothing_off(draw, assert_whole):
    assert_whole(draw)


@pytest.mark.parametrize("draw", [draw for name, draw in FIGURES.items() if name != "workers"])
def test_no_label_lies_on_another(draw):
    figure, canvas = drawn(draw)
    boxes = {text.get_text(): Text.get_window_extent(text, canvas.get_renderer()) for text in figure.axes[0].texts}
    names = list(boxes)
    assert len(names) == len(figure.axes[0].texts)
    over = [(one, other) for i, one in enumerate(names) for other in names[:i] if boxes[one].overlaps(boxes[other])]
    assert over == []


# recall


def test_each_index_is_one_mark_at_its_bytes_and_its_best_recall():
    (axes,) = recall_against_bytes().axes
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines] == list(RUNS.values())
    assert [text.get_text() for text in axes.texts] == list(RUNS)
    assert axes.get_xscale() == "log"


def test_a_label_stands_beside_its_own_mark():
    figure, canvas = drawn(recall_against_bytes)
    (axes,) = figure.axes
    marks = {name: axes.transData.transform(place) for name, place in RUNS.items()}
    for text in axes.texts:
        box = text.get_window_extent(canvas.get_renderer())
        x, y = marks[text.get_text()]
        away = max(box.x0 - x, x - box.x1, 0), max(box.y0 - y, y - box.y1, 0)
        assert max(away) < 40 and not any(box.contains(*mark) for mark in marks.values())
        assert text.get_color() == COLOURS[figures.kind_of(text.get_text())[0]]


def test_what_keeps_vectors_alike_looks_alike():
    kinds = {name: figures.kind_of(name) for name in RUNS}
    assert kinds["IVF4096,PQ48"] == kinds["OPQ48,IVF4096,PQ48"] == kinds["IVF4096,PQ192"]
    assert kinds["Flat"] == kinds["IVF4096,Flat"] and kinds["IVF4096,SQ8"] == kinds["IVF4096,SQ4"]
    assert len(set(kinds.values())) == 5
    assert len({marker for _, marker in kinds.values()}) == 5, "told apart without colours, too"


# workers


def test_each_stage_reads_what_was_written_before_it_and_has_all_workers():
    texts = [text.get_text() for text in FIGURES["workers"]().axes[0].texts]
    assert sum("worker 3" in text for text in texts) == len(figures.STAGES) == 4
    stages = list(figures.STAGES.values())
    for (*_, written), (read, *_) in pairwise(stages[:3]):
        assert read == written
    assert "knn.index" in stages[3][0] and stages[2][3] == "knn.index"


# growth


def test_lines_levels_and_the_papers_point_are_what_is_given():
    (axes,) = FIGURES["bytes"]().axes
    assert axes.get_xscale() == axes.get_yscale() == "log"
    level, lines, (paper,) = axes.lines[:2], axes.lines[2:5], axes.lines[5:]
    assert [line.get_ydata()[0] for line in level] == list(LEVELS.values())
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in lines] == [(TOKENS, y) for y in BYTES.values()]
    assert len({line.get_linestyle() for line in lines}) == len({line.get_color() for line in lines}) == 3
    assert (paper.get_xdata()[0], paper.get_ydata()[0]) == PAPERS[1:]
    assert [text.get_text() for text in axes.texts] == [*LEVELS, *BYTES, PAPERS[0]]


def test_the_time_axis_speaks_of_seconds_and_days():
    (axes,) = FIGURES["hours"]().axes
    ticks = dict(zip((tick.get_text() for tick in axes.get_yticklabels()), axes.get_yticks(), strict=True))
    assert ticks["1 hour"] == 1 and ticks["1 day"] == 24 and ticks["1 second"] == 1 / 3600
    assert "1 year" not in ticks


@given(values=st.lists(st.floats(1, 1e12), min_size=1, max_size=6), factor=st.floats(1.01, 10))
def test_labels_are_moved_apart_and_keep_their_order(values, factor):
    places = figures.apart(values, factor)
    order = sorted(range(len(values)), key=lambda i: values[i])
    assert all(place >= value for place, value in zip(places, values, strict=True))
    rising = [places[i] for i in order]
    assert all(upper >= lower * factor * (1 - 1e-9) for lower, upper in pairwise(rising))


@pytest.mark.parametrize(
    ("number", "said"), [(93e12, "93 T"), (2.4e6, "2.4 M"), (28e9, "28 G"), (999, "999"), (1500, "1.5 k")]
)
def test_large_numbers_are_short(number, said):
    assert figures.short(number) == said and figures.short(number, "B").replace("B", "").strip() == said
