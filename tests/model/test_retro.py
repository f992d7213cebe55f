"""RETRO against the paper: its equations in float64, its causality, its sizes; and what is refused."""

import json
import os
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from einops import repeat
from hypothesis import given, settings
from hypothesis import strategies as st
from paper_equations import retro_logits
from safetensors.torch import load_file, save_file
from small_retros import OPTIONS, SMALL, batch, every_option, make
from torch import nn
from torch.testing import assert_close

from retro_nb.model import pretrained
from retro_nb.model.layers import RMSNorm
from retro_nb.model.presets import PRESETS
from retro_nb.model.retro import RETRO

# the paper's equations


@given(
    option=st.sampled_from(["reference", "paper", "gated"]), n=st.integers(1, 13), k=st.integers(1, 2),
    r=st.sampled_from([4, 5, 8]), read=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=8, deadline=None)
def test_logits_are_algorithm_1_written_out_in_loops(option, n, k, r, read, seed):
    model = make(seed, **OPTIONS[option]).double()
    seq, retrieved = batch(n, k, r, b=1, seed=seed)
    retrieved[torch.rand(retrieved.shape) < 0.2] = 0
    if retrieved.numel():
        retrieved[0, -1, -1] = 0  # a neighbour of padding only
    expected = retro_logits(model, seq[0], retrieved[0] if read else None)
    assert_close(model(seq, retrieved if read else None)[0], expected, atol=1e-5, rtol=0)


@every_option
@pytest.mark.parametrize("n", [1, 4, 14, 23])
def test_a_token_changes_no_logit_before_it(option, n):
    """Row j of the batch has its token j changed; every row is compared with itself, to the last bit."""
    model = make(**OPTIONS[option])
    (seq,), retrieved = batch(n, b=1)
    rows, neighbours = repeat(seq, "n -> j n", j=n), repeat(retrieved, "1 l k r -> j l k r", j=n)
    others = torch.where(torch.eye(n, dtype=torch.bool), seq % 39 + 1, rows)
    for given_neighbours in (neighbours, None):
        changed = (model(others, given_neighbours) != model(rows, given_neighbours)).any(-1)
        assert not changed.tril(-1).any() and changed.diagonal().all()


@every_option
@pytest.mark.parametrize("n", [4, 14, 23])
def test_a_neighbour_is_first_read_by_the_last_token_of_its_chunk(option, n):
    """Row i of the batch has the i-th retrieved token changed; token um−1 is the first that may notice."""
    model, m = make(**OPTIONS[option]), 4
    (seq,), (retrieved,) = batch(n, b=1)
    rows = repeat(seq, "n -> j n", j=retrieved.numel())
    neighbours = repeat(retrieved, "l k r -> j l k r", j=retrieved.numel())
    others = neighbours.clone()
    others.view(len(rows), -1).diagonal().copy_(retrieved.flatten() % 39 + 1)
    changed = (model(rows, others) != model(rows, neighbours)).any(-1)
    first = torch.arange(n // m).repeat_interleave(retrieved[0].numel()) * m + m - 1
    assert changed.int().argmax(dim=1).equal(first) and changed.any(dim=1).all()


def test_the_encoder_is_conditioned_on_layer_min_P_after_self_attention():
    model, seen = make(), {}
    model.decoder.layers[1].attn.register_forward_hook(lambda _, __, out: seen.update(after_attention=out))
    model.encoder.register_forward_pre_hook(lambda _, args: seen.update(chunks=args[2]))
    model(*batch(11))
    assert_close(seen["chunks"].flatten(1, 2), seen["after_attention"][:, :8], atol=0, rtol=0)


@every_option
def test_the_order_of_neighbours_does_not_matter(option):
    model = make(**OPTIONS[option])
    seq, retrieved = batch(20, k=3)
    assert_close(model(seq, retrieved[:, :, [2, 0, 1]]), model(seq, retrieved), atol=2e-6, rtol=1e-5)


@every_option
@pytest.mark.parametrize("having", [(), (0,), (4,), (1, 3), (0, 1, 2, 3, 4, 5)])
def test_chunks_without_neighbours_are_left_out_and_nothing_changes(option, having, monkeypatch):
    model, encoded = make(**OPTIONS[option]).double(), []
    seq, retrieved = batch(13, b=2)
    retrieved[torch.isin(torch.arange(6), torch.tensor(having), invert=True).view(2, 3)] = 0
    model.encoder.register_forward_pre_hook(lambda _, args: encoded.append(args[0].shape[:2].numel()))

    def outcome():
        loss = model(torch.cat((seq, seq[:, :1]), dim=1), retrieved, return_loss=True)
        return model(seq, retrieved), loss, *torch.autograd.grad(loss, model.parameters(), allow_unused=True)

    compact = outcome()
    monkeypatch.setattr(RETRO, "_with_neighbours", lambda self, retrieved: (retrieved, None))
    for few, all_ in zip(compact, outcome(), strict=True):
        assert_close(few, torch.zeros_like(few) if all_ is None else all_)
    assert set(encoded) == {max(2, len(having)), 6}


def test_single_neighbours_need_no_axis():
    model = make()
    seq, retrieved = batch(12, k=1)
    assert torch.equal(model(seq, retrieved[:, :, 0]), model(seq, retrieved))


# padding


@every_option
def test_padding_in_neighbours_is_never_read(option):
    model = make(**OPTIONS[option])
    seq, retrieved = batch(14)
    expected = model(seq, retrieved)
    assert_close(model(seq, F.pad(retrieved, (0, 3))), expected, atol=2e-6, rtol=1e-5)
    assert_close(model(seq, F.pad(retrieved, (0, 0, 1, 2))), expected, atol=2e-6, rtol=1e-5)


def test_a_chunk_with_padding_only_reads_the_null_value():
    """One learned vector: for every query, any k and any r the same, and not nothing."""
    model = make()
    read = []
    for layer in model.decoder.layers[1:]:
        layer.cross_attn.fn.register_forward_hook(lambda layer, _, out: read.append((layer, out)))
    seq, retrieved = batch(14)
    a = model(seq, torch.zeros_like(retrieved))
    b = model(seq, torch.zeros_like(retrieved[:, :, :1, :4]))
    assert_close(a, b)
    for cca, out in read:
        null = cca.attn.to_out(cca.attn.null_v)
        assert_close(out[:, 3:], null.expand_as(out[:, 3:]))
        assert out[:, :3].abs().max() == 0
    off = model(seq)
    assert_close(a[:, :3], off[:, :3])
    assert not torch.allclose(a[:, 3:], off[:, 3:])


@every_option
def test_padding_poisons_no_gradient(option):
    model = make(**OPTIONS[option]).train()
    seq, retrieved = batch(13)
    seq[0] = 0
    retrieved[0] = 0
    retrieved[1, 1, 0] = 0
    loss = model(seq, retrieved[:, : 12 // 4], return_loss=True)
    loss.backward()
    assert loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# loss


@every_option
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("read", [False, True])
def test_loss_is_the_mean_over_real_labels(option, training, read):
    model = make(**OPTIONS[option]).train(training)
    seq, retrieved = batch(15)
    seq[0, 9:] = 0
    neighbours = retrieved[:, : 14 // 4] if read else None
    log_p = model(seq[:, :-1], neighbours).log_softmax(-1)
    terms = [-log_p[b, i, seq[b, i + 1]] for b in range(2) for i in range(14) if seq[b, i + 1] != 0]
    assert_close(model(seq, neighbours, return_loss=True), sum(terms) / len(terms))


def test_loss_of_padding_is_zero():
    assert make()(torch.zeros(2, 9, dtype=torch.long), return_loss=True) == 0


def test_dropout_in_training_only():
    rates = dict(enc_attn_dropout=0.3, enc_ff_dropout=0.3, dec_attn_dropout=0.3, dec_ff_dropout=0.3)
    seq, retrieved = batch(12)
    for name in rates:
        model = make(**{name: rates[name]})
        assert torch.equal(model(seq, retrieved), make()(seq, retrieved))
        assert not torch.equal(model.train()(seq, retrieved), model(seq, retrieved)), name


def test_bfloat16_runs():
    model = make().bfloat16()
    seq, retrieved = batch(12)
    logits = model(seq, retrieved)
    assert logits.dtype == torch.bfloat16
    assert_close(logits.float(), make()(seq, retrieved), atol=0.2, rtol=0.1)


# piece by piece


def feed(model: RETRO, seq, retrieved, cuts):
    """Feed seq in pieces that end at every position in `cuts` too."""
    state, m, out = model.start_decoding(len(seq), seq.shape[1], retrieval=retrieved is not None), 4, []
    bounds = sorted({0, *cuts, seq.shape[1]})
    for start, stop in pairwise(bounds):
        for a, b in model.pieces(start, stop):
            new = retrieved[:, a // m] if retrieved is not None and (a + 1) % m == 0 else None
            out.append(model.decode(seq[:, a:b], state, new))
    assert state.length == seq.shape[1]
    return torch.cat(out, dim=1)


@every_option
@given(data=st.data())
@settings(max_examples=6, deadline=None)
def test_decoding_piece_by_piece_equals_forward(option, data):
    model = make(**OPTIONS[option])
    n = data.draw(st.integers(1, 24))
    cuts = data.draw(st.sets(st.integers(0, n)))
    seq, retrieved = batch(n, k=data.draw(st.integers(1, 2)), r=data.draw(st.sampled_from([4, 8])))
    retrieved[:, ::2, 0, 5:] = 0
    for neighbours in (retrieved, None):
        assert_close(feed(model, seq, neighbours, cuts), model(seq, neighbours), atol=1e-5, rtol=0)


@given(m=st.integers(1, 7), start=st.integers(0, 30), length=st.integers(0, 30))
@settings(deadline=None)
def test_pieces_cover_and_never_cross_an_attending_chunk(m, start, length):
    pieces = list(RETRO.pieces(SimpleNamespace(chunk_size=m), start, start + length))
    assert [p for a, b in pieces for p in range(a, b)] == list(range(start, start + length))
    for a, b in pieces:
        assert len({(p + 1) // m for p in range(a, b)}) == 1
    assert len(pieces) == len({(p + 1) // m for p in range(start, start + length)})


def test_what_decode_refuses():
    model = make()
    seq, retrieved = batch(8)
    with pytest.raises(ValueError, match=r"not one piece: feed \[\(0, 3\), \(3, 7\), \(7, 8\)\]"):
        model.decode(seq, model.start_decoding(2))
    with pytest.raises(ValueError, match="not one piece"):
        model.decode(seq[:, :0], model.start_decoding(2))
    with pytest.raises(ValueError, match="no neighbours are read at position 0"):
        model.decode(seq[:, :3], model.start_decoding(2), retrieved[:, 0])
    with pytest.raises(ValueError, match="capacity 2"):
        model.decode(seq[:, :3], model.start_decoding(2, capacity=2))
    with pytest.raises(ValueError, match="max_seq_len 24"):
        model.start_decoding(2, capacity=25)
    state = model.start_decoding(2, retrieval=False)
    model.decode(seq[:, :3], state)
    with pytest.raises(ValueError, match="retrieval=False"):
        model.decode(seq[:, 3:4], state, retrieved[:, 0])


# what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(dec_cross_attn_layers=(1, 4)), "dec_cross_attn_layers names layer 4, but the layers are 1 … 3"),
        (dict(dec_cross_attn_layers=(0,)), "names layer 0"),
        (dict(dec_cross_attn_layers=()), "name at least one layer"),
        (dict(enc_cross_attn_layers=(3,)), "enc_cross_attn_layers names layer 3"),
        (dict(tied_output=True), "separate_embeddings=True, or enc_dim=16"),
        (dict(norm_klass="BatchNorm"), "choose one of RMSNorm, LayerNorm"),
        (dict(dim_head=7), "dim_head 7 is odd"),
        (dict(pad_id=40), "pad_id 40 is not in the vocabulary, 0 … 39"),
        (dict(pad_id=-1), "pad_id -1 is not in the vocabulary"),
        (dict(chunk_size=0), "chunk_size is 0: pass 1 or more"),
        (dict(max_seq_len=0), "max_seq_len is 0"),
    ],
)
def test_impossible_models_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        RETRO(**{**SMALL, **changes})


def test_impossible_input_is_refused():
    model = make()
    seq, retrieved = batch(12)
    for n in (0, 25):
        with pytest.raises(ValueError, match=rf"given {n} tokens .* takes 1 to 24"):
            model(torch.ones(1, n, dtype=torch.long))
    with pytest.raises(ValueError, match="given 0 tokens"):
        model(seq[:, :1], return_loss=True)
    with pytest.raises(ValueError, match=r"2 chunks, but the sequence has 3 complete chunks of 4"):
        model(seq, retrieved[:, :2])
    with pytest.raises(ValueError, match="3 tokens a neighbour, fewer than chunk_size 4"):
        model(seq, retrieved[..., :3])
    with pytest.raises(ValueError, match=r"seq holds token 40, the vocabulary is 0 … 39"):
        model(seq + 40 - seq.max(), retrieved)
    with pytest.raises(ValueError, match=r"retrieved holds token -1"):
        model(seq, retrieved - retrieved - 1)


# options


def test_named_norms_and_all_layers():
    for norm, kind in ((None, RMSNorm), ("LayerNorm", nn.LayerNorm), (nn.LayerNorm, nn.LayerNorm)):
        model = make(norm_klass=norm, dec_cross_attn_layers=None)
        norms = {type(m.norm) for m in model.modules() if hasattr(m, "norm")}
        assert norms == {kind} and type(model.decoder.norm_out) is kind
        assert all(layer.cross_attn is not None for layer in model.decoder.layers)
        assert json.loads(json.dumps(model.config))["norm_klass"] == (norm and "LayerNorm")


def test_options_do_what_they_say():
    paper = make(**OPTIONS["paper"])
    assert paper.to_logits.weight is paper.token_emb.weight
    assert paper.token_emb.embedding_dim == 16 and paper.enc_token_emb.embedding_dim == 12
    assert paper.encoder.layers[0].cross_attn is not None and paper.encoder.layers[1].cross_attn is None
    assert paper.decoder.layers[1].cross_attn.fn.attn.to_k.in_features == 12
    assert not any("pos_emb" in name for name, _ in paper.named_parameters())
    assert make(ff_mult=3).decoder.layers[0].ff.fn.net[0].out_features == 48
    seq, _ = batch(8)
    assert not torch.allclose(make()(seq.roll(1, 1))[:, -1], make()(seq)[:, -1])
    tied = RETRO(**{**SMALL, **OPTIONS["paper"], "num_tokens": 2000, "dec_dim": 256})
    loss = tied(torch.randint(1, 2000, (2, 21)), return_loss=True).item()
    assert abs(loss - torch.tensor(2000.0).log().item()) < 1.5  # a fresh tied model is near uniform


# sizes


def relative_position_projections(model: RETRO) -> int:
    """The paper's relative positions cost one more d × (h · dim_head) matrix in every attention."""
    layers = [*model.encoder.layers, *model.decoder.layers]
    return sum(layer.attn.fn.to_q.weight.numel() * (2 if layer.cross_attn is not None else 1) for layer in layers)


@pytest.mark.parametrize(
    ("name", "millions", "depth", "ff"),
    [("172M", 172, 12, 3584), ("425M", 425, 12, 6144), ("1.5B", 1451, 24, 8192), ("7.5B", 7532, 32, 16384)],
)
def test_presets_have_the_sizes_of_table_2(name, millions, depth, ff):
    """Table 2 counts our parameters, those of the relative positions and, for 1.5B, a seventh layer in P.

    Table 10 gives P = 9, 12, …, 24 there; section 2.5 has every third layer from 6, and so has the count.
    """
    with torch.device("meta"):
        model = RETRO.preset(name)
    assert len(model.decoder.layers) == depth
    assert model.decoder.layers[0].ff.fn.net[0].out_features == ff

    ours = model.num_parameters(embeddings=False)
    theirs = ours + relative_position_projections(model)
    if name == "1.5B":
        assert abs(theirs / 1e6 / millions - 1) < 0.015
        seventh = model.decoder.layers[8].cross_attn
        theirs += sum(p.numel() for p in seventh.parameters()) + seventh.fn.attn.to_q.weight.numel()
    print(f"{name}: ours {ours / 1e6:.1f} M, as the paper counts {theirs / 1e6:.1f} M, paper {millions} M")
    assert 0.90 < ours / 1e6 / millions < 0.92
    assert abs(theirs / 1e6 / millions - 1) < 0.004


def test_presets_take_changes_and_refuse_unknown_names():
    model = RETRO.preset("172M", num_tokens=50, dec_depth=2, dec_cross_attn_layers=(2,), max_seq_len=128)
    assert model.config["num_tokens"] == 50 and model.config["heads"] == 16
    assert model.num_parameters() - model.num_parameters(embeddings=False) == 50 * (896 + 896 + 1)
    assert model(torch.randint(1, 50, (1, 64)), torch.randint(1, 50, (1, 1, 2, 128))).shape == (1, 64, 50)
    with pytest.raises(ValueError, match=", ".join(PRESETS)):
        RETRO.preset("7B")


# weights on disk


@every_option
def test_save_and_load(option, tmp_path):
    model = make(**OPTIONS[option])
    model.save_pretrained(tmp_path / "new" / "folder")
    loaded = RETRO.from_pretrained(tmp_path / "new" / "folder")
    assert loaded.config == model.config and not loaded.training
    seq, retrieved = batch(12)
    assert torch.equal(loaded(seq, retrieved), model(seq, retrieved))
    assert {p.name for p in (tmp_path / "new" / "folder").iterdir()} == {"config.json", "model.safetensors"}


def test_weights_are_readable_by_all_who_may_read_other_files(tmp_path):
    make().save_pretrained(tmp_path)
    assert len({(tmp_path / name).stat().st_mode for name in ("config.json", "model.safetensors")}) == 1


def test_included_models_go_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained, "INCLUDED", tmp_path / "included")
    make().save_pretrained(tmp_path / "included" / "poems")
    assert RETRO.from_pretrained("poems").config == make().config
    make(dec_depth=1, dec_cross_attn_layers=(1,)).save_pretrained("poems")  # a folder that is there comes first
    assert RETRO.from_pretrained("poems").config["dec_depth"] == 1
    with pytest.raises(FileNotFoundError, match=r"prose is no folder .* \(poems\)"):
        RETRO.from_pretrained("prose")


def test_checkpoints_that_do_not_fit_are_refused(tmp_path):
    def saved(name, **changes):
        make(**changes).save_pretrained(tmp_path / name)
        return tmp_path / name

    folder, other = saved("a"), saved("b", heads=4, dim_head=4)  # equal shapes, another model
    (folder / "config.json").write_text((other / "config.json").read_text())
    with pytest.raises(ValueError, match=r"model\.safetensors does not hold the weights of the model in .*config"):
        RETRO.from_pretrained(folder)

    for text, message in (
        ('{"model_type": "bert"}', "not the configuration of a RETRO"),
        ("[]", "not the configuration"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
    ):
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            RETRO.from_pretrained(folder)

    folder = saved("c")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="does not hold the weights"):
        RETRO.from_pretrained(folder)
    os.remove(folder / "model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        RETRO.from_pretrained(folder)


def saved_with(folder, weights=None, **changes):
    """A model of which config.json, its copy in the weights' file, or the weights have been changed."""
    make().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    tensors = load_file(folder / "model.safetensors") | (weights or {})
    save_file(tensors, folder / "model.safetensors", metadata={"config": json.dumps(config)})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_shapes_are_compared_before_memory_is_taken(tmp_path):
    for name, changes, message in (
        (
            "long",
            dict(max_seq_len=2**40),
            r"pos_emb\.weight has the shape \(24, \d+\) in the file and \(10995",
        ),
        ("pad", dict(pad_id=99), "pad_id 99 is not in the vocabulary"),
        ("deep", dict(dec_depth=4), r"the file has no decoder\.layers"),
    ):
        with pytest.raises(ValueError, match=message):
            RETRO.from_pretrained(saved_with(tmp_path / name, **changes))


def test_weights_that_are_not_finite_are_not_loaded(tmp_path):
    spoilt = make().to_logits.bias.detach().clone()
    spoilt[3] = float("nan")
    folder = saved_with(tmp_path, {"to_logits.bias": spoilt})
    with pytest.raises(ValueError, match=r"not finite, to_logits\.bias first"):
        RETRO.from_pretrained(folder)


def test_torchs_data_parallel_on_several_gpus_is_refused():
    with pytest.raises(TypeError, match=r"DataParallel cannot run a RETRO: .*accelerate launch"):
        make()._replicate_for_data_parallel()  # torch calls it for a model on several GPUs


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    old = make(seed=1)
    old.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(model, path, **_):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("retro_nb.model.pretrained.save_model", full_disk)
    with pytest.raises(OSError, match="No space left"):
        make(seed=2).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
