"""The examples of retro-pytorch 0.3.9's README with another import line, smaller, and its keyword arguments."""

import importlib
import importlib.util
import inspect
import json
import sys
import types

import faiss
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import retro_nb
from retro_nb import (
    RETRO,
    RETRODataset,
    TrainingWrapper,
    bert_embed,
    chunks_to_index_and_embed,
    chunks_to_precalculated_knn_,
    text_folder_to_chunks_,
    tokenize,
    top_k,
)

faiss.omp_set_num_threads(1)

SMALL = dict(enc_dim=16, dec_dim=16, dim_head=8, heads=2)
WORDS = "law peace war trade union state people power treaty silver gold navy army land tax vote".split()


@pytest.fixture(autouse=True)
def in_a_folder_of_texts(tmp_path, monkeypatch, tiny_bert):
    """The examples use relative paths and the default BERT, here a tiny one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text_folder" / "deeper").mkdir(parents=True)
    for seed, name in enumerate(["a.txt", "b.txt", "deeper/c.txt"]):
        words = np.random.default_rng(seed).choice(WORDS, 70)
        (tmp_path / "text_folder" / name).write_text(" ".join(words))
    default = retro_nb.text.tokens.bert_folder
    for module in (retro_nb.text.tokens, retro_nb.store.embedding):
        monkeypatch.setattr(module, "bert_folder", lambda bert=None: default(bert or tiny_bert))


def test_the_model_by_itself():
    retro = RETRO(
        chunk_size=8,
        max_seq_len=64,
        enc_dim=16,
        enc_depth=2,
        dec_dim=24,
        dec_depth=6,
        dec_cross_attn_layers=(3, 6),
        heads=2,
        dim_head=8,
        dec_attn_dropout=0.25,
        dec_ff_dropout=0.25,
        use_deepnet=True,
    )
    seq = torch.randint(0, 20000, (2, 64 + 1))
    retrieved = torch.randint(0, 20000, (2, 8, 2, 16))
    loss = retro(seq, retrieved, return_loss=True)
    loss.backward()
    assert loss.ndim == 0 and torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in retro.parameters() if p.grad is not None)


def test_training_wrapper_trains_and_samples():
    retro = RETRO(max_seq_len=32, chunk_size=8, enc_depth=1, dec_depth=2, dec_cross_attn_layers=(1, 2), **SMALL)
    wrapper = TrainingWrapper(
        retro=retro,
        knn=2,
        chunk_size=8,
        documents_path="./text_folder",
        glob="**/*.txt",
        chunks_memmap_path="./train.chunks.dat",
        seqs_memmap_path="./train.seq.dat",
        doc_ids_memmap_path="./train.doc_ids.dat",
        max_chunks=1_000_000,
        max_seqs=100_000,
        knn_extra_neighbors=100,
        processed_stats_json_path="./processed-stats.json",
        faiss_index_filename="knn.index",
        max_index_memory_usage="100m",
        current_memory_available="1G",
    )
    with open("processed-stats.json") as file:
        assert json.load(file)["docs"] == wrapper.stats["docs"] == 3

    train_dl = iter(wrapper.get_dataloader(batch_size=2, shuffle=True))
    optim = wrapper.get_optimizer(lr=3e-4, wd=0.01)
    seq, retrieved = map(lambda t: t.cpu(), next(train_dl))
    loss = retro(seq, retrieved, return_loss=True)
    loss.backward()
    optim.step()
    optim.zero_grad()

    sampled = wrapper.generate(filter_fn=top_k, filter_thres=0.9, temperature=1.0)
    assert sampled.shape[0] == 1 and sampled.shape[1] <= 32
    prompt = torch.randint(0, 1000, (1, 16))
    before = prompt.clone()
    sampled = wrapper.generate(prompt, filter_fn=top_k, filter_thres=0.9, temperature=1.0)
    assert torch.equal(sampled[:, :16], before) and torch.equal(prompt, before)


def test_dataset_on_mock_memory_maps():
    num_chunks, chunk_size, num_seqs, num_neighbors = 1000, 8, 100, 2

    def save_memmap(path, tensor):
        f = np.memmap(path, dtype=tensor.dtype, mode="w+", shape=tensor.shape)
        f[:] = tensor
        del f

    save_memmap("./train.chunks.dat", np.int32(np.random.randint(0, 8192, size=(num_chunks, chunk_size + 1))))
    save_memmap("./train.chunks.knn.dat", np.int32(np.random.randint(0, 1000, size=(num_chunks, num_neighbors))))
    save_memmap("./train.seq.dat", np.int32(np.random.randint(0, 128, size=(num_seqs,))))

    train_ds = RETRODataset(
        num_sequences=num_seqs,
        num_chunks=num_chunks,
        num_neighbors=num_neighbors,
        chunk_size=chunk_size,
        seq_len=64,
        chunk_memmap_path="./train.chunks.dat",
        chunk_nn_memmap_path="./train.chunks.knn.dat",
        seq_memmap_path="./train.seq.dat",
    )
    train_dl = iter(DataLoader(train_ds, batch_size=2))
    retro = RETRO(max_seq_len=64, chunk_size=8, enc_depth=1, dec_depth=2, dec_cross_attn_layers=(1, 2), **SMALL)
    seq, retrieved = map(lambda t: t.cpu(), next(train_dl))
    assert seq.shape == (2, 65) and retrieved.shape == (2, 8, 2, 16)
    loss = retro(seq, retrieved, return_loss=True)
    loss.backward()
    assert torch.isfinite(loss)


def chunk_the_texts() -> dict:
    return text_folder_to_chunks_(
        folder="./text_folder",
        glob="**/*.txt",
        chunks_memmap_path="./train.chunks.dat",
        seqs_memmap_path="./train.seq.dat",
        doc_ids_memmap_path="./train.doc_ids.dat",
        chunk_size=8,
        seq_len=32,
        max_chunks=1_000_000,
        max_seqs=100_000,
    )


def test_chunks_neighbours_and_index():
    stats = chunk_the_texts()
    assert (stats["docs"], stats["chunks"], stats["seqs"]) == (3, 3 * 9, 3 * 3)

    knn_path, faiss_index = chunks_to_precalculated_knn_(
        num_nearest_neighbors=2,
        num_chunks=stats["chunks"],
        chunk_size=8,
        chunk_memmap_path="./train.chunks.dat",
        doc_ids_memmap_path="./train.doc_ids.dat",
        use_cls_repr=False,
        max_rows_per_file=500,
        chunks_to_embeddings_batch_size=16,
        embed_dim=32,
        num_extra_neighbors=10,
        force_reprocess=False,
        index_file="knn.index",
        max_index_memory_usage="100m",
        current_memory_available="1G",
    )
    assert str(knn_path) == "train.chunks.knn.dat" and faiss_index.ntotal == stats["chunks"]

    index, embeddings = chunks_to_index_and_embed(
        num_chunks=stats["chunks"], chunk_size=8, chunk_memmap_path="./train.chunks.dat"
    )
    query_vector = embeddings[:1]
    _, indices = index.search(query_vector, k=2)
    neighbor_embeddings = embeddings[indices]
    assert indices[0, 0] == 0 and neighbor_embeddings.shape == (1, 2, 32)


def test_bert():
    ids = tokenize(["hello world", "foo bar, and more"])
    embeds = bert_embed(ids, return_cls_repr=True)
    assert embeds.shape == (2, 32)
    assert not torch.allclose(embeds, bert_embed(ids))


# every keyword argument


@pytest.fixture(scope="module")
def peer():
    if importlib.util.find_spec("retro_pytorch") is None:
        pytest.skip("retro-pytorch is not installed")
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("autofaiss") is None:
            patch.setitem(sys.modules, "autofaiss", types.SimpleNamespace(build_index=None))
        yield {name: importlib.import_module(f"retro_pytorch.{name}") for name in PUBLIC}


PUBLIC = {
    "retro_pytorch": ["RETRO", "RETRO.forward"],
    "data": ["RETRODataset", "knn_to_retrieved_chunks"],
    "retrieval": [
        "tokenize",
        "bert_embed",
        "text_folder_to_chunks_",
        "chunks_to_embeddings_",
        "chunks_to_index_and_embed",
        "chunks_to_precalculated_knn_",
    ],
    "training": [
        "TrainingWrapper",
        "TrainingWrapper.generate",
        "knn_chunks_from_seq_chunks",
        "top_k",
        "top_p",
        "gumbel_sample",
    ],
    "optimizer": ["get_optimizer"],
}


def lookup(module, name):
    for part in name.split("."):
        module = getattr(module, part)
    return module


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in PUBLIC.items() for name in names])
def test_every_keyword_argument_of_the_reference_is_known(peer, module, name):
    """By name where the reference has it by name, at the same place where it may be given by place."""
    theirs = inspect.signature(undecorated(lookup(peer[module], name))).parameters
    ours = inspect.signature(lookup(retro_nb, name)).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in ours.values())
    passed_on = {
        "chunks_to_precalculated_knn_": "chunks_to_index_and_embed",
        "TrainingWrapper": "chunks_to_precalculated_knn_",
        "text_folder_to_chunks_": "documents_to_chunks_",
    }
    known = set(ours)
    if takes_any and name in passed_on:
        known |= set(inspect.signature(getattr(retro_nb, passed_on[name])).parameters)
    by_place = [p.name for p in ours.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    for place, (parameter, about) in enumerate(theirs.items()):
        if about.kind is about.VAR_KEYWORD:
            continue
        assert parameter in known, f"{name}({parameter}=…)"
        if about.kind is about.POSITIONAL_OR_KEYWORD:
            assert by_place[place] == parameter
        if about.default is not about.empty and parameter in ours:
            assert ours[parameter].default is not about.empty, f"{name}: {parameter} may be left out there"


def undecorated(function):
    """`generate` hides in the closure of a decorator that does not name what it wraps."""
    function = inspect.unwrap(function)
    return function.__closure__[0].cell_contents if function.__name__ == "inner" else function


def test_constants_are_the_references(peer):
    assert (retro_nb.SOS_ID, retro_nb.EOS_ID) == (peer["retrieval"].SOS_ID, peer["retrieval"].EOS_ID)
