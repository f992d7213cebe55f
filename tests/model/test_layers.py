"""The parts of the model, each against its formula written out with loops (tests/paper_equations.py)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paper_equations import attention, cca, feed_forward, rms_norm, turned
from torch import nn
from torch.testing import assert_close

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
    rotate,
)

few = settings(max_examples=15, deadline=None)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def angles(positions: range, dim_head: int) -> torch.Tensor:
    return rotary(torch.tensor(list(positions)), dim_head)


# normalisation and residuals


def test_rms_norm_is_its_formula():
    x, norm = torch.randn(2, 3, 10) * 5, RMSNorm(10)
    nn.init.normal_(norm.gamma)
    expected = torch.stack([rms_norm(row, norm.gamma) for row in x.flatten(0, 1)]).view_as(x)
    assert_close(norm(x), expected)


def test_rms_norm_gate_and_zero_input():
    x, norm = torch.randn(3, 10), RMSNorm(10, gated=True)
    nn.init.normal_(norm.gate)
    assert_close(norm(x), RMSNorm(10)(x) * torch.sigmoid(x * norm.gate))
    zero = torch.zeros(1, 10, requires_grad=True)
    norm(zero).sum().backward()
    assert norm(zero).abs().max() == 0 and zero.grad.isfinite().all()


def test_residuals():
    x, fn, norm = torch.randn(2, 3, 4), nn.Linear(4, 4), nn.LayerNorm(4)
    assert_close(PreNorm(fn, norm)(x), x + fn(norm(x)))
    assert_close(PostNorm(fn, norm, scale=3.0)(x), norm(3 * x + fn(x)))


def test_feed_forward():
    ff, x = FeedForward(6, mult=3), torch.randn(2, 6)
    assert ff.net[0].out_features == 18
    assert_close(ff(x), torch.stack([feed_forward(ff, row) for row in x]))


# positions


@given(dim_head=st.sampled_from([2, 8, 32, 48]), position=st.integers(0, 300))
@few
def test_rotation_is_a_multiplication_of_complex_numbers(dim_head, position):
    vector = torch.randn(dim_head)
    out = rotate(vector.view(1, 1, 1, -1), angles(range(position, position + 1), dim_head)).flatten()
    assert_close(out, turned(vector, position), atol=1e-4, rtol=0)
    assert_close(out[32:], vector[32:], atol=0, rtol=0)
    assert_close(out.norm(), vector.norm())


@given(shift=st.integers(1, 200))
@few
def test_rotated_products_depend_on_the_distance_only(shift):
    q, k = torch.randn(2, 1, 1, 5, 40).double()

    def products(first):
        turn = angles(range(first, first + 5), 40)
        return rotate(q, turn) @ rotate(k, turn).mT

    assert_close(products(0), products(shift), atol=1e-4, rtol=0)
    assert not torch.allclose(products(0), rotate(q, angles(range(5), 40)) @ k.mT, atol=1e-2)


# attention


@given(
    heads=st.integers(1, 3), dim_head=st.sampled_from([4, 34]), causal=st.booleans(), null_kv=st.booleans(),
    masked=st.booleans(), cross=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
@few
def test_attention_is_softmax_over_the_visible_keys(heads, dim_head, causal, null_kv, masked, cross, seed):
    torch.manual_seed(seed)
    n, r = 5, 7 if cross else 5
    causal = causal and not cross
    layer = Attention(
        6, context_dim=9 if cross else None, heads=heads, dim_head=dim_head, causal=causal, null_kv=null_kv
    ).double()
    x = torch.randn(2, n, 6).double()
    context = torch.randn(2, r, 9).double() if cross else x
    mask = torch.rand(2, r) > 0.4 if masked else torch.ones(2, r, dtype=torch.bool)
    mask[:, 0] = True
    turn_q, turn_k = angles(range(3, 3 + n), dim_head), angles(range(r), dim_head)
    out = layer(x, context=context if cross else None, mask=mask if masked else None, q_rotary=turn_q, k_rotary=turn_k)
    for b in range(2):
        for i in range(n):
            seen = [(context[b, j], j) for j in range(r) if mask[b, j] and (not causal or j <= i)]
            assert_close(out[b, i], attention(layer, x[b, i], 3 + i, seen), atol=1e-5, rtol=0)


@pytest.mark.parametrize("null_kv", [False, True])
def test_a_row_without_visible_keys_is_finite_and_harmless(null_kv):
    layer = Attention(8, heads=2, dim_head=4, null_kv=null_kv)
    x = torch.randn(2, 5, 8, requires_grad=True)
    mask = torch.tensor([[False] * 5, [True, True, False, True, False]])
    out = layer(x, mask=mask)
    assert out.isfinite().all()
    assert_close(out[1:], layer(x[1:], mask=mask[1:]))
    out[1].sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad[0].abs().max() == 0
    if null_kv:  # all that is left to see is the null value, the same for every query
        assert_close(out[0], layer.to_out(layer.null_v).expand(5, 8))
    else:  # on every kernel the same: as if nothing were masked
        assert_close(out[:1], layer(x[:1]))


@given(cuts=st.lists(st.integers(1, 4), min_size=1, max_size=5))
@few
def test_cached_pieces_equal_the_whole(cuts):
    n = sum(cuts)
    layer, x, turn = Attention(8, heads=2, dim_head=6, causal=True), torch.randn(2, n, 8), angles(range(n), 6)
    whole = layer(x, q_rotary=turn, k_rotary=turn)
    past, pieces, start = Past(capacity=n + 2), [], 0
    for size in cuts:
        positions = torch.arange(start, start + size)
        bias = hiding(torch.arange(n + 2) > positions[:, None], x.dtype)  # as a recording sees it: the whole past
        place = Place(positions, turn[:, positions], turn[:, positions], bias)
        pieces.append(layer.extend(x[:, positions], past, place))
        start += size
    assert_close(torch.cat(pieces, dim=1), whole, atol=1e-6, rtol=1e-5)


def test_causal_and_mask_together():
    layer, x = Attention(8, heads=2, dim_head=4, causal=True).double(), torch.randn(1, 6, 8).double()
    mask = torch.tensor([[True, False, True, True, False, True]])
    out = layer(x, mask=mask)
    for i in range(6):
        seen = [(x[0, j], 0) for j in range(i + 1) if mask[0, j]]
        assert_close(out[0, i], attention(layer, x[0, i], 0, seen))


def test_dropout_is_for_training_only():
    layer, x = Attention(8, heads=2, dim_head=4, dropout=0.5), torch.randn(1, 6, 8)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


# chunked cross-attention


def make_cca(m: int, l: int, k: int, r: int, b: int = 2):
    layer = ChunkedCrossAttention(m, dim=6, context_dim=5, heads=2, dim_head=6).double()
    encoded = torch.randn(b, l, k, r, 5).double()
    mask = torch.rand(b, l, k, r) > 0.3
    return layer, encoded, mask


@given(
    m=st.integers(1, 5), l=st.integers(1, 3), k=st.integers(1, 3), rest=st.integers(0, 4),
    continuation=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
@few
def test_chunked_cross_attention_is_equations_3_to_6(m, l, k, rest, continuation, seed):
    torch.manual_seed(seed)
    n = l * m + min(rest, m - 1)
    layer, encoded, mask = make_cca(m, l, k, r=m * (1 + continuation))
    x = torch.randn(2, n, 6).double()
    block = PreNorm(layer, RMSNorm(6).double())  # the loops apply the residual and its norm
    out = block(x, layer.remember(encoded, mask))
    for b in range(2):
        E = {u + 1: encoded[b, u] for u in range(l)}
        visible = {u + 1: mask[b, u] for u in range(l)}
        expected = torch.stack(cca(block, list(x[b]), E, visible, m))
        assert_close(out[b], expected, atol=1e-5, rtol=0)


def test_the_first_tokens_read_nothing_and_the_last_one_reads_the_last_chunk():
    m, l = 4, 3
    layer, encoded, mask = make_cca(m, l, k=2, r=8)
    mask[:] = True
    x = torch.randn(2, l * m, 6).double()
    out = layer(x, layer.remember(encoded, mask))
    assert out[:, : m - 1].abs().max() == 0 and out[:, m - 1 :].abs().min(dim=-1).values.gt(0).all()
    encoded[:, -1] += 1
    changed = (layer(x, layer.remember(encoded, mask)) != out).any(-1)
    assert changed[:, -1].all() and not changed[:, :-1].any()


def test_one_softmax_over_all_neighbours():
    """A neighbour that attracts every query takes all the weight away from the other one."""
    layer, encoded, mask = make_cca(m=2, l=1, k=2, r=4, b=1)
    mask[:] = True
    x = torch.randn(1, 3, 6).double()
    alone = layer(x, layer.remember(encoded[:, :, :1], mask[:, :, :1]))
    both = layer(x, layer.remember(encoded, mask))
    other = layer(x, layer.remember(encoded[:, :, 1:], mask[:, :, 1:]))
    assert not torch.allclose(both[:, 1:], (alone + other)[:, 1:] / 2)
    memory = layer.remember(encoded, mask)
    keys = memory.keys.clone()
    q = layer.attn.queries(x[:, 1:], angles(range(1, 3), 6))
    keys[:, :, 5] = 1e3 * q.sum(2)  # a token of the second neighbour
    expected = layer.attn.to_out(memory.values[:, :, 5].flatten(1))
    assert_close(layer(x[:, :2], memory._replace(keys=keys))[:, 1], expected, atol=1e-6, rtol=0)


@given(m=st.integers(1, 5), u=st.integers(1, 3), data=st.data())
@few
def test_pieces_of_an_attending_chunk_equal_the_whole(m, u, data):
    """Decoding feeds an attending chunk in pieces, with only its own neighbours in memory."""
    l = 3
    layer, encoded, mask = make_cca(m, l, k=2, r=2 * m)
    x = torch.randn(2, l * m + m - 1, 6).double()
    whole = layer(x, layer.remember(encoded, mask))
    start = data.draw(st.integers(u * m - 1, u * m + m - 2))
    stop = data.draw(st.integers(start + 1, u * m + m - 1))
    memory = layer.open(encoded[:, u - 1 : u], mask[:, u - 1 : u])
    reader = angles(range(start - (u - 1) * m, stop - (u - 1) * m), 6)  # m−1 is where an attending chunk begins
    place = Place(torch.arange(start, stop), reader, reader, torch.zeros(stop - start, stop))
    assert_close(layer.read(x[:, start:stop], memory, place.reader), whole[:, start:stop])


def test_no_memory_reads_nothing():
    layer, _, _ = make_cca(m=2, l=1, k=1, r=2)
    x = torch.randn(2, 5, 6).double()
    assert layer(x, None).abs().max() == 0


def test_whole_sequences_are_read_alike_with_gradients_and_without():
    """To the last bit: single rows are multiplied otherwise while decoding, and the null value is one."""
    cca = ChunkedCrossAttention(4, dim=64, context_dim=64, heads=2, dim_head=32)
    x, kept = torch.randn(2, 16, 64), torch.tensor([0, 5])
    memory = cca.remember(torch.randn(2, 1, 1, 8, 64), torch.ones(2, 1, 1, 8, dtype=torch.bool))
    with torch.no_grad():
        expected = cca(x, memory, kept=kept)
    assert torch.equal(cca(x, memory, kept=kept), expected)
