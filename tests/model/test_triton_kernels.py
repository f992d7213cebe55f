"""The kernels of one token against the layers that they replace.

They need a GPU and Triton. Where Triton is installed but no GPU is there, TRITON_INTERPRET=1 runs them slowly.
"""

import os

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from retro_nb.model import triton_kernels
from retro_nb.model.layers import (
    Attention,
    ChunkedCrossAttention,
    FeedForward,
    Past,
    Place,
    PostNorm,
    PreNorm,
    RMSNorm,
    hiding,
    rotary,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    triton_kernels.triton is None or (DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1"),
    reason="needs Triton and a CUDA GPU",
)
every_batch = pytest.mark.parametrize("b", [1, 2, 16, 33])
sizes = pytest.mark.parametrize(("d", "heads", "dim_head"), [(40, 2, 16), (24, 3, 40)])


def shaken(fn: nn.Module, d: int) -> PreNorm:
    """`fn` inside its residual, with no weight at 0 or 1."""
    torch.manual_seed(0)
    block = PreNorm(fn, RMSNorm(d))
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return block.to(DEVICE).requires_grad_(False)


@every_batch
@sizes
def test_self_attention(b, d, heads, dim_head):
    block = shaken(Attention(d, heads=heads, dim_head=dim_head, causal=True), d)
    pasts, angles = (Past(7), Past(7)), rotary(torch.arange(7, device=DEVICE), dim_head)
    for i in range(6):
        positions = torch.tensor([i], device=DEVICE)
        bias = hiding(torch.arange(7, device=DEVICE) > positions[:, None], torch.float32)
        place = Place(positions, angles[:, positions], angles[:, positions], bias)
        x = torch.randn(b, 1, d, device=DEVICE)
        expected = block.around(block.fn.extend, x, pasts[0], place)
        assert_close(triton_kernels.extend(block, x, pasts[1], place), expected, atol=1e-4, rtol=1e-4)
    assert_close(pasts[1].keys, pasts[0].keys, atol=1e-4, rtol=1e-4)
    assert_close(pasts[1].values, pasts[0].values, atol=1e-4, rtol=1e-4)


@every_batch
@sizes
def test_cross_attention(b, d, heads, dim_head):
    block = shaken(ChunkedCrossAttention(4, dim=d, context_dim=12, heads=heads, dim_head=dim_head), d)
    mask = torch.rand(b, 1, 2, 9, device=DEVICE) > 0.3
    mask[0] = False  # nothing but the null key
    memory = block.fn.open(torch.randn(b, 1, 2, 9, 12, device=DEVICE), mask)
    reader = rotary(torch.tensor([5], device=DEVICE), dim_head)
    place = Place(torch.tensor([9], device=DEVICE), reader, reader, torch.zeros(1, 10, device=DEVICE))
    x = torch.randn(b, 1, d, device=DEVICE)
    expected = block.around(block.fn.read, x, memory, place.reader)
    assert_close(triton_kernels.read(block, x, memory, place), expected, atol=1e-4, rtol=1e-4)
    assert_close(triton_kernels.read(block, x, None, place), x)


@every_batch
@pytest.mark.parametrize("d", [24, 200])
def test_feed_forward(b, d):
    block, x = shaken(FeedForward(d), d), torch.randn(b, 1, d, device=DEVICE)
    assert_close(triton_kernels.feed(block, x), block(x), atol=1e-4, rtol=1e-4)


def test_what_does_not_fit():
    class Layer(nn.Module):
        def __init__(self, block: nn.Module):
            super().__init__()
            self.block = block

    x = torch.randn(1, 1, 24, device=DEVICE)
    good, ff = nn.ModuleList([Layer(shaken(FeedForward(24), 24))]), FeedForward(24)
    assert triton_kernels.fits(good, x) == (DEVICE == "cuda")
    assert not triton_kernels.fits(good, x.expand(65, 1, 24)) and not triton_kernels.fits(good, x.expand(1, 2, 24))
    assert not triton_kernels.fits(good, x.double()) and not triton_kernels.fits(good, x.cpu())
    for other in (PostNorm(ff, RMSNorm(24)), PreNorm(ff, nn.LayerNorm(24)), PreNorm(ff, RMSNorm(24, gated=True))):
        assert not triton_kernels.fits(nn.ModuleList([Layer(other.to(DEVICE))]), x)
