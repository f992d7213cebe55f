"""The two stacks of RETRO: an encoder of neighbours, and a decoder that reads them (notebook 04)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn

from retro_nb.layers import Attention, ChunkedCrossAttention, FeedForward, KeyValueCache, Memory, rotary

Wrap = Callable[[nn.Module], nn.Module]  # puts a module inside its residual


class Layer(nn.Module):
    """Self-attention, cross-attention (in some layers only) and feed-forward, each inside its residual."""

    def __init__(self, attn: nn.Module, cross_attn: nn.Module | None, ff: nn.Module):
        super().__init__()
        self.attn, self.cross_attn, self.ff = attn, cross_attn, ff


class Encoder(nn.Module):
    """Reads the retrieved tokens in both directions, in the light of the chunk that retrieved them.

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
        self.layers = nn.ModuleList()
        for i in range(1, depth + 1):
            attn, cross = Attention(dim, **attention), None
            if i in cross_attn_layers:
                cross = wrap(Attention(dim, context_dim=chunk_dim, **attention))
            self.layers.append(Layer(wrap(attn), cross, wrap(FeedForward(dim, ff_mult, ff_dropout))))
        self.norm_out = norm_out
        self.project_out = nn.Linear(dim, out_dim) if out_dim else nn.Identity()

    def forward(
        self, x: Float[Tensor, "b l k r _"], mask: Bool[Tensor, "b l k r"], chunks: Float[Tensor, "b l m _"]
    ) -> Float[Tensor, "b l k r _"]:
        """Encode embedded neighbours `x`; `mask` is False on their padding, `chunks` holds H_1 … H_l."""
        b, l, k, r, _ = x.shape
        within = rotary(torch.arange(r, device=x.device), self.dim_head)
        across = repeat(within, "two r d -> two (k r) d", k=k)
        chunk = rotary(torch.arange(chunks.shape[2], device=x.device), self.dim_head)

        x = rearrange(x, "b l k r d -> (b l k) r d")
        mask = rearrange(mask, "b l k r -> (b l k) r")
        chunks = rearrange(chunks, "b l m d -> (b l) m d")
        for layer in self.layers:
            x = layer.attn(x, mask=mask, q_rotary=within, k_rotary=within)
            if layer.cross_attn is not None:  # the k neighbours of a chunk share its keys and values
                x = rearrange(x, "(c k) r d -> c (k r) d", k=k)
                x = layer.cross_attn(x, context=chunks, q_rotary=across, k_rotary=chunk)
                x = rearrange(x, "c (k r) d -> (c k) r d", k=k)
            x = layer.ff(x)
        return rearrange(self.project_out(self.norm_out(x)), "(b l k) r d -> b l k r d", b=b, l=l)


@dataclass
class DecodingState:
    """Everything `RETRO.decode` keeps of the tokens it was fed; made by `RETRO.start_decoding`."""

    capacity: int  # tokens there is room for
    retrieval: bool  # RETRO[ON], or RETRO[OFF] = forward(retrieved=None)
    caches: list[KeyValueCache]  # self-attention keys and values, one cache a layer
    chunk: Tensor  # b i d: the current chunk after self-attention at layer min(P), to condition the encoder
    memories: dict[int, Memory | None] = field(default_factory=dict)  # what each layer reads of E_u
    length: int = 0  # tokens fed so far


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
        self.layers = nn.ModuleList()
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
        retrieved: Float[Tensor, "b l k r _"] | None = None,
        mask: Bool[Tensor, "b l k r"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Whole sequences at once (paper Algorithm 1); without `retrieved` the layers P do not read."""
        turn = rotary(torch.arange(x.shape[1], device=x.device), self.dim_head)
        encoded = None
        for layer in self.layers:
            x = layer.attn(x, q_rotary=turn, k_rotary=turn)
            if layer.cross_attn is not None and retrieved is not None:
                l, m = retrieved.shape[1], self.chunk_size
                if encoded is None and l > 0:  # layer min(P)
                    chunks = rearrange(x[:, : l * m], "b (l m) d -> b l m d", m=m)
                    encoded = encoder(retrieved, mask, chunks)
                x = layer.cross_attn(x, layer.cross_attn.fn.remember(encoded, mask))
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
        """The same for the next piece of the sequences, all of it in one attending chunk."""
        start, m = state.length, self.chunk_size
        turn = rotary(start + torch.arange(x.shape[1], device=x.device), self.dim_head)
        chunk_ends = (start + 1) % m == 0  # with the first token of this piece
        encoded = None
        for i, layer in enumerate(self.layers, start=1):
            x = layer.attn(x, q_rotary=turn, k_rotary=turn, cache=state.caches[i - 1])
            if layer.cross_attn is not None and state.retrieval:
                if i == self.first:
                    chunk = torch.cat((state.chunk.type_as(x), x), dim=1)
                    if retrieved is not None:
                        encoded = encoder(retrieved, mask, rearrange(chunk[:, :m], "b m d -> b 1 m d"))
                    state.chunk = chunk[:, m:] if chunk_ends else chunk
                if chunk_ends:
                    state.memories[i] = layer.cross_attn.fn.remember(encoded, mask)
                x = layer.cross_attn(x, state.memories.get(i), start)
            x = layer.ff(x)
        state.length += x.shape[1]
        return self.norm_out(x)
