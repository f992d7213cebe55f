"""The linear map for few rows against the same product in float64 and nn.Linear's own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from retro_nb.model.linear import Linear, linear

SHAPES = [(), (1,), (1, 1), (2,), (2, 1), (1, 3), (4,), (2, 2, 1), (5,), (2, 3), (0,), (0, 1)]


@given(
    shape=st.sampled_from(SHAPES), o=st.integers(1, 9), d=st.integers(1, 70), bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), strided=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_it_is_the_product_for_any_number_of_rows(shape, o, d, bias, dtype, strided, seed):
    dice = torch.Generator().manual_seed(seed)
    x, weight, added = (torch.randn(size, generator=dice).to(dtype) for size in ((*shape, d), (o, d), (o,)))
    if strided:
        x, weight = (t.repeat_interleave(2, dim=-1)[..., ::2] for t in (x, weight))
    added = added if bias else None
    with torch.no_grad():
        out = linear(x, weight, added)
    exact = x.double() @ weight.double().T + (added.double() if bias else 0)
    assert out.shape == (*shape, o) and out.dtype == dtype
    assert_close(out.double(), exact, atol=0.1 if dtype == torch.bfloat16 else 1e-4, rtol=0.02)


@pytest.mark.parametrize("rows", [1, 4, 5])
def test_gradients_and_autocast_are_those_of_nn_linear(rows):
    torch.manual_seed(0)
    ours, plain = Linear(6, 4), nn.Linear(6, 4)
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(rows, 6)
    for each in (ours, plain):
        each(x).square().sum().backward()
    assert_close(ours.weight.grad, plain.weight.grad)
    assert_close(ours.bias.grad, plain.bias.grad)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16
        assert_close(ours(x), plain(x))
