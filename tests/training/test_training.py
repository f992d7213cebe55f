"""Training: the loop equals a hand-written one, and a run that was stopped anywhere equals one that was not.

The file is also the script that its own tests start in other processes: see `CHILDREN` at the end.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import ConcatDataset, DataLoader, Dataset, TensorDataset

from retro_nb.model.retro import RETRO
from retro_nb.store.splits import split_by_document
from retro_nb.training.log import History, read_log
from retro_nb.training.training import ShuffledBatches, evaluate_loss, fit, get_optimizer, learning_rate

CONFIG = dict(
    num_tokens=40, max_seq_len=12, chunk_size=4, enc_dim=8, enc_depth=1, dec_dim=16, dec_depth=1,
    dec_cross_attn_layers=(1,), heads=2, dim_head=8,
)  # fmt: skip
DROPOUT = dict(enc_ff_dropout=0.1, dec_attn_dropout=0.1, dec_ff_dropout=0.1)
RUN = dict(steps=12, batch_size=4, lr=1e-2, checkpoint_every=5, progress=False)


def tiny_retro(**changes) -> RETRO:
    torch.manual_seed(7)
    return RETRO(**(CONFIG | changes))


def tiny_data(sequences: int = 18, padding: bool = True, seed: int = 0) -> TensorDataset:
    """Sequences of 12 + 1 tokens; with `padding` each ends in 0 to 10 padding tokens."""
    generator = torch.Generator().manual_seed(seed)
    seq = torch.randint(1, 40, (sequences, 13), generator=generator)
    if padding:
        ends = torch.randint(3, 14, (sequences, 1), generator=generator)
        seq = seq.masked_fill(torch.arange(13) >= ends, 0)
    return TensorDataset(seq, torch.randint(0, 40, (sequences, 3, 2, 8), generator=generator))


def lasting(history: History) -> list[dict]:
    """The records without what depends on the clock."""
    return [{k: v for k, v in record.items() if "second" not in k} for record in history]


def weights(retro: nn.Module) -> torch.Tensor:
    return torch.cat([param.detach().flatten() for param in retro.parameters()])


def at_forward(retro: nn.Module, number: int, action) -> None:
    """Call `action` at the start of the model's forward pass `number`, counted from 1."""
    calls = iter(range(1, 10**6))

    def hook(*_) -> None:
        if next(calls) == number:
            action()

    retro.register_forward_pre_hook(hook)


class Killed(BaseException):
    """Stands for a kill: nothing in the package may catch it."""


def killed() -> None:
    raise Killed


@pytest.fixture(scope="module")
def uninterrupted() -> tuple[list[dict], torch.Tensor]:
    retro = tiny_retro(**DROPOUT)
    return lasting(fit(retro, tiny_data(), tiny_data(5, seed=1), eval_every=4, **RUN)), weights(retro)


def resume(out_dir: Path, uninterrupted: tuple[list[dict], torch.Tensor]) -> None:
    """Go on with the run in `out_dir` and find every bit the same, whatever the model's weights were."""
    retro = tiny_retro(**DROPOUT)
    if list(out_dir.glob("checkpoints/step-*")):
        nn.init.zeros_(retro.token_emb.weight)
    history = fit(retro, tiny_data(), tiny_data(5, seed=1), eval_every=4, out_dir=out_dir, **RUN)
    assert lasting(history) == uninterrupted[0]
    assert torch.equal(weights(retro), uninterrupted[1])
    assert read_log(out_dir / "log.jsonl") == history
    assert "step-00000012" in os.listdir(out_dir / "checkpoints") and len(os.listdir(out_dir / "checkpoints")) == 2


# the optimizer and the schedule


def test_optimizer_groups_and_order():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 5))
    model[3].weight = model[0].weight  # tied
    embedding, matrix, bias, gain, shift, last_bias = model.parameters()
    optimizer = get_optimizer(iter([*model.parameters(), *model.parameters()]), lr=0.1, wd=0.2)
    decayed, spared = optimizer.param_groups
    assert list(map(id, decayed["params"])) == list(map(id, (embedding, matrix)))
    assert list(map(id, spared["params"])) == list(map(id, (bias, gain, shift, last_bias)))
    assert (decayed["lr"], decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.2, 0.0)

    matrix.requires_grad_(False)
    kept = get_optimizer(model.parameters(), filter_by_requires_grad=True).param_groups[0]["params"]
    assert list(map(id, kept)) == [id(embedding)]


@pytest.mark.parametrize(
    "step, expected",
    [(0, 1e-7), (5, (1e-7 + 2e-4) / 2), (10, 2e-4), (60, 2e-4 * 0.55), (110, 2e-5), (35, 2e-4 * 0.868198)],
)
def test_learning_rate(step, expected):
    assert learning_rate(step, steps=110, lr=2e-4, warmup_steps=10) == pytest.approx(expected, rel=1e-6)


# the order of the data


@given(length=st.integers(1, 30), batch_size=st.integers(1, 40), seed=st.integers(0, 9), data=st.data())
def test_shuffled_batches(length, batch_size, seed, data):
    batches = list(islice(ShuffledBatches(length, batch_size, seed), 2 + 3 * length // batch_size))
    assert {len(batch) for batch in batches} == {batch_size}
    stream = [number for batch in batches for number in batch]
    for epoch in range(len(stream) // length):
        assert sorted(stream[epoch * length : (epoch + 1) * length]) == list(range(length))

    start = data.draw(st.integers(0, len(batches) - 1))
    assert next(iter(ShuffledBatches(length, batch_size, seed, start=start))) == batches[start]
    count = data.draw(st.integers(1, batch_size))
    shares = [next(iter(ShuffledBatches(length, batch_size, seed, share=(p, count)))) for p in range(count)]
    assert all(shares) and sorted(n for share in shares for n in share) == sorted(batches[0])


def test_epochs_and_seeds_have_orders_of_their_own():
    first, second = islice(ShuffledBatches(50, 50, seed=1), 2)
    assert first != second
    assert next(iter(ShuffledBatches(50, 50, seed=2))) != first


class Owned(Dataset):
    def __init__(self, owners):
        self.sequence_documents = np.array(owners)

    def __getitem__(self, index):
        return index

    def __len__(self):
        return len(self.sequence_documents)


@given(
    owners=st.lists(st.integers(0, 9), min_size=2, max_size=40).filter(lambda ids: len(set(ids)) > 1),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 5),
)
def test_split_by_document(owners, share, seed):
    train, valid = split_by_document(Owned(owners), share, seed)
    assert sorted([*train, *valid]) == list(range(len(owners)))
    in_train, in_valid = ({owners[i] for i in side} for side in (train, valid))
    assert in_train and in_valid and not in_train & in_valid
    count = len(set(owners))
    assert len(in_valid) == min(max(round(share * count), 1), count - 1)
    assert split_by_document(Owned(owners), share, seed)[1].indices == valid.indices


def test_another_seed_splits_otherwise():
    documents = list(range(40))
    assert len({tuple(split_by_document(Owned(documents), 0.5, seed)[1].indices) for seed in range(5)}) == 5


def test_split_by_document_errors():
    with pytest.raises(ValueError, match=r"1 document\(s\) cannot be split"):
        split_by_document(Owned([3, 3, 3]))
    with pytest.raises(ValueError, match=r"the share 1\.5"):
        split_by_document(Owned([1, 2]), 1.5)


# the loss


@pytest.mark.parametrize("retrieval", ["on", "off"])
def test_evaluate_loss_is_the_mean_over_tokens(retrieval):
    retro, data = tiny_retro(**DROPOUT).double(), tiny_data(11)
    total = count = 0
    retro.eval()
    for seq, retrieved in data:
        logits = retro(seq[None, :-1], retrieved[None] if retrieval == "on" else None)[0].tolist()
        for row, target in zip(logits, seq[1:].tolist(), strict=True):
            if target != 0:
                total += math.log(math.fsum(map(math.exp, row))) - row[target]
                count += 1
    retro.train()
    losses = [evaluate_loss(retro, data, batch_size=size, retrieval=retrieval) for size in (1, 4, 11)]
    assert losses == pytest.approx([total / count] * 3, rel=1e-12)
    assert retro.training


def test_evaluate_loss_errors():
    with pytest.raises(ValueError, match="'shuffled' is unknown"):
        evaluate_loss(tiny_retro(), tiny_data(), retrieval="shuffled")
    empty = TensorDataset(torch.zeros(2, 13, dtype=torch.int64), torch.zeros(2, 3, 2, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="no token"):
        evaluate_loss(tiny_retro(), empty)


# the loop


@pytest.mark.parametrize("changes, retrieval", [({}, True), (DROPOUT, True), ({}, False)])
def test_fit_equals_the_loop_by_hand(changes, retrieval):
    data, retro = tiny_data(), tiny_retro(**changes)
    optimizer = get_optimizer(retro.parameters(), lr=1e-2, wd=0.1)
    loader = DataLoader(data, batch_sampler=ShuffledBatches(len(data), 4, 3), generator=torch.Generator())
    losses, norms = [], []
    torch.manual_seed(3)
    for step, (seq, retrieved) in zip(range(1, 13), loader, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps=12, lr=1e-2, warmup_steps=2)
        loss = retro(seq, retrieved if retrieval else None, return_loss=True)
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(retro.parameters(), 0.5).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    fitted = tiny_retro(**changes)
    history = fit(fitted, data, grad_clip=0.5, warmup_steps=2, seed=3, retrieval=retrieval, **RUN)
    assert history.losses == pytest.approx(losses, abs=1e-6)
    assert history.curve("grad_norm")[1] == pytest.approx(norms, abs=1e-6)
    torch.testing.assert_close(weights(fitted), weights(retro))
    assert history.steps == list(range(1, 13))
    assert losses[-1] < losses[0]


def test_record(uninterrupted):
    data, records = tiny_data(), uninterrupted[0]
    seen = [n for batch in islice(ShuffledBatches(len(data), 4), 12) for n in batch]
    targets = sum((data[number][0][1:] != 0).sum().item() for number in seen)
    assert records[-1]["tokens"] == targets
    assert [r["lr"] for r in records] == [learning_rate(s, steps=12, lr=1e-2, warmup_steps=1) for s in range(1, 13)]
    assert [r["step"] for r in records if "valid_loss" in r] == [4, 8, 12]


def test_valid_loss_and_the_caller_s_model():
    retro, valid = tiny_retro(**DROPOUT).eval(), tiny_data(5, seed=1)
    before = set(retro.__dict__)
    history = fit(retro, tiny_data(), valid, **RUN)
    assert history[-1]["valid_loss"] == pytest.approx(evaluate_loss(retro, valid), abs=1e-6)
    assert not retro.training and set(retro.__dict__) == before
    assert all(param.grad is None for param in retro.parameters())


@pytest.mark.parametrize("padding", [False, True])
def test_accumulation_equals_a_larger_batch(padding):
    data, whole, parts = tiny_data(padding=padding), tiny_retro(), tiny_retro()
    expected = fit(whole, data, **(RUN | {"batch_size": 6}))
    history = fit(parts, data, accumulate=3, **(RUN | {"batch_size": 2}))
    assert history.losses == pytest.approx(expected.losses, abs=1e-5)
    assert history.curve("tokens") == expected.curve("tokens")
    torch.testing.assert_close(weights(parts), weights(whole), atol=1e-4, rtol=1e-3)


def test_clipping():
    norms = []

    def measure(optimizer, *_):
        grads = [p.grad.norm() for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        norms.append(torch.stack(grads).norm().item())

    handle = register_optimizer_step_pre_hook(measure)
    try:
        clipped = fit(tiny_retro(), tiny_data(), grad_clip=0.01, **RUN)
        free = fit(tiny_retro(), tiny_data(), grad_clip=math.inf, **RUN)
    finally:
        handle.remove()
    assert norms[:12] == pytest.approx([0.01] * 12, rel=1e-3)
    assert norms[12:] == pytest.approx(free.curve("grad_norm")[1], rel=1e-5)
    assert clipped[0]["grad_norm"] == free[0]["grad_norm"] > 0.1


def test_without_retrieval_neighbours_do_not_matter():
    data, retro = tiny_data(), tiny_retro()
    encoder = weights(retro.encoder)
    other = TensorDataset(data.tensors[0], tiny_data(seed=5).tensors[1])
    history = fit(retro, data, data, retrieval=False, **RUN)
    assert lasting(history) == lasting(fit(tiny_retro(), other, other, retrieval=False, **RUN))
    assert torch.equal(weights(retro.encoder), encoder)
    assert history[-1]["valid_loss"] == pytest.approx(evaluate_loss(retro, data, retrieval="off"), abs=1e-6)
    assert lasting(fit(tiny_retro(), data, **RUN)) != lasting(fit(tiny_retro(), other, **RUN))


def test_bf16_and_repeated_runs_in_one_process():
    AcceleratorState._reset_state()
    Accelerator(mixed_precision="bf16")  # as if left over from another cell
    first, retro = fit(tiny_retro(), tiny_data(), **RUN), tiny_retro()
    half = fit(retro, tiny_data(), precision="bf16", **RUN)
    again = fit(tiny_retro(), tiny_data(), **RUN)
    assert lasting(first) == lasting(again)
    assert half.losses != first.losses
    assert half.losses == pytest.approx(first.losses, abs=0.1)
    seq, retrieved = tiny_data()[:2]
    assert retro(seq[:, :-1], retrieved).dtype == weights(retro).dtype == torch.float32
    twice = fit(retro, tiny_data(), precision="bf16", **RUN)  # the model was not left prepared
    assert twice.losses[0] < half.losses[0]


def test_frozen_parameters_stay():
    retro = tiny_retro()
    retro.encoder.requires_grad_(False)
    encoder, decoder = weights(retro.encoder), weights(retro.decoder)
    fit(retro, tiny_data(), **RUN)
    assert torch.equal(weights(retro.encoder), encoder) and not torch.equal(weights(retro.decoder), decoder)


def test_workers_do_not_change_the_data(uninterrupted):
    history = fit(tiny_retro(**DROPOUT), tiny_data(), tiny_data(5, seed=1), eval_every=4, num_workers=2, **RUN)
    assert lasting(history) == uninterrupted[0]


# errors


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"steps": None}, "steps is None and epochs None"),
        ({"epochs": 1}, "steps is 12 and epochs 1"),
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"checkpoint_every": 0}, "checkpoint_every is 0"),
        ({"warmup_steps": 12}, "warmup_steps 12"),
        ({"precision": "fp8"}, "precision 'fp8'"),
    ],
)
def test_settings_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        fit(tiny_retro(), tiny_data(), **(RUN | changes))


def test_an_empty_dataset():
    with pytest.raises(ValueError, match="train holds 0 sequences"):
        fit(tiny_retro(), tiny_data(0), **RUN)
    with pytest.raises(ValueError, match="valid holds 0 sequences"):
        fit(tiny_retro(), tiny_data(), tiny_data(0), **RUN)


def test_a_validation_set_without_a_token_is_refused_before_any_step():
    tokens, retrieved = tiny_data(5).tensors
    tokens[:, 1:] = 0
    retro = tiny_retro()
    at_forward(retro, 1, killed)
    with pytest.raises(ValueError, match="none of the 5 sequences of valid holds a token to predict"):
        fit(retro, tiny_data(), TensorDataset(tokens, retrieved), **RUN)
    tokens[4, 12] = 7
    with pytest.raises(Killed):
        fit(retro, tiny_data(), TensorDataset(tokens, retrieved), **RUN)


def padding_alone(sequences: int) -> TensorDataset:
    """Sequences of a single token, which none follows."""
    seq, retrieved = tiny_data(sequences).tensors
    return TensorDataset(seq.masked_fill(torch.arange(13) > 0, 0), retrieved)


def test_training_data_without_a_token_is_refused_before_any_step():
    retro = tiny_retro()
    at_forward(retro, 1, killed)
    with pytest.raises(ValueError, match="none of the 5 sequences of train holds a token to predict"):
        fit(retro, padding_alone(5), **RUN)


def test_a_batch_without_a_token_is_no_number_that_is_not_finite():
    data = ConcatDataset([padding_alone(14), tiny_data(2)])
    history = fit(tiny_retro(), data, **(RUN | {"batch_size": 1, "steps": 16}))
    assert history[-1]["skipped"] == 0
    assert history.losses.count(0.0) == 14  # the mean over no token, as the model gives it


def test_epochs_are_rounded_up_to_steps():
    assert len(fit(tiny_retro(), tiny_data(18), **(RUN | {"steps": None, "epochs": 2}))) == 9
    assert len(fit(tiny_retro(), tiny_data(3), **(RUN | {"steps": None, "epochs": 1}))) == 1


# numbers that are not finite


class NoDerivative(torch.autograd.Function):
    """Zero, with a derivative that is not a number."""

    @staticmethod
    def forward(ctx, x):
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * math.nan


SPOILT = {
    "nan": lambda loss: loss * math.nan,
    "inf": lambda loss: loss * math.inf,
    "gradient": lambda loss: loss + NoDerivative.apply(loss),
}


def spoil(retro: nn.Module, passes: set[int], kind: str = "nan") -> None:
    """Spoil the loss, or only its gradient, of these forward passes, counted from 1."""
    numbers = iter(range(1, 10**6))
    retro.register_forward_hook(lambda _, __, loss: SPOILT[kind](loss) if next(numbers) in passes else None)


def saved_weights(folder: Path) -> torch.Tensor:
    return weights(RETRO.from_pretrained(folder))


@pytest.mark.parametrize("kind", SPOILT)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_step_that_is_not_finite_changes_nothing(tmp_path, kind, accumulate):
    """The same as the loop by hand that leaves the step out, moments and count of steps included."""
    data, retro, bad = tiny_data(padding=False), tiny_retro(), {2, 3, 8}
    optimizer = get_optimizer(retro.parameters(), lr=1e-2, wd=0.1)
    loader = iter(DataLoader(data, batch_sampler=ShuffledBatches(len(data), 2, 0), generator=torch.Generator()))
    for step in range(1, 13):
        for seq, retrieved in islice(loader, accumulate):
            (retro(seq, retrieved, return_loss=True) / accumulate).backward()
        nn.utils.clip_grad_norm_(retro.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps=12, lr=1e-2, warmup_steps=1)
        if step not in bad:
            optimizer.step()
        optimizer.zero_grad()

    fitted = tiny_retro()
    spoil(fitted, {step * accumulate for step in bad}, kind)
    run = RUN | {"batch_size": 2, "accumulate": accumulate, "out_dir": tmp_path}
    with pytest.warns(UserWarning, match=r"changed no weight, the last step 8: loss .*sequences \["):
        history = fit(fitted, data, **run)
    torch.testing.assert_close(weights(fitted), weights(retro), atol=1e-5, rtol=1e-5)
    state = torch.load(tmp_path / "checkpoints" / "step-00000012" / "optimizer.bin")["state"]
    assert {int(moments["step"]) for moments in state.values()} == {12 - len(bad)}
    assert history.curve("skipped")[1] == [0, 1, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3]
    assert set(range(1, 13)) - set(history.curve("grad_norm")[0]) == bad
    assert history.curve("tokens")[1] == [step * 2 * accumulate * 12 for step in range(1, 13)]
    for line in (tmp_path / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # NaN and Infinity are not JSON


def test_skipped_steps_do_not_disturb_an_exact_resume(tmp_path):
    def run(out_dir: Path, stop: int = 0) -> tuple[list[dict], torch.Tensor]:
        retro = tiny_retro(**DROPOUT)
        spoil(retro, {7}) if stop or out_dir.name == "whole" else spoil(retro, {2})  # step 7: it goes on from 5
        if stop:
            at_forward(retro, stop, killed)
        return lasting(fit(retro, tiny_data(), out_dir=out_dir, **RUN)), weights(retro)

    with pytest.warns(UserWarning, match="step 7"):
        whole = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "parts", stop=9)
    with pytest.warns(UserWarning, match="step 7"):
        parts = run(tmp_path / "parts")
    assert parts[0] == whole[0] and torch.equal(parts[1], whole[1])


@pytest.mark.parametrize("log_every", [1, 4, 100])
def test_several_steps_in_a_row_end_the_run(tmp_path, log_every):
    data, retro, run = tiny_data(), tiny_retro(), RUN | {"steps": 40, "log_every": log_every, "checkpoint_every": 4}
    spoil(retro, set(range(14, 24)))
    batch = list(islice(ShuffledBatches(len(data), 4), 23))[-1]
    with pytest.raises(FloatingPointError) as error:
        fit(retro, data, out_dir=tmp_path, **run)
    assert f"step 23: loss nan, gradient norm nan, sequences {batch}" in str(error.value)
    newest = max((tmp_path / "checkpoints").glob("step-*"))
    assert str(newest) in str(error.value) and newest.name in ("step-00000020", "step-00000024")
    assert "lower lr" in str(error.value) and saved_weights(newest).isfinite().all()
    assert read_log(tmp_path / "log.jsonl")[22]["skipped"] == 10

    fewer = tiny_retro()
    spoil(fewer, {*range(3, 12), *range(13, 22)})
    with pytest.warns(UserWarning, match="changed no weight"):
        history = fit(fewer, data, **run)
    assert history[-1]["skipped"] == 18 and history[-1]["step"] == 40


def test_a_run_of_which_every_step_is_skipped_ends_with_an_error():
    retro = tiny_retro()
    spoil(retro, {1, 2, 3})
    run = RUN | {"steps": 3, "log_every": 100}
    with pytest.raises(FloatingPointError, match=r"3 steps in a row .* step 3: loss nan"):
        fit(retro, tiny_data(), **run)


def test_a_checkpoint_never_holds_a_number_that_is_not_finite(tmp_path):
    retro = tiny_retro()
    at_forward(retro, 6, lambda: nn.init.constant_(retro.token_emb.weight, math.inf))
    message = r"after step 6, .*token_emb.weight.*the last good checkpoint is .*step-00000004"
    with pytest.raises(FloatingPointError, match=message), pytest.warns(UserWarning, match="changed no weight"):
        fit(retro, tiny_data(), out_dir=tmp_path, **(RUN | {"checkpoint_every": 2}))
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-00000002", "step-00000004"]
    assert saved_weights(tmp_path / "checkpoints" / "step-00000004").isfinite().all()


def test_weights_that_are_not_finite_are_refused_before_the_first_step():
    retro = tiny_retro()
    retro.token_emb.weight.data[3, 1] = math.nan
    at_forward(retro, 1, killed)
    with pytest.raises(FloatingPointError, match=r"before the first step, .*token_emb\.weight"):
        fit(retro, tiny_data(), **RUN)


def test_a_validation_loss_that_is_not_finite_names_the_sequences():
    retro = tiny_retro()
    spoil(retro, {2})
    with pytest.raises(FloatingPointError, match=r"sequences \[4, 5, 6, 7\]"):
        evaluate_loss(retro, tiny_data(10), batch_size=4)
    measure = iter([0.5, math.nan])
    with pytest.raises(FloatingPointError, match="after step 4, measure gives score nan"):
        fit(tiny_retro(), tiny_data(), tiny_data(5), measure=lambda: {"score": next(measure)}, eval_every=2, **RUN)


@pytest.mark.parametrize("value, error", [
    (np.float32("nan"), FloatingPointError), (-math.inf, FloatingPointError), (torch.tensor(1.0), TypeError),
    ("0.5", TypeError), ({"a": math.nan}, TypeError),
])  # fmt: skip
def test_what_is_measured_must_be_a_finite_number(value, error):
    with pytest.raises(error, match="after step 12, measure gives score"):
        fit(tiny_retro(), tiny_data(), tiny_data(5), measure=lambda: {"score": value}, **RUN)


def test_numpy_s_numbers_can_be_measured(tmp_path):
    measure = dict(score=np.float32(0.5), count=np.int64(3))
    history = fit(tiny_retro(), tiny_data(), tiny_data(5), measure=lambda: measure, out_dir=tmp_path, **RUN)
    assert history[-1]["score"] == 0.5 and history[-1]["count"] == 3 and read_log(tmp_path / "log.jsonl") == history


# stopping and going on


@pytest.mark.parametrize("stop", [3, 9, 14])  # in step 3, in step 7, in step 10
def test_a_run_that_broke_goes_on(tmp_path, stop, uninterrupted):
    retro = tiny_retro(**DROPOUT)
    at_forward(retro, stop, killed)
    with pytest.raises(Killed):
        fit(retro, tiny_data(), tiny_data(5, seed=1), eval_every=4, out_dir=tmp_path, log_every=1, **RUN)
    resume(tmp_path, uninterrupted)
    resume(tmp_path, uninterrupted)  # a finished run has nothing left to do


def test_going_on_with_accumulation(tmp_path):
    run = RUN | {"batch_size": 2, "accumulate": 3}
    expected, retro = fit(tiny_retro(**DROPOUT), tiny_data(), **run), tiny_retro(**DROPOUT)
    at_forward(retro, 3 * 8 + 2, killed)  # in the midst of step 9
    with pytest.raises(Killed):
        fit(retro, tiny_data(), out_dir=tmp_path, **run)
    assert lasting(fit(tiny_retro(**DROPOUT), tiny_data(), out_dir=tmp_path, **run)) == lasting(expected)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "a scheduler"])
def test_who_stops_it_gets_a_checkpoint(tmp_path, uninterrupted, number, capsys):
    retro, handlers = tiny_retro(**DROPOUT), [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    at_forward(retro, 9, lambda: os.kill(os.getpid(), number))  # step 7: passes 5 and 6 evaluate
    with pytest.raises(
        KeyboardInterrupt, match=r"stopped after step 7 of \d+, saved in .*step-00000007: the same call"
    ):
        fit(retro, tiny_data(), tiny_data(5, seed=1), eval_every=4, out_dir=tmp_path, **RUN)
    assert "interrupt again to stop at once" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-00000005", "step-00000007"]
    assert read_log(tmp_path / "log.jsonl").steps == [1, 2, 3, 4, 5, 6, 7]
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    resume(tmp_path, uninterrupted)


def test_a_second_interrupt_stops_at_once(tmp_path, uninterrupted, capsys):
    retro = tiny_retro(**DROPOUT)
    at_forward(retro, 9, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])  # in step 7
    with pytest.raises(KeyboardInterrupt, match=r"stopped at once, .* goes on from the newest checkpoint"):
        fit(retro, tiny_data(), tiny_data(5, seed=1), eval_every=4, out_dir=tmp_path, **RUN)
    assert capsys.readouterr().err.count("interrupt again to stop at once") == 1
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-00000005"]
    resume(tmp_path, uninterrupted)


def half_saved(value, path: Path, save=torch.save) -> None:
    save(value, path)
    if Path(path).name == "optimizer.bin":
        with open(path, "r+b") as file:
            file.truncate(100)
        killed()


def at_rename(source, target, replace=os.replace) -> None:
    killed() if Path(target).name == "step-00000010" else replace(source, target)


def at_removal(path, missing_ok=False, unlink=Path.unlink) -> None:
    unlink(path, missing_ok)
    if path.parent.name == "step-00000005":
        killed()


@pytest.mark.parametrize(
    "name, patch",
    [("torch.save", half_saved), ("os.replace", at_rename), ("pathlib.Path.unlink", at_removal)],
)
def test_killed_while_saving(tmp_path, monkeypatch, name, patch, uninterrupted):
    data, valid = tiny_data(), tiny_data(5, seed=1)
    if patch is half_saved:  # the second time only: the first checkpoint has to survive
        retro = tiny_retro(**DROPOUT)
        at_forward(retro, 9, killed)
        with pytest.raises(Killed):
            fit(retro, data, valid, eval_every=4, out_dir=tmp_path, **RUN)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(name, patch)
        fit(tiny_retro(**DROPOUT), data, valid, eval_every=4, out_dir=tmp_path, **RUN)
    assert (tmp_path / "checkpoints" / "step-00000005").exists()
    resume(tmp_path, uninterrupted)


def test_a_full_disk_names_the_checkpoint_and_keeps_the_one_before(tmp_path, monkeypatch):
    fit(tiny_retro(), tiny_data(), out_dir=tmp_path, **RUN)
    kept = (tmp_path / "checkpoints" / "step-00000012" / "optimizer.bin").read_bytes()
    shutil.copytree(tmp_path, tmp_path / "copy")
    monkeypatch.setattr(RETRO, "save_pretrained", lambda *_: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
    with pytest.raises(OSError, match=r"could not save .*step-00000005.*No space left"):
        fit(tiny_retro(), tiny_data(), out_dir=tmp_path / "new", **RUN)
    assert (tmp_path / "checkpoints" / "step-00000012" / "optimizer.bin").read_bytes() == kept


def test_starting_over(tmp_path):
    fit(tiny_retro(), tiny_data(), out_dir=tmp_path, **RUN)
    retro, other = tiny_retro(), RUN | {"lr": 1e-3}
    at_forward(retro, 3, killed)
    with pytest.raises(Killed):
        fit(retro, tiny_data(), out_dir=tmp_path, resume=False, log_every=1, **other)
    assert read_log(tmp_path / "log.jsonl").steps == [1, 2] and not list(tmp_path.glob("checkpoints/step-*"))
    expected = fit(tiny_retro(), tiny_data(), **other)
    assert lasting(fit(tiny_retro(), tiny_data(), out_dir=tmp_path, **other)) == lasting(expected)


@pytest.mark.parametrize(
    "model, run, message",
    [
        ({"dec_depth": 2}, {}, "another model: dec_depth is 1 there and 2 here"),
        ({}, {"lr": 1e-3}, "another run: lr is 0.01 there and 0.001 here"),
        ({}, {"steps": 13}, "another run: steps is 12 there and 13 here"),
        ({}, {"retrieval": False}, "another run: retrieval is True there and False here"),
        ({}, {"seed": 1}, "another run: seed"),
    ],
)
def test_a_checkpoint_of_another_model_or_run(tmp_path, finished, model, run, message):
    out_dir = shutil.copytree(finished, tmp_path / "run")
    retro = tiny_retro(**model)
    before = weights(retro)
    with pytest.raises(ValueError, match=message):
        fit(retro, tiny_data(), out_dir=out_dir, **(RUN | run))
    assert torch.equal(weights(retro), before)
    assert (out_dir / "log.jsonl").read_bytes() == (finished / "log.jsonl").read_bytes()


def test_what_does_not_change_the_losses_may_change(finished):
    assert len(fit(tiny_retro(), tiny_data(), out_dir=finished, **(RUN | {"checkpoint_every": 3}))) == 12


def test_a_checkpoint_is_a_model(finished):
    retro = tiny_retro()
    fit(retro, tiny_data(), **RUN)
    loaded = RETRO.from_pretrained(finished / "checkpoints" / "step-00000012")
    assert torch.equal(weights(loaded), weights(retro))


def test_an_unfinished_line_is_not_read(finished, tmp_path):
    lines = (finished / "log.jsonl").read_text()
    (tmp_path / "log.jsonl").write_text(lines + '{"step": 13, "lo')
    assert read_log(tmp_path / "log.jsonl") == read_log(finished / "log.jsonl")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    out_dir = tmp_path_factory.mktemp("finished")
    fit(tiny_retro(), tiny_data(), out_dir=out_dir, **RUN)
    return out_dir


# other processes


def start(name: str, out_dir: Path, processes: int = 1, **variables: str) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), __file__, name, str(out_dir)]
    variables |= {"OMP_NUM_THREADS": str(torch.get_num_threads()), "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(command, env=os.environ | variables, stdout=-1, stderr=-1, text=True)


def child_alone(out_dir: Path) -> None:
    """Print a report, then run again and die while saving the second checkpoint."""

    def save(self, folder, whole=RETRO.save_pretrained):
        whole(self, folder)
        if (out_dir / "checkpoints" / "step-00000005").exists():
            (Path(folder) / "config.json").write_text("{")
            os.kill(os.getpid(), signal.SIGKILL)

    retro, data, valid = tiny_retro(**DROPOUT), tiny_data(), tiny_data(5, seed=1)
    names = {id(param): name for name, param in retro.named_parameters()}
    groups = get_optimizer(retro.parameters()).param_groups
    order = [[names[id(param)] for param in group["params"]] for group in groups]
    print(json.dumps({"order": order, "history": lasting(fit(retro, data, valid, eval_every=4, **RUN))}), flush=True)
    RETRO.save_pretrained = save
    fit(tiny_retro(**DROPOUT), data, valid, eval_every=4, out_dir=out_dir, **RUN)


@pytest.mark.slow
def test_another_process_agrees_and_survives_sigkill(tmp_path, uninterrupted):
    child = start("alone", tmp_path, PYTHONHASHSEED="1")
    output, errors = child.communicate()
    assert child.returncode == -signal.SIGKILL, errors
    report = json.loads(output)
    assert report["history"] == uninterrupted[0]
    names = [name for name, _ in tiny_retro().named_parameters()]
    assert all(group == sorted(group, key=names.index) for group in report["order"])
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["saving", "step-00000005"]
    resume(tmp_path, uninterrupted)


def child_share(out_dir: Path) -> None:
    retro = tiny_retro()
    at_forward(retro, 20, killed)  # in step 9: two passes a step, one an evaluation
    fit(retro, tiny_data(), tiny_data(5, seed=1), eval_every=4, accumulate=2, out_dir=out_dir, log_every=1, **RUN)


@pytest.mark.slow
def test_two_processes_share_the_batch(tmp_path):
    run = RUN | {"accumulate": 2, "eval_every": 4}
    expected = fit(tiny_retro(), tiny_data(), tiny_data(5, seed=1), **run)
    _, errors = start("share", tmp_path, processes=2).communicate()
    assert "Killed" in errors, errors
    shared = read_log(tmp_path / "log.jsonl")
    assert len(shared) == 8 and (tmp_path / "checkpoints/step-00000005/random_states_1.bin").exists()
    with pytest.warns(UserWarning, match=r"saved by 2 process\(es\) and goes on with 1: dropout draws other"):
        alone = fit(tiny_retro(), tiny_data(), tiny_data(5, seed=1), out_dir=tmp_path, **run)  # goes on from step 5
    for history in (shared, alone):
        for name in ("loss", "grad_norm", "valid_loss", "tokens"):
            steps, values = history.curve(name)
            assert values == pytest.approx(expected.curve(name)[1][: len(steps)], rel=1e-4)
    assert alone[:5] == shared[:5] and len(alone) == 12


def child_skip(out_dir: Path) -> None:
    """Only the second process meets a number that is not finite."""
    retro = tiny_retro()
    if os.environ["RANK"] == "1":
        spoil(retro, {4})
    fit(retro, tiny_data(), out_dir=out_dir, **RUN)


@pytest.mark.slow
def test_two_processes_skip_alike(tmp_path):
    retro = tiny_retro()
    spoil(retro, {4})
    with pytest.warns(UserWarning, match="changed no weight"):
        expected = fit(retro, tiny_data(), **RUN)
    child = start("skip", tmp_path, processes=2)
    _, errors = child.communicate()
    assert child.returncode == 0 and errors.count("changed no weight") == 1, errors
    shared = read_log(tmp_path / "log.jsonl")
    assert shared.steps == expected.steps and shared.curve("skipped") == expected.curve("skipped")
    assert shared.losses == pytest.approx(expected.losses, rel=1e-4)
    torch.testing.assert_close(
        saved_weights(tmp_path / "checkpoints" / "step-00000012"), weights(retro), atol=1e-4, rtol=1e-3
    )


CHILDREN = {"alone": child_alone, "share": child_share, "skip": child_skip}

if __name__ == "__main__":
    CHILDREN[sys.argv[1]](Path(sys.argv[2]))
