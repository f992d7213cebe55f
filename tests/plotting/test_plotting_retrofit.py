"""The figures of notebook 09: what is drawn is what they are given, nothing is cut off, and each is shown once."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from retro_nb.measure.results import results
from retro_nb.plotting import retrofit as figures
from retro_nb.plotting.style import COLOURS

FROZEN, ADDED = {"words": 200_000, "layers": 154_000, "last norm": 1_000}, {"encoder": 80_000, "CCA": 65_000}
TOKENS = [2_000_000, 11_000_000, 20_000_000]
LOSSES = {"RETROfit": [[3.7, 1.5, 0.2], [3.8, 1.6, 0.3]], "RETRO from scratch": [[5.6, 0.4, 0.1]]}
TENTHS = {"RETROfit": [3.6, 3.5], "RETRO from scratch": [2.5, 2.2, 0.9]}


def learning():
    """Invented runs, as the results hold them."""
    curves = {
        name: [{"on": [[1, 6, 10], losses], "off": [[1, 6, 10], [9.0] * 3]} for losses in each]
        for name, each in LOSSES.items()
    }
    runs = {name: [{"tokens": TOKENS, "curves": each} for each in seeds] for name, seeds in curves.items()}
    return figures.learning(runs, TENTHS, ("GPT", 3.714), "Both learn")


FIGURES = {
    "anatomy": lambda: figures.anatomy(4, [2, 4]),
    "anatomy of one layer": lambda: figures.anatomy(1, [1]),
    "weights": lambda: figures.weights(FROZEN, ADDED),
    "learning": learning,
}


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_a_figure_is_closed_and_cuts_nothing_off(draw, assert_whole):
    assert_whole(draw)


def title(axes) -> str:
    """Wherever it stands: the house style, which another test may have put on, sets titles to the left."""
    return axes.get_title(loc="center") + axes.get_title(loc="left")


# what is added to a language model

GREY, GREEN = "#DDE3E8", COLOURS["model"]


def drawn_boxes(axes) -> dict[str, list[tuple[float, float, str]]]:
    """What the boxes say, with the middles and colours of all that say it."""
    found = {}
    for text in axes.texts:
        middle = text.get_position()
        for patch in axes.patches:
            if isinstance(patch, FancyBboxPatch) and patch.get_path().contains_point(middle):
                found.setdefault(text.get_text(), []).append((*middle, to_hex(patch.get_facecolor()).upper()))
    return found


@pytest.mark.parametrize(("depth", "readers"), [(1, [1]), (4, [2, 4]), (6, [3]), (3, [1, 3])])
def test_every_layer_has_its_parts_and_those_that_read_one_more(depth, readers):
    (axes,) = figures.anatomy(depth, readers).axes
    found = drawn_boxes(axes)
    assert [colour for *_, colour in found.pop("encoder: reads the neighbours")] == [GREEN]
    columns = {text.get_position()[0]: text.get_text() for text in axes.texts if text.get_text().startswith("layer")}
    layers = [f"layer {number}" for number in range(1, depth + 1)]
    assert list(columns.values()) == layers and list(columns) == sorted(columns)
    reading = [layers[number - 1] for number in readers]
    expected = {"attention": (layers, GREY), "CCA": (reading, GREEN), "feed-forward": (layers, GREY)}
    assert set(found) == {name for name, (where, _) in expected.items() if where}
    for name, boxes in found.items():
        where, colour = expected[name]
        assert [columns[x] for x, _, _ in boxes] == where and {each for *_, each in boxes} == {colour}
    heights = [found[name][0][1] for name in expected if name in found]
    assert heights == sorted(heights), "from below to above"
    arrows = Counter(to_hex(each.get_edgecolor()).upper() for each in axes.patches if isinstance(each, FancyArrowPatch))
    assert arrows == +Counter({COLOURS["muted"]: depth - 1, COLOURS["neighbour"]: 2 * len(readers)})


# how many weights


def test_bars_are_as_long_as_there_are_weights_and_join():
    (axes,) = figures.weights(FROZEN, ADDED).axes
    counts = list((FROZEN | ADDED).values())
    assert [bar.get_width() for bar in axes.patches] == counts
    assert [bar.get_x() for bar in axes.patches] == [sum(counts[:i]) for i in range(len(counts))]
    assert len({bar.get_y() for bar in axes.patches}) == 1
    for text, bar, (name, count) in zip(axes.texts, axes.patches, (FROZEN | ADDED).items(), strict=True):
        x, y = text.get_position()
        assert text.get_text() == f"{name}\n{count:,}" and x == bar.get_x() + bar.get_width() / 2
        inside = bar.get_y() < y < bar.get_y() + bar.get_height()
        assert inside == (count > 1_000), "beside its bar where that is narrow"


def test_what_is_added_is_green_and_what_stays_is_grey():
    (axes,) = figures.weights(FROZEN, ADDED).axes
    shades = [np.array(bar.get_facecolor()[:3]) for bar in axes.patches]
    assert all(np.ptp(shade) < 0.1 for shade in shades[:3])
    assert all(shade[1] - shade[[0, 2]].max() > 0.1 for shade in shades[3:])
    assert all(not np.array_equal(one, other) for one, other in pairwise(shades))


@pytest.mark.parametrize(("added", "share"), [({"all": 500}, "50"), ({"a": 100, "b": 25}, "20"), ({"a": 1}, "0")])
def test_the_title_says_the_share_that_is_trained(added, share):
    (axes,) = figures.weights({"words": 200, "layers": 300}, added).axes
    assert title(axes) == f"{share}% of the weights are trained"


# how it learns


def test_each_seed_has_a_line_in_the_look_of_its_model():
    looks = {"RETROfit": (COLOURS["model"], "-"), "RETRO from scratch": (COLOURS["chunk"], "--")}
    expected = [(*looks[name], [2, 11, 20], losses) for name, each in LOSSES.items() for losses in each]
    assert [
        (line.get_color(), line.get_linestyle(), list(line.get_xdata()), list(line.get_ydata()))
        for line in learning().axes[0].lines
        if line.get_marker() == "None" and line.get_color() != COLOURS["baseline"]
    ] == expected


def test_whole_trainings_of_a_tenth_are_diamonds_at_a_tenth_of_the_tokens():
    diamonds = [line for line in learning().axes[0].lines if line.get_marker() == "D" and len(line.get_xdata())]
    assert [list(line.get_ydata()) for line in diamonds] == list(TENTHS.values())
    assert [list(line.get_xdata()) for line in diamonds] == [[2.0] * 2, [2.0] * 3]
    assert [line.get_color() for line in diamonds] == [COLOURS["model"], COLOURS["chunk"]]
    assert {line.get_linestyle() for line in diamonds} == {"None"}


def test_what_a_figure_of_learning_says():
    (axes,) = learning().axes
    (level,) = (line for line in axes.lines if line.get_color() == COLOURS["baseline"])
    assert list(level.get_ydata()) == [3.714] * 2 and level.get_label() == "GPT: 3.71"
    said = [text.get_text() for text in axes.get_legend().get_texts()]
    assert said == [*LOSSES, "a training of a tenth", "GPT: 3.71"] and title(axes) == "Both learn"
    assert axes.get_xlabel().endswith("millions") and axes.get_ylabel() == "nats per fact"


def test_all_that_was_measured_is_in_view():
    found = results("almanac-retrofit")
    names = {"RETROfit": "retrofit", "RETRO from scratch": "scratch"}
    runs = {name: found["runs"][model] for name, model in names.items()}
    tenths = {name: found[f"{model}-tenth"]["on"] for name, model in names.items()}
    (axes,) = figures.learning(runs, tenths, ("GPT", float(np.mean(found["baseline"]["off"]))), "").axes
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    points = np.concatenate([line.get_xydata() for line in axes.lines if line.get_color() != COLOURS["baseline"]])
    assert (points > (left, low)).all() and (points < (right, high)).all()
    assert len(points) == sum(len(run["tokens"]) for each in runs.values() for run in each) + 6
