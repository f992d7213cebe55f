"""The blockwise loss equals PyTorch's cross-entropy of all logits at once."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from retro_nb.model import loss
from retro_nb.model.loss import linear_cross_entropy, token_cross_entropy


def problem(t, d, v, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(size, generator=generator, dtype=dtype) for size in ((t, d), (v, d), (v,))]
    return [x.requires_grad_() for x in draw], torch.randint(v, (t,), generator=generator)


def both(inputs, targets, at_once, even=1):
    """(value, gradients) of ours and of PyTorch's, a factor upstream included."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(loss.LOGITS_AT_ONCE, "cpu", at_once)
        patch.setitem(loss.EVEN, "cpu", even)
        ours = linear_cross_entropy(*inputs, targets)
        ours_grads = torch.autograd.grad(ours * 0.3, inputs)
    x, weight, bias = inputs
    plain = F.cross_entropy(F.linear(x, weight, bias), targets, reduction="sum")
    return (ours, *ours_grads), (plain, *torch.autograd.grad(plain * 0.3, inputs))


@settings(deadline=None, max_examples=50)
@given(
    t=st.integers(0, 9), d=st.integers(1, 5), v=st.integers(1, 7), at_once=st.integers(1, 40),
    even=st.sampled_from([1, 4]), seed=st.integers(0, 99),
)  # fmt: skip
def test_value_and_gradients_for_every_size_of_block(t, d, v, at_once, even, seed):
    for ours, plain in zip(*both(*problem(t, d, v, seed), at_once, even), strict=True):
        assert_close(ours, plain)


def test_extreme_logits_neither_overflow_nor_vanish():
    inputs, targets = problem(6, 3, 11, dtype=torch.float32)
    with torch.no_grad():
        inputs[1].mul_(1e4)
    for ours, plain in zip(*both(inputs, targets, 22), strict=True):
        assert ours.isfinite().all()
        assert_close(ours, plain)


def test_gradients_by_finite_differences():
    inputs, targets = problem(4, 3, 5)
    assert torch.autograd.gradcheck(lambda *x: linear_cross_entropy(*x, targets), inputs)


def test_autocast_multiplies_in_bfloat16_and_adds_up_in_float32():
    inputs, targets = problem(300, 16, 50, dtype=torch.float32)
    exact, *exact_grads = both(inputs, targets, 1000)[1]
    with torch.autocast("cpu", torch.bfloat16):
        value = linear_cross_entropy(*inputs, targets)
    grads = torch.autograd.grad(value * 0.3, inputs)
    assert value.dtype == torch.float32 and all(g.dtype == torch.float32 for g in grads)
    assert_close(value, exact, rtol=2e-3, atol=0)
    for ours, plain in zip(grads, exact_grads, strict=True):
        assert (ours - plain).norm() < 1e-2 * plain.norm()


def test_losses_of_tokens_are_float32_of_the_bfloat16_logits(monkeypatch):
    """Whole numbers, so that no logit depends on the order of a sum; each is rounded to bfloat16."""
    (t, d, v), generator = (10, 16, 50), torch.Generator().manual_seed(0)
    numbers = [torch.randint(-40, 41, size, generator=generator).bfloat16() for size in ((t, d), (v, d), (v,))]
    x, weight, bias = numbers[0], numbers[1] / 256, numbers[2] / 256
    targets = torch.randint(v, (t,), generator=generator)
    exact, logits = F.linear(x.double(), weight.double(), bias.double()), F.linear(x, weight, bias)
    assert_close(logits, exact.bfloat16(), atol=0, rtol=0)
    monkeypatch.setitem(loss.LOGITS_AT_ONCE, "cpu", 3 * v)  # blocks of three tokens, and one that is left
    losses = token_cross_entropy(x, weight, bias, targets)
    assert losses.dtype == torch.float32
    expected = F.cross_entropy(logits.double(), targets, reduction="none")
    assert_close(losses.double(), expected, atol=1e-5, rtol=1e-6)
    assert (F.cross_entropy(exact, targets, reduction="none") - expected).abs().max() > 1e-3, "nothing was rounded"


def test_nothing_is_computed_for_derivatives_that_nobody_wants(monkeypatch):
    inputs, targets = problem(5, 3, 4)
    monkeypatch.setattr(torch, "mm", None)
    with torch.no_grad():
        assert linear_cross_entropy(*inputs, targets) > 0
