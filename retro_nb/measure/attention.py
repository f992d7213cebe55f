"""Weights with which each token reads each retrieved token (notebook 07).

Shapes: b batch, n sequence length, m chunk length, l chunks in a sequence, k neighbours, r retrieved tokens per
neighbour, d width, h heads; c chunks of a batch that have neighbours.
"""

from contextlib import ExitStack
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from retro_nb.model.base import evaluating
from retro_nb.model.layers import ChunkedCrossAttention, Memory, hiding, rotary
from retro_nb.model.retro import RETRO


@torch.no_grad()
def cross_attention(
    retro: RETRO, seq: Int[Tensor, "b n"], retrieved: Int[Tensor, "b l k r"]
) -> dict[int, Float[Tensor, "b h n _"]]:
    """Cross-attention weights of each token on each retrieved token, by the number of every layer in P.

    Token i reads the neighbours of chunk (i + 1) // m − 1. Its row holds 1 + k·r weights that sum to 1: that of the
    null key, then those of the k·r tokens, neighbour after neighbour. The first m − 1 tokens read nothing: zeros.

    It takes one forward pass in evaluation mode, in which a hook records the inputs of each layer.

    Raises:
        ValueError: the sequence has no complete chunk; others as in `RETRO.forward`.
    """
    if seq.shape[1] < retro.chunk_size:
        raise ValueError(f"{seq.shape[1]} tokens are no chunk of {retro.chunk_size}: nothing is read, pass more")
    read: dict[int, Tensor] = {}

    def note(number: int, cca: ChunkedCrossAttention, given: tuple, named: dict) -> None:
        read[number] = _weights(cca, *given, **named)

    with ExitStack() as stack:
        stack.enter_context(evaluating(retro))
        for number, layer in enumerate(retro.decoder.layers, start=1):
            if layer.cross_attn is not None:
                hook = layer.cross_attn.fn.register_forward_pre_hook(partial(note, number), with_kwargs=True)
                stack.callback(hook.remove)
        retro(seq, retrieved)
    return read


def _weights(
    cca: ChunkedCrossAttention, x: Float[Tensor, "b n d"], memory: Memory, kept: Int[Tensor, " c"] | None = None
) -> Float[Tensor, "b h n _"]:
    """Softmax of one layer, from its queries and keys; the arguments are those of the layer's `forward`.

    Queries have their positions from decoding: token i is at m − 1 + (i + 1) % m.
    """
    attn, m, (b, n, _) = cca.attn, cca.chunk_size, x.shape
    places = m - 1 + torch.arange(1, n + 1, device=x.device) % m
    q = attn.queries(x, rotary(places, attn.dim_head)) * attn.dim_head**-0.5
    keys, _ = attn.with_null(memory.keys, memory.values)
    bias = hiding(~F.pad(memory.mask, (1, 0), value=True), keys.dtype)
    weights = q.new_zeros(b, attn.heads, n, keys.shape[2])
    weights[:, :, m - 1 :, 0] = 1  # a chunk without neighbours has only the null key
    for row, chunk in enumerate(range(b * (n // m)) if kept is None else kept.tolist()):
        text, u = divmod(chunk, n // m)
        readers = slice(m - 1 + u * m, m - 1 + (u + 1) * m)
        weights[text, :, readers] = (q[text, :, readers] @ keys[row].mT + bias[row]).softmax(dim=-1)
    return weights
