"""Filters, noise and generation; generation against a plain loop that runs the whole model for every token."""

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from retro_nb.model import cuda_graphs, sampling, transformer
from retro_nb.model.retro import RETRO
from retro_nb.model.sampling import EOS_ID, generate, gumbel_sample, top_k, top_p
from retro_nb.text.tokens import get_tokenizer

M, N, V, PAD = 4, 22, 110, 0
few = settings(max_examples=10, deadline=None)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(scope="module")
def retro() -> RETRO:
    torch.manual_seed(0)
    model = RETRO(
        num_tokens=V, max_seq_len=N, enc_dim=12, enc_depth=1, dec_dim=16, dec_depth=2,
        dec_cross_attn_layers=(1, 2), heads=2, dim_head=8, chunk_size=M,
    )  # fmt: skip
    with torch.no_grad():
        model.to_logits.weight.mul_(8)  # a fresh model is undecided: sharper logits make paths that matter
    return model.eval()


def noise(seed: int = 0, device: str | torch.device = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def fetch(chunk: torch.Tensor, u: int) -> torch.Tensor:
    """Neighbours that depend on every token of the chunk and on its number."""
    key = (chunk.cpu() * torch.arange(1, M + 1)).sum(-1) + 31 * u
    return (key[:, None, None] + 7 * torch.arange(2)[:, None] + torch.arange(2 * M)) % (V - 1) + 1


def prompt_of(p: int, b: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, EOS_ID, (b, p), generator=noise(seed))


def no_end(logits, thres):
    """A filter that never samples [SEP]."""
    logits = logits.clone()
    logits[..., EOS_ID] = float("-inf")
    return top_k(logits, thres)


@torch.inference_mode()
def plain_generate(retro, rows, fetch=None, new=N, thres=0.9, temperature=1.0, generator=None, eos_id=EOS_ID):
    """The same without any cache: for each token forward() on everything so far, neighbours fetched again.

    rows: the prompts, lists of token ids.
    """
    rows, position = [list(row) for row in rows], min(map(len, rows))
    lengths, device = [len(row) for row in rows], retro.to_logits.weight.device
    ends = [min(N, length + new) for length in lengths]
    ended = [position >= end for end in ends]
    while not all(ended):
        seq = torch.tensor([row[:position] for row in rows], device=device)
        retrieved = torch.zeros(len(rows), 0, 2, 2 * M).long() if fetch else None
        for u in range(position // M) if fetch else ():
            retrieved = torch.cat((retrieved, fetch(seq[:, u * M : (u + 1) * M], u)[:, None]), dim=1)
        logits = retro(seq, retrieved.to(device) if fetch else None)[:, -1]
        sampled = gumbel_sample(top_k(logits, thres), temperature, generator=generator).tolist()
        for i, row in enumerate(rows):
            if position >= lengths[i]:
                row.append(PAD if ended[i] else sampled[i])
                ended[i] |= row[-1] == eos_id
            ended[i] |= position + 1 >= ends[i]
        position += 1
    return torch.tensor([row[:position] + [PAD] * (position - len(row)) for row in rows])


# filters


@given(v=st.integers(1, 40), thres=st.floats(0, 1), seed=st.integers(0, 99))
@settings(deadline=None)
def test_top_k_keeps_the_largest(v, thres, seed):
    logits = torch.randn(2, 3, v, generator=noise(seed))
    kept = top_k(logits, thres)
    stays = kept.isfinite()
    assert (stays.sum(-1) == max(1, round((1 - thres) * v))).all()
    assert torch.equal(kept[stays], logits[stays])
    assert (kept.masked_fill(~stays, 9e9).amin(-1) >= logits.masked_fill(stays, -9e9).amax(-1)).all()


@given(v=st.integers(1, 40), thres=st.floats(0, 1), seed=st.integers(0, 99))
@settings(deadline=None)
def test_top_p_keeps_the_smallest_set_with_the_mass(v, thres, seed):
    logits = 3 * torch.randn(2, v, generator=noise(seed))
    kept = top_p(logits, thres)
    for row, out in zip(logits, kept, strict=True):
        p, stays = row.softmax(-1), out.isfinite()
        assert torch.equal(out[stays], row[stays])
        assert stays.all() or row[stays].min() >= row[~stays].max()
        assert p[stays].sum() >= 1 - thres - 1e-5
        assert stays.sum() == 1 or p[stays].sum() - p[stays].min() < 1 - thres + 1e-5
        assert thres > 0 or stays.all()


def test_thres_is_the_share_filtered_out_for_both():
    logits = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.05, 0.05]))
    for filter_fn, kept in (
        (top_p, {0: 5, 0.08: 4, 0.2: 3, 0.5: 2, 0.65: 1, 0.9: 1, 1: 1}),
        (top_k, {0: 5, 0.2: 4, 0.6: 2, 0.8: 1, 0.99: 1, 1: 1}),
    ):
        assert {thres: filter_fn(logits, thres).isfinite().sum().item() for thres in kept} == kept
    before = logits.clone()
    top_p(logits, 0.5), top_k(logits, 0.5)
    assert torch.equal(logits, before)
    for bad in (-0.1, 1.1, math.nan):
        for filter_fn in (top_k, top_p):
            with pytest.raises(ValueError, match="share to filter out"):
                filter_fn(logits, bad)


def test_gumbel_sample_follows_the_softmax():
    logits = torch.tensor([1.0, 0.0, -1.0, float("-inf")])
    for temperature in (0.5, 1, 2.0):
        draws = gumbel_sample(logits.expand(40000, 4), temperature, generator=noise())
        frequency = draws.bincount(minlength=4) / len(draws)
        assert_close(frequency, (logits / temperature).softmax(-1), atol=0.01, rtol=0)


def test_gumbel_sample_edges():
    logits = torch.randn(6, 3, 9, generator=noise())
    assert torch.equal(gumbel_sample(logits, 0), logits.argmax(-1))
    assert torch.equal(gumbel_sample(logits, 0.0, dim=0), logits.argmax(0))
    assert gumbel_sample(logits, dim=1).shape == (6, 9)
    assert torch.equal(gumbel_sample(logits, generator=noise(1)), gumbel_sample(logits, generator=noise(1)))
    assert not torch.equal(gumbel_sample(logits, generator=noise(1)), gumbel_sample(logits, generator=noise(2)))
    for refused in (-1.0, math.inf, -math.inf, math.nan, 1e31):
        with pytest.raises(ValueError, match=r"temperature .* is not in 0 … 1e\+30: pass 0 for greedy"):
            gumbel_sample(logits, refused)


@given(temperature=st.sampled_from([1e-300, 1e-45, 1e-40, 1e-6, 1e6, 1e30]), seed=st.integers(0, 99))
@settings(deadline=None)
def test_gumbel_sample_at_any_temperature_draws_what_can_be_drawn(temperature, seed):
    """Cold is greedy, hot is uniform over the tokens that the filter has left."""
    logits = 9 * torch.randn(7, 12, generator=noise(seed))
    kept = top_k(logits, 0.5)
    draws = torch.stack([gumbel_sample(kept, temperature, generator=noise(i)) for i in range(100)])
    assert kept.expand(100, -1, -1).gather(-1, draws[..., None]).isfinite().all()
    seen = torch.tensor([len(row.unique()) for row in draws.T])
    assert (draws == logits.argmax(-1)).all() if temperature < 1 else (seen == 6).all()


BAD_ROWS = {"NaN": [0.0, math.nan, 1.0], "∞": [0.0, math.inf, 1.0], "all −∞": [-math.inf] * 3}


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("bad", BAD_ROWS.values(), ids=BAD_ROWS)
@pytest.mark.parametrize("filter_fn", [top_k, top_p])
def test_scores_that_cannot_be_drawn_from_are_refused(bad, filter_fn, temperature):
    scores = torch.tensor([[0.0, 1.0, -math.inf], bad, bad])
    for thres in (0, 0.5, 1):
        with pytest.raises(FloatingPointError, match=r"row \[1\] of \[3\] are not finite.*Load a checkpoint"):
            gumbel_sample(filter_fn(scores, thres), temperature)
        assert filter_fn(scores[:1], thres).isfinite().any()


# generation equals the plain loop


@given(
    p=st.sampled_from([1, M - 1, M, M + 1, 2 * M - 1, 2 * M, N - 1]), b=st.integers(1, 3), read=st.booleans(),
    temperature=st.sampled_from([0, 1.0]), seed=st.integers(0, 999),
)  # fmt: skip
@few
def test_cached_tokens_are_the_plain_loops(retro, p, b, read, temperature, seed):
    prompt = prompt_of(p, b, seed)
    found = fetch if read else None
    options = dict(temperature=temperature, eos_id=EOS_ID if seed % 2 else -1)
    out = generate(retro, prompt, found, generator=noise(seed), **options)
    expected = plain_generate(retro, prompt.tolist(), found, generator=noise(seed), **options)
    assert torch.equal(out, expected)
    assert torch.equal(out[:, :p], prompt)


@given(lengths=st.lists(st.integers(1, N), min_size=2, max_size=4), read=st.booleans(), data=st.data())
@few
def test_prompts_of_different_lengths(retro, lengths, read, data):
    seed, new = data.draw(st.integers(0, 999)), data.draw(st.sampled_from([0, 1, 5, N]))
    rows = [prompt_of(length, seed=seed + i)[0].tolist() for i, length in enumerate(lengths)]
    prompt = torch.full((len(rows), max(lengths)), 77)  # whatever stands beyond a prompt is ignored
    for row, tokens in zip(prompt, rows, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    out = generate(
        retro, prompt, fetch if read else None, prompt_lengths=torch.tensor(lengths), max_new_tokens=new,
        generator=noise(seed),
    )  # fmt: skip
    assert torch.equal(out, plain_generate(retro, rows, fetch if read else None, new, generator=noise(seed)))


def test_greedy_rows_are_what_they_are_alone(retro):
    lengths = torch.tensor([3, 9, 5])
    prompt = prompt_of(9, b=3)
    out = generate(retro, prompt, fetch, prompt_lengths=lengths, temperature=0, max_new_tokens=6)
    for i, length in enumerate(lengths.tolist()):
        alone = generate(retro, prompt[i : i + 1, :length], fetch, temperature=0, max_new_tokens=6)[0]
        assert out[i, : len(alone)].tolist() == alone.tolist()
        assert (out[i, len(alone) :] == PAD).all()


# recorded steps


class Tape(TorchDispatchMode):
    """A CUDA graph without CUDA: keeps every operation with the very tensors and numbers that it got.

    `replay` runs them all again and leaves each result where it lay the first time.
    """

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert operation is not torch.ops.aten._local_scalar_dense.default, "a value was read: a GPU would wait"
        out = operation(*args, **(kwargs or {}))
        self.operations.append((operation, args, kwargs or {}, out))
        return out

    def replay(self):
        for operation, args, kwargs, out in self.operations:
            for old, new in zip(tree_leaves(out), tree_leaves(operation(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():  # no view, not in place
                    old.copy_(new)


@pytest.fixture
def tapes(monkeypatch) -> list[Tape]:
    """On the CPU steps are recorded as they are on a GPU; the tapes, as they come."""
    found = []

    def record(function, inputs):
        found.append(tape := Tape())
        with tape:
            result = function(*inputs)
        result.fill_(float("nan"))  # on a GPU nothing has run so far
        return tape.replay, result

    monkeypatch.setattr(transformer, "can_record", lambda x: not torch.is_grad_enabled())
    monkeypatch.setattr(cuda_graphs, "record", record)
    return found


KINDS = {
    "reference": {},
    "no map": dict(project_encoded=False, separate_embeddings=True, absolute_positions=False),
    "deepnet": dict(use_deepnet=True, enc_cross_attn_layers=()),
    "gated": dict(gated_rmsnorm=True, dec_cross_attn_layers=(1,)),
}


def small(kind: str) -> RETRO:
    """A small model of each kind, "preset" with everything else as in the paper."""
    torch.manual_seed(1)
    sizes = dict(num_tokens=V, max_seq_len=N, enc_dim=12, dec_dim=16, dec_depth=3, dim_head=8, chunk_size=M)
    sizes |= dict(dec_cross_attn_layers=(2, 3), heads=2)
    if kind == "preset":
        model = RETRO.preset("172M", **sizes, enc_heads=3, enc_dim_head=6)
    else:
        model = RETRO(**{**sizes, "enc_depth": 1, **KINDS[kind]})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def check_against_the_plain_loop(model: RETRO, read: bool, temperature: float, device: str = "cpu") -> None:
    rows = [prompt_of(length, seed=length)[0].tolist() for length in (5, 1, 9)]
    prompt = torch.tensor([row + [0] * (9 - len(row)) for row in rows])
    found, dice = fetch if read else None, (noise(2, device), noise(2, device))
    out = generate(
        model, prompt, found, prompt_lengths=torch.tensor([5, 1, 9]), temperature=temperature, eos_id=7,
        generator=dice[0],
    )  # fmt: skip
    expected = plain_generate(model, rows, found, temperature=temperature, eos_id=7, generator=dice[1])
    assert out.tolist() == expected.tolist()


@pytest.mark.parametrize("read", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "preset"])
def test_recorded_tokens_are_the_plain_loops(tapes, kind, read):
    """One recording for all tokens; with retrieval one more when the first chunk has ended."""
    model = small(kind)
    for temperature in (0, 1.0):
        tapes.clear()
        check_against_the_plain_loop(model, read, temperature)
        assert len(tapes) == 1 + read


@torch.no_grad()
def one_by_one(model: RETRO, seq: torch.Tensor, near: list[torch.Tensor | None]) -> torch.Tensor:
    """Logits of seq, fed token by token."""
    state = model.start_decoding(len(seq))
    logits = [
        model.decode(seq[:, i : i + 1], state, near[i // M] if (i + 1) % M == 0 else None)
        for i in range(seq.shape[1])
    ]  # fmt: skip
    return torch.cat(logits, dim=1)


def test_recordings_follow_neighbours_of_another_form(monkeypatch, tapes, retro):
    """More neighbours, longer ones, none: what is read has another shape, and an old record would not fit."""
    seq = prompt_of(N, b=2)
    found = [fetch(seq[:, u * M : (u + 1) * M], u) for u in range(N // M)]
    near = [found[0], found[1][:, :1], None, torch.cat((found[3], found[3]), dim=-1), found[4]]
    recorded = one_by_one(retro, seq, near)
    assert len(tapes) == 1 + len(near)
    monkeypatch.setattr(transformer, "can_record", lambda x: False)
    assert_close(recorded, one_by_one(retro, seq, near))


def test_a_recording_that_fails_costs_time_only(monkeypatch, tapes, retro):
    def fail(function, inputs):
        raise RuntimeError("operation not permitted")

    monkeypatch.setattr(cuda_graphs, "record", fail)
    with pytest.warns(UserWarning, match="without a CUDA graph, so more slowly: operation not permitted"):
        check_against_the_plain_loop(small("reference"), True, 1.0)


@needs_cuda
@pytest.mark.parametrize("read", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "preset"])
def test_on_a_gpu_tokens_are_the_plain_loops(recwarn, kind, read):
    recordings, record = [], cuda_graphs.record
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_graphs, "record", lambda *args: recordings.append(1) or record(*args))
        for temperature in (0, 1.0):
            check_against_the_plain_loop(small(kind).cuda(), read, temperature, "cuda")
    assert len(recordings) == 2 * (1 + read) and not any("CUDA graph" in str(w.message) for w in recwarn)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
@pytest.mark.parametrize("precision", ["float64", "bfloat16", "autocast"])
def test_recordings_are_right_in_every_precision(request, retro, precision, device):
    if device == "cpu":
        request.getfixturevalue("tapes")
    model = RETRO(**retro.config).to(device).eval()
    model.load_state_dict(retro.state_dict())
    seq = prompt_of(N, b=3).to(device)
    near = [fetch(seq[:, u * M : (u + 1) * M], u).to(device) for u in range(N // M)]
    exact = model.double()(seq, torch.stack(near, dim=1)).detach()
    model.to(torch.float32 if precision == "autocast" else getattr(torch, precision))
    with torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "autocast"):
        logits = one_by_one(model, seq, near)
    error = (logits.double() - exact).abs().mean() / exact.std()
    assert error < (1e-6 if precision == "float64" else 0.05)  # angles are float32


# where a row ends


def end_at(positions: dict[int, int], p: int):
    """A filter under which row i samples [SEP] at position positions[i] and 5 everywhere else."""
    step = p - 1

    def filter_fn(logits, thres):
        nonlocal step
        step += 1
        out = torch.full_like(logits, float("-inf"))
        for i in range(len(logits)):
            out[i, EOS_ID if step == positions.get(i) else 5] = 0
        return out

    return filter_fn


def test_every_row_stops_at_its_own_generated_sep(retro):
    prompt = prompt_of(3, b=3)
    out = generate(retro, prompt, fetch, filter_fn=end_at({0: 6, 1: 4, 2: 9}, p=3))
    assert out.shape == (3, 10)
    for row, end in zip(out.tolist(), (6, 4, 9), strict=True):
        assert row[3:] == [5] * (end - 3) + [EOS_ID] + [PAD] * (9 - end)


def test_a_text_ends_as_the_models_own_tokenizer_ends_it(retro, tokenizers, monkeypatch):
    """Unless another end is given; BERT's [SEP] where the model has no tokenizer."""
    own = get_tokenizer(tokenizers["bpe"])
    written = [5, EOS_ID, 6, own.ids.eos, 7, 8]

    def text(**options) -> list[int]:
        words = iter(written)

        def spell(logits, thres):
            out = torch.full_like(logits, float("-inf"))
            out[:, next(words)] = 0
            return out

        return generate(retro, prompt_of(3), filter_fn=spell, max_new_tokens=len(written), **options)[0, 3:].tolist()

    assert text() == written[:2] and text(eos_id=7) == written[:5]
    monkeypatch.setattr(retro, "tokenizer", own)
    assert own.ids.eos == 2 and text() == written[:4] and text(eos_id=7) == written[:5]


@pytest.mark.parametrize("token", [EOS_ID, PAD, 101])
def test_a_prompt_may_hold_any_token(retro, token):
    prompt = prompt_of(6)
    prompt[0, 2:5] = token
    out = generate(retro, prompt, fetch, filter_fn=no_end)
    assert out.shape == (1, N) and torch.equal(out[:, :6], prompt)
    prompt[:] = token
    assert torch.equal(generate(retro, prompt, max_new_tokens=2, filter_fn=no_end)[:, :6], prompt)


def test_when_others_end_changes_nothing_for_a_row(retro):
    """Row 0 samples the same text whether row 1 ends at once or never."""
    prompt = prompt_of(3, b=2)

    def one_ends(logits, thres):
        logits = no_end(logits, thres)
        logits[1] = float("-inf")
        logits[1, EOS_ID] = 0
        return logits

    early = generate(retro, prompt, fetch, filter_fn=one_ends, generator=noise())
    late = generate(retro, prompt, fetch, filter_fn=no_end, generator=noise())
    assert torch.equal(early[0], late[0]) and early[1, 3] == EOS_ID and (early[1, 4:] == PAD).all()


@pytest.mark.parametrize("p", [1, M - 1, M, M + 1, N - 1, N])
@pytest.mark.parametrize("new", [0, 1, 7, None])
def test_the_length_of_the_result(retro, p, new):
    prompt = prompt_of(p)
    out = generate(retro, prompt, fetch, filter_fn=no_end, max_new_tokens=new)
    assert out.shape == (1, N if new is None else min(N, p + new))
    assert torch.equal(out[:, :p], prompt)


@given(
    ends=st.lists(st.integers(3, 12), min_size=1, max_size=3), spare=st.integers(0, 9),
    patience=st.sampled_from([2, 4]),
)  # fmt: skip
@few
def test_looking_rarely_for_the_end_changes_nothing(retro, ends, spare, patience):
    """On a GPU the rows' ends are noticed late: not in the text, nor in what is fetched."""
    texts = []
    for every in (1, patience):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sampling, "_patience", lambda *_, every=every: every)
            calls = []
            out = generate(
                retro, prompt_of(3, b=len(ends)), lambda chunk, u: calls.append(u) or fetch(chunk, u),  # noqa: B023
                filter_fn=end_at(dict(enumerate(ends)), p=3), max_new_tokens=max(ends) - 2 + spare,
            )  # fmt: skip
        texts.append((out.tolist(), calls))
    assert texts[0] == texts[1] and len(texts[0][0][0]) == max(ends) + 1


# logits that are not finite


def spoilt(at: dict[int, int], p: int, value: float = math.nan):
    """A filter that puts `value` into the logits of row i at position at[i], prompts of p tokens being given."""
    positions = iter(range(p, N))

    def filter_fn(logits, thres):
        position, logits = next(positions), no_end(logits, thres)
        for i, where in at.items():
            if where == position:
                logits[i, 5] = value
        return logits

    return filter_fn


@given(
    at=st.dictionaries(st.integers(0, 2), st.integers(3, N - 1), min_size=1), patience=st.sampled_from([1, 2, 4]),
    value=st.sampled_from([math.nan, math.inf]), temperature=st.sampled_from([0, 1.0]),
)  # fmt: skip
@few
def test_logits_that_are_not_finite_end_the_writing(retro, at, patience, value, temperature):
    """The first of them is named, however rarely a GPU looks; nothing that comes after it is given away."""
    first = min(at.values())
    row = min(i for i, where in at.items() if where == first)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "_patience", lambda *_: patience)
        for on_token in (None, lambda position, tokens: seen.append(position)):
            with pytest.raises(FloatingPointError, match=f"row {row} at position {first} are not finite"):
                generate(
                    retro, prompt_of(3, b=3), fetch, filter_fn=spoilt(at, p=3, value=value), on_token=on_token,
                    temperature=temperature,
                )  # fmt: skip
    assert seen == list(range(3, first))


def test_only_logits_that_are_drawn_from_must_be_finite(retro):
    """Not those of a row that is still read, or has ended."""
    prompt, lengths = prompt_of(9, b=2), torch.tensor([3, 9])
    options = dict(prompt_lengths=lengths, max_new_tokens=2, temperature=0)
    good = generate(retro, prompt, fetch, filter_fn=no_end, **options)
    assert torch.equal(good, generate(retro, prompt, fetch, filter_fn=spoilt({1: 8}, p=3), **options))
    assert torch.equal(good, generate(retro, prompt, fetch, filter_fn=spoilt({0: 5}, p=3), **options))
    for at in ({0: 4}, {1: 9}):
        with pytest.raises(FloatingPointError, match=f"position {min(at.values())} "):
            generate(retro, prompt, fetch, filter_fn=spoilt(at, p=3), **options)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_a_broken_model_writes_nothing(retro, value, device):
    model = RETRO(**retro.config).to(device).eval()
    model.load_state_dict(retro.state_dict())
    with torch.no_grad():
        model.decoder.layers[1].ff.fn.net[0].weight[0, 0] = value
    for options in ({}, dict(temperature=0), dict(filter_fn=top_p), dict(max_new_tokens=1)):
        with pytest.raises(FloatingPointError, match="row 0 at position 3 are not finite"):
            generate(model, prompt_of(3, b=2), fetch, **options)


# neighbours


def test_neighbours_are_fetched_once_a_chunk_and_not_after_the_last_token(retro):
    calls = []

    def watching(chunk, u):
        calls.append((u, chunk.clone()))
        return fetch(chunk, u)

    for p, new, expected in ((1, None, 5), (9, None, 5), (3, 1, 0), (3, 2, 1), (8, 0, 0), (8, 1, 2), (N, 5, 0)):
        calls.clear()
        out = generate(retro, prompt_of(p, b=2), watching, max_new_tokens=new, filter_fn=no_end)
        assert [u for u, _ in calls] == list(range(expected))
        for u, chunk in calls:
            assert torch.equal(chunk, out[:, u * M : (u + 1) * M])


def test_given_neighbours_are_used_and_kept(retro):
    prompt = prompt_of(10, b=2)
    own = torch.randint(1, V, (2, 2, 2, 2 * M), generator=noise(5))
    kept, fetched = own.clone(), []

    def both(chunk, u):
        fetched.append(u)
        return fetch(chunk, u)

    def mixed(chunk, u):
        return own[:, u] if u < 2 else fetch(chunk, u)

    out = generate(retro, prompt, both, retrieved=own, temperature=0, eos_id=-1)
    assert torch.equal(out, plain_generate(retro, prompt.tolist(), mixed, temperature=0, eos_id=-1))
    assert fetched == [2, 3, 4] and torch.equal(own, kept)

    def then_padding(chunk, u):
        return own[:, u] if u < 2 else torch.zeros(2, 2, 2 * M).long()

    out = generate(retro, prompt, retrieved=own, temperature=0, eos_id=-1)
    assert torch.equal(out, plain_generate(retro, prompt.tolist(), then_padding, temperature=0, eos_id=-1))
    assert not torch.equal(out, generate(retro, prompt, temperature=0, eos_id=-1))


# the rest of the contract


def test_streaming_and_seeds(retro):
    seen = []
    options = dict(prompt_lengths=torch.tensor([2, 5]), max_new_tokens=6, filter_fn=no_end)
    prompt = prompt_of(5, b=2)
    out = generate(
        retro, prompt, fetch, on_token=lambda i, t: seen.append((i, t.tolist())), generator=noise(3), **options
    )
    assert seen == [(i, out[:, i].tolist()) for i in range(2, out.shape[1])]
    assert torch.equal(out, generate(retro, prompt, fetch, generator=noise(3), **options))
    assert not torch.equal(out, generate(retro, prompt, fetch, generator=noise(4), **options))


def test_modes_gradients_and_the_prompt_are_left_alone(retro):
    prompt = prompt_of(5)
    kept = prompt.clone()

    def failing(chunk, u):
        raise RuntimeError("no index")

    try:
        retro.train()
        out = generate(retro, prompt, fetch)
        assert retro.training and torch.equal(prompt, kept)
        with pytest.raises(RuntimeError, match="no index"):
            generate(retro, prompt, failing)
        assert retro.training
        retro(out, return_loss=True).backward()  # what was generated can be trained on
    finally:
        retro.zero_grad()
        retro.eval()
    generate(retro, prompt)
    assert not retro.training


def test_dropout_is_off_while_sampling(retro):
    model = RETRO(**{**retro.config, "dec_attn_dropout": 0.5, "dec_ff_dropout": 0.5, "enc_ff_dropout": 0.5})
    model.load_state_dict(retro.state_dict())
    prompt = prompt_of(5)
    expected = generate(retro, prompt, fetch, temperature=0)
    assert torch.equal(generate(model.train(), prompt, fetch, temperature=0), expected)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (prompt_of(0), {}, "one token at least"),
        (prompt_of(1, b=0), {}, "one token at least"),
        (prompt_of(N + 1), {}, "the prompt holds 23 tokens, the model takes 22"),
        (prompt_of(3), dict(max_new_tokens=-1), "max_new_tokens -1 is negative"),
        (prompt_of(3), dict(prompt_lengths=torch.tensor([4])), r"must lie in 1 … 3"),
        (prompt_of(3), dict(prompt_lengths=torch.tensor([0])), r"must lie in 1 … 3"),
        (prompt_of(9), dict(retrieved=torch.ones(1, 3, 2, 8).long()), r"completes 2 of 4 tokens: pass retrieved"),
        (
            prompt_of(5),
            dict(fetch_neighbours=lambda chunk, u: fetch(chunk, u)[0]),
            "fetch_neighbours for chunk 0 has the shape",
        ),
        (
            prompt_of(5),
            dict(fetch_neighbours=lambda chunk, u: fetch(chunk, u)[:, :0]),
            r"\(1, 0, 8\): fetch_neighbours",
        ),
        (prompt_of(5), dict(fetch_neighbours=lambda chunk, u: fetch(chunk, u)[..., :3]), "3 tokens a neighbour"),
        (prompt_of(3), dict(temperature=-1), "temperature -1 is not in"),
        (prompt_of(3), dict(temperature=math.inf), "temperature inf is not in"),
        (prompt_of(3), dict(temperature=math.nan), "temperature nan is not in"),
        (prompt_of(3), dict(filter_thres=math.nan), "thres nan is the share to filter out"),
        (prompt_of(3), dict(filter_fn=top_p, filter_thres=1.5), "thres 1.5 is the share to filter out"),
        (prompt_of(3) + V, {}, "vocabulary"),
    ],
)
def test_bad_calls_are_refused(retro, prompt, options, message):
    with pytest.raises(ValueError, match=message):
        generate(retro, prompt, **options)


SCRIPT = """
import numpy as np, torch  # in a process that checks no annotation
from retro_nb import RETRO, generate
retro = RETRO(num_tokens=40, max_seq_len=9, enc_dim=8, enc_depth=1, dec_dim=8, dec_depth=1, chunk_size=4, heads=1,
              dec_cross_attn_layers=(1,), dim_head=8)
prompt = torch.ones(1, 5).long()
for retro, prompt, options in (
    (retro, [[1, 2]], {}), (retro, np.ones((1, 2), int), {}), (retro, "text", {}), (retro, prompt[0], {}),
    (retro, prompt.float(), {}), (retro, prompt, {"prompt_lengths": [5]}), (retro, prompt, {"retrieved": prompt}),
    (retro, prompt, {"prompt_lengths": torch.tensor([5, 5])}),
    (retro, prompt, {"retrieved": torch.ones(2, 1, 1, 8).long()}),
    (retro, prompt, {"fetch_neighbours": lambda chunk, u: None}),
    (retro, prompt, {"fetch_neighbours": lambda chunk, u: np.ones((1, 1, 8), int)}),
    (retro, prompt, {"fetch_neighbours": lambda chunk, u: torch.ones(1, 1, 8)}),
    (torch.nn.DataParallel(retro), prompt, {}), (torch.nn.Linear(1, 1), prompt, {}),
):
    try:
        generate(retro, prompt, **options)
    except (TypeError, ValueError) as error:
        print(type(error).__name__, error)
"""


def test_what_is_no_tensor_of_tokens_is_named():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    expected = (
        ("TypeError prompt", "of type list: pass a tensor"), ("TypeError prompt", "ndarray: pass a tensor"),
        ("TypeError prompt", "str: pass a tensor"), ("ValueError prompt", "(5,): pass a tensor of token ids, (b, n)"),
        ("TypeError prompt", "float32"), ("TypeError prompt_lengths", "list: pass"), ("ValueError retrieved", "(1, 5)"),
        ("ValueError prompt_lengths has 2 rows", "1 prompts"), ("ValueError retrieved has 2 rows", "1 prompts"),
        ("TypeError the result of fetch_neighbours for chunk 0", "NoneType"),
        ("TypeError the result of fetch_neighbours for chunk 0", "ndarray"),
        ("TypeError the result of fetch_neighbours for chunk 0", "float32"),
        ("TypeError", "DataParallel: pass its .module"), ("TypeError Linear", "pass a RETRO"),
    )  # fmt: skip
    for line, (begin, part) in zip(done.stdout.splitlines(), expected, strict=True):
        assert line.startswith(begin) and part in line, done.stderr


@pytest.mark.slow
def test_two_processes_write_the_same():
    """Same seed, same machine: the weights, the losses and the samples of another process, to the last bit."""
    program = """
import torch
from retro_nb import RETRO, generate, top_p
torch.manual_seed(3)
retro = RETRO(num_tokens=50, max_seq_len=32, enc_dim=16, enc_depth=1, dec_dim=16, dec_depth=2,
              dec_cross_attn_layers=(1, 2), heads=2, dim_head=8, chunk_size=4)
dice = torch.Generator().manual_seed(5)
out = generate(retro, torch.ones(2, 3, dtype=torch.long), lambda chunk, u: chunk[:, None].repeat(1, 2, 2),
               generator=dice, filter_fn=top_p, filter_thres=0.1, eos_id=-1)
print(out.tolist(), retro(out, return_loss=True).item().hex())
"""
    runs = [
        subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True
        )
        for seed in "12"
    ]
    assert all(run.returncode == 0 for run in runs), runs[0].stderr
    assert runs[0].stdout == runs[1].stdout and len(runs[0].stdout) > 100
