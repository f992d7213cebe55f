"""The figures of notebook 07: they say what they are given, cut nothing off, and are shown once."""

import html.parser
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgb

from retro_nb.measure.evaluation import MODES
from retro_nb.plotting import evaluation as plots

SEEDS = [0.31, 0.28, 0.35]
FACTS = {"baseline": [3.7, 3.69], "on": SEEDS, "off": [3.9], "shuffled": [4.0, 4.4], "N only": [1.0], "F only": [2.0]}
SHARES = {"speeches": {"on": [1.1, 1.4, 0.9], "shuffled": [-0.4, -0.2, -0.3]}, "docstrings": {"on": [7.0, 8.0, 7.5]}}
INTERVALS = {"speeches": {"on": (0.2, 2.0)}}
YEARS = range(1790, 2030, 20)
GROUPS = {f"{year}s": (0.01 * i - 0.05, 0.01 * i - 0.1, 0.01 * i + 0.02) for i, year in enumerate(YEARS)}
GROUPED = {"by decade": GROUPS, "by distance": {"0–2": (0.1, 0.05, 0.2), "2–4": (0.0, -0.1, 0.1)}}
CURVES = {"on": [[4.0, 2.0, 1.0], [4.0, 1.0, 1.0]], "shuffled": [[4.0, 4.0, 4.0]]}
TOKENS = [0, 5_000_000, 9_000_000]
WORDS = [f"word{i}" for i in range(40)]
SWEEPS = {"neighbours k": {"0": [1.3, 1.31], "1": [1.2]}, "database": {"1/16": SEEDS, "1": SEEDS}}
CHANCES = {"the twin": {"amber": 0.93, "violet": 0.02, "grey": 0.01}, "nothing": {"red": 0.1, "amber": 0.09}}

FIGURES = {  # each function once, on invented numbers
    "answers": lambda: plots.answers(CHANCES, {"amber": "neighbour"}, "It reads"),
    "attention_map": lambda: plots.attention_map(np.eye(25, 40), WORDS[:25], WORDS, 17, "It looks at the fact"),
    "rewritings": lambda: plots.rewritings(np.eye(40), WORDS, "It says what it reads"),
    "bars": lambda: plots.bars({"almanac": FACTS}, "nats per fact token", "It copies", line=("ln 40", 3.69)),
    "two bars": lambda: plots.bars(SHARES, "%", "Little", intervals=INTERVALS),
    "resampled": lambda: plots.resampled(np.linspace(-0.1, 0.4, 500), (-0.1, 0.3), "bits per byte", "Not sure"),
    "copying": lambda: plots.copying(TOKENS, CURVES, 3.69, "It copies"),
    "hit_rates": lambda: plots.hit_rates({"40 towns": [0.9, 0.8, 0.9], "8,000 towns": [0.5, 0.4]}),
    "gains": lambda: plots.gains(GROUPED, "bits per byte saved", "Everywhere a little"),
    "sweeps": lambda: plots.sweeps(SWEEPS, [1.29, 1.3], "bits per byte", "More helps"),
}


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_a_figure_is_closed_and_cuts_nothing_off(draw, assert_whole):
    assert_whole(draw)


def test_every_condition_has_a_colour_of_its_own():
    assert list(plots.CONDITIONS) == ["baseline", *MODES]
    assert len(set(plots.CONDITIONS.values())) == len(plots.CONDITIONS)


def test_bars_show_the_mean_every_seed_and_the_interval():
    figure = plots.bars(SHARES, "%", "Little", intervals=INTERVALS)
    speeches, docstrings = figure.axes
    assert [bar.get_height() for bar in speeches.patches] == pytest.approx([3.4 / 3, -0.3])
    dots = np.concatenate([line.get_ydata() for line in docstrings.lines if line.get_marker() == "o"])
    assert sorted(dots) == [7.0, 7.5, 8.0]
    whiskers = [[list(line.get_ydata()) for line in axes.lines if line.get_marker() == "_"] for axes in figure.axes]
    assert whiskers == [[[0.2, 2.0]], []]
    assert [text.get_text() for text in speeches.texts] == ["1.13", "−0.30"]


def test_a_rewriting_stands_in_the_row_of_the_word_that_was_written():
    chances = np.array([[0.9, 0.1], [0.0, 0.6]])
    axes = plots.rewritings(chances, ["red", "blue"], "").axes[0]
    assert np.array_equal(axes.images[0].get_array(), chances)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["red", "blue"]
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("what the memory says", "answer")


def test_copying_is_marked_where_the_mean_has_halved():
    (axes,) = plots.copying(TOKENS, CURVES, 3.2, "").axes
    assert [text.get_text() for text in axes.texts] == ["half at 5 M"]
    (axes,) = plots.copying(TOKENS, CURVES, 1.9, "").axes
    assert not axes.texts


def test_a_gain_is_filled_where_it_is_certain():
    groups = {"sure": (0.2, 0.1, 0.3), "worse": (-0.2, -0.3, -0.1), "open": (0.1, -0.1, 0.3), "one": (0.2, 0.2, 0.2)}
    dots = [line for line in plots.gains({"": groups}, "", "").axes[0].lines if line.get_marker() == "o"]
    assert [dot.get_markerfacecolor() == "white" for dot in dots] == [False, False, True, False]


# a coloured text


class Reader(html.parser.HTMLParser):
    """What a page says below its legend, and its tokens: the text, how it is marked, and the tooltip."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.tokens, self.inside = "", [], None
        self.feed(page.split("</p>", 1)[1])

    def handle_starttag(self, tag, attrs):
        if tag == "br":
            self.text += "\n"
            return
        self.inside = {"tag": tag, "text": "", **dict(attrs)} if tag != "div" else None

    def handle_endtag(self, tag):
        if self.inside:
            self.tokens.append(self.inside)
        self.inside = None

    def handle_data(self, data):
        self.text += data
        if self.inside:
            self.inside["text"] += data


words = st.text(st.characters(codec="utf-8", exclude_characters="\r"), min_size=1)
pieces = st.lists(words | st.sampled_from(["<b>", "</div>\n", "&amp; "]), min_size=1, max_size=8)


@given(pieces, st.integers(0, 2**31))
@settings(deadline=None, max_examples=30)
def test_a_coloured_text_is_the_text_and_is_marked_by_the_difference(pieces, seed):
    rng = np.random.default_rng(seed)
    on, off = rng.uniform(0, 9, (2, len(pieces)))
    on[rng.random(len(pieces)) < 0.3] = np.nan
    page = Reader(plots.coloured(pieces, on, off).data)
    assert page.text.replace("\xa0", " ") == "".join(pieces).replace("\xa0", " ")  # an indent cannot be broken
    predicted = np.flatnonzero(~np.isnan(on))
    assert len(page.tokens) == len(predicted)
    for i, token in zip(predicted.tolist(), page.tokens, strict=True):
        gain = off[i] - on[i]
        assert token["text"] == pieces[i].rstrip()
        assert token["tag"] == ("b" if gain >= 0.5 else "i" if gain <= -0.5 else "span")
        numbers = [float(number) for number in re.findall(r"[\d.]+", token["title"])]
        expected = [off[i], on[i], 100 * np.exp(-off[i]), 100 * np.exp(-on[i])]
        assert numbers == pytest.approx(expected, abs=0.051)


def test_purple_is_cheaper_orange_dearer_and_letters_stay_readable():
    def luminance(colour):
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
        return float(np.dot((0.2126, 0.7152, 0.0722), linear))

    data = plots.coloured(["a ", "b ", "c "], np.array([0.0, 5.0, 1.0]), np.array([9.0, 0.0, 1.0])).data
    shades = [re.search("#......", token["style"])[0] for token in Reader(data).tokens]
    cheaper, dearer, same = map(to_rgb, shades)
    assert cheaper[2] > cheaper[0] and dearer[0] > dearer[2] and max(same) - min(same) < 0.02
    for shade in shades:
        assert (luminance(shade) + 0.05) / (luminance("#222222") + 0.05) > 4.5
    assert data.startswith("<p") and "3 nats cheaper with neighbours" in data
