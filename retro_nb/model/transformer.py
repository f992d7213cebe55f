"""The two stacks of RETRO: an encoder of neighbours, and a decoder that reads them (notebook 04)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from retro_nb.model import triton_kernels
from retro_nb.model.cuda_graphs import Recording, can_record
from retro_nb.model.layers import (
    Attention,
    ChunkedCrossAttention,
    FeedForward,
    OpenMemory,
    Past,
    Place,
    PostNorm,
    PreNorm,
    Residual,
    RMSNorm,
    hiding,
    rotary,
)

NORMS = {"RMSNorm": RMSNorm, "LayerNorm": nn.LayerNorm}
Wrap = Callable[[nn.Module], Residual]  # puts a module inside a residual


class Layer(nn.Module):
    """Self-attention, cross-attention (in some layers only) and feed-forward, each inside its residual."""

    def __init__(self, attn: Residual[Attention], cross_attn: Residual | None, ff: Residual[FeedForward]):
        super().__init__()
        self.attn, self.cross_attn, self.ff = attn, cross_attn, ff


class Layers(nn.ModuleList):
    """The layers of a stack; a ModuleList that says what it holds."""

    if TYPE_CHECKING:

        def __iter__(self) -> Iterator[Layer]: ...


def of_chunks(
    x: Shaped[Tensor, "b n *d"], m: int, kept: Int[Tensor, " c"] | None = None
) -> Shaped[Tensor, "_ _ {m} *d"]:
    """Split x into the l complete chunks of each sequence, (b, l, m); with `kept`, only these chunks, (c, 1, m)."""
    l = x.shape[1] // m
    chunks = rearrange(x[:, : l * m], "b (l m) ... -> b l m ...", m=m)
    return chunks if kept is None else rearrange(chunks, "b l ... -> (b l) 1 ...")[kept]


class Encoder(nn.Module):
    """Bidirectional encoder of the retrieved tokens, conditioned on the chunk that retrieved them.

    E_u^j = Encoder(RET(C_u)^j, H_u): in the layers P_enc each neighbour attends to H_u, the activations of
    the chunk it was retrieved for (paper section 2.4, eq. 7: both sides count their positions from 0).
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        cross_attn_layers: Sequence[int],
        *,
        chunk_dim: int,
        out_dim: int | None,
        ff_mult: int,
        ff_dropout: float,
        wrap: Wrap,
        norm_out: nn.Module,
        **attention,
    ):
        super().__init__()
        self.dim_head = attention["dim_head"]
        self.layers = Layers()
        for i in range(1, depth + 1):
            attn, cross = Attention(dim, **attention), None
            if i in cross_attn_layers:
                cross = wrap(Attention(dim, context_dim=chunk_dim, **attention))
            self.layers.append(Layer(wrap(attn), cross, wrap(FeedForward(dim, ff_mult, ff_dropout))))
        self.norm_out = norm_out
        self.project_out = nn.Linear(dim, out_dim) if out_dim else nn.Identity()

    def forward(
        self,
        x: Float[Tensor, "b l k r _"],
        mask: Bool[Tensor, "b l k r"],
        chunks: Float[Tensor, "b l m _"],
        chunk_mask: Bool[Tensor, "b l m"] | None = None,
    ) -> Float[Tensor, "b l k r _"]:
        """Encode embedded neighbours `x`; `chunks` holds H_1 … H_l. The masks are False on padding."""
        b, l, k, r, _ = x.shape
        within = rotary(torch.arange(r, device=x.device), self.dim_head)
        across = repeat(within, "two r d -> two (k r) d", k=k)
        chunk = rotary(torch.arange(chunks.shape[2], device=x.device), self.dim_head)

        x = rearrange(x, "b l k r d -> (b l k) r d")
        mask = rearrange(mask, "b l k r -> (b l k) r")
        chunks = rearrange(chunks, "b l m d -> (b l) m d")
        chunk_mask = None if chunk_mask is None else rearrange(chunk_mask, "b l m -> (b l) m")
        for layer in self.layers:
            x = layer.attn(x, mask=mask, q_rotary=within, k_rotary=within)
            if layer.cross_attn is not None:  # the k neighbours of a chunk share its keys and values
                x = rearrange(x, "(c k) r d -> c (k r) d", k=k)
                x = layer.cross_attn(x, context=chunks, mask=chunk_mask, q_rotary=across, k_rotary=chunk)
                x = rearrange(x, "c (k r) d -> (c k) r d", k=k)
            x = layer.ff(x)
        return rearrange(self.project_out(self.norm_out(x)), "(b l k) r d -> b l k r d", b=b, l=l)


@dataclass
class DecodingState:
    """Everything `RETRO.decode` keeps about the tokens fed so far; made by `RETRO.start_decoding`."""

    capacity: int  # most tokens that can be fed
    retrieval: bool  # RETRO[ON], or RETRO[OFF] = forward(retrieved=None)
    pasts: list[Past]  # self-attention keys and values, one past per layer
    chunk: Tensor  # b m d: the current chunk after self-attention at layer min(P), to condition the encoder
    angles: Tensor  # 2 _ _: rotary of all positions that can occur
    memories: dict[int, OpenMemory | None] = field(default_factory=dict)  # what each layer reads of E_u
    recording: Recording = field(default_factory=Recording)  # of a one-token step, on a GPU
    length: int = 0  # tokens fed so far


class WithModules:
    """Decode by calling the modules, block by block; `triton_kernels` does the same in fewer kernels."""

    @staticmethod
    def extend(block: Residual[Attention], x: Tensor, past: Past, place: Place) -> Tensor:
        return block.around(block.fn.extend, x, past, place)

    @staticmethod
    def read(block: Residual[ChunkedCrossAttention], x: Tensor, memory: OpenMemory | None, place: Place) -> Tensor:
        return block.around(block.fn.read, x, memory, place.reader)

    @staticmethod
    def feed(block: Residual[FeedForward], x: Tensor) -> Tensor:
        return block(x)


class Decoder(nn.Module):
    """A causal transformer in which the layers P read the encoded neighbours.

    RETRO(H, E) = FFW(CCA(ATTN(H), E)) in the layers P, LM(H) = FFW(ATTN(H)) in the others (paper eq. 2).
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        cross_attn_layers: Sequence[int],
        *,
        chunk_size: int,
        encoded_dim: int,
        ff_mult: int,
        ff_dropout: float,
        wrap: Wrap,
        norm_out: nn.Module,
        **attention,
    ):
        super().__init__()
        self.chunk_size, self.dim_head, self.first = chunk_size, attention["dim_head"], min(cross_attn_layers)
        self.layers = Layers()
        for i in range(1, depth + 1):
            attn, cross = Attention(dim, causal=True, **attention), None
            if i in cross_attn_layers:
                cross = wrap(ChunkedCrossAttention(chunk_size, dim=dim, context_dim=encoded_dim, **attention))
            self.layers.append(Layer(wrap(attn), cross, wrap(FeedForward(dim, ff_mult, ff_dropout))))
        self.norm_out = norm_out

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        encoder: Encoder,
        retrieved: Float[Tensor, "_ _ k r _"] | None = None,
        mask: Bool[Tensor, "_ _ k r"] | None = None,
        kept: Int[Tensor, " c"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Process whole sequences (paper Algorithm 1); without `retrieved` the layers P do not read.

        The neighbours have shape (b, l, k, r); with `kept`, those of the c kept chunks have shape (c, 1, k, r).
        """
        turn = rotary(torch.arange(x.shape[1], device=x.device), self.dim_head)
        encoded = None
        for layer in self.layers:
            x = layer.attn(x, q_rotary=turn, k_rotary=turn)
            if layer.cross_attn is not None and retrieved is not None:
                l, m = x.shape[1] // self.chunk_size, self.chunk_size
                if encoded is None and l > 0:  # layer min(P)
                    encoded = encoder(retrieved, mask, of_chunks(x, m, kept))
                memory = None if encoded is None else layer.cross_attn.fn.remember(encoded, mask)
                x = layer.cross_attn(x, memory, kept=kept)
            x = layer.ff(x)
        return self.norm_out(x)

    def decode(
        self,
        x: Float[Tensor, "b n d"],
        state: DecodingState,
        encoder: Encoder,
        retrieved: Float[Tensor, "b 1 k r _"] | None = None,
        mask: Bool[Tensor, "b 1 k r"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Process the next piece of the sequences, which lies in one attending chunk."""
        positions = torch.arange(state.length, state.length + x.shape[1], device=x.device)
        if state.retrieval and (state.length + 1) % self.chunk_size == 0:  # the first token ends a chunk
            if retrieved is not None:
                self._step(x[:, :1], positions[:1], state)  # for state.chunk; the token reads E_u further below
                retrieved = encoder(retrieved, mask, rearrange(state.chunk, "b m d -> b 1 m d"))
            self._remember(state, retrieved, mask)
        out = self._step(x, positions, state)
        state.length += x.shape[1]
        return out

    def _step(
        self, x: Float[Tensor, "b n d"], positions: Int[Tensor, " n"], state: DecodingState
    ) -> Float[Tensor, "b n d"]:
        """Run all layers; for a single token on a GPU, from the second call on, replay a recording."""
        if x.shape[1] == 1 and can_record(x):
            return state.recording.play(partial(self._layers, state, state.capacity), x, positions)
        return self._layers(state, state.length + x.shape[1], x, positions)

    def _layers(
        self, state: DecodingState, seen: int, x: Float[Tensor, "b n d"], positions: Int[Tensor, " n"]
    ) -> Float[Tensor, "b n d"]:
        """Run all layers for tokens at `positions`, which attend over the first `seen` tokens.

        Only the tensors x and positions change from token to token, and repeating a call does no harm.
        """
        m = self.chunk_size
        turn, reader = (state.angles.index_select(1, each) for each in (positions, m - 1 + (positions + 1) % m))
        later = torch.arange(seen, device=x.device) > rearrange(positions, "n -> n 1")
        place = Place(positions, turn, reader, hiding(later, x.dtype))
        ops = triton_kernels if triton_kernels.fits(self.layers, x) else WithModules
        for i, (layer, past) in enumerate(zip(self.layers, state.pasts, strict=True), start=1):
            x = ops.extend(layer.attn, x, past, place)
            if layer.cross_attn is not None and state.retrieval:
                if i == self.first:
                    state.chunk.index_copy_(1, positions % m, x.type_as(state.chunk))
                x = ops.read(layer.cross_attn, x, state.memories.get(i), place)
            x = ops.feed(layer.ff, x)
        return self.norm_out(x)

    def _remember(
        self,
        state: DecodingState,
        encoded: Float[Tensor, "b 1 k r _"] | None,
        mask: Bool[Tensor, "b 1 k r"] | None,
    ) -> None:
        """Make the layers P read `encoded`, copied into the recorded memory if it fits; otherwise record anew."""
        for i, layer in enumerate(self.layers, start=1):
            if layer.cross_attn is None:
                continue
            old = state.memories.get(i)
            new = None if encoded is None else layer.cross_attn.fn.open(encoded, mask)
            if old is not None and new is not None and old.keys.shape == new.keys.shape:
                for place, value in zip(old, new, strict=True):
                    place.copy_(value)
            elif new is not old:
                state.memories[i], state.recording = new, Recording()


def norm_of(norm_klass: type[nn.Module] | str | None, gated: bool, deepnet: bool) -> Callable[[int], nn.Module]:
    """Function from a width to a norm, for both stacks."""
    if gated:
        return partial(RMSNorm, gated=True)
    if deepnet:
        return nn.LayerNorm
    name = norm_klass.__name__ if isinstance(norm_klass, type) else norm_klass or "RMSNorm"
    if name not in NORMS:
        raise ValueError(f"norm_klass {name} is unknown: choose one of {', '.join(NORMS)}")
    return NORMS[name]


def residual(
    norm: Callable[[int], nn.Module], dim: int, deepnet: bool, scale: float | None, default_scale: float
) -> dict[str, Any]:
    """How a stack of width `dim` wraps its parts (`wrap`), and the norm behind its last layer (`norm_out`).

    With `deepnet`, the norms come after the parts, and `scale` multiplies the residual stream.
    """
    if not deepnet:
        return {"wrap": lambda fn: PreNorm(fn, norm(dim)), "norm_out": norm(dim)}
    factor = default_scale if scale is None else scale
    return {"wrap": lambda fn: PostNorm(fn, norm(dim), factor), "norm_out": nn.Identity()}


class DeepNetScales(NamedTuple):
    """DeepNet's residual scales and initial gains for an encoder and a decoder (Wang et al. 2022, table 1)."""

    encoder: float
    decoder: float
    encoder_gain: float
    decoder_gain: float


def deepnet_scales(enc_depth: int, dec_depth: int) -> DeepNetScales:
    """The scales and gains for these numbers of layers."""
    size = (enc_depth**4 * dec_depth) ** (1 / 16)
    return DeepNetScales(0.81 * size, (3 * dec_depth) ** (1 / 4), 0.87 / size, (12 * dec_depth) ** (-1 / 4))


@torch.no_grad()
def deepnet_init(module: nn.Module, gain: float) -> None:
    """Xavier normal initialisation, scaled by `gain` in values, attention outputs and feed-forward."""
    scaled: set[nn.Module] = set()
    for part in module.modules():
        if isinstance(part, Attention):
            scaled |= {part.to_v, part.to_out}
        elif isinstance(part, FeedForward):
            scaled |= {part.net[0], part.net[-1]}
    for linear in module.modules():
        if isinstance(linear, nn.Linear):
            nn.init.xavier_normal_(linear.weight, gain=gain if linear in scaled else 1.0)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
