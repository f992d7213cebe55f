"""The parts of RETRO: normalisation, rotary positions, attention, chunked cross-attention (notebook 04).

Shapes: b batch, n sequence length, m chunk length, l chunks in a sequence, k neighbours, r retrieved tokens
per neighbour, d width, h heads. `_` is a size that no other argument shares.
"""

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from retro_nb.common.devices import attention_kernels
from retro_nb.model.linear import Linear

ROTARY_DIM = 32  # most features of a head that are rotated; the others carry content only
Inner = TypeVar("Inner", bound=nn.Module)


class RMSNorm(nn.Module):
    """Scale every token to root mean square 1: x / sqrt(mean(x²) + eps) · gamma (Zhang & Sennrich 2019).

    `gated` multiplies the result by sigmoid(gate · x), one learned number per feature.
    """

    def __init__(self, dim: int, *, eps: float = 1e-8, gated: bool = False):
        super().__init__()
        self.eps = eps
        self.gamma = nn.Parameter(torch.ones(dim))
        self.gate = nn.Parameter(torch.ones(dim)) if gated else None

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        out = F.rms_norm(x, self.gamma.shape, self.gamma.type_as(x), self.eps)  # one kernel if the types are equal
        return out if self.gate is None else out * (x * self.gate).sigmoid()


class Residual(nn.Module, Generic[Inner]):
    """A residual connection around `fn`, with a norm; the subclasses define `around`."""

    def __init__(self, fn: Inner, norm: nn.Module):
        super().__init__()
        self.fn, self.norm = fn, norm

    def forward(self, x: Float[Tensor, "*b d"], *args, **kwargs) -> Float[Tensor, "*b d"]:
        return self.around(self.fn, x, *args, **kwargs)

    def around(self, fn: Callable[..., Tensor], x: Float[Tensor, "*b d"], *args, **kwargs) -> Float[Tensor, "*b d"]:
        """The same residual around another function, such as a method of `self.fn` for decoding."""
        raise NotImplementedError


class PreNorm(Residual[Inner]):
    """Residual around `fn` with the norm before it: x + fn(norm(x))."""

    def around(self, fn: Callable[..., Tensor], x: Float[Tensor, "*b d"], *args, **kwargs) -> Float[Tensor, "*b d"]:
        return x + fn(self.norm(x), *args, **kwargs)


class PostNorm(Residual[Inner]):
    """Residual around `fn` with the norm after it: norm(scale · x + fn(x)) (DeepNet, Wang et al. 2022)."""

    def __init__(self, fn: Inner, norm: nn.Module, scale: float = 1.0):
        super().__init__(fn, norm)
        self.scale = scale

    def around(self, fn: Callable[..., Tensor], x: Float[Tensor, "*b d"], *args, **kwargs) -> Float[Tensor, "*b d"]:
        return self.norm(self.scale * x + fn(x, *args, **kwargs))


def rotary(positions: Int[Tensor, " n"], dim_head: int) -> Float[Tensor, "2 n {dim_head}"]:
    """Cosine and sine of the angles that rotate a head's first min(dim_head, 32) features at `positions`.

    The sine is −sin for the first feature of a pair, as `rotate` needs it; the other features have angle 0.

    Feature pair i at position p rotates by p / 10000^(2i / dim) radians (RoFormer, Su et al. 2021). The score
    of a query at p and a key at p' then depends on p − p' only: attention sees distances, never positions.
    """
    dim = min(dim_head, ROTARY_DIM)
    frequencies = 10000.0 ** (-torch.arange(0, dim, 2, device=positions.device) / dim)
    angles = rearrange(positions, "n -> n 1") * frequencies
    angles = F.pad(torch.cat((-angles, angles), dim=-1), (0, dim_head - dim))
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x: Float[Tensor, "*b n d"], rotary: Float[Tensor, "2 n d"]) -> Float[Tensor, "*b n d"]:
    """Rotate the leading features of every head by `rotary`; feature i is paired with feature i + dim/2."""
    (cos, sin), half = rotary, min(x.shape[-1], ROTARY_DIM) // 2
    first, second, still = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.addcmul(x * cos, torch.cat((second, first, still), dim=-1), sin).type_as(x)


class Place(NamedTuple):
    """Positions of the tokens being decoded, in the forms that the layers need.

    All tensors lie on the device, so that one recording (cuda_graphs.py) serves every token.
    """

    positions: Int[Tensor, " n"]
    turn: Float[Tensor, "2 n _"]  # rotary of queries and keys in the self-attention
    reader: Float[Tensor, "2 n _"]  # rotary of queries in the attending chunk, at m−1+i
    bias: Float[Tensor, "n _"]  # added to scores of the first tokens of the sequence: 0, or −inf if hidden


class Past:
    """Key-value cache of one self-attention: decoding computes the keys and values of each token once.

    The first use allocates memory for `capacity` tokens, which never moves.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def extend(
        self, keys: Float[Tensor, "b h n d"], values: Float[Tensor, "b h n d"], place: Place
    ) -> tuple[Float[Tensor, "b h _ d"], Float[Tensor, "b h _ d"]]:
        """Store the new tokens' keys and values; return those of all tokens that `place.bias` covers."""
        b, h, _, d = keys.shape
        all_keys, all_values = self.room(b, h, d, keys)
        all_keys.index_copy_(2, place.positions, keys)
        all_values.index_copy_(2, place.positions, values)
        seen = place.bias.shape[1]
        return all_keys[:, :, :seen], all_values[:, :, :seen]

    def room(self, b: int, h: int, d: int, like: Tensor) -> tuple[Float[Tensor, "b h _ d"], Float[Tensor, "b h _ d"]]:
        """The tensors for the keys and values of all `capacity` tokens."""
        if self.keys is None or self.values is None:  # zeros: hidden values are still multiplied, by 0
            self.keys, self.values = (like.new_zeros(b, h, self.capacity, d) for _ in range(2))
        return self.keys, self.values


def hiding(hidden: Bool[Tensor, "*b r"], dtype: torch.dtype) -> Float[Tensor, "*b r"]:
    """Bias for attention scores: −inf where a key is hidden, 0 elsewhere.

    Rows begin at multiples of 8 numbers; otherwise GPU kernels would copy them at every use.
    """
    r = hidden.shape[-1]
    room = torch.zeros(*hidden.shape[:-1], -(-r // 8) * 8, dtype=dtype, device=hidden.device)
    return room[..., :r].masked_fill_(hidden, float("-inf"))


class Attention(nn.Module):
    """Multi-head attention: softmax(q·k / sqrt(dim_head)) v, over the sequence itself or over a context.

    Args:
        dim: width d of the queries' side and of the result.
        context_dim: width of the attended side, by default `dim`.
        causal: token i sees tokens 0 … i only.
        dropout: share of the attention weights dropped in training.
        null_kv: adds one learned key and value, so that a query may attend to nothing at all.
    """

    def __init__(
        self,
        dim: int,
        *,
        context_dim: int | None = None,
        heads: int = 8,
        dim_head: int = 64,
        causal: bool = False,
        dropout: float = 0.0,
        null_kv: bool = False,
    ):
        super().__init__()
        context_dim, inner = context_dim or dim, heads * dim_head
        self.heads, self.dim_head, self.causal, self.dropout = heads, dim_head, causal, dropout
        self.to_q = Linear(dim, inner, bias=False)
        self.to_k = Linear(context_dim, inner, bias=False)
        self.to_v = Linear(context_dim, inner, bias=False)
        self.to_out = Linear(inner, dim)
        self.null_k = nn.Parameter(torch.randn(inner)) if null_kv else None
        self.null_v = nn.Parameter(torch.randn(inner)) if null_kv else None

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        *,
        context: Float[Tensor, "b r _"] | None = None,
        mask: Bool[Tensor, "b _"] | None = None,
        q_rotary: Float[Tensor, "2 n _"] | None = None,
        k_rotary: Float[Tensor, "2 _ _"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Attend from x to `context` (by default x itself); `mask` is True where a key is visible."""
        keys, values = self.keys_values(x if context is None else context, k_rotary)
        return self.attend(self.queries(x, q_rotary), keys, values, mask)

    def queries(
        self, x: Float[Tensor, "b n _"], rotary: Float[Tensor, "2 n _"] | None = None
    ) -> Float[Tensor, "b h n d"]:
        q = rearrange(self.to_q(x), "b n (h d) -> b h n d", h=self.heads)
        return q if rotary is None else rotate(q, rotary)

    def keys_values(
        self, context: Float[Tensor, "b r _"], rotary: Float[Tensor, "2 r _"] | None = None
    ) -> tuple[Float[Tensor, "b h r d"], Float[Tensor, "b h r d"]]:
        k, v = (rearrange(to(context), "b r (h d) -> b h r d", h=self.heads) for to in (self.to_k, self.to_v))
        return (k if rotary is None else rotate(k, rotary)), v

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h r d"],
        v: Float[Tensor, "b h r d"],
        mask: Bool[Tensor, "b r"] | None = None,
    ) -> Float[Tensor, "b n _"]:
        """Softmax over all r keys together, weighted sum of the values, heads merged."""
        if mask is not None and self.null_k is None:
            # A row without any visible key would divide 0 by 0. It attends to everything instead; callers know
            # that its result is padding.
            mask = mask | ~mask.any(dim=-1, keepdim=True)
        if self.null_k is not None:
            k, v = self.with_null(k, v)
            mask = None if mask is None else F.pad(mask, (1, 0), value=True)

        n, r = q.shape[2], k.shape[2]
        if mask is not None:
            mask = rearrange(mask, "b r -> b 1 1 r")
        whole = self.causal and mask is None and n == r  # this case has its own kernel
        if self.causal and not whole and n > 1:
            past = torch.ones(n, r, dtype=torch.bool, device=q.device).tril(r - n)
            mask = past if mask is None else mask & past
        with attention_kernels(queries=n, keys=r):
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=whole, dropout_p=self.dropout if self.training else 0.0
            )
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))

    def with_null(
        self, k: Float[Tensor, "b h r d"], v: Float[Tensor, "b h r d"]
    ) -> tuple[Float[Tensor, "b h _ d"], Float[Tensor, "b h _ d"]]:
        """Prepend the learned null key and value."""
        assert self.null_k is not None and self.null_v is not None
        null = (repeat(t, "(h d) -> b h 1 d", b=len(k), h=self.heads) for t in (self.null_k, self.null_v))
        k, v = (torch.cat((first.type_as(t), t), dim=2) for first, t in zip(null, (k, v), strict=True))
        return k, v

    # decoding

    def extend(self, x: Float[Tensor, "b n d"], past: Past, place: Place) -> Float[Tensor, "b n d"]:
        """Self-attention of the next tokens over the past and themselves; adds them to the past."""
        parts = torch.stack((self.to_q(x), self.to_k(x), self.to_v(x)))
        parts = rearrange(parts, "three b n (h d) -> three b h n d", h=self.heads)
        q, k = rotate(parts[:2], place.turn)
        return self.look(q, *past.extend(k, parts[2], place), place.bias)

    def look(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h r d"],
        v: Float[Tensor, "b h r d"],
        bias: Float[Tensor, "*_ r"],
    ) -> Float[Tensor, "b n _"]:
        """`attend` with `bias` as the only mask.

        Written out, because PyTorch's fused kernels leave most of a GPU idle for a single query.
        """
        weights = (q * self.dim_head**-0.5 @ k.mT + bias).softmax(dim=-1)
        out = weights @ v
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))


class FeedForward(nn.Module):
    """Two linear maps with a GELU between them, `mult` times wider inside."""

    def __init__(self, dim: int, mult: int = 4, dropout: float = 0.0):
        super().__init__()
        inner = mult * dim
        self.net = nn.Sequential(Linear(dim, inner), nn.GELU(), nn.Dropout(dropout), Linear(inner, dim))

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        return self.net(x)


class Memory(NamedTuple):
    """Keys and values of the k·r retrieved tokens that each attending chunk reads in one layer."""

    keys: Float[Tensor, "b h r d"]  # b runs over the l chunks of all sequences, r over all k neighbours
    values: Float[Tensor, "b h r d"]
    mask: Bool[Tensor, "b r"]
    chunks: int  # l


class OpenMemory(NamedTuple):
    """The memory of one chunk per sequence, prepared for many tokens that read one after another."""

    keys: Float[Tensor, "b h r d"]  # the null key first
    values: Float[Tensor, "b h r d"]
    bias: Float[Tensor, "b 1 1 r"]


class ChunkedCrossAttention(nn.Module):
    """CCA(H, E): every attending chunk reads the encoded neighbours of the chunk before (paper eq. 3–6).

    The attending chunk of u is the last token of chunk u and the first m−1 tokens of chunk u+1. These
    tokens may depend on the whole of chunk u, hence on its neighbours E_u:

        sequence          0 …  m−2 │ m−1 … 2m−2 │ 2m−1 … 3m−2 │ …
        attends           nothing  │    E_1     │     E_2     │

    Relative positions (eq. 6): query i of an attending chunk stands at m−1+i, and the r tokens of each
    neighbour stand at 0 … r−1. One softmax runs over all k·r retrieved tokens and the null key.
    """

    def __init__(self, chunk_size: int, **attention):
        super().__init__()
        self.chunk_size = chunk_size
        self.attn = Attention(null_kv=True, **attention)

    def remember(self, encoded: Float[Tensor, "b l k r _"], mask: Bool[Tensor, "b l k r"]) -> Memory:
        """Project the encoded neighbours to keys and values; mask is False on padding."""
        _, l, k, r, _ = encoded.shape
        positions = repeat(torch.arange(r, device=encoded.device), "r -> (k r)", k=k)
        keys, values = self.attn.keys_values(
            rearrange(encoded, "b l k r d -> (b l) (k r) d"), rotary(positions, self.attn.dim_head)
        )
        return Memory(keys, values, rearrange(mask, "b l k r -> (b l) (k r)"), chunks=l)

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        memory: Memory | None,
        kept: Int[Tensor, " c"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Output of the cross-attention, zero where there is nothing to read yet.

        Args:
            x: whole sequences.
            memory: that of their l chunks; None if no chunk has neighbours.
            kept: the memory holds only these c of the b·l chunks; the others have no neighbours and read only
                the null value.
        """
        if memory is None:
            return torch.zeros_like(x)
        m, l = self.chunk_size, memory.chunks if kept is None else x.shape[1] // self.chunk_size
        before = m - 1  # tokens ahead of the first attending chunk
        n = x.shape[1] - before
        width = m if l > 1 else n
        attending = F.pad(x[:, before:], (0, 0, 0, l * width - n))
        attending = rearrange(attending, "b (l m) d -> (b l) m d", l=l)
        if kept is not None:
            attending = attending[kept]

        positions = m - 1 + torch.arange(width, device=x.device)
        q = self.attn.queries(attending, rotary(positions, self.attn.dim_head))
        out = self.attn.attend(q, memory.keys, memory.values, memory.mask)
        if kept is not None:
            out = self._with_null_elsewhere(out, kept, len(x) * l)
        out = rearrange(out, "(b l) m d -> b (l m) d", l=l)[:, :n]
        return F.pad(out, (0, 0, before, 0))

    def _with_null_elsewhere(
        self, out: Float[Tensor, "c m d"], kept: Int[Tensor, " c"], chunks: int
    ) -> Float[Tensor, "{chunks} m d"]:
        """Place `out` at the chunks `kept` and the null value at all others.

        The rows are copied into a separate tensor, because Inductor computes `index_copy` into an expanded view in
        place, so that all rows of the view change (pytorch/pytorch#183986; torch 2.11 to 2.13 at least).
        """
        null_v, to_out = self.attn.null_v, self.attn.to_out
        assert null_v is not None
        # `to_out` is not called: Linear computes a single row differently, and this is one of many
        null = F.linear(null_v, to_out.weight, to_out.bias).type_as(out)
        read = out.new_zeros(chunks, *out.shape[1:]).index_copy(0, kept, out)
        has_read = torch.zeros(chunks, dtype=torch.bool, device=out.device).index_fill(0, kept, True)
        return torch.where(rearrange(has_read, "c -> c 1 1"), read, null)

    # decoding

    def open(self, encoded: Float[Tensor, "b 1 k r _"], mask: Bool[Tensor, "b 1 k r"]) -> OpenMemory:
        """`remember` one chunk per sequence, with the null key prepended and the mask as a bias."""
        keys, values, seen, _ = self.remember(encoded, mask)
        bias = hiding(~F.pad(seen, (1, 0), value=True), keys.dtype)
        return OpenMemory(*self.attn.with_null(keys, values), rearrange(bias, "b r -> b 1 1 r"))

    def read(
        self, x: Float[Tensor, "b n d"], memory: OpenMemory | None, turn: Float[Tensor, "2 n _"]
    ) -> Float[Tensor, "b n d"]:
        """Output for tokens of one attending chunk, zero if it has no neighbours; `turn` is their rotary."""
        if memory is None:
            return torch.zeros_like(x)
        return self.attn.look(self.attn.queries(x, turn), *memory)
