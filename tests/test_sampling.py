"""Filters, noise and generation; generation against a plain loop that runs the whole model for every token."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from retro_nb.model import RETRO
from retro_nb.sampling import EOS_ID, generate, gumbel_sample, top_k, top_p

M, N, V, PAD = 4, 22, 110, 0
few = settings(max_examples=10, deadline=None)


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


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fetch(chunk: torch.Tensor, u: int) -> torch.Tensor:
    """Neighbours that depend on every token of the chunk and on its number."""
    key = (chunk * torch.arange(1, M + 1)).sum(-1) + 31 * u
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
    lengths = [len(row) for row in rows]
    ends = [min(N, length + new) for length in lengths]
    ended = [position >= end for end in ends]
    while not all(ended):
        seq = torch.tensor([row[:position] for row in rows])
        retrieved = torch.zeros(len(rows), 0, 2, 2 * M).long() if fetch else None
        for u in range(position // M) if fetch else ():
            retrieved = torch.cat((retrieved, fetch(seq[:, u * M : (u + 1) * M], u)[:, None]), dim=1)
        logits = retro(seq, retrieved)[:, -1]
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
    for bad in (-0.1, 1.1):
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
    with pytest.raises(ValueError, match="negative"):
        gumbel_sample(logits, -1.0)


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
        (prompt_of(5), dict(fetch_neighbours=lambda chunk, u: fetch(chunk, u)[0]), "must return"),
        (prompt_of(3), dict(temperature=-1), "negative"),
        (prompt_of(3) + V, {}, "vocabulary"),
    ],
)
def test_bad_calls_are_refused(retro, prompt, options, message):
    with pytest.raises(ValueError, match=message):
        generate(retro, prompt, **options)


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
