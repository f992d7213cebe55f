"""Cross-entropy of a linear output layer that never holds the logits of all tokens (notebook 05).

A token has v logits, 30,522 for BERT's word pieces. The logits of a batch take more memory than all the
activations of a small model, and writing and reading them takes more time than its layers. But the loss of a
token and its derivative depend on the logits of that token alone. So the tokens are processed in blocks, and only
three results of a block are kept: its loss, and the derivatives by its input and by the weights.

Shapes: t tokens, d width, v vocabulary.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import BackwardCFunction, once_differentiable

from retro_nb.common.devices import can_compile

# Logits held at once: on a CPU about the size of its cache, on a GPU enough to keep it busy (0.5 GB in float32).
LOGITS_AT_ONCE = {"cpu": 2**23, "cuda": 2**27}
# A GPU multiplies twice as fast if the number of rows is padded to a multiple of this.
EVEN = {"cpu": 1, "cuda": 64}


def linear_cross_entropy(
    x: Float[Tensor, "t d"], weight: Float[Tensor, "v d"], bias: Float[Tensor, " v"], targets: Int[Tensor, " t"]
) -> Float[Tensor, ""]:
    """Sum over tokens of cross_entropy(x @ weight.T + bias, targets), in nats.

    Under autocast the matrices are multiplied in its dtype; the softmax always has at least float32. Only first
    derivatives are available.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    return _LinearCrossEntropy.apply(x, weight, bias, targets, torch.is_grad_enabled())


@torch.no_grad()
def token_cross_entropy(
    x: Float[Tensor, "t d"], weight: Float[Tensor, "v d"], bias: Float[Tensor, " v"], targets: Int[Tensor, " t"]
) -> Float[Tensor, " t"]:
    """cross_entropy(x @ weight.T + bias, targets) of each token, in nats and float32, computed in blocks."""
    block = _tokens_at_once(x, weight)
    pairs = zip(x.split(block), targets.split(block), strict=True)
    return torch.cat(
        [F.cross_entropy(F.linear(some, weight, bias).float(), target, reduction="none") for some, target in pairs]
    )


class _LinearCrossEntropy(torch.autograd.Function):
    """∂loss/∂logits = softmax − one-hot is known with the loss, so the forward pass computes the derivatives."""

    @staticmethod
    def forward(
        ctx: BackwardCFunction, x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, with_gradients: bool
    ) -> Tensor:
        w, b = _even(weight, x), _even(bias, x, value=float("-inf"))  # padding has probability 0
        total = torch.zeros((), device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        learns = with_gradients and any(ctx.needs_input_grad[1:3])  # the output layer may be frozen
        dx = torch.zeros_like(x)
        sums = [torch.zeros_like(t, dtype=total.dtype) for t in (w, b) if learns]
        block = _tokens_at_once(x, w)
        softmax_loss = _fused_softmax_loss() if x.is_cuda and can_compile("cuda") else _softmax_loss
        with torch.autocast(x.device.type, enabled=False):
            for x_block, target, dx_block in zip(x.split(block), targets.split(block), dx.split(block), strict=True):
                loss, slope = softmax_loss(F.linear(x_block, w, b), target)
                total += loss
                if with_gradients:
                    torch.mm(slope, w, out=dx_block)
                if learns:
                    dw, db = sums
                    dw += slope.T @ x_block
                    db += slope.sum(dim=0, dtype=db.dtype)
        learned = (each[: len(t)].to(t.dtype) for each, t in zip(sums, (weight, bias), strict=False))
        ctx.save_for_backward(dx, *learned)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: BackwardCFunction, upstream: Tensor) -> tuple[Tensor | None, ...]:
        slopes = [t * upstream.to(t.dtype) for t in ctx.saved_tensors]
        return *slopes, *[None] * (5 - len(slopes))


def _tokens_at_once(x: Tensor, weight: Tensor) -> int:
    """Number of tokens in a block."""
    return max(1, LOGITS_AT_ONCE.get(x.device.type, LOGITS_AT_ONCE["cpu"]) // len(weight))


def _even(table: Tensor, x: Tensor, value: float = 0.0) -> Tensor:
    """`table` in x's dtype, padded with rows of `value` to a multiple of EVEN."""
    rows = -len(table) % EVEN.get(x.device.type, 1)
    return F.pad(table.to(x.dtype), (0, 0) * (table.ndim - 1) + (0, rows), value=value)


def _softmax_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Summed loss of a block, and its derivative by the logits, which may be overwritten."""
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    top = exact.amax(dim=-1, keepdim=True)
    asked = exact.gather(-1, targets[:, None])
    exact = exact.sub_(top).exp_()
    mass = exact.sum(dim=-1, keepdim=True)
    loss = (mass.log() + top - asked).sum()
    # The target's derivative p − 1 is tiny for a well-predicted token, so it is rounded only after the subtraction.
    surprise = (asked - top).exp_() / mass - 1
    slope = exact.div_(mass).to(logits.dtype)
    return loss, slope.scatter_(-1, targets[:, None], surprise.to(logits.dtype))


@lru_cache
def _fused_softmax_loss() -> Callable:
    """`_softmax_loss` in a few kernels instead of ten: on a GPU each reads and writes all logits."""
    return torch.compile(_softmax_loss, dynamic=True)
