"""planning/prediction.py: n-grams and copiers against counting by hand; what copying saves is found."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_nb import Store, StoreSettings
from retro_nb.planning import prediction as module
from retro_nb.planning.prediction import ORDER, Copier, NGrams, predict, predict_arrays
from retro_nb.text.document import Document
from retro_nb.text.tokens import SpecialIds

SPECIAL = SpecialIds(pad=0, sos=1, eos=2)
texts = st.lists(st.integers(3, 6), min_size=1, max_size=60).map(np.array)


def by_hand(tokens: list[int], asked: list[int], i: int, v: int) -> float:
    """Witten–Bell, order by order, with dictionaries."""
    p = 1 / v
    for n in range(1, ORDER + 1):
        if i - n + 1 < 0:
            break
        followed = defaultdict(Counter)
        for j in range(n - 1, len(tokens)):
            followed[tuple(tokens[j - n + 1 : j])][tokens[j]] += 1
        seen = followed.get(tuple(asked[i - n + 1 : i]), Counter())
        if seen:
            p = (seen[asked[i]] + len(seen) * p) / (seen.total() + len(seen))
    return p


@given(texts, texts)
@settings(deadline=None, max_examples=40)
def test_ngrams_are_those_of_counting(tokens, asked):
    found = NGrams(tokens, 7).probabilities(asked)
    expected = [by_hand(tokens.tolist(), asked.tolist(), i, 7) for i in range(len(asked))]
    assert found == pytest.approx(expected, rel=1e-9)


@given(texts, texts)
@settings(deadline=None, max_examples=20)
def test_ngrams_are_a_distribution(tokens, context):
    model = NGrams(tokens, 7)
    total = sum(model.probabilities(np.append(context, token))[-1] for token in range(7))
    assert total == pytest.approx(1)


@given(texts, st.lists(st.integers(3, 6), min_size=1, max_size=8))
@settings(deadline=None)
def test_a_copier_says_what_followed_the_longest_context(text, asked):
    copier, text = Copier(), text.tolist()
    copier.read(text)
    for i in range(len(asked)):
        expected = (0, 0.0)
        for n in range(min(i, ORDER - 1), 0, -1):
            after = [text[j] for j in range(n, len(text)) if text[j - n : j] == asked[i - n : i]]
            if after:
                expected = (n, after.count(asked[i]) / len(after))
                break
        assert copier.forecast(asked, i) == pytest.approx(expected)


@given(texts, st.integers(1, 59))
@settings(deadline=None)
def test_a_text_may_be_read_piece_by_piece(text, at):
    whole, pieces, text = Copier(), Copier(), text.tolist()
    whole.read(text)
    pieces.read(text[:at])
    pieces.read(text, min(at, len(text)))
    assert whole.followed == pieces.followed


def arrays(documents: int, copied: bool, m: int = 8, seed: int = 0):
    """Documents of random tokens; the neighbour of each chunk is told, and copied from if `copied`."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(3, 200, (documents, 4, m))
    if copied:  # every second document repeats the one before
        rows[1::2] = rows[::2]
    following = np.concatenate([rows[:, 1:, 0], np.full((documents, 1), 2)], axis=1)
    chunks = np.concatenate([rows, following[..., None]], axis=2).reshape(-1, m + 1)
    ids = np.arange(4 * documents).reshape(documents // 2, 2, 4)[:, ::-1].reshape(-1, 1)
    return chunks, np.repeat(np.arange(documents), 4), ids


def test_what_stands_on_the_pages_is_saved_and_what_does_not_is_not():
    left_out = np.arange(1, 80, 2)
    gains = {}
    for copied in (True, False):
        found = predict_arrays(*arrays(80, copied), left_out, SPECIAL, progress=False)
        gains[copied] = found.gain
        low, high = found.interval
        assert low <= found.gain <= high and found.tokens == 40 * 32
        assert found.gain == pytest.approx(1 - found.with_pages.sum() / found.without.sum())
        assert math.isclose(sum(share for _, share in found.by_overlap.values()), 1)
    assert gains[True] > 0.3 and abs(gains[False]) < 0.02


def test_documents_that_are_left_out_are_on_no_page():
    chunks, doc_ids, ids = arrays(80, copied=True)
    found = predict_arrays(chunks, doc_ids, ids, np.arange(80)[16:], SPECIAL, progress=False)
    assert abs(found.gain) < 0.03  # both documents of each pair are left out


def test_weights_come_from_the_other_half():
    forecast = module.Forecasts(
        ngram=np.full(40, 0.1), own=np.zeros(40), own_length=np.zeros(40, np.int64),
        page=np.r_[np.ones(20), np.zeros(20)], page_length=np.full(40, 3), shared=np.zeros(40, np.int64),
        document=np.r_[np.zeros(20, np.int64), np.ones(20, np.int64)],
    )  # fmt: skip
    losses = module.cross_fitted(forecast, forecast.document == 0, pages=True)
    assert losses[0] > -np.log(0.5) and losses[-1] > -np.log(0.1)  # each half is told the wrong thing by the other
    assert np.allclose(module.cross_fitted(forecast, forecast.document == 0, pages=False), -np.log(0.1), atol=0.2)


def test_too_few_documents_are_refused(tmp_path):
    with pytest.raises(ValueError, match="7 of 80 documents"):
        predict_arrays(*arrays(80, copied=True), np.arange(7), SPECIAL)


def test_a_store_is_asked(tmp_path, tiny_bert):
    words = "alpha beta gamma delta epsilon zeta eta theta".split()
    rng = np.random.default_rng(0)
    documents = [Document(" ".join(rng.choice(words, 60)), f"{i}", f"{i}") for i in range(20)]
    store = Store.build(documents, tmp_path, StoreSettings(chunk_size=8, seq_len=32, bert=tiny_bert), progress=False)
    found = predict(store, k=1, share=0.5, progress=False)
    assert len(found.documents) == 10 and found.tokens > 300 and str(len(found.documents)) in str(found)
