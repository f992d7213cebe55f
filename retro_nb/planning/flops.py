"""Floating-point operations per token, the measure of every speed (notebooks 05 and 11).

A matrix product of (a, b) with (b, c) is 2·a·b·c operations, a multiplication and an addition for each term.
Only matrix products are counted, and only what the equations need of them: half of the causal attention, no padding.
Element-wise work is left out, as is usual, so that the model FLOP utilisation, the reached share of a processor's
rate, is never overstated.

Shapes: n sequence length, m chunk length, l chunks in a sequence, k neighbours, r retrieved tokens per neighbour,
d width, v vocabulary.
"""

from itertools import pairwise

from retro_nb.model.retro import RETRO


def flops_per_token(retro: RETRO, *, n: int, k: int = 2, r: int | None = None, training: bool = True) -> float:
    """Floating-point operations per token of a sequence.

    Args:
        n: tokens in the sequence, all of them real, with neighbours for each of its n // m chunks.
        k, r: neighbours of a chunk, and tokens of each neighbour (2m if left out). k = 0 is RETRO[OFF].
        training: count forward and backward, three times forward, since every product has two derivatives.
    """
    about, m = retro.config, retro.chunk_size
    retrieved = (n // m) * k * (2 * m if r is None else r)  # tokens to encode
    counts = [_decoder(about, n), _output(about, n)]
    if k:
        counts += [_encoder(about, n // m, retrieved, k), _cross_attention(about, n, m, retrieved, k)]
    return (3 if training else 1) * sum(counts) / n


def _product(rows: int, *widths: int) -> int:
    """Operations of applying linear maps d0 → d1 → … to rows."""
    return sum(2 * rows * a * b for a, b in pairwise(widths))


def _attention(inner: int, pairs: int) -> int:
    """Operations of scores and weighted values, for `pairs` of a query and a key visible to it."""
    return 2 * 2 * inner * pairs


def _decoder(about: dict, n: int) -> int:
    d, inner = about["dec_dim"], about["heads"] * about["dim_head"]
    self_attention = 4 * _product(n, d, inner) + _attention(inner, n * (n + 1) // 2)
    feed_forward = _product(n, d, about["ff_mult"] * d, d)
    return about["dec_depth"] * (self_attention + feed_forward)


def _encoder(about: dict, l: int, retrieved: int, k: int) -> int:
    d, depth, m = about["enc_dim"], about["enc_depth"], about["chunk_size"]
    inner = (about["enc_heads"] or about["heads"]) * (about["enc_dim_head"] or about["dim_head"])
    r = retrieved // (l * k)
    self_attention = 4 * _product(retrieved, d, inner) + _attention(inner, retrieved * r)
    feed_forward = _product(retrieved, d, about["ff_mult"] * d, d)
    conditioning = 2 * _product(retrieved, d, inner) + 2 * _product(l * m, about["dec_dim"], inner)
    conditioning += _attention(inner, retrieved * m)
    layers = _count(about["enc_cross_attn_layers"], depth)
    out = _product(retrieved, d, about["dec_dim"]) if about["project_encoded"] else 0
    return depth * (self_attention + feed_forward) + layers * conditioning + out


def _cross_attention(about: dict, n: int, m: int, retrieved: int, k: int) -> int:
    d, inner = about["dec_dim"], about["heads"] * about["dim_head"]
    encoded = d if about["project_encoded"] else about["enc_dim"]
    readers = n - (m - 1)  # the first m − 1 tokens read nothing
    keys = retrieved // (n // m) + 1  # and the null key
    reading = 2 * _product(readers, d, inner) + _attention(inner, readers * keys)
    layers = _count(about["dec_cross_attn_layers"], about["dec_depth"])
    return layers * (reading + 2 * _product(retrieved, encoded, inner))


def _output(about: dict, n: int) -> int:
    d = about["dec_dim"]
    embedded = d if about["separate_embeddings"] else about["enc_dim"]
    widening = _product(n, embedded, d) if embedded != d else 0
    return widening + _product(n, d, about["num_tokens"])


def _count(layers: list[int] | None, depth: int) -> int:
    return depth if layers is None else len(layers)
