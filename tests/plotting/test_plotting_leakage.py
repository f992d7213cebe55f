"""What the figures of notebook 08 work out for themselves: which words they mark, which run they frame."""

import html
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_nb.plotting import leakage as figures
from retro_nb.store.chunking import document_tokens
from retro_nb.text.document import Document

OLD = Document("They wrote: we the people <b>of\nthe United States</b> & no one else. Peace!", "1800 A", "a")
NEW = Document("Peace is what we the people <b>of the United States</b> ask for.", "1900 B & C", "b")
PEACE = Document("PEACE is what others said.", "1850 D", "d")


def plain(page: str) -> str:
    """A page's words, without marks and the numbers of the runs."""
    return " ".join(html.unescape(re.sub(r"<sub>\d+</sub>|<[^>]*>", "", page)).split())


def cells(page: str) -> list[str]:
    return re.findall(r"<td[^>]*>(.*?)</td>", page, re.DOTALL)


# texts


def test_an_extract_is_the_text_token_by_token():
    ids, _ = (np.concatenate(parts) for parts in zip(*document_tokens(OLD.text), strict=True))
    whole = figures.extract(OLD, 0, len(ids))
    assert "".join(whole.words) == OLD.text and whole.ids.tolist() == ids.tolist()
    for first in range(len(ids)):
        some = figures.extract(OLD, first, 3)
        assert some.ids.tolist() == ids[first : first + 3].tolist() and len(some.words) == len(some.ids)
        assert [word.strip() for word in some.words] == [word.strip() for word in whole.words[first : first + 3]]


def test_both_texts_are_there_whole_and_the_longest_run_is_bold_in_both():
    page = figures.shared_text(figures.extract(NEW, 0), [figures.extract(PEACE, 0), figures.extract(OLD, 0)]).data
    left, right = cells(page)
    assert plain(left) == NEW.text and plain(right) == " ".join(OLD.text.split())
    run = "we the people <b>of the United States</b>"
    for text in (left, right):
        (bold,) = re.findall(r"<b [^>]*>.*?</b>", text, re.DOTALL)
        assert plain(bold) == run
    assert re.search(r"1800 A, 14 tokens in a row</th>", page) and "<sub>14</sub>" in left and "<sub>14</sub>" in right


def test_a_word_says_from_whom_its_run_is():
    page = figures.shared_text(figures.extract(NEW, 0), [figures.extract(PEACE, 0), figures.extract(OLD, 0)]).data
    left, right = cells(page)
    hints = dict(re.findall(r'title="([^"]*)"[^>]*>([^<]*)', left))
    assert hints["3 tokens in a row, also in 1850 D"] == "Peace is what"
    assert hints["14 tokens in a row, also in 1800 A"].startswith("we the people")
    assert set(re.findall('also in ([^"]*)"', right)) == {"1900 B &amp; C"}


def test_nothing_in_common():
    page = figures.shared_text(figures.extract(NEW, 2, 1), [figures.extract(OLD, 1, 2)]).data
    left, _ = cells(page)
    assert plain(left) == "is" and "0 tokens in a row" in page


@pytest.mark.parametrize(
    ("new", "old", "length"),
    [
        (NEW, OLD, 14),
        (OLD, NEW, 14),
        (Document("Once more: we the people <b>of the United States indeed.", "1950 E", "e"), OLD, 11),
        (NEW, PEACE, 3),
        (Document("Nobody", "1960 F", "f"), PEACE, 0),
    ],
)
def test_two_documents_and_their_longest_run(new, old, length):
    page = figures.longest_shared(new, old).data
    titles = [html.unescape(title) for title in re.findall("<th[^>]*>(.*?)</th>", page)]
    assert titles == [new.title, f"{old.title}, {length} tokens in a row"]
    assert [plain(text) for text in cells(page)] == [" ".join(document.text.split()) for document in (new, old)]


def test_of_a_very_long_run_only_the_beginning_is_shown_but_all_of_it_counted():
    old, new = (Document(f"{name} {'to be or not ' * 50}.", name, "") for name in ("Yes", "No"))
    page = figures.longest_shared(new, old).data
    title, heading = re.findall("<th[^>]*>(.*?)</th>", page)
    assert title == "No" and heading == "Yes, 201 tokens in a row, of which 159 are shown"
    assert "<sub>159</sub>" in cells(page)[0] and "32 and more" in page


def test_a_long_run_is_shown_where_it_is_in_both():
    """Far from the beginning of either, and not where the other document has only a part of it."""
    run = "we the people of the united states"
    old = Document(f"{'one two three ' * 60}we the people. {'four ' * 60}{run}, he said.", "old", "")
    new = Document(f"{'five six ' * 90}{run}; {'seven ' * 90}", "new", "")
    page = figures.longest_shared(new, old).data
    for text in cells(page):
        (bold,) = re.findall(r"<b [^>]*>.*?</b>", text, re.DOTALL)
        assert plain(bold) == run


@pytest.mark.parametrize(("length", "opacity"), [(3, None), (4, "26"), (8, "59"), (31, "A6"), (32, ""), (64, "")])
def test_a_longer_run_is_darker(length, opacity):
    shaded = figures._shaded([" one", " two"], [length] * 2, ["1800 A"] * 2, 99)
    assert ("background" in shaded) == (f"<sub>{length}</sub>" in shaded) == (opacity is not None)
    if opacity is not None:
        assert f"#D55E00{opacity};" in shaded or f'#D55E00{opacity}"' in shaded


# the table


@settings(deadline=None, max_examples=15)
@given(data=st.data(), m=st.integers(1, 4), r=st.integers(1, 5))
def test_the_table_shows_every_length_and_frames_the_longest_run(data, m, r):
    chunk, text = (data.draw(st.lists(st.sampled_from(["to", "be", "or"]), min_size=n, max_size=n)) for n in (m, r))
    lengths = np.array([[common_suffix(chunk[: i + 1], text[: j + 1]) for j in range(r)] for i in range(m)])
    (axes,) = figures.suffix_table(lengths, chunk, text).axes
    shown = {label.get_position()[::-1]: int(label.get_text()) for label in axes.texts}
    assert shown == dict(np.ndenumerate(lengths))
    assert [label.get_text() for label in axes.get_xticklabels()] == text
    assert [label.get_text() for label in axes.get_yticklabels()] == chunk
    corners = sorted(frame.get_xy() for frame in axes.patches)
    fields = [(int(y + 0.5), int(x + 0.5)) for x, y in corners]
    assert [lengths[field] for field in fields] == list(range(1, lengths.max() + 1))
    assert [chunk[i] for i, _ in fields] == [text[j] for _, j in fields]


def common_suffix(one: list[str], other: list[str]) -> int:
    return max(n for n in range(min(len(one), len(other)) + 1) if one[len(one) - n :] == other[len(other) - n :])


# the curves


def test_no_bytes_is_no_point_and_shares_are_written_on_the_bars():
    points = [(0.125, 0.25, {"on": None, "off": None}), (1.0, 1.0, {"on": 1.25, "off": 1.5})]
    curve = [{"alpha": a, "chunks": share, "bytes": share, "bits_per_byte": bits} for a, share, bits in points]
    lines, bars = figures.bits_by_overlap(curve, "t").axes
    drawn = {line.get_label(): line.get_ydata() for line in lines.lines}
    np.testing.assert_equal(drawn, {"on": [np.nan, 1.25], "off": [np.nan, 1.5]})
    assert [text.get_text() for text in bars.texts] == ["25.0%", "100.0%"]
    assert [label.get_text() for label in bars.get_xticklabels()] == ["12.5%", "100%"]


def test_a_chunk_of_eight_tokens_is_left_of_the_line():
    (axes,) = figures.overlap_histogram({"a": np.array([8, 8, 9, 64]) / 64}, "t").axes
    corners, line = axes.patches[0].get_xy(), axes.lines[0].get_xdata()[0]
    before, after = ({y for x, y in corners if (x < line) == side and y > 0.01} for side in (True, False))
    assert before == {0.5} and after == {0.5, 0.25}  # two of four chunks; then, in steps of four tokens, 9 and 64
    assert 8 / 64 < line < 9 / 64
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a: 50.0% above 12.5%"]


def test_gains_lie_in_their_bands():
    gains = {"a": [(0.1, 0.0, 0.3), (0.2, 0.1, 0.4)], "b": [(-0.1, -0.2, 0.0), (0.0, -0.1, 0.1)]}
    (axes,) = figures.gain_by_overlap([0.5, 1.0], gains, "t").axes
    for (name, points), line, band in zip(gains.items(), axes.lines, axes.collections, strict=False):
        assert line.get_label() == name and line.get_ydata().tolist() == [value for value, _, _ in points]
        corners = {tuple(corner) for path in band.get_paths() for corner in path.vertices.round(6).tolist()}
        for alpha, (_, low, high) in zip([0.5, 1.0], points, strict=True):
            assert {(alpha, low), (alpha, high)} <= corners


def test_what_is_compared_with_keeps_its_colour_and_the_axis_says_which_chunks_count():
    gains = {name: [(0.1, 0.0, 0.3)] for name in ("speeches", "shuffled")}
    (axes,) = figures.gain_by_overlap([1.0], gains, "t", "r of the chunks").axes
    assert axes.get_xlabel() == "r of the chunks"
    assert [line.get_color() for line in axes.lines[:2]] == [figures.COLOURS["chunk"], figures.CONDITIONS["shuffled"]]
