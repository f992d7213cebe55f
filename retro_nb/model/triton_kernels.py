"""Triton kernels that decode one token on a GPU, five per layer instead of twenty.

Multiplying one token by a weight matrix is so little work that a GPU spends its time between the kernels. So all
operations between two matrices are fused into the kernel of one of them: norm and rotation before it, bias, GELU
and residual after it. The results are those of the layers (transformer.py). The layers themselves run where these
kernels do not fit: other norms, larger batches, a machine without Triton.

Shapes: b batch, h heads, d width (of a head, in attention), r keys; o outputs of a matrix.
"""

import warnings
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor, nn

from retro_nb.model.layers import (
    ROTARY_DIM,
    Attention,
    ChunkedCrossAttention,
    FeedForward,
    OpenMemory,
    Past,
    Place,
    PreNorm,
    Residual,
    RMSNorm,
)

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

MOST_ROWS = 64  # largest b: tokens that share one read of the weights


def fits(layers: nn.ModuleList, x: Float[Tensor, "b n d"]) -> bool:
    """Whether the kernels can compute these decoder layers for x."""
    return (
        triton is not None
        and x.is_cuda
        and x.shape[1] == 1
        and len(x) <= MOST_ROWS
        and not torch.is_autocast_enabled("cuda")
        and x.dtype != torch.float64
        and all(_plain(block, x.dtype) for layer in layers for block in layer.children())
        and works(x.device)
    )


def _plain(block: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a block has the norm that the kernels compute."""
    return (
        type(block) is PreNorm
        and type(block.norm) is RMSNorm
        and block.norm.gate is None
        and block.norm.gamma.dtype == dtype
    )


@cache
def works(device: torch.device) -> bool:
    """Whether kernels can be compiled for this device: tried once, with a warning if they cannot."""
    try:
        x, each = torch.ones(1, 1, 16, device=device), nn.Linear(16, 16, device=device)
        return torch.allclose(linear(x, each), each(x), atol=1e-3)
    except Exception as error:  # whatever the compiler raises, the layers run without the kernels
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        warnings.warn(f"Triton does not work here, so tokens are sampled without it, slower: {reason}", stacklevel=2)
        return False


def extend(block: Residual[Attention], x: Float[Tensor, "b 1 d"], past: Past, place: Place) -> Float[Tensor, "b 1 d"]:
    """Self-attention of the next token, with its norm and residual."""
    attn = block.fn
    new = linear(x, attn.to_q, attn.to_k, attn.to_v, norm=block.norm)
    out = x.new_empty(len(x), 1, attn.to_q.out_features)
    keys, values = past.room(len(x), attn.heads, attn.dim_head, x)
    _attend[(len(x) * attn.heads,)](
        new, keys, values, place.turn, None, place.positions, out, attn.heads, keys.shape[2], 0, 0, PARTS=3,
        **_sizes(attn),
    )  # fmt: skip
    return linear(out, attn.to_out, residual=x)


def read(
    block: Residual[ChunkedCrossAttention], x: Float[Tensor, "b 1 d"], memory: OpenMemory | None, place: Place
) -> Float[Tensor, "b 1 d"]:
    """Chunked cross-attention of the next token, with its norm and residual."""
    if memory is None:
        return x
    attn = block.fn.attn
    q = linear(x, attn.to_q, norm=block.norm)
    out, r = torch.empty_like(q), memory.keys.shape[2]
    _attend[(len(x) * attn.heads,)](
        q, memory.keys, memory.values, place.reader, memory.bias, None, out, attn.heads, r, r, memory.bias.stride(0),
        PARTS=1, **_sizes(attn),
    )  # fmt: skip
    return linear(out, attn.to_out, residual=x)


def feed(block: Residual[FeedForward], x: Float[Tensor, "b 1 d"]) -> Float[Tensor, "b 1 d"]:
    """The feed-forward layers of the next token, with their norm and residual."""
    widen, narrow = (each for each in block.fn.net if isinstance(each, nn.Linear))
    return linear(linear(x, widen, norm=block.norm, gelu=True), narrow, residual=x)


def linear(
    x: Float[Tensor, "b 1 d"],
    *maps: nn.Linear,
    norm: nn.Module | None = None,  # an RMSNorm: `fits` lets no other pass
    gelu: bool = False,
    residual: Float[Tensor, "b 1 o"] | None = None,
) -> Float[Tensor, "b maps o"]:
    """residual + gelu(map(norm(x))), for up to three maps without bias, or one with bias."""
    b, width, outputs = len(x), maps[0].in_features, maps[0].out_features
    weights = [(maps[i] if i < len(maps) else maps[0]).weight for i in range(3)]
    out = x.new_empty(b, len(maps), outputs)
    sizes = _one_row(width) if b == 1 else _many_rows(b, width, outputs * len(maps))
    _linear[(triton.cdiv(outputs, sizes["BLOCK"]), len(maps))](
        x, *weights, maps[0].bias, None if norm is None else norm.gamma, residual, out, b, width, outputs,
        0.0 if norm is None else norm.eps, GELU=gelu, **sizes,
    )  # fmt: skip
    return out


# The sizes below were the fastest of about ten on an H200, for the layers of a model 896 wide.


def _one_row(width: int) -> dict[str, int | str]:
    """Sizes of `_linear` for one token; it multiplies and sums without tensor cores."""
    step = min(2048, _power(width))
    return dict(ROWS=1, BLOCK=2, STEP=step, PRECISION="ieee", num_warps=8 if step > 1024 else 4)


def _many_rows(b: int, width: int, outputs: int) -> dict[str, int | str]:
    """Sizes for several tokens; tensor cores multiply, with the float32 precision that PyTorch is set to."""
    precision = "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    block, step, warps = (64, 64, 4) if outputs >= 1024 else (16, 128, 2 if b <= 16 else 4)
    step = min(step, _power(width))
    return dict(ROWS=_power(b), BLOCK=block, STEP=step, PRECISION=precision, num_warps=warps, num_stages=4)


def _sizes(attn: Attention) -> dict[str, float | int]:
    d = attn.dim_head
    return dict(
        scale=d**-0.5, d=d, D=_power(d), HALF=min(d, ROTARY_DIM) // 2, R=max(16, 8192 // _power(d)), num_warps=8
    )  # fmt: skip


def _power(number: int) -> int:
    """The next power of 2, at least 16."""
    return max(16, triton.next_power_of_2(number))


if triton is not None:

    @triton.jit
    def _linear(
        x, w0, w1, w2, bias, gamma, residual, out, rows, width, outputs, eps,
        GELU: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """Compute BLOCK outputs of one map for all rows, STEP features of x at a time."""
        part = tl.program_id(1)
        w = w0
        if part == 1:
            w = w1
        if part == 2:
            w = w2
        o, row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, ROWS)
        total = tl.zeros((BLOCK, STEP) if ROWS == 1 else (BLOCK, ROWS), tl.float32)
        squares = tl.zeros((ROWS, STEP), tl.float32)
        for start in range(0, width, STEP):
            i = start + tl.arange(0, STEP)
            inside = (row < rows)[:, None] & (i < width)[None, :]
            values = tl.load(x + row[:, None] * width + i[None, :], inside, 0.0).to(tl.float32)
            if gamma is not None:
                squares += values * values
                values *= tl.load(gamma + i, i < width, 0.0).to(tl.float32)[None, :]
            inside = (o < outputs)[:, None] & (i < width)[None, :]
            weights = tl.load(w + o[:, None] * width + i[None, :], inside, 0.0).to(tl.float32)
            if ROWS == 1:
                total += weights * values
            else:
                total = tl.dot(weights, tl.trans(values), total, input_precision=PRECISION)
        if ROWS == 1:
            total = tl.sum(total, axis=1)[None, :]
        else:
            total = tl.trans(total)
        if gamma is not None:
            total *= tl.rsqrt(tl.sum(squares, axis=1) / width + eps)[:, None]
        if bias is not None:
            total += tl.load(bias + o, o < outputs, 0.0).to(tl.float32)[None, :]
        if GELU:
            total = 0.5 * total * (1 + tl.erf(total * 0.7071067811865476))
        inside = (row < rows)[:, None] & (o < outputs)[None, :]
        if residual is not None:
            total += tl.load(residual + row[:, None] * outputs + o[None, :], inside, 0.0).to(tl.float32)
        place = (row[:, None] * tl.num_programs(1) + part) * outputs + o[None, :]
        tl.store(out + place, total, inside)

    @triton.jit
    def _attend(
        new, keys, values, turn, bias, positions, out, heads, capacity, count, bias_stride, scale,
        d: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, R: tl.constexpr, PARTS: tl.constexpr,
    ):  # fmt: skip
        """One head of one row: rotate the query, with PARTS = 3 store the new key and value, then attend."""
        b, h, f = tl.program_id(0) // heads, tl.program_id(0) % heads, tl.arange(0, D)
        partner = tl.where(f < HALF, f + HALF, tl.where(f < 2 * HALF, f - HALF, f))
        cos, sin = tl.load(turn + f, f < d, 0.0), tl.load(turn + d + f, f < d, 0.0)
        own = new + (b * PARTS * heads + h) * d
        q = tl.load(own + f, f < d, 0.0).to(tl.float32) * cos
        q = (q + tl.load(own + partner, f < d, 0.0).to(tl.float32) * sin) * scale
        past = tl.program_id(0).to(tl.int64) * capacity * d
        if PARTS == 3:
            count = tl.load(positions).to(tl.int32)
            own += heads * d
            k = tl.load(own + f, f < d, 0.0).to(tl.float32) * cos
            k += tl.load(own + partner, f < d, 0.0).to(tl.float32) * sin
            v = tl.load(own + heads * d + f, f < d, 0.0).to(tl.float32)
            tl.store(keys + past + count * d + f, k, f < d)
            tl.store(values + past + count * d + f, v, f < d)
            top = tl.sum(q * k, axis=0)
            total = tl.full((), 1.0, tl.float32)
            result = v
        else:
            top = tl.full((), float("-inf"), tl.float32)
            total = tl.full((), 0.0, tl.float32)
            result = tl.zeros((D,), tl.float32)
        for start in range(0, count, R):
            r = start + tl.arange(0, R)
            place, inside = past + r[:, None] * d + f[None, :], (r < count)[:, None] & (f < d)[None, :]
            score = tl.sum(tl.load(keys + place, inside, 0.0).to(tl.float32) * q[None, :], axis=1)
            if bias is not None:
                score += tl.load(bias + b * bias_stride + r, r < count, 0.0).to(tl.float32)
            score = tl.where(r < count, score, float("-inf"))
            higher = tl.maximum(top, tl.max(score, axis=0))
            weight, shrink = tl.exp(score - higher), tl.exp(top - higher)
            result *= shrink
            result += tl.sum(tl.load(values + place, inside, 0.0).to(tl.float32) * weight[:, None], axis=0)
            total = total * shrink + tl.sum(weight, axis=0)
            top = higher
        tl.store(out + (b * heads + h) * d + f, result / total, f < d)
