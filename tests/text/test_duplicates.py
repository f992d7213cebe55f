"""Near-duplicates against sets of tuples compared pair by pair."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_nb.text.duplicates import GRAM, JACCARD, Pair, grams_of, jaccard, near_duplicates, repeating


def by_brute_force(documents: list[np.ndarray], gram: int, at_least: float) -> list[Pair]:
    """The same by sets of tuples."""
    sets = [{tuple(text[i : i + gram].tolist()) for i in range(len(text) - gram + 1)} for text in documents]
    pairs = []
    for j, second in enumerate(sets):
        for i, first in enumerate(sets[:j]):
            similarity = len(first & second) / max(1, len(first | second))
            if similarity >= at_least:
                pairs.append(Pair(i, j, similarity))
    return sorted(pairs)


@st.composite
def edited(draw) -> list[np.ndarray]:
    """Documents that are one another with a few tokens changed and the ends cut off, of few different tokens."""
    tokens = st.integers(0, draw(st.sampled_from([1, 3, 60_000])))
    originals = draw(st.lists(st.lists(tokens, max_size=60), min_size=1, max_size=3))
    documents = []
    for original in draw(st.lists(st.sampled_from(originals), min_size=1, max_size=8)):
        text = list(original)
        for place, token in draw(st.dictionaries(st.integers(0, 60), tokens, max_size=3)).items():
            if place < len(text):
                text[place] = token
        documents.append(np.array(text[draw(st.integers(0, 3)) :], np.int32))
    return documents


@given(edited(), st.integers(1, 14), st.sampled_from([0.1, 0.3, 0.5, 0.8, 1.0]))
@settings(max_examples=300, deadline=None)
def test_pairs_are_those_of_comparing_all_sets(documents, gram, at_least):
    assert near_duplicates(documents, gram=gram, at_least=at_least) == by_brute_force(documents, gram, at_least)


@given(edited(), st.sets(st.integers(0, 7)))
@settings(max_examples=100, deadline=None)
def test_pairs_with_one_of_some_documents(documents, among):
    among = {number for number in among if number < len(documents)}
    found = near_duplicates(documents, among, gram=3, at_least=0.4)
    assert found == [pair for pair in by_brute_force(documents, 3, 0.4) if {pair.first, pair.second} & among]


def test_a_changed_token_costs_thirteen_runs():
    text = np.arange(1000, 1200)
    other = text.copy()
    other[100] = 0
    runs = len(text) - GRAM + 1
    ((first, second, similarity),) = near_duplicates([text, np.arange(500), other])
    assert (first, second) == (0, 2) and similarity == (runs - 13) / (runs + 13)
    assert near_duplicates([text, other], at_least=similarity) and not near_duplicates([text, other], at_least=0.99)


def test_short_documents_have_no_runs_and_no_pair():
    text = np.arange(GRAM - 1)
    assert len(grams_of(text)) == 0 and jaccard(grams_of(text), grams_of(text)) == 0
    assert near_duplicates([text, text]) == [] and near_duplicates([]) == []


def test_runs_are_told_apart_whatever_their_type():
    """Neighbouring ids, order, and the width of the integers."""
    runs = np.random.default_rng(0).integers(0, 3, (5000, 13))
    rows = np.unique(runs, axis=0)
    hashes = {int(grams_of(row.astype(kind))[0]) for row in rows for kind in (np.uint16, np.int64)}
    assert len(hashes) == len(rows)


@pytest.mark.parametrize(("gram", "at_least"), [(0, 0.8), (13, 0.0), (13, 1.01)])
def test_senseless_limits_are_refused(gram, at_least):
    with pytest.raises(ValueError, match=f"runs of {gram} tokens, similarity {at_least}: pass 1 or more"):
        near_duplicates([], gram=gram, at_least=at_least)


@given(edited())
@settings(max_examples=100, deadline=None)
def test_documents_that_repeat_one_before_them_are_the_seconds_of_all_pairs(documents):
    longer = [np.repeat(text, 3) for text in documents]  # so that most have runs of 13
    found, compared = repeating(longer)
    assert compared == len(documents)
    assert found == sorted({pair.second for pair in by_brute_force(longer, GRAM, JACCARD)})


def test_documents_are_compared_in_order_until_the_time_is_over(monkeypatch):
    text = np.arange(100)
    clock = iter(range(100))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))  # a second between two looks at it
    assert repeating([text] * 9, seconds=3) == ([1, 2], 3)
    assert repeating([text] * 9, seconds=0) == ([], 1) and repeating([], seconds=0) == ([], 0)
