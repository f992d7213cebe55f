"""Shared runs against all substrings, and bits per byte against loops of floats."""

import difflib
import inspect
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_nb.measure.leakage import gain_curve, leakage_curve, overlaps, shared_runs
from retro_nb.text.tokens import SpecialIds

CLS, SEP, PAD = 101, 102, 0
often = settings(deadline=None, max_examples=150)
sometimes = settings(deadline=None, max_examples=50)


def runs_of(chunk, texts, **options) -> list[int]:
    return shared_runs(np.array(chunk, np.int64), [np.array(text, np.int64) for text in texts], **options).tolist()


def all_runs(tokens) -> list[tuple[int, int]]:
    return [(i, j) for i in range(len(tokens)) for j in range(i + 1, len(tokens) + 1)]


def brute_force(chunk, texts, no_text=(PAD, CLS, SEP)) -> list[int]:
    """From the definition: every run of the chunk that is a run of a text, painted onto its tokens."""
    shared = {tuple(text[i:j]) for text in texts for i, j in all_runs(text)}
    longest = [0] * len(chunk)
    for i, j in all_runs(chunk):
        if tuple(chunk[i:j]) in shared and not set(chunk[i:j]) & set(no_text):
            for token in range(i, j):
                longest[token] = max(longest[token], j - i)
    return longest


words = st.sampled_from([7, 8, 9])
tokens = st.one_of(words, words, st.sampled_from([PAD, CLS, SEP, 10]))  # 10 is a word, too, but a rare one
sequences = st.lists(tokens, max_size=16)
corpora = st.lists(sequences, max_size=4)


# shared runs


@often
@given(chunk=sequences, texts=corpora)
def test_every_token_has_the_longest_run_around_it(chunk, texts):
    assert runs_of(chunk, texts) == brute_force(chunk, texts)


@often
@given(chunk=st.lists(st.sampled_from([7, 8]), max_size=24), text=st.lists(st.sampled_from([7, 8]), max_size=24))
def test_two_words_only(chunk, text):
    """Where runs overlap most."""
    assert runs_of(chunk, [text]) == brute_force(chunk, [text])


@often
@given(chunk=sequences, texts=corpora)
def test_no_run_crosses_from_one_text_to_the_next(chunk, texts):
    each = [runs_of(chunk, [text]) for text in texts]
    assert runs_of(chunk, texts) == np.max([[0] * len(chunk), *each], axis=0).tolist()


def test_a_run_cut_by_a_texts_end_or_by_what_is_no_text():
    chunk = [7, 8, 9, 10]
    assert runs_of(chunk, [[7, 8, 9, 10]]) == [4, 4, 4, 4]
    assert runs_of(chunk, [[7, 8], [9, 10]]) == [2, 2, 2, 2]
    for cut in (PAD, CLS, SEP):
        assert runs_of(chunk, [[7, 8, 9, cut, 10]]) == [3, 3, 3, 1]
        assert runs_of([7, 8, cut, 9], [[7, 8, cut, 9]]) == [2, 2, 0, 1]


@often
@given(chunk=sequences, texts=corpora, random=st.randoms())
def test_the_order_of_texts_does_not_matter(chunk, texts, random):
    shuffled = random.sample(texts, len(texts))
    assert runs_of(chunk, shuffled) == runs_of(chunk, texts)


@often
@given(chunk=sequences, texts=corpora)
def test_read_backwards_the_runs_are_the_same(chunk, texts):
    assert runs_of(chunk[::-1], [text[::-1] for text in texts]) == runs_of(chunk, texts)[::-1]


@often
@given(chunk=st.lists(words, min_size=1, max_size=20), before=sequences, after=sequences, others=corpora)
def test_a_chunk_within_a_text_is_shared_whole(chunk, before, after, others):
    assert runs_of(chunk, [*others, before + chunk + after]) == [len(chunk)] * len(chunk)


@often
@given(chunk=sequences, texts=st.lists(st.lists(st.sampled_from([PAD, CLS, SEP, 20, 21, 22]), max_size=16), max_size=3))
def test_other_words_share_nothing(chunk, texts):
    assert runs_of(chunk, texts) == [0] * len(chunk)


@often
@given(chunk=sequences, texts=corpora)
def test_other_special_ids(chunk, texts):
    """With them [CLS] and [SEP] are words like others."""
    assert runs_of(chunk, texts, special=SpecialIds(9, 8, 8)) == brute_force(chunk, texts, no_text=(9, 8))


@often
@given(chunk=sequences, text=sequences)
def test_both_sides_have_the_same_longest_run(chunk, text):
    assert max(runs_of(chunk, [text]), default=0) == max(runs_of(text, [chunk]), default=0)


@pytest.mark.parametrize("texts", [[], [[]], [[], []], [[PAD] * 5], [[PAD], [], [SEP, PAD, PAD]]])
@pytest.mark.parametrize("chunk", [[], [7], [7, 8, PAD, PAD], [CLS, SEP], [PAD] * 4])
def test_nothing_is_shared_with_texts_without_a_word(chunk, texts):
    assert runs_of(chunk, texts) == [0] * len(chunk)


def test_no_neighbours_in_an_array():
    for shape in ((0, 128), (10, 0), (0, 0)):
        found = shared_runs(np.array([7, 8]), np.zeros(shape, np.uint16))
        assert found.tolist() == [0, 0] and found.dtype == np.int64


def test_a_run_is_no_longer_than_the_chunk_and_the_text():
    assert runs_of([7] * 3, [[7] * 9]) == [3] * 3
    assert runs_of([7] * 9, [[7] * 3]) == [3] * 9
    assert runs_of([7], [[8], [7]]) == [1]
    assert runs_of([7] * 300, [[7] * 400]) == [300] * 300  # more than 8 bits can count


@often
@given(chunk=sequences, texts=corpora, more=st.integers(0, 5))
def test_padding_never_counts(chunk, texts, more):
    padded = [[PAD] * more + text + [PAD] * more for text in texts]
    assert runs_of(chunk + [PAD] * more, padded) == runs_of(chunk, texts) + [0] * more


@pytest.mark.parametrize("kinds", [(np.uint16, np.int64), (np.int64, np.uint16), (np.uint8, np.int32)])
def test_a_chunk_and_texts_of_other_types(kinds):
    """Token 7 + 65,536 of the texts is not token 7 of the chunk."""
    chunk, text = np.array([7, 8, 9], kinds[0]), np.array([8, 9, 7], kinds[1])
    assert shared_runs(chunk, [text]).tolist() == [1, 2, 2]
    assert shared_runs(chunk, [text.astype(np.int64) + 2**16]).tolist() == [0, 0, 0]


@pytest.mark.parametrize("vocabulary", [2, 5, 30, 300])
@pytest.mark.parametrize("kind", [np.uint16, np.uint32, np.uint64, np.int32, np.int64])
def test_a_chunk_and_its_neighbours_at_full_size(vocabulary, kind):
    """The longest run as difflib finds it, in an array of k neighbours and in a list of them."""
    rng = np.random.default_rng(vocabulary)
    chunk, texts = (rng.integers(1000, 1000 + vocabulary, shape).astype(kind) for shape in (64, (10, 128)))
    texts[3, 50:90] = chunk[20:60]
    texts[7, 100:] = PAD
    matchers = [difflib.SequenceMatcher(None, chunk.tolist(), text[text > 0].tolist(), False) for text in texts]
    found = shared_runs(chunk, texts)
    assert found.max() == max(matcher.find_longest_match().size for matcher in matchers) >= 40
    assert found.dtype == np.int64 and (found == shared_runs(chunk, list(texts))).all()


# the evaluated chunks


def rows_of_document(document, m, pad=PAD) -> list[list[int]]:
    starts = range(0, max(len(document) - 1, 1), m)
    return [(document[start : start + m + 1] + [pad] * m)[: m + 1] for start in starts]


@sometimes
@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=4),
    m=st.integers(1, 6),
    seed=st.integers(0, 99),
    special=st.sampled_from([SpecialIds(PAD, CLS, SEP), SpecialIds(300, 2, 2)]),
)
def test_overlaps_are_those_of_the_documents_tokens(lengths, m, seed, special):
    """N with F are two chunks' tokens of a document, so runs cross from N to F and never out of the document."""
    rng, (pad, sos, eos) = np.random.default_rng(seed), special
    words = (200, 201, 202) if sos == CLS else (PAD, CLS, SEP)
    documents = [[sos, *rng.choice(words, length).tolist(), eos] for length in lengths]
    split = [rows_of_document(document, m, pad) for document in documents]
    place = [(d, u * m) for d, rows in enumerate(split) for u in range(len(rows))]
    chunks = np.array([row for rows in split for row in rows], np.uint16)
    rows = rng.integers(0, len(chunks), 5)
    neighbours = rng.integers(-1, len(chunks), (5, 3)).astype(np.int32)
    expected = []
    for row, ids in zip(rows, neighbours, strict=True):
        (d, start), found = place[row], [place[i] for i in ids if i >= 0]
        chunk = [token for token in documents[d][start : start + m] if token not in (sos, eos)]
        texts = [documents[other][first : first + 2 * m] for other, first in found]
        expected.append(max(brute_force(chunk, texts, no_text=special), default=0) / max(len(chunk), 1))
    doc_ids = np.array([d for d, _ in place], np.int32)
    assert overlaps(chunks, rows, neighbours, doc_ids, special=special, progress=False).tolist() == expected


@pytest.fixture
def corpus():
    """Two documents whose second chunks are the same: 4 words, and one word before the end."""
    documents = [[CLS, 7, 8, 9, 10, 11, 12, 13, SEP], [CLS, 20, 21, 22, 23, 10, 11, 12, 13, 8, SEP]]
    split = [rows_of_document(document, 4) for document in documents]
    chunks = np.array([row for rows in split for row in rows], np.int32)
    return chunks, np.repeat([0, 1], [len(rows) for rows in split])


def test_a_chunk_is_divided_by_the_words_it_has(corpus):
    chunks, doc_ids = corpus
    assert chunks.tolist()[2:] == [[CLS, 20, 21, 22, 23], [23, 10, 11, 12, 13], [13, 8, SEP, PAD, PAD]]
    neighbours = np.array([[0, -1], [0, 1], [0, 1]])
    # no word of 3; 10 11 12 of 4 words, across N and F of chunk 0; of 13 8 one word
    assert overlaps(chunks, np.array([2, 3, 4]), neighbours, doc_ids, progress=False).tolist() == [0, 3 / 4, 1 / 2]
    itself = np.arange(5)
    assert (overlaps(chunks, itself, itself[:, None], doc_ids, progress=False) == 1).all()
    assert (overlaps(chunks, itself, np.full((5, 2), -1), doc_ids, progress=False) == 0).all()


def test_a_continuation_is_of_the_neighbours_own_document():
    """By the documents' numbers: these chunks hold no [SEP] that could tell."""
    chunks = np.array([[7, 8, 9], [9, 10, 11], [7, 8, 9], [9, 10, 11], [8, 9, 10]])
    doc_ids, neighbours = np.array([0, 0, 1, 2, 3]), np.array([[0], [2]])
    found = overlaps(chunks, np.array([4, 4]), neighbours, doc_ids, progress=False)
    assert found.tolist() == [1, 1 / 2]  # 7 8 goes on with 9 10 in document 0, and ends document 1


def test_nothing_to_compare(corpus):
    chunks, doc_ids = corpus
    assert overlaps(chunks, np.arange(0), np.zeros((0, 10), int), doc_ids).shape == (0,)
    assert (overlaps(chunks, np.arange(2), np.zeros((2, 0), int), doc_ids) == 0).all()


def test_a_bar_shows_progress(corpus, capsys):
    chunks, doc_ids = corpus
    overlaps(chunks, np.array([1, 2]), np.array([[0], [1]]), doc_ids)
    assert "comparing: 100%" in capsys.readouterr().err
    overlaps(chunks, np.array([1, 2]), np.array([[0], [1]]), doc_ids, progress=False)
    assert not capsys.readouterr().err


def test_chunks_that_do_not_fit(corpus):
    chunks, doc_ids = corpus
    unchecked = inspect.unwrap(overlaps)  # outside of tests nothing checks annotations
    with pytest.raises(ValueError, match="2 rows, 3 of neighbours; 5 chunks, 5 doc_ids: pass neighbours for each row"):
        unchecked(chunks, np.arange(2), np.zeros((3, 1), int), doc_ids)
    with pytest.raises(ValueError, match="5 chunks, 4 doc_ids"):
        unchecked(chunks, np.arange(2), np.zeros((2, 1), int), doc_ids[:-1])
    for rows in ([-1, 2], [2, 5]):
        with pytest.raises(IndexError, match=f"rows {rows[0]} … {rows[1]} of 5 chunks"):
            overlaps(chunks, np.array(rows), np.zeros((2, 1), int), doc_ids)
    with pytest.raises(IndexError, match="neighbour ids 5 … 5 for 5 chunks"):
        overlaps(chunks, np.arange(2), np.array([[0], [5]]), doc_ids, progress=False)


# bits per byte


@st.composite
def evaluations(draw) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
    e = draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    overlap = rng.integers(0, 65, e) / 64
    nats = {name: rng.uniform(0, 300, e) for name in ("on", "off")}
    return overlap, nats, rng.integers(0, 5, e) * 70 + np.eye(e, dtype=int)[0]  # one byte at least


@often
@given(evaluation=evaluations())
def test_bits_per_byte_of_the_chunks_that_share_little(evaluation):
    overlap, nats, sizes = evaluation
    curve = leakage_curve(*evaluation)
    assert json.loads(json.dumps(curve, allow_nan=False)) == curve
    assert [point["alpha"] for point in curve] == [0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1]
    for point in curve:
        kept = [i for i in range(len(overlap)) if overlap[i] <= point["alpha"]]
        size = sum(int(sizes[i]) for i in kept)
        assert point["chunks"] == pytest.approx(len(kept) / len(overlap))
        assert point["bytes"] == pytest.approx(size / sum(sizes.tolist()))
        assert list(point["bits_per_byte"]) == ["on", "off"]
        for name, found in point["bits_per_byte"].items():
            bits = sum(nats[name][i] / math.log(2) for i in kept)
            assert found is None if not size else found == pytest.approx(bits / size)


@often
@given(evaluation=evaluations())
def test_all_chunks_at_one_and_more_with_every_step(evaluation):
    _, nats, sizes = evaluation
    curve = leakage_curve(*evaluation)
    assert curve[-1]["chunks"] == curve[-1]["bytes"] == 1
    plain = {name: losses.sum() / math.log(2) / sizes.sum() for name, losses in nats.items()}
    assert curve[-1]["bits_per_byte"] == pytest.approx(plain)
    for share in ("chunks", "bytes"):
        shares = [point[share] for point in curve]
        assert shares == sorted(shares)


def test_a_chunk_at_the_limit_is_kept_and_none_is_none():
    overlap, sizes = np.array([0.25, 0.5]), np.array([10, 30])
    curve = leakage_curve(overlap, {"on": np.array([10.0, 20.0]) * math.log(2)}, sizes, alphas=[0, 0.25, 0.5])
    assert curve == [
        {"alpha": 0.0, "chunks": 0.0, "bytes": 0.0, "bits_per_byte": {"on": None}},
        {"alpha": 0.25, "chunks": 0.5, "bytes": 0.25, "bits_per_byte": {"on": pytest.approx(1)}},
        {"alpha": 0.5, "chunks": 1.0, "bytes": 1.0, "bits_per_byte": {"on": pytest.approx(30 / 40)}},
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"overlap": [0.5]}, r"\{'overlap': 1, 'sizes': 2, 'on': 2\}"),
        ({"sizes": [1, 2, 3]}, r"\{'overlap': 2, 'sizes': 3, 'on': 2\}"),
        ({"nats": {"on": np.ones(2), "off": np.ones(4)}}, r"'on': 2, 'off': 4\}: pass one for each"),
        ({"sizes": [0, 0]}, "2 chunks of 0 bytes"),
        ({"overlap": [0.5, 1.5]}, r"overlap has 1\.5: pass shares from 0 to 1"),
        ({"overlap": [0.5, math.nan]}, "overlap has nan"),
        ({"alphas": (0.5, 12.5)}, r"alphas has 12\.5: pass shares from 0 to 1"),
        ({"alphas": (-0.1,)}, r"alphas has -0\.1"),
    ],
)
def test_values_that_do_not_fit(changes, message):
    arguments = {"overlap": [0.5, 0.5], "nats": {"on": np.ones(2)}, "sizes": [3, 4], **changes}
    arguments |= {name: np.array(arguments[name]) for name in ("overlap", "sizes")}
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(leakage_curve)(**arguments)


def test_no_chunk_at_all():
    with pytest.raises(ValueError, match="0 chunks of 0 bytes"):
        leakage_curve(np.zeros(0), {}, np.zeros(0, int))


# the gain


@sometimes
@given(evaluation=evaluations(), data=st.data())
def test_the_gain_is_the_distance_of_two_curves(evaluation, data):
    overlap, nats, sizes = evaluation
    documents = np.array(data.draw(st.lists(st.integers(3, 5), min_size=len(sizes), max_size=len(sizes))))
    curve = leakage_curve(overlap, nats, sizes + 1)
    gains = gain_curve(overlap, nats["off"], nats["on"], sizes + 1, documents)
    for point, gain in zip(curve, gains, strict=True):
        bits = point["bits_per_byte"]
        if bits["on"] is None:
            assert np.isnan(gain).all() and len(gain) == 3
        else:
            assert gain[0] == pytest.approx(bits["off"] - bits["on"], abs=1e-9)
            kept = documents[overlap <= point["alpha"]]
            each = [_gain_in(overlap, nats, sizes + 1, documents, point["alpha"], d) for d in set(kept.tolist())]
            assert min(each) - 1e-9 <= gain[1] <= gain[2] <= max(each) + 1e-9  # a mixture of the documents' own


def _gain_in(overlap, nats, sizes, documents, alpha, document) -> float:
    """By a loop over the chunks of one document."""
    rows = [i for i in range(len(overlap)) if overlap[i] <= alpha and documents[i] == document]
    return sum(nats["off"][i] - nats["on"][i] for i in rows) / math.log(2) / sum(int(sizes[i]) for i in rows)


def test_the_gains_interval_is_drawn_over_documents_not_over_chunks():
    """Forty documents of ten equal chunks each: as chunks they would be ten times as many witnesses."""
    rng = np.random.default_rng(0)
    saved, sizes, documents = rng.normal(1, 5, 40).repeat(10), np.full(400, 100), np.arange(40).repeat(10)
    (gain,) = gain_curve(np.zeros(400), saved + 50, np.full(400, 50.0), sizes, documents, alphas=[1])
    expected = saved.std() / math.sqrt(40) / math.log(2) / 100  # standard error over 40 documents
    assert gain[0] == pytest.approx(saved.mean() / math.log(2) / 100)
    assert gain[2] - gain[0] == pytest.approx(1.96 * expected, rel=0.1)
    assert gain[0] - gain[1] == pytest.approx(1.96 * expected, rel=0.1)


def test_no_gain_where_nothing_is_kept():
    half, ones, one = np.full(2, 0.5), np.ones(2), np.ones(2, int)
    nothing, all_of_it = gain_curve(half, ones, ones, one, one, alphas=[0.25, 0.5])
    assert np.isnan(nothing).all() and all_of_it == (0, 0, 0)
    assert np.isnan(gain_curve(half, ones, ones, 0 * one, one, alphas=[1])).all()
