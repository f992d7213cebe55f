"""Bits per byte against a plain loop over documents; the conditions; the bootstrap against what is known of it."""

import inspect
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from retro_nb import RETRO, RETRODataset, almanac
from retro_nb.common.arrays import open_array
from retro_nb.measure import evaluation
from retro_nb.measure.evaluation import (
    MODES,
    Score,
    bytes_of_chunks,
    evaluate,
    fact_tokens,
    found_twins,
    interval,
    next_chunks,
    score,
    shuffled,
    token_losses,
)
from retro_nb.reference import documents_to_chunks_
from retro_nb.text.document import Document
from retro_nb.text.tokens import TextTokenizer, decode, get_tokenizer, tokenize

M, N, K = 4, 12, 2
TEXTS = [
    "The treaty of peace — signed in Zürich — was kept.",
    "Naïve people pay taxes. " * 5,
    "war",
    "Gold, silver and copper; army and navy. " * 3,
]


@pytest.fixture(scope="module", params=["bert", "gpt2"])
def tokenizer(request, tiny_bert, tokenizers):
    """BERT's, and one whose documents begin and end with the same id and that pads with an id after its words."""
    return get_tokenizer(tokenizers.get(request.param, tiny_bert))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, tokenizer):
    """A dataset of TEXTS with random neighbours, none of them of the document itself."""
    folder = tmp_path_factory.mktemp("corpus")
    paths = {f"{name}_memmap_path": folder / f"{name}.npy" for name in ("chunks", "seqs", "doc_ids")}
    documents = [Document(text, str(number), "here") for number, text in enumerate(TEXTS)]
    stats = documents_to_chunks_(documents, **paths, chunk_size=M, seq_len=N, tokenizer=tokenizer, progress=False)
    doc_ids, rng = np.load(folder / "doc_ids.npy"), np.random.default_rng(0)
    knns = [rng.choice(np.flatnonzero(doc_ids != document), K) for document in doc_ids]
    np.save(folder / "knns.npy", np.array(knns, np.int32))
    dataset = RETRODataset(
        num_chunks=stats["chunks"],
        chunk_size=M,
        seq_len=N,
        num_sequences=stats["seqs"],
        num_neighbors=K,
        chunk_memmap_path=folder / "chunks.npy",
        chunk_nn_memmap_path=folder / "knns.npy",
        seq_memmap_path=folder / "seqs.npy",
        doc_ids_memmap_path=folder / "doc_ids.npy",
    )
    return dataset, bytes_of_chunks(folder / "chunks.npy")


@pytest.fixture
def retro(tokenizer):
    torch.manual_seed(0)
    sizes = dict(enc_dim=16, enc_depth=1, dec_dim=16, dec_depth=2, dec_cross_attn_layers=(1, 2), heads=2, dim_head=8)
    of_words = dict(num_tokens=tokenizer.size, pad_id=tokenizer.ids.pad)
    model = RETRO(max_seq_len=N, chunk_size=M, dec_attn_dropout=0.5, **of_words, **sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that neighbours matter
    return model


def plain_nats(retro, dataset, text, number, tokenizer, mode) -> tuple[float, int]:
    """Nats and tokens of one document: its own tokens, cut into sequences, neighbours fetched one by one."""
    tokens, first = tokenize(text, tokenizer=tokenizer)[0], int(np.searchsorted(dataset.doc_ids, number))
    chunks, total, count = open_array(dataset._paths["chunks"][0]), 0.0, 0
    stop = int(np.searchsorted(dataset.doc_ids, number, "right"))
    for start in range(0, len(tokens) - 1, N):
        seq = tokens[start : start + N]
        near = torch.full((1, len(seq) // M, 1 if mode == "oracle" else K, 2 * M), tokenizer.ids.pad)
        for u in range(len(seq) // M):
            own = first + start // M + u
            found = dataset.knns[own].tolist()
            if mode == "oracle":
                found = [own + 1] if own + 1 < stop else []
            for j, i in enumerate(found):
                follows = i + 1 < len(chunks) and dataset.doc_ids[i + 1] == dataset.doc_ids[i]
                if mode != "F only":
                    near[0, u, j, :M] = torch.from_numpy(chunks[i, :M].astype(np.int64))
                if follows and mode != "N only":
                    near[0, u, j, M:] = torch.from_numpy(chunks[i + 1, :M].astype(np.int64))
        with torch.no_grad():
            logits = retro.double()(seq[None], None if mode == "off" else near)[0]
        for position, label in enumerate(tokens[start + 1 : start + 1 + len(seq)]):
            if label != tokenizer.ids.eos:
                total, count = total + F.cross_entropy(logits[position], label).item(), count + 1
    return total, count


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "shuffled"])
def test_scores_are_those_of_a_plain_loop(corpus, retro, tokenizer, mode):
    dataset, sizes = corpus
    documents = [0, 1, 3]
    losses = token_losses(retro, dataset, documents, mode, batch_size=2, progress=False)
    assert retro.training
    made = score(losses, documents, dataset.doc_ids, sizes)
    retro.eval()
    expected = [plain_nats(retro, dataset, TEXTS[number], number, tokenizer, mode) for number in documents]
    assert made.nats == pytest.approx([nats for nats, _ in expected], rel=1e-4)
    assert made.tokens.tolist() == [count for _, count in expected]
    assert made.bytes.tolist() == [len(TEXTS[number].encode()) for number in documents]
    nats, count = (sum(each) for each in zip(*expected, strict=True))
    assert made.bits_per_byte == pytest.approx(nats / math.log(2) / made.bytes.sum(), rel=1e-4)
    assert made.perplexity == pytest.approx(math.exp(nats / count), rel=1e-3)


def test_a_loss_lies_at_its_token(corpus, retro, tokenizer):
    """Everything of the documents has a loss but what opens and closes them, and nothing else has."""
    dataset, _ = corpus
    tokens = open_array(dataset._paths["chunks"][0])[:, :M]
    losses = token_losses(retro, dataset, [1, 2], "off", progress=False)
    asked = np.isin(dataset.doc_ids, [1, 2])[:, None] & ~np.isin(tokens, tokenizer.ids)
    assert (np.isnan(losses) == ~asked).all()


def test_the_oracle_shows_what_comes_next(corpus, retro, tokenizer):
    """The neighbour of a chunk is its successor, with that one's continuation; at the end there is none."""
    dataset, _ = corpus
    chunks, doc_ids = open_array(dataset._paths["chunks"][0])[:, :M].astype(np.int64), dataset.doc_ids
    found = dataset.with_neighbours(next_chunks(doc_ids))
    for number in range(len(found)):
        (_, retrieved), first = found[number], int(found.first_chunks([number])[0])
        for u in range(N // M):
            for half, other in enumerate((first + u + 1, first + u + 2)):
                there = other < len(doc_ids) and doc_ids[other] == doc_ids[first]
                wanted = chunks[other] if there else np.full(M, tokenizer.ids.pad)
                assert retrieved[u, 0, half * M :][:M].tolist() == wanted.tolist()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_losses_that_are_not_finite_are_refused(corpus, retro, tokenizer, value):
    """NaN in the array means "not counted": a model that gives it must not pass for one that was not asked."""
    dataset, _ = corpus
    word = int(open_array(dataset._paths["chunks"][0])[np.searchsorted(dataset.doc_ids, 3), 2])
    with torch.no_grad():
        retro.to_logits.bias[word] = value if math.isnan(value) else -value
    with pytest.raises(FloatingPointError, match=f"document 3, mode 'off': a token's loss is {value}"):
        token_losses(retro, dataset, [3], "off", progress=False)
    assert retro.training


def test_other_neighbours(corpus, retro):
    """None at all is the model without retrieval up to its null key; k = 1 reads the first ones only."""
    dataset, _ = corpus
    one = dataset.with_neighbours(dataset.knns[:, :1])
    again = dataset.with_neighbours(np.where(np.arange(K) < 1, dataset.knns, -1))
    few, same, all_of_them = (token_losses(retro, each, [1, 3], progress=False) for each in (one, again, dataset))
    np.testing.assert_allclose(few, same, rtol=1e-4)
    assert not np.allclose(few, all_of_them, equal_nan=True)
    assert one[0][1].shape == (N // M, 1, 2 * M) and dataset[0][1].shape == (N // M, K, 2 * M)
    with pytest.raises(ValueError, match=f"neighbours of 3 chunks for a corpus of {dataset.num_chunks}"):
        dataset.with_neighbours(dataset.knns[:3])


@given(st.lists(st.integers(1, 6), min_size=2, max_size=8), st.integers(0, 5))
@settings(deadline=None)
def test_shuffled_neighbours_are_those_of_another_evaluated_document(counts, seed):
    doc_ids = np.repeat(np.arange(len(counts)), counts)
    documents = list(range(0, len(counts), 2)) if len(counts) > 2 else [0, 1]
    knns = np.arange(len(doc_ids))[:, None]  # who finds a neighbour is told by its number
    mixed = shuffled(knns, doc_ids, documents, seed)
    for row, document in enumerate(doc_ids):
        if document in documents:
            taken_from = doc_ids[mixed[row, 0]]
            assert taken_from != document and taken_from in documents
        else:
            assert mixed[row, 0] == row


@given(st.lists(st.integers(1, 4), min_size=2, max_size=6), st.integers(1, 3), st.integers(0, 99))
@settings(deadline=None)
def test_shuffling_gives_no_document_its_own_text(counts, k, seed):
    """Where the documents are in the database too, others have found them: what they found stays away from them."""
    doc_ids = np.repeat(np.arange(len(counts)), counts)
    knns = np.random.default_rng(seed).integers(-1, len(doc_ids), (len(doc_ids), k))
    mixed = shuffled(knns, doc_ids, list(range(len(counts))), seed)
    assert not ((mixed >= 0) & (doc_ids[mixed] == doc_ids[:, None])).any()
    found = [set(row) | {-1} for row in knns.tolist()]
    for row, ids in enumerate(mixed.tolist()):
        assert any(set(ids) <= found[other] for other in np.flatnonzero(doc_ids != doc_ids[row]))


def test_every_other_chunk_can_be_drawn():
    doc_ids = np.array([0, 0, 1, 2, 2])
    seen = {int(shuffled(np.arange(5)[:, None], doc_ids, [0, 1, 2], seed)[3, 0]) for seed in range(60)}
    assert seen == {0, 1, 2}


def test_the_interval_of_a_mean():
    """Of many documents of equal size it is the mean ± 1.96 standard errors."""
    rng, count = np.random.default_rng(0), 2000
    bits = rng.normal(1.3, 0.2, count)
    made = Score(bits * math.log(2) * 1000, np.full(count, 200), np.full(count, 1000))
    error = 1.96 * bits.std() / count**0.5
    assert interval(made) == pytest.approx((bits.mean() - error, bits.mean() + error), abs=error / 10)


def test_a_paired_difference_is_narrower_than_its_parts():
    rng, sizes = np.random.default_rng(0), np.full(30, 1000)
    hard = rng.normal(1000, 300, 30)
    first, second = Score(hard, sizes, sizes), Score(hard + rng.normal(10, 2, 30), sizes, sizes)
    low, high = interval(second, first)
    assert 0 < low < (second.nats - first.nats).sum() / math.log(2) / sizes.sum() < high < 0.02
    assert interval(first)[1] - interval(first)[0] > 10 * (high - low)


def test_a_document_counts_by_its_bytes():
    """Three times the same document, told in pieces or as one, is as many bits per byte."""
    whole = Score(np.array([300.0]), np.array([60]), np.array([240]))
    parts = Score(np.full(3, 100.0), np.full(3, 20), np.full(3, 80))
    assert whole.bits_per_byte == pytest.approx(parts.bits_per_byte)
    assert interval(whole) == pytest.approx((whole.bits_per_byte,) * 2)


def test_evaluate(corpus, retro):
    dataset, sizes = corpus
    models = {"on": (retro, "on"), "off": (retro, "off"), "shuffled": (retro, "shuffled")}
    made = evaluate(models, dataset, [0, 1, 3], sizes, progress=False)
    assert json.loads(json.dumps(made)).keys() == {"documents", "tokens", "bytes", *models}
    assert made["documents"] == 3 and made["bytes"] == sum(len(TEXTS[number].encode()) for number in (0, 1, 3))
    difference = made["off"]["more_than_on"]
    assert difference["bits_per_byte"] == pytest.approx(made["off"]["bits_per_byte"] - made["on"]["bits_per_byte"])
    assert difference["interval"][0] <= difference["bits_per_byte"] <= difference["interval"][1]


def test_bad_input_is_refused(corpus, retro):
    dataset, _ = corpus
    with pytest.raises(ValueError, match="mode 'of' is unknown: choose one of on, off"):
        token_losses(retro, dataset, [0], "of")
    with pytest.raises(ValueError, match="document 9 is not in this corpus"):
        token_losses(retro, dataset, [0, 9], progress=False)
    with pytest.raises(ValueError, match="shuffling needs two"):
        token_losses(retro, dataset, [1], "shuffled", progress=False)


def test_facts_are_found_among_the_tokens(tmp_path):
    """For BERT every fact of the almanac is one token, and the only tokens told are facts, in their order."""
    towns = almanac(towns=3, seed=5, facts=9)
    paths = {f"{name}_memmap_path": tmp_path / f"{name}.npy" for name in ("chunks", "seqs", "doc_ids")}
    documents_to_chunks_(towns, **paths, chunk_size=M, seq_len=N, progress=False)
    chunks, doc_ids = np.load(tmp_path / "chunks.npy")[:, :M], np.load(tmp_path / "doc_ids.npy")
    told = fact_tokens(towns, doc_ids, M)
    for number, document in enumerate(towns):
        rows = doc_ids == number
        words = [decode([token]) for token in chunks[rows][told[rows]].tolist()]
        assert words == [document.text[start:stop].lower() for start, stop in document.facts]


@pytest.mark.parametrize("other", [almanac(towns=3, seed=6, facts=9), almanac(towns=2, seed=5, facts=9)])
def test_facts_are_not_looked_for_in_another_corpus(tmp_path, other):
    """Documents are known by their numbers, so the chunks of another corpus would be marked."""
    towns = almanac(towns=3, seed=5, facts=9)
    paths = {f"{name}_memmap_path": tmp_path / f"{name}.npy" for name in ("chunks", "seqs", "doc_ids")}
    documents_to_chunks_(towns, **paths, chunk_size=M, seq_len=N, progress=False)
    doc_ids = np.load(tmp_path / "doc_ids.npy")
    with pytest.raises(ValueError, match=r"pass the (whole )?corpus"):
        fact_tokens(other, doc_ids, M)
    with pytest.raises(ValueError, match=r"document \d, .* chunks of \d+ tokens, but the chunk array has \d+"):
        fact_tokens(towns, doc_ids, 2 * M)


@pytest.mark.parametrize("trimmed", [True, False])
@pytest.mark.parametrize("kind", ["bpe", "llama3", "llama2"])
def test_of_a_fact_of_several_tokens_the_first_is_found(tmp_path, tokenizers, kind, trimmed):
    """Whether or not the tokenizer counts the space before a word as the token's."""
    towns, made = almanac(towns=3, seed=5, facts=9), get_tokenizer(tokenizers[kind])
    rules = json.loads(made.backend.to_str())
    if not trimmed and rules["post_processor"]:
        rules["post_processor"]["trim_offsets"] = False
    made = TextTokenizer(Tokenizer.from_str(json.dumps(rules)), made.ids)
    paths = {f"{name}_memmap_path": tmp_path / f"{name}.npy" for name in ("chunks", "seqs", "doc_ids")}
    documents_to_chunks_(towns, **paths, chunk_size=M, seq_len=N, tokenizer=made, progress=False)
    chunks, doc_ids = np.load(tmp_path / "chunks.npy")[:, :M], np.load(tmp_path / "doc_ids.npy")
    told = fact_tokens(towns, doc_ids, M, made)
    for number, document in enumerate(towns):
        tokens, places = chunks[doc_ids == number].flatten(), np.flatnonzero(told[doc_ids == number])
        assert len(places) == len(document.facts)
        for place, (start, stop) in zip(places, document.facts, strict=True):
            assert made.decode(tokens[place:])[:20].strip().startswith(document.text[start:stop])
            assert document.text[:start].strip() == made.decode(tokens[:place]).strip()


@given(st.lists(st.integers(1, 5), min_size=2, max_size=9), st.integers(1, 3), st.integers(0, 99))
@settings(deadline=None)
def test_a_twin_is_found_by_the_number_of_its_document(counts, k, seed):
    doc_ids = np.repeat(np.arange(len(counts)), counts)
    knns = np.random.default_rng(seed).integers(-1, len(doc_ids), (len(doc_ids), k))
    for found, row, own in zip(found_twins(knns, doc_ids), knns.tolist(), doc_ids.tolist(), strict=True):
        assert found == any(i >= 0 and doc_ids[i] // 2 == own // 2 for i in row)


def test_what_was_not_measured_is_not_scored():
    doc_ids, size = np.repeat([0, 1, 2], 2).astype(np.int32), np.full(6, 10)
    losses = np.where(doc_ids[:, None] == 0, np.nan, np.ones((6, 4))).astype(np.float32)
    assert score(losses, [1, 2], doc_ids, size).bits_per_byte == pytest.approx(0.4 / math.log(2))
    for documents, message in (([0, 1], "document 0 has no loss"), ([1, 7], "document 7 has no loss"), ([], "no doc")):
        with pytest.raises(ValueError, match=message):
            score(losses, documents, doc_ids, size)
    with pytest.raises(ValueError, match="6 doc_ids, 3 chunk_bytes: pass those of one corpus"):
        inspect.unwrap(score)(losses, [1], doc_ids, size[:3])  # in tests the annotations would refuse it first
    both, one = score(losses, [1, 2], doc_ids, size), score(losses, [1], doc_ids, size)
    with pytest.raises(ValueError, match="scores of 2 and 1 documents"):
        interval(both, one)
    with pytest.raises(ValueError, match=r"share 95\.0 of the resamplings"):
        interval(both, share=95.0)


def test_modes_are_documented():
    assert all(mode in evaluation.__doc__ for mode in MODES)
