"""The figures of a survey: what is drawn is what they are given, nothing is cut off, and each is shown once."""

import pytest
from matplotlib.colors import to_hex

from retro_nb.planning.costs import Rates, Size, Step
from retro_nb.planning.survey import Survey
from retro_nb.plotting import survey as figures
from retro_nb.plotting.style import COLOURS

SIZE = Size(documents=16, bytes=9000, tokens=2000, chunks=40, seqs=16, pairs=1500, longest=6000, titles=1600)
STEPS = (
    Step("chunk", 4.0, 2_800_000, 10**9),
    Step("embed", 1440.0, 22_000_000, 10**9),
    Step("index", 0.002, 22_000_000, 10**9),
    Step("search", 8.3, 117_000, 10**9),
)


def found(lengths=(2, 0, 0, 5, 7, 0, 3, 0, 0, 0, 0, 0, 0, 1), longest=6000, title="Works", **changes):
    """An invented survey."""
    whole = SIZE._replace(**changes)
    rates = Rates(tokens=1.0, chunks=1.0, comparisons=1.0, queries=1.0, listed=1.0, indexed=1.0)
    return Survey(
        chunk_size=64, seq_len=2048, knn=2, index="Flat", seconds=1.0, complete=True, length=None, longest_title=title,
        first_replaced="", lengths=lengths, whole=whole, rates=rates, steps=STEPS, free_disk=10**12, all_memory=10**10,
        bert_unsuited=False, trained_on_all=True, documents=sum(lengths), longest=longest,
    )  # fmt: skip


FIGURES = {
    "lengths": lambda: figures.lengths(found()),
    "of one": lambda: figures.lengths(found((0,) * 33 + (1,), 2**33 - 1, "x" * 300)),
    "of tiny ones": lambda: figures.lengths(found((10**6, 0, 5), 3)),
    "times": lambda: figures.times(STEPS),
    "short times": lambda: figures.times([step._replace(seconds=step.seconds / 1e5) for step in STEPS]),
    "predictions": lambda: figures.predictions({"all": (0.07, 0.04), "copies": (0.6, 0.4), "new": (0, -0.01)}, 0.03),
    "long times": lambda: figures.times([step._replace(seconds=step.seconds * 1e6) for step in STEPS]),
}


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_a_figure_is_closed_and_cuts_nothing_off(draw, assert_whole):
    assert_whole(draw)


def title(axes) -> str:
    return axes.get_title(loc="center") + axes.get_title(loc="left")


def test_bars_of_lengths_stand_where_they_belong():
    (axes,) = figures.lengths(found()).axes
    bars = {(bar.get_x(), bar.get_x() + bar.get_width()): bar.get_height() for bar in axes.patches if bar.get_height()}
    assert bars == {(0.5, 1): 2, (4, 8): 5, (8, 16): 7, (32, 64): 3, (4096, 8192): 1}
    assert title(axes) == "How long are the 18 documents?" and axes.get_xscale() == "log"
    empty, *others = (to_hex(bar.get_facecolor()).upper() for bar in axes.patches)
    assert empty == COLOURS["muted"] and set(others) == {COLOURS["chunk"]}
    low, high = axes.get_xlim()
    assert low < 0.5 and high > 8192


def test_an_arrow_leads_to_the_longest():
    (axes,) = figures.lengths(found()).axes
    empty, longest = axes.texts
    assert empty.get_text() == "2 empty" and longest.get_text() == "the longest: 66.7% of all text\nWorks"
    assert longest.xy == (6000, 0) and longest.arrow_patch is not None
    (axes,) = figures.lengths(found(lengths=(0, 1, 1))).axes
    assert len(axes.texts) == 1, "none is empty"


def test_bars_of_times_are_as_long_as_the_steps():
    (axes,) = figures.times(STEPS).axes
    assert [bar.get_width() for bar in axes.patches] == [4.0, 1440.0, 0.01, 8.3]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "cut into chunks", "embed", "index", "search neighbours",
    ]  # fmt: skip
    assert [text.get_text() for text in axes.texts] == [
        " 4.0 s, 2.8 MB", " 24 min, 22 MB", " < 0.1 s, 22 MB", " 8.3 s, 117 kB",
    ]  # fmt: skip
    assert title(axes) == "A build will take about 24 min"
    top, bottom = (axes.patches[i].get_y() for i in (0, 3))
    assert axes.transData.transform((1, top))[1] > axes.transData.transform((1, bottom))[1], "in order from above"


def test_ticks_of_times_stand_at_their_seconds():
    (axes,) = figures.times(STEPS).axes
    ticks = dict(zip((each.get_text() for each in axes.get_xticklabels()), axes.get_xticks(), strict=True))
    assert ticks["1 min"] == 60 and ticks["1 h"] == 3600 and ticks["0.1 s"] == 0.1
    assert max(ticks.values()) < axes.get_xlim()[1]


def test_predictions_lie_where_they_were_predicted_and_measured():
    points = {"all": (0.07, 0.04), "new": (0.0, -0.01)}
    (axes,) = figures.predictions(points, mine=0.03).axes
    dots = {tuple(line.get_xydata()[0]) for line in axes.lines if line.get_marker() == "o"}
    assert dots == set(points.values()) and [text.get_text() for text in axes.texts] == list(points)
    assert any(list(line.get_xdata()) == [0.03, 0.03] for line in axes.lines)
    (axes,) = figures.predictions(points).axes
    assert len(axes.lines) == 3, "the diagonal and the points"
