"""What a trained model reads of its neighbours, and what it would read if the database said otherwise (notebook 07).

Shapes: b batch, n sequence length, m chunk length, l chunks in a sequence, k neighbours, r retrieved tokens per
neighbour, d width, h heads; c chunks of the corpus, or those of a batch that have neighbours.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int32, Integer
from torch import Tensor

from retro_nb.common.arrays import PathLike
from retro_nb.model.layers import ChunkedCrossAttention, Memory, hiding, rotary
from retro_nb.model.retro import RETRO
from retro_nb.store.chunking import document_tokens, tokens_to_chunks
from retro_nb.text.tokens import TextTokenizer, get_tokenizer


@torch.no_grad()
def cross_attention(
    retro: RETRO, seq: Int[Tensor, "b n"], retrieved: Int[Tensor, "b l k r"]
) -> dict[int, Float[Tensor, "b h n _"]]:
    """How much each token reads of each retrieved token, for every layer of P by its number.

    Token i reads what was retrieved for chunk (i + 1) // m − 1. Its row holds 1 + k·r weights that sum to 1: the
    null key's, then those of the k·r tokens, neighbour after neighbour. The first m − 1 tokens read nothing: zeros.

    It is one forward pass in evaluation mode, in which a hook takes down what each layer is given.

    Raises:
        ValueError: the sequence has no complete chunk; others as `RETRO.forward`.
    """
    if seq.shape[1] < retro.chunk_size:
        raise ValueError(f"{seq.shape[1]} tokens are no chunk of {retro.chunk_size}: nothing is read, pass more")
    read: dict[int, Tensor] = {}

    def note(number: int, cca: ChunkedCrossAttention, given: tuple, named: dict) -> None:
        read[number] = _weights(cca, *given, **named)

    with ExitStack() as stack:
        stack.callback(retro.train, retro.training)
        for number, layer in enumerate(retro.decoder.layers, start=1):
            if layer.cross_attn is not None:
                hook = layer.cross_attn.fn.register_forward_pre_hook(partial(note, number), with_kwargs=True)
                stack.callback(hook.remove)
        retro.eval()(seq, retrieved)
    return read


def _weights(
    cca: ChunkedCrossAttention, x: Float[Tensor, "b n d"], memory: Memory, kept: Int[Tensor, " c"] | None = None
) -> Float[Tensor, "b h n _"]:
    """The softmax of one layer, from its own queries and keys; its arguments are those of the layer's `forward`.

    Queries stand where they stand in decoding: token i at m − 1 + (i + 1) % m.
    """
    attn, m, (b, n, _) = cca.attn, cca.chunk_size, x.shape
    places = m - 1 + torch.arange(1, n + 1, device=x.device) % m
    q = attn.queries(x, rotary(places, attn.dim_head)) * attn.dim_head**-0.5
    keys, _ = attn.with_null(memory.keys, memory.values)
    bias = hiding(~F.pad(memory.mask, (1, 0), value=True), keys.dtype)
    weights = q.new_zeros(b, attn.heads, n, keys.shape[2])
    weights[:, :, m - 1 :, 0] = 1  # all that a chunk without neighbours has is the null key
    for row, chunk in enumerate(range(b * (n // m)) if kept is None else kept.tolist()):
        text, u = divmod(chunk, n // m)
        readers = slice(m - 1 + u * m, m - 1 + (u + 1) * m)
        weights[text, :, readers] = (q[text, :, readers] @ keys[row].mT + bias[row]).softmax(dim=-1)
    return weights


def pieces(text: str, *, tokenizer: PathLike | TextTokenizer | None = None) -> list[str]:
    """The text of each token of a document, with the white space after it: [CLS] has none, [SEP] is left out."""
    starts = [start for part in document_tokens(text, tokenizer=tokenizer) for start, _ in part.spans.tolist()]
    return [text[start:stop] for start, stop in pairwise(starts)]


def rewritten(
    chunks: Integer[np.ndarray, "c m_plus_1"],
    first: int | np.integer,
    text: str,
    words: Mapping[tuple[int, int], str],
    *,
    tokenizer: PathLike | TextTokenizer | None = None,
) -> Int32[np.ndarray, "c m_plus_1"]:
    """The chunk array as it would be if some words of a document were others: a database that has been edited.

    The words are exchanged in the document's text, and the text is cut into chunks anew. What was found stays found:
    the neighbours of all chunks are left as they were, only what they say has changed.

    Args:
        chunks: the chunk array; it stays as it is.
        first: the number of the document's first chunk.
        text: the document's text.
        words: what is to stand in place of the characters [start, stop).
        tokenizer: the chunk array's (see `tokens.get_tokenizer`).

    Raises:
        ValueError: not exactly one token changes for each word. If their number did, all later tokens would move.
    """
    edited, m = text, chunks.shape[1] - 1
    for (start, stop), word in sorted(words.items(), reverse=True):  # from the end: the places before stay
        edited = edited[:start] + word + edited[stop:]
    tokenizer = get_tokenizer(tokenizer)
    cut = tokens_to_chunks(document_tokens(edited, tokenizer=tokenizer), m, tokenizer.ids.pad)
    rows = np.concatenate([part.rows for part in cut])
    old = chunks[first : first + len(rows)]
    changed = int((rows[:, :-1] != old[:, :-1]).sum()) if rows.shape == old.shape else rows.size
    if changed != len(words):
        raise ValueError(
            f"{changed} tokens of document {text[:30]!r} change with {len(words)} words ({', '.join(words.values())}): "
            f"pass another word of one word piece in place of each, and the first chunk of this text"
        )
    made = chunks.astype(np.int32)
    made[first : first + len(rows)] = rows
    return made
