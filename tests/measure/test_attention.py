"""The weights of the cross-attention against what the layers give."""

import pytest
import torch
from einops import rearrange
from small_retros import OPTIONS, batch, every_option, make
from torch.testing import assert_close

from retro_nb.measure.attention import cross_attention

M = 4  # the chunk size of `make`


def what_layers_did(retro, seq, retrieved) -> dict[int, tuple]:
    """For each layer of P its cross-attention, its memory, which chunks that holds, and what it gave."""
    seen, hooks = {}, []
    for number, layer in enumerate(retro.decoder.layers, start=1):
        if layer.cross_attn is not None:

            def note(cca, given, named, out, number=number):
                seen[number] = cca, given[1], named.get("kept"), out

            hooks.append(layer.cross_attn.fn.register_forward_hook(note, with_kwargs=True))
    with torch.no_grad():
        retro(seq, retrieved)
    for hook in hooks:
        hook.remove()
    return seen


@every_option
@pytest.mark.parametrize("n", [4, 7, 8, 14, 24])
def test_weights_times_values_are_what_the_layer_gives(option, n):
    """Token by token: the null value and the values of the chunk it reads, weighted; also where some have none."""
    retro = make(**OPTIONS[option])
    seq, retrieved = batch(n)
    retrieved[torch.rand(retrieved.shape) < 0.2] = 0
    if n >= 12:
        retrieved[1, 1] = 0  # a chunk without neighbours
    weights = cross_attention(retro, seq, retrieved)
    done = what_layers_did(retro, seq, retrieved)
    assert list(weights) == list(done) == [2, 3]
    for number, (cca, memory, kept, out) in done.items():
        attn, l = cca.attn, n // M
        rows = list(range(len(seq) * l)) if kept is None else kept.tolist()
        null = rearrange(attn.null_v, "(h d) -> h 1 d", h=attn.heads)
        for text in range(len(seq)):
            for i in range(M - 1, n):
                chunk, own = text * l + (i + 1) // M - 1, weights[number][text, :, i]
                assert_close(own.sum(dim=-1), torch.ones(attn.heads))
                value = own[:, :1] * null[:, 0]
                if chunk in rows:
                    row = rows.index(chunk)
                    value = value + (own[:, 1:, None] * memory.values[row]).sum(dim=1)
                    assert not own[:, 1:][:, ~memory.mask[row]].any(), "padding was read"
                else:
                    assert (own[:, 0] == 1).all() and not own[:, 1:].any()
                assert_close(attn.to_out(rearrange(value, "h d -> (h d)")), out[text, i], atol=1e-5, rtol=1e-4)


def test_the_first_tokens_read_nothing_and_weights_say_who_reads_whom():
    """Other neighbours of chunk 1 change the weights of those tokens only that read them, in the first layer of P."""
    retro, (seq, retrieved) = make(), batch(13, b=1)
    other = retrieved.clone()
    other[0, 1] = other[0, 1] % 39 + 1
    before, after = (cross_attention(retro, seq, near)[2][0] for near in (retrieved, other))
    assert not before[:, : M - 1].any()
    moved = (before != after).any(dim=-1).any(dim=0).nonzero()[:, 0].tolist()
    assert moved == [7, 8, 9, 10]


def test_dropout_is_off_and_the_model_left_as_it_was():
    retro, (seq, retrieved) = make(dec_attn_dropout=0.5, dec_ff_dropout=0.5), batch(8)
    calm = cross_attention(retro, seq, retrieved)
    retro.train()
    again = cross_attention(retro, seq, retrieved)
    assert retro.training and all(torch.equal(calm[number], again[number]) for number in calm)
    assert not any(layer.cross_attn.fn._forward_pre_hooks for layer in retro.decoder.layers if layer.cross_attn)


def test_without_a_chunk_there_is_nothing_to_read():
    retro, (seq, retrieved) = make(), batch(3)
    with pytest.raises(ValueError, match="3 tokens are no chunk of 4"):
        cross_attention(retro, seq, retrieved)
