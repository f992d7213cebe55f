"""RETROfit against the language model that it is made of, and against its own equations in float64."""

import json
import os
import re
import shutil
import socket
import threading
from copy import copy, deepcopy
from itertools import pairwise

import numpy as np
import pytest
import torch
from einops import repeat
from hypothesis import given, settings
from hypothesis import strategies as st
from paper_equations import retrofit_logits
from safetensors import safe_open
from tiny_language_models import CONFIGS, TOKENIZERS, N, language_model, move
from torch import nn
from torch.testing import assert_close
from torch.utils.data import Subset, TensorDataset
from transformers import AutoModelForCausalLM

from retro_nb import RETRO, RETROfit, fit, generate, left_pad, retrofit
from retro_nb.measure import evaluation
from retro_nb.training.log import read_log
from retro_nb.training.training import evaluate_loss
from retro_nb.training.wrapper import TrainingWrapper

M, K, R = 4, 2, 8
SMALL = dict(start=2, every=1, chunk_size=M, enc_dim=12, enc_depth=2, heads=2, dim_head=8)
RUN = dict(steps=3, batch_size=2, lr=1e-2, warmup_steps=1, progress=False)
every_family = pytest.mark.parametrize("family", CONFIGS)
two_families = pytest.mark.parametrize("family", ["gpt2", "mistral"])  # as unlike as any two
folders: dict[str, str] = {}  # of the tokenizers


@pytest.fixture(scope="module", autouse=True)
def tokenizer_folders(tokenizers):
    folders.update({name: str(folder) for name, folder in tokenizers.items()})


def fresh(family: str, seed: int = 0, **changes) -> RETROfit:
    """What `retrofit` makes of a tiny language model."""
    tokenizer = folders[TOKENIZERS[family]]
    return retrofit(language_model(family, seed), **{**SMALL, "tokenizer": tokenizer, **changes})


def make(family: str, seed: int = 0, **changes) -> RETROfit:
    """The same with every weight moved, so that it reads."""
    model = fresh(family, seed, **changes)
    move(model.reader)
    return model


def batch(n: int, k: int = K, r: int = R, b: int = 2, seed: int = 0):
    """Sequences and neighbours without padding, in ids that every tokenizer has."""
    torch.manual_seed(seed)
    return torch.randint(3, 300, (b, n)), torch.randint(3, 300, (b, n // M, k, r))


def data(model: RETROfit, sequences: int = 6, n: int = 12) -> TensorDataset:
    seq, retrieved = batch(n + 1, b=sequences, seed=5)
    seq[0, 7:], retrieved[0, 1:] = model.pad_id, model.pad_id
    retrieved[1] = model.pad_id
    retrieved[2:, :, 0, M:] = model.pad_id
    return TensorDataset(seq, retrieved)


def weights(module: nn.Module) -> torch.Tensor:
    return torch.cat([weight.detach().flatten().clone() for weight in module.parameters()])


# what it starts from, and what it remains


@every_family
def test_at_first_the_neighbours_change_nothing(family):
    model = fresh(family)
    original = language_model(family)
    seq, retrieved = batch(14)
    retrieved[0, 1], retrieved[1, :, 1] = model.pad_id, model.pad_id
    assert torch.equal(model(seq, retrieved), original(seq).logits)
    assert torch.equal(model(seq), original(seq).logits)


@every_family
def test_off_stays_the_language_model_to_the_last_bit(family, tmp_path):
    """After training, and after saving and loading; on does not."""
    model, original = fresh(family), language_model(family)
    fit(model, data(model), **RUN)
    model.save_pretrained(tmp_path)
    loaded = RETROfit.from_pretrained(tmp_path, deepcopy(original), tokenizer=model.tokenizer)
    seq, retrieved = batch(14)
    expected = original(seq).logits
    assert torch.equal(model(seq), expected) and torch.equal(loaded(seq), expected)
    assert torch.equal(loaded(seq, retrieved), model(seq, retrieved))
    assert torch.equal(model(seq, retrieved)[:, : M - 1], expected[:, : M - 1])
    assert (model(seq, retrieved)[:, M - 1 :] != expected[:, M - 1 :]).any(dim=-1).all()
    assert evaluate_loss(model, data(model), retrieval="off") == evaluate_loss(
        retrofit(original, **SMALL, tokenizer=model.tokenizer), data(model), retrieval="on"
    )


# its equations


@given(
    family=st.sampled_from(["gpt2", "llama"]), n=st.integers(1, 11), k=st.integers(1, 2), r=st.sampled_from([4, 5, 8]),
    read=st.booleans(), layers=st.sampled_from([(1, 1), (1, 2), (2, 1), (3, 4)]), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=12, deadline=None)
def test_logits_are_the_layers_by_hand_and_the_papers_reading(family, n, k, r, read, layers, seed):
    model = make(family, seed, start=layers[0], every=layers[1]).double()
    seq, retrieved = batch(n, k, r, b=1, seed=seed)
    retrieved[torch.rand(retrieved.shape) < 0.2] = model.pad_id
    if retrieved.numel():
        retrieved[0, -1, -1] = model.pad_id  # a neighbour of padding only
    expected = retrofit_logits(model, seq[0], retrieved[0] if read else None)
    assert_close(model(seq, retrieved if read else None)[0], expected, atol=1e-5, rtol=0)


@every_family
@given(n=st.integers(1, 14), without=st.sets(st.integers(0, 2)), seed=st.integers(0, 99))
@settings(max_examples=3, deadline=None)
def test_tokens_change_no_logit_before_them(family, n, without, seed):
    """Row i of the batch has its tokens from i on changed; every row is compared with itself, to the last bit."""
    model = make(family, seed)
    (seq,), retrieved = batch(n, b=1, seed=seed)
    retrieved[:, [u for u in without if u < n // M]] = model.pad_id
    rows, neighbours = repeat(seq, "n -> i n", i=n), repeat(retrieved, "1 l k r -> i l k r", i=n)
    others = torch.where(torch.ones(n, n, dtype=torch.bool).triu(), (seq + 1) % 297 + 3, rows)
    for read in (neighbours, None):
        changed = (model(others, read) != model(rows, read)).any(-1)
        assert not changed.tril(-1).any() and changed.diagonal().all()


@every_family
@given(n=st.integers(M, 14), k=st.integers(1, 2), without=st.sets(st.integers(0, 2)), seed=st.integers(0, 99))
@settings(max_examples=3, deadline=None)
def test_neighbours_are_first_read_by_the_last_token_of_their_chunk(family, n, k, without, seed):
    """Row u of the batch has the neighbours of chunk u changed; token (u + 1)m − 1 is the first that notices."""
    model, l = make(family, seed), n // M
    (seq,), (retrieved,) = batch(n, k, b=1, seed=seed)
    rows, neighbours = repeat(seq, "n -> u n", u=l), repeat(retrieved, "l k r -> u l k r", u=l).clone()
    others = neighbours.clone()
    others.diagonal().copy_((others.diagonal() + 1) % 297 + 3)
    for u in without:  # chunks of other rows
        if u < l:
            others[torch.arange(l) != u, u] = neighbours[torch.arange(l) != u, u] = model.pad_id
    changed = (model(rows, others) != model(rows, neighbours)).any(-1)
    assert changed.int().argmax(dim=1).tolist() == [(u + 1) * M - 1 for u in range(l)]
    assert changed.any(dim=1).all()


@two_families
def test_padding_in_neighbours_is_never_read(family):
    model = make(family)
    seq, retrieved = batch(14)
    expected = model(seq, retrieved)
    for places in ((0, 3), (0, 0, 1, 2)):  # behind each neighbour; neighbours of padding only
        more = nn.functional.pad(retrieved, places, value=model.pad_id)
        assert_close(model(seq, more), expected, atol=5e-6, rtol=1e-5)
    assert torch.equal(model(seq, retrieved[:, :, 0]), model(seq, retrieved[:, :, :1]))


@pytest.mark.parametrize(
    ("family", "having"), [("gpt2", ()), ("llama", (0,)), ("qwen2", (1, 3)), ("gemma", (0, 1, 2, 3, 4, 5))]
)
def test_chunks_without_neighbours_are_left_out_and_nothing_changes(family, having, monkeypatch):
    model, encoded = make(family), []
    seq, retrieved = batch(13)
    retrieved[torch.isin(torch.arange(6), torch.tensor(having), invert=True).view(2, 3)] = model.pad_id
    model.reader.encoder.register_forward_pre_hook(lambda _, args: encoded.append(args[0].shape[:2].numel()))

    def outcome():
        loss = model(torch.cat((seq, seq[:, :1]), dim=1), retrieved, return_loss=True)
        return model(seq, retrieved), loss, *torch.autograd.grad(loss, model.reader.parameters())

    compact = outcome()
    monkeypatch.setattr(RETROfit, "_with_neighbours", lambda self, retrieved: (retrieved, None))
    for few, all_ in zip(compact, outcome(), strict=True):
        assert_close(few, all_, atol=2e-6, rtol=1e-4)
    assert set(encoded) == {max(2, len(having)), 6}


# piece by piece


def feed(model: RETROfit, seq, retrieved, cuts=()):
    """Feed seq in pieces that end at every position in `cuts` too."""
    state, out = model.start_decoding(len(seq), seq.shape[1], retrieval=retrieved is not None), []
    for start, stop in pairwise(sorted({0, *cuts, seq.shape[1]})):
        for a, b in model.pieces(start, stop):
            new = retrieved[:, a // M] if retrieved is not None and (a + 1) % M == 0 else None
            out.append(model.decode(seq[:, a:b], state, new))
    assert state.length == seq.shape[1]
    return torch.cat(out, dim=1)


@every_family
@given(data=st.data(), n=st.integers(1, 20), seed=st.integers(0, 99), read=st.booleans())
@settings(max_examples=4, deadline=None)
def test_decoding_piece_by_piece_equals_forward(family, data, n, seed, read):
    """With padding before the texts, and behind them, and chunks without neighbours."""
    model = make(family, seed)
    cuts, starts, lengths = (data.draw(st.lists(st.integers(0, n), min_size=3, max_size=3)) for _ in range(3))
    seq, retrieved = batch(n, b=3, k=data.draw(st.integers(1, 2)), r=data.draw(st.sampled_from([4, 8])), seed=seed)
    begun = torch.arange(n) - torch.tensor(starts)[:, None]
    seq = seq.where((begun >= 0) & (begun <= torch.tensor(lengths)[:, None]), model.pad_id)
    retrieved[torch.rand(retrieved.shape[:3]) < 0.4] = model.pad_id
    retrieved[..., 5:].masked_fill_(torch.rand(retrieved[..., 5:].shape) < 0.2, model.pad_id)
    expected, out = (use(seq, retrieved if read else None) for use in (model, lambda *a: feed(model, *a, cuts)))
    assert_close(out[begun >= 0], expected[begun >= 0], atol=2e-5, rtol=1e-5)
    assert expected.isfinite().all() and out.isfinite().all()


def test_a_piece_without_neighbours_reads_nothing():
    """Not even those of the chunk before. Only the last layer reads, so that no later token can tell of it."""
    model = make("llama", start=3)
    seq, retrieved = batch(15)
    state, off, out = model.start_decoding(2), model(seq), []
    for a, b in model.pieces(0, 15):
        out.append(model.decode(seq[:, a:b], state, retrieved[:, 0] if a == M - 1 else None))
    told = [torch.allclose(one, other, atol=1e-5) for one, other in zip(torch.cat(out, 1)[0], off[0], strict=True)]
    assert told == [True] * 3 + [False] * 4 + [True] * 8


@two_families
def test_what_decode_refuses(family):
    model = make(family)
    seq, retrieved = batch(8)
    with pytest.raises(ValueError, match=r"not one piece: feed \[\(0, 3\), \(3, 7\), \(7, 8\)\]"):
        model.decode(seq, model.start_decoding(2))
    with pytest.raises(ValueError, match="not one piece"):
        model.decode(seq[:, :0], model.start_decoding(2))
    with pytest.raises(ValueError, match="no neighbours are read at position 0"):
        model.decode(seq[:, :3], model.start_decoding(2), retrieved[:, 0])
    with pytest.raises(ValueError, match="capacity 2"):
        model.decode(seq[:, :3], model.start_decoding(2, capacity=2))
    with pytest.raises(ValueError, match=f"max_seq_len {N}"):
        model.start_decoding(2, capacity=N + 1)
    state = model.start_decoding(2, retrieval=False)
    model.decode(seq[:, :3], state)
    with pytest.raises(ValueError, match="retrieval=False"):
        model.decode(seq[:, 3:4], state, retrieved[:, 0])


@two_families
def test_what_was_refused_leaves_no_trace(family):
    model = make(family)
    seq, retrieved = batch(8)
    padded = torch.cat((torch.full((2, 1), model.pad_id), seq[:, 1:]), dim=1)
    unknown = torch.tensor([[5], [model.num_tokens]])
    state, untouched = model.start_decoding(2), model.start_decoding(2)
    with pytest.raises(ValueError, match=f"seq holds token {model.num_tokens}, the vocabulary is"):
        model.decode(torch.cat((padded[:, :2], unknown), dim=1), state)
    assert torch.equal(model.decode(seq[:, :3], state), model.decode(seq[:, :3], untouched))
    with pytest.raises(ValueError, match=f"seq holds token {model.num_tokens}"):
        model.decode(unknown, state, retrieved[:, 0])
    with pytest.raises(ValueError, match=f"retrieved holds token {model.num_tokens}"):
        model.decode(seq[:, 3:4], state, retrieved[:, 0].clamp(min=model.num_tokens))
    assert torch.equal(model.decode(seq[:, 3:7], state), model.decode(seq[:, 3:7], untouched))


# padding before a text


@every_family
@given(lengths=st.lists(st.integers(1, 10), min_size=1, max_size=3), seed=st.integers(0, 99), read=st.booleans())
@settings(max_examples=3, deadline=None)
def test_a_padded_row_is_read_as_if_it_were_alone(family, lengths, seed, read):
    """Each with just enough padding to end with a chunk; and in one batch, with what the longest needs."""
    model = make(family, seed)
    seq, retrieved = batch(max(lengths), b=len(lengths), seed=seed)
    texts = [row[:length] for row, length in zip(seq, lengths, strict=True)]
    together = left_pad(nn.utils.rnn.pad_sequence(texts, True, model.pad_id), M, model.pad_id)
    retrieved = torch.randint(3, 300, (len(texts), together.shape[1] // M, K, R))
    logits = model(together, retrieved if read else None)
    for row, neighbours, text, found in zip(together, retrieved, texts, logits, strict=True):
        alone = left_pad(text[None], M, model.pad_id)
        l = alone.shape[1] // M
        assert alone.shape[1] == -(-len(text) // M) * M and torch.equal(row[-len(text) :], text)
        assert (row[: -len(text)] == model.pad_id).all()
        expected = model(alone, neighbours[None, -l:] if read else None)[0]
        assert_close(found[-len(text) :], expected[-len(text) :], atol=1e-5, rtol=1e-5)
        if not read:
            assert_close(found[-len(text) :], model(text[None])[0], atol=1e-5, rtol=1e-5)


@two_families
@given(length=st.integers(1, 10), cuts=st.sets(st.integers(0, 11)))
@settings(max_examples=3, deadline=None)
def test_the_end_of_a_short_question_reads_its_neighbours(family, length, cuts):
    model = make(family)
    (text,), _ = batch(length, b=1)
    prompt = left_pad(text[None], M, model.pad_id)
    l = prompt.shape[1] // M
    retrieved, others = torch.randint(3, 300, (2, 1, l, K, R))
    changed = (model(prompt, others) != model(prompt, retrieved)).any(dim=-1)[0, -length:]
    expected = [p % M == M - 1 or p >= M for p in range(prompt.shape[1] - length, prompt.shape[1])]
    assert changed.tolist() == expected and expected[-1]
    out = feed(model, prompt, retrieved, [cut for cut in cuts if cut < l * M])
    assert_close(out[:, -length:], model(prompt, retrieved)[:, -length:], atol=2e-5, rtol=1e-5)


@every_family
def test_padding_is_seen_by_no_text_nor_by_the_encoder(family):
    """Whatever stands there: the embedding of padding is made enormous."""
    model = make(family)
    seq, retrieved = batch(8)
    seq[0, :5], seq[1, :2], retrieved[0, 1, 0, 3:] = model.pad_id, model.pad_id, model.pad_id
    expected, decoded = model(seq, retrieved), feed(model, seq, retrieved)
    with torch.no_grad():
        model.backbone.get_input_embeddings().weight[model.pad_id if model.pad_id < model.words else 0] = 1e4
    for poisoned, clean in ((model(seq, retrieved), expected), (feed(model, seq, retrieved), decoded)):
        for row, start in ((0, 5), (1, 2)):  # without the padding's own logit: the tables may be one
            others = [word for word in range(model.words) if word not in (0, model.pad_id)]
            assert_close(poisoned[row, start:, others], clean[row, start:, others])


# what is trained


@every_family
def test_only_what_is_added_learns_and_all_of_it(family):
    """Behind an output of zeros nothing has a gradient at first; from the second step on everything has."""
    model = fresh(family).train()
    added, own = dict(model.reader.named_parameters()), weights(model.backbone)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    seq, retrieved = data(model)[:]
    for step in (1, 2):
        before = {name: weight.detach().clone() for name, weight in added.items()}
        optimizer.zero_grad()
        model(seq, retrieved, return_loss=True).backward()
        optimizer.step()
        moved = {name for name, weight in added.items() if not torch.equal(weight, before[name])}
        outputs = {name for name in added if re.search(r"cross_attn\.\d\.fn\.attn\.to_out", name)}
        assert moved == (outputs if step == 1 else set(added))
    assert torch.equal(weights(model.backbone), own)
    assert all(weight.grad is None for weight in model.backbone.parameters())
    reader, all_ = (sum(weight.numel() for weight in part.parameters()) for part in (model.reader, model))
    assert model.trained_share == reader / all_


@every_family
def test_a_model_that_is_not_frozen_learns_too(family):
    model = make(family, freeze=False).train()
    seq, retrieved = data(model)[:]
    model(seq, retrieved, return_loss=True).backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in model.parameters())
    assert model.trained_share == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_is_refused_where_the_readers_would_not_learn(reentrant):
    options = dict(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model = make("gpt2", freeze=False)
    model.backbone.gradient_checkpointing_enable(**options)
    model.train()
    with pytest.raises(ValueError, match="gradient_checkpointing_disable"):
        model(*batch(9), return_loss=True)
    model(batch(9)[0], return_loss=True).backward()  # nothing is read
    expected = model.eval()(*batch(8))  # nothing is run again
    frozen = make("gpt2")
    frozen.backbone.gradient_checkpointing_enable(**options)
    frozen.train()(*batch(9), return_loss=True).backward()  # a frozen language model keeps its activations
    assert_close(frozen.eval()(*batch(8)), expected)
    assert all(weight.grad is not None for weight in frozen.reader.parameters())


def test_a_language_model_set_to_return_tuples_is_read_alike(tmp_path):
    seq, retrieved = batch(12)
    expected, plain = make("gpt2")(seq, retrieved), language_model("gpt2")
    plain.config.return_dict = False
    model = retrofit(plain, **SMALL, tokenizer=folders["gpt2"])
    move(model.reader)
    model.load_state_dict(make("gpt2").state_dict())
    assert torch.equal(model(seq, retrieved), expected) and plain.config.return_dict is False
    assert generate(model, seq[:, :6], lambda chunk, u: retrieved[:, u], max_new_tokens=3).shape == (2, 9)
    model.save_pretrained(tmp_path)
    loaded = RETROfit.from_pretrained(tmp_path, language_model("gpt2"), tokenizer=model.tokenizer)
    assert torch.equal(loaded(seq, retrieved), expected)


def test_one_model_is_called_while_it_writes():
    """By the function that fetches its neighbours, in the same thread."""
    model, (seq, retrieved) = make("gpt2").eval(), batch(12)

    def fetch(chunk, u):
        model(seq, retrieved.flip(0))
        return retrieved[:, u]

    options = dict(max_new_tokens=7, temperature=0)
    expected = generate(model, seq[:, :3], lambda chunk, u: retrieved[:, u], **options)
    assert torch.equal(generate(model, seq[:, :3], fetch, **options), expected)


def test_another_thread_uses_the_language_model_meanwhile():
    """In the midst of one forward pass: the same model with other neighbours, and the language model alone."""
    model, (seq, retrieved), (_, others) = make("gpt2").eval(), batch(12), batch(12, seed=1)
    calls = {"other": lambda: model(seq, others), "alone": lambda: model.backbone(seq).logits}
    expected, found = {name: call() for name, call in calls.items()}, {}
    first = model(seq, retrieved)

    def meanwhile(*_):
        if threading.current_thread() is threading.main_thread():
            for name, call in calls.items():
                thread = threading.Thread(target=lambda name=name, call=call: found.update({name: call()}))
                thread.start()
                thread.join()

    hook = model.backbone.transformer.h[-1].attn.register_forward_pre_hook(meanwhile)
    again = model(seq, retrieved)
    hook.remove()
    assert torch.equal(again, first)
    for name in calls:
        assert torch.equal(found[name], expected[name])


def test_dropout():
    """None in a frozen model, whatever its configuration says; all of it in one that is trained."""
    seq, retrieved = batch(12)
    for changes, drops in (({}, False), ({"dropout": 0.3}, True), ({"freeze": False}, True)):
        model = make("gpt2", **changes).train()  # its own dropout is 0.1
        assert model.training and model.reader.training
        assert torch.equal(model(seq, retrieved), model(seq, retrieved)) != drops, changes
        assert torch.equal(model(seq), model(seq)) == (changes != {"freeze": False}), changes
        assert torch.equal(model.eval()(seq, retrieved), make("gpt2")(seq, retrieved))


def test_the_mode_is_the_language_models():
    for mode in (True, False):
        model = retrofit(language_model("gpt2").train(mode), **SMALL, tokenizer=folders["gpt2"])
        assert model.training is mode and model.reader.training is mode and not model.backbone.training


def child(folder: str, port: int) -> None:
    """One of two processes that share each batch: now and then one of them has no neighbours to read."""
    try:
        os.mkdir(f"{folder}/first")
        rank = 0
    except FileExistsError:
        rank = 1
    about = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in about.items()} | {"ACCELERATE_USE_CPU": "true"}
    folders["gpt2"] = f"{folder}/tokenizer"
    model = fresh("gpt2")
    fit(model, data(model), data(model), out_dir=folder, **RUN)


def test_two_processes_share_the_batch(tmp_path, run_apart):
    shutil.copytree(folders["gpt2"], tmp_path / "tokenizer")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert run_apart(child, str(tmp_path), port, processes=2) == [0, 0]
    model = fresh("gpt2")
    expected, shared = fit(model, data(model), data(model), **RUN), read_log(tmp_path / "log.jsonl")
    for name in ("loss", "grad_norm", "valid_loss", "tokens"):
        assert shared.curve(name)[1] == pytest.approx(expected.curve(name)[1], rel=1e-4)
    loaded = RETROfit.from_pretrained(
        tmp_path / "checkpoints" / "step-00000003", language_model("gpt2"), tokenizer=model.tokenizer
    )
    assert_close(weights(loaded), weights(model), atol=1e-5, rtol=1e-4)


# weights on disk


@pytest.fixture(scope="module")
def language_models(tmp_path_factory) -> dict[str, str]:
    """Folders with a language model of each family and its tokenizer, as one is downloaded."""
    root = tmp_path_factory.mktemp("language_models")
    for family, name in TOKENIZERS.items():
        shutil.copytree(folders[name], root / family)
        language_model(family).save_pretrained(root / family)
    return {family: str(root / family) for family in CONFIGS}


@two_families
def test_only_what_is_added_is_saved(family, language_models, tmp_path):
    """The language model is then loaded by its name, or given: as it is, or as a model of its own in 16 bits."""
    model = retrofit(language_models[family], **SMALL)
    move(model.reader)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert names == {name for name, _ in model.reader.named_parameters()}
    size = (tmp_path / "model.safetensors").stat().st_size
    assert weights(model.reader).nbytes < size < weights(model.reader).nbytes + 15_000

    seq, retrieved = batch(14)
    expected = model(seq, retrieved)
    given = AutoModelForCausalLM.from_pretrained(language_models[family])
    for loaded in (RETROfit.from_pretrained(tmp_path), RETROfit.from_pretrained(tmp_path, given)):
        assert torch.equal(loaded(seq, retrieved), expected) and loaded.config == model.config
        assert not loaded.training and loaded.frozen and loaded.trained_share == model.trained_share
        assert loaded.tokenizer.fingerprint == model.tokenizer.fingerprint
    half = AutoModelForCausalLM.from_pretrained(language_models[family], dtype=torch.bfloat16)
    loaded = RETROfit.from_pretrained(tmp_path, half)
    assert loaded(seq).dtype == torch.bfloat16 and weights(loaded.reader).equal(weights(model.reader))
    assert_close(loaded(seq, retrieved).float(), expected, atol=0.3, rtol=0.1)


@two_families
def test_with_a_language_model_that_was_trained_all_is_saved(family, language_models, tmp_path):
    model = retrofit(language_models[family], **SMALL, freeze=False)
    move(model)
    model.save_pretrained(tmp_path)
    seq, retrieved = batch(14)
    given = RETROfit.from_pretrained(tmp_path, language_model(family), tokenizer=model.tokenizer)
    for loaded in (RETROfit.from_pretrained(tmp_path), given):
        assert torch.equal(loaded(seq, retrieved), model(seq, retrieved)) and torch.equal(loaded(seq), model(seq))
        assert not torch.equal(loaded(seq), language_model(family)(seq).logits)
        assert not loaded.frozen and loaded.trained_share == 1


def test_another_language_model_is_refused(tmp_path):
    fresh("gpt2").save_pretrained(tmp_path)
    for other in (language_model("gpt2", seed=1), language_model("gpt2", n_head=1), language_model("llama")):
        before = weights(other)
        with pytest.raises(ValueError, match=f"this {type(other).__name__} is not the one that the weights are for"):
            RETROfit.from_pretrained(tmp_path, other, tokenizer=folders["gpt2"])
        assert torch.equal(weights(other), before) and all(weight.requires_grad for weight in other.parameters())


def test_another_tokenizer_is_refused(tmp_path):
    fresh("gpt2").save_pretrained(tmp_path)
    backbone = language_model("gpt2")
    for other, message in (
        ("bpe", "it was made for another tokenizer than this one of 300 ids"),
        ("llama3", "it was made for another tokenizer than this one of 301 ids"),
        ("llama2", "the tokenizer has 330 ids, the language model knows 300"),
    ):
        with pytest.raises(ValueError, match=message):
            RETROfit.from_pretrained(tmp_path, backbone, tokenizer=folders[other])
    assert all(weight.requires_grad for weight in backbone.parameters())


def test_what_is_missing_or_damaged(language_models, tmp_path):
    folder = tmp_path / "model"
    retrofit(language_models["gpt2"], **SMALL).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    with pytest.raises(ValueError, match="is not the configuration of a RETRO saved"):
        RETRO.from_pretrained(folder)
    with pytest.raises(FileNotFoundError, match="nowhere is no folder"):
        RETROfit.from_pretrained(tmp_path / "nowhere")
    (folder / "config.json").write_text(json.dumps(config | {"enc_depth": 1}))
    with pytest.raises(ValueError, match=r"does not hold the weights .* saved with another configuration"):
        RETROfit.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="does not hold the weights"):
        RETROfit.from_pretrained(folder)
    retrofit(shutil.copytree(language_models["gpt2"], tmp_path / "gone"), **SMALL).save_pretrained(folder)
    shutil.rmtree(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"no language model '.*gone' on this machine"):
        RETROfit.from_pretrained(folder)


@two_families
def test_a_copy_is_a_model_of_its_own(family):
    model = make(family)
    seq, retrieved = batch(14)
    expected, off = model(seq, retrieved), model(seq)
    copied = deepcopy(model)
    assert torch.equal(copied(seq, retrieved), expected)
    move(copied)
    assert torch.equal(model(seq, retrieved), expected) and torch.equal(model(seq), off)
    remade = retrofit(deepcopy(copied.backbone), **SMALL, tokenizer=model.tokenizer)
    remade.reader.load_state_dict(copied.reader.state_dict())
    assert torch.equal(remade(seq, retrieved), copied(seq, retrieved))


@two_families
def test_a_language_model_in_bfloat16(family):
    """What is added stays in float32, and learns."""
    model, exact = make(family), make(family)
    model.backbone.bfloat16()
    seq, retrieved = batch(14)
    logits = model(seq, retrieved)
    assert logits.dtype == torch.bfloat16 and model.reader.norm_chunk.gamma.dtype == torch.float32
    assert_close(logits.float(), exact(seq, retrieved), atol=0.3, rtol=0.1)
    assert_close(feed(model, seq, retrieved).float(), logits.float(), atol=0.1, rtol=0.1)
    if family == "gpt2":
        losses = fit(model, data(model), **RUN | {"steps": 15}).losses
        assert sum(losses[-3:]) < sum(losses[:3])


# what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(start=4), r"start 4, every 1: the layers are 1 … 3, .* Pass start=1"),
        (dict(start=0), "start 0, every 1: the layers are 1 … 3"),
        (dict(every=0), "start 2, every 0: the layers are 1 … 3"),
        (dict(max_seq_len=N + 1), f"max_seq_len {N + 1} is not in 1 … {N}"),
        (dict(max_seq_len=0), f"max_seq_len 0 is not in 1 … {N}"),
        (dict(chunk_size=0), "chunk_size 0 must be 1 or more; the paper's is 64"),
        (dict(dim_head=7), "dim_head 7 is odd"),
        (dict(tokenizer=None), "this GPT2LMHeadModel does not say where it is from: pass tokenizer"),
        (dict(tokenizer="llama2"), "the tokenizer has 330 ids, the language model knows 300: pass its own"),
    ],
)
def test_impossible_models_are_refused(changes, message):
    """Before anything is done to the language model."""
    model = language_model("gpt2").train()
    options = {**SMALL, "tokenizer": "gpt2", **changes}
    with pytest.raises(ValueError, match=message):
        retrofit(model, **options | {"tokenizer": folders.get(options["tokenizer"])})
    assert model.training and all(weight.requires_grad for weight in model.parameters())


def test_there_is_no_such_model_or_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match="no language model 'nobody/nothing' on this machine"):
        retrofit("nobody/nothing")
    model = language_model("gpt2")
    model.config.name_or_path = str(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"no tokenizer '{tmp_path}' on this machine"):
        retrofit(model, **SMALL)
    assert all(weight.requires_grad for weight in model.parameters())


def test_defaults_are_the_papers_or_the_language_models():
    model = retrofit(language_model("llama", num_hidden_layers=13), tokenizer=folders["bpe"])
    assert list(model.blocks) == [6, 9, 12] and model.chunk_size == 64 and model.seq_len == N
    assert model.reader.embed[1].out_features == 16 and len(model.reader.encoder.layers) == 2
    long = language_model("llama", max_position_embeddings=4096)
    assert retrofit(long, **SMALL, tokenizer=folders["bpe"]).seq_len == 2048
    assert retrofit(long, **SMALL, tokenizer=folders["bpe"], max_seq_len=3000).seq_len == 3000


def test_impossible_input_is_refused():
    model = make("gpt2")
    seq, retrieved = batch(12)
    for n in (0, N + 1):
        with pytest.raises(ValueError, match=rf"given {n} tokens .* takes 1 to {N}"):
            model(torch.ones(1, n, dtype=torch.long))
    with pytest.raises(ValueError, match=r"2 chunks, but the sequence has 3 complete chunks of 4"):
        model(seq, retrieved[:, :2])
    with pytest.raises(ValueError, match="3 tokens a neighbour, fewer than chunk_size 4"):
        model(seq, retrieved[..., :3])
    with pytest.raises(ValueError, match=r"seq holds token 301, the vocabulary is 0 … 300"):
        model(seq + 301 - seq.max(), retrieved)
    with pytest.raises(ValueError, match=r"retrieved holds token -1"):
        model(seq, retrieved - retrieved - 1)
    with pytest.raises(ValueError, match="retrieval is off and the model frozen: nothing would be trained"):
        fit(model, data(model), **RUN, retrieval=False)
    with pytest.raises(ValueError, match="6 chunks, but the sequence has 3"):
        wrong = TensorDataset(batch(13)[0], torch.randint(3, 300, (2, 6, K, R)))  # of chunks half as long
        fit(model, wrong, **RUN)


# with a corpus


WORDS = "the people of every state and union prosper in law peace war trade with foreign nations 1862".split()


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for seed, length in enumerate((20, 15, 3, 17, 19)):
        (folder / f"{seed}.txt").write_text(" ".join(np.random.default_rng(seed).choice(WORDS, length)))
    return folder


@pytest.fixture(scope="module")
def wrapped(texts, tmp_path_factory, tiny_bert, language_models) -> TrainingWrapper:
    """A small folder of texts for a GPT-2, whose tokenizer has no padding: the id after its vocabulary is that."""
    model = retrofit(language_models["gpt2"], **SMALL, max_seq_len=16)
    move(model.reader)
    return TrainingWrapper(
        retro=model, chunk_size=M, documents_path=texts, knn=K, bert=tiny_bert, progress=False,
        work_dir=tmp_path_factory.mktemp("work"),
    )  # fmt: skip


def test_a_corpus_in_the_language_models_own_tokens(wrapped):
    model, seen = wrapped.retro, []
    assert model.pad_id == 300 == model.num_tokens - 1 and wrapped.tokenizer is model.tokenizer
    for seq, retrieved in wrapped.ds:
        text = wrapped.tokenizer.decode(seq)
        seen.append(text)
        assert retrieved.shape == (4, K, 2 * M) and max(seq.max(), retrieved.max()) <= model.pad_id
    assert "the people" in " ".join(seen)
    assert any((seq == model.pad_id).any() for seq, _ in wrapped.ds)


def test_training_goes_on_where_it_stopped(wrapped, tmp_path):
    """With the same losses and weights; the language model is the same in all of it."""
    run = RUN | dict(steps=6, checkpoint_every=2, valid_share=0.3)
    whole, parts = deepcopy(wrapped.retro), deepcopy(wrapped.retro)

    def train(retro, **changes):
        made = deepcopy(wrapped)
        made.retro = retro
        history = made.fit(**run | changes)
        return [{name: value for name, value in record.items() if "second" not in name} for record in history]

    def stop(module, args, calls=iter(range(100))):  # noqa: B008
        if next(calls) == 4:
            raise InterruptedError

    expected = train(whole)
    handle = parts.register_forward_pre_hook(stop)
    with pytest.raises(InterruptedError):
        train(parts, out_dir=tmp_path)
    handle.remove()
    assert max(path.name for path in (tmp_path / "checkpoints").iterdir()) == "step-00000004"
    nn.init.zeros_(parts.reader.embed[1].weight)
    assert train(parts, out_dir=tmp_path) == expected and "valid_loss" in expected[-1]
    assert torch.equal(weights(parts), weights(whole))
    assert torch.equal(weights(whole.backbone), weights(wrapped.retro.backbone))
    assert not torch.equal(weights(whole.reader), weights(wrapped.retro.reader))
    loaded = RETROfit.from_pretrained(tmp_path / "checkpoints" / "step-00000006")
    assert torch.equal(weights(loaded), weights(whole))


def test_losses_of_a_corpus_on_off_and_shuffled(wrapped):
    """Token by token those of the language model, or of what it reads."""
    documents = list(range(5))
    on, off, shuffled = (
        evaluation.token_losses(wrapped.retro, wrapped.ds, documents, mode, progress=False)
        for mode in ("on", "off", "shuffled")
    )
    original = wrapped.retro.backbone.eval()
    for row, (seq, _) in enumerate(wrapped.ds):
        first = int(wrapped.ds.first_chunks([row])[0])
        text = (seq[1:] != wrapped.retro.pad_id) & (seq[1:] != wrapped.ds.eos_id)
        log_p = original(seq[:-1].clamp(max=299)[None]).logits[0].log_softmax(dim=-1)
        for i in text.nonzero()[:, 0].tolist():
            assert off.reshape(-1)[first * M + 1 + i] == pytest.approx(-log_p[i, seq[i + 1]].item(), abs=1e-5)
    assert np.array_equal(np.isnan(on), np.isnan(off)) and np.array_equal(np.isnan(shuffled), np.isnan(off))
    told = ~np.isnan(on)
    assert (on != off)[told].any() and (on != shuffled)[told].any()


@given(length=st.integers(1, 14), seed=st.integers(0, 99))
@settings(max_examples=4, deadline=None)
def test_greedy_samples_are_the_argmax_of_forward_step_by_step(wrapped, length, seed):
    """With live retrieval, and all that is remembered between the steps."""
    prompt, _ = batch(length, seed=seed)
    out = wrapped.generate(prompt, temperature=0, max_new_tokens=9)
    written, model = prompt, wrapped.retro.eval()
    while written.shape[1] < out.shape[1]:
        l = written.shape[1] // M
        found = [wrapped.fetch_knn_chunks_fn(written[:, u * M : (u + 1) * M]) for u in range(l)]
        retrieved = torch.stack(found, dim=1) if l else torch.empty(2, 0, K, R, dtype=torch.long)
        token = model(written, retrieved)[:, -1].argmax(dim=-1)
        ended = (written[:, length:] == wrapped.tokenizer.ids.eos).any(dim=1)
        written = torch.cat((written, token.masked_fill(ended, model.pad_id)[:, None]), dim=1)
    assert torch.equal(out, written)


def test_a_question_that_was_padded_is_answered_as_if_it_were_alone(wrapped):
    model, ids = wrapped.retro, wrapped.tokenizer.ids
    questions = [row[:length] for row, length in zip(batch(7)[0], (2, 7), strict=True)]
    together = left_pad(nn.utils.rnn.pad_sequence(questions, True, ids.pad), M, ids.pad)
    out = wrapped.generate(together, temperature=0, max_new_tokens=2)
    for row, question in zip(out, questions, strict=True):
        alone = left_pad(question[None], M, ids.pad)
        answer = wrapped.generate(alone, temperature=0, max_new_tokens=2)[0, alone.shape[1] :]
        assert torch.equal(row[together.shape[1] :][: len(answer)], answer)
        plain = generate(model, question[None], temperature=0, max_new_tokens=2, eos_id=ids.eos)[0]
        padded = generate(model, alone, temperature=0, max_new_tokens=2, eos_id=ids.eos)[0]
        assert torch.equal(padded[alone.shape[1] :], plain[len(question) :])


def test_what_does_not_go_together(wrapped, texts, tiny_bert, tmp_path):
    options = dict(chunk_size=M, documents_path=texts, knn=K, bert=tiny_bert, work_dir=tmp_path / "work")
    for changes, message in (
        ({"tokenizer": folders["bpe"]}, r"a tokenizer of its own \(301 ids\), this one is another \(300 ids\)"),
        ({"tokenizer": tiny_bert}, r"a tokenizer of its own \(301 ids\), this one is another \(30522 ids\)"),
        ({"tokenizer": 300}, "a tokenizer of its own"),
        ({"chunk_size": 8}, "chunk_size 8, but the model was made for 4"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainingWrapper(retro=wrapped.retro, **options | changes)
    assert not (tmp_path / "work").exists()


def test_a_store_of_another_model_is_met_at_the_door(wrapped, tmp_path):
    other_tokens, part = copy(wrapped.ds), Subset(wrapped.ds, [0, 1])
    other_tokens.tokenizer_fingerprint = "another"
    assert wrapped.ds.tokenizer_fingerprint == wrapped.retro.tokenizer.fingerprint
    for model, store, message in (
        (fresh("gpt2", chunk_size=8), part, "chunks have 4 tokens, the model's 8"),
        (wrapped.retro, other_tokens, "cut by tokenizer another, the model has"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(model, store, steps=1, out_dir=tmp_path / "run", progress=False)
        with pytest.raises(ValueError, match=message):
            evaluation.token_losses(model, store.dataset if store is part else store, [0], progress=False)
    assert not (tmp_path / "run").exists()
