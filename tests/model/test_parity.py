"""RETRO equals retro-pytorch 0.3.9, weight for weight, once the reference's query positions are put right.

The reference computes the positions m−1 … 2m−2 of the chunked cross-attention's queries and then shifts them
by m−1 a second time, so that all but the first query of a chunk stand at position 0.
"""

import sys
from types import ModuleType
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from retro_nb.model.retro import RETRO


def import_reference():
    """retro_pytorch imports autofaiss, which wants an old NumPy; the model never calls it."""
    stub = ModuleType("autofaiss")
    stub.build_index = None
    with patch.dict(sys.modules):
        sys.modules.setdefault("autofaiss", stub)
        import retro_pytorch.retro_pytorch as module

        loaded = {name: value for name, value in sys.modules.items() if name != "autofaiss"}
    sys.modules.update(loaded)
    return module


reference = import_reference()


class Functional:
    """torch.nn.functional, but 4-D tensors are not padded: the query positions are the only ones."""

    def __getattr__(self, name):
        return getattr(F, name)

    @staticmethod
    def pad(tensor, *args, **kwargs):
        return tensor if tensor.ndim == 4 else F.pad(tensor, *args, **kwargs)


def corrected():
    return patch.object(reference, "F", Functional())


def test_the_correction_touches_the_query_positions_only():
    """The reference pads 3-D activations, 2-D masks and 4-D positions; the last are b h n d with b = h = 1."""
    seen = []

    class Watching(Functional):
        @staticmethod
        def pad(tensor, *args, **kwargs):
            seen.append(tuple(tensor.shape))
            return Functional.pad(tensor, *args, **kwargs)

    peer, _, (seq, retrieved, _) = build(EXAMPLE, seed=0, b=2, n=20, k=2, r=16, retrieval=True)
    with patch.object(reference, "F", Watching()):
        peer(seq, retrieved=retrieved)
    four = {shape for shape in seen if len(shape) == 4}
    assert four == {(1, 1, 8, 32)}  # m = 8 positions, 32 rotary features
    assert {len(shape) for shape in seen} == {2, 3, 4}


EXAMPLE = dict(
    num_tokens=60, max_seq_len=40, enc_dim=24, enc_depth=2, dec_dim=32, dec_depth=3,
    dec_cross_attn_layers=(1, 3), dim_head=32, chunk_size=8,
)  # fmt: skip


def build(config: dict, seed: int, b: int, n: int, k: int, r: int, retrieval: bool):
    """The reference with shaken-up weights (its norms start at 1, its biases at 0), ours, and a batch.

    Some sequences and neighbours end in padding, one neighbour in three is padding altogether.
    """
    torch.manual_seed(seed)
    peer = reference.RETRO(**config)
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours = RETRO.from_retro_pytorch(peer.state_dict(), **config)
    seq = torch.randint(1, config["num_tokens"], (b, n + 1))
    seq[0, n - int(torch.randint(0, n // 2, ())) :] = 0
    if not retrieval:
        return peer, ours, (seq, None)
    retrieved = torch.randint(1, config["num_tokens"], (b, n // config["chunk_size"], k, r))
    real = torch.randint(1, r + 1, retrieved.shape[:3]) * (torch.rand(retrieved.shape[:3]) > 1 / 3)
    retrieved[torch.arange(r) >= real[..., None]] = 0
    return peer, ours, (seq[:, :-1], retrieved, seq[:, 1:])


@st.composite
def cases(draw):
    depth, m = draw(st.integers(1, 3)), draw(st.sampled_from([2, 4, 8]))
    enc_depth = draw(st.integers(1, 2))
    deepnet = draw(st.booleans())
    n = draw(st.integers(m, 4 * m))
    config = dict(
        num_tokens=60,
        max_seq_len=n + draw(st.integers(0, 3)),
        enc_dim=draw(st.sampled_from([24, 32])),
        enc_depth=enc_depth,
        enc_cross_attn_layers=draw(st.sampled_from([None, (), (1,), (enc_depth,)])),
        dec_dim=draw(st.sampled_from([24, 40])),
        dec_depth=depth,
        dec_cross_attn_layers=draw(
            st.none() | st.sets(st.integers(1, depth), min_size=1).map(lambda layers: tuple(sorted(layers)))
        ),
        dim_head=draw(st.sampled_from([32, 40])),
        chunk_size=m,
        use_deepnet=deepnet,
        gated_rmsnorm=draw(st.booleans()),
    )
    if deepnet and draw(st.booleans()):
        config |= dict(enc_scale_residual=1.5, dec_scale_residual=1.25)
    shape = dict(
        b=draw(st.integers(1, 2)), n=n, k=draw(st.integers(1, 4)), r=m * draw(st.integers(1, 2)),
        retrieval=draw(st.booleans() | st.just(True)),
    )  # fmt: skip
    return config, shape, draw(st.integers(0, 1000))


@given(cases())
@settings(max_examples=40, deadline=None)
def test_logits_loss_and_gradients_equal_the_reference(case):
    config, shape, seed = case
    peer, ours, (seq, retrieved, *labels) = build(config, seed, **shape)
    with corrected():
        expected = peer(seq[:, : shape["n"]], retrieved=retrieved)
        logits = ours(seq[:, : shape["n"]], retrieved)
        assert_close(logits, expected, atol=1e-5, rtol=1e-5)

        if retrieved is None:  # the reference has no loss here: take it from its logits
            expected_loss = F.cross_entropy(expected.mT, seq[:, 1:], ignore_index=0)
            whole = seq
        else:
            whole = torch.cat((seq, labels[0][:, -1:]), dim=1)
            expected_loss = peer(whole, retrieved=retrieved, return_loss=True)
        loss = ours(whole, retrieved, return_loss=True)
    assert_close(loss, expected_loss, atol=1e-5, rtol=1e-5)

    loss.backward()
    expected_loss.backward()
    zero = torch.zeros_like
    expected_grads = {name: zero(p) if p.grad is None else p.grad for name, p in peer.named_parameters()}
    expected_grads = RETRO.from_retro_pytorch(expected_grads, **config).state_dict()
    for name, p in ours.named_parameters():
        grad = zero(p) if p.grad is None else p.grad
        assert_close(grad, expected_grads[name], atol=1e-4, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def uncorrected_difference(config: dict, n: int, r: int, seed: int = 0):
    peer, ours, (seq, retrieved, _) = build(config, seed, b=2, n=n, k=2, r=r, retrieval=True)
    with torch.no_grad():
        return (ours(seq, retrieved) - peer(seq, retrieved=retrieved)).abs().amax(dim=(0, 2))


def test_uncorrected_the_reference_differs_from_the_first_reader_on():
    """Measured over three seeds: from token m−1 on every token has a logit that differs by 0.1 to 0.6."""
    difference = uncorrected_difference(EXAMPLE, n=24, r=16)
    m = EXAMPLE["chunk_size"]
    assert difference[: m - 1].max() < 1e-5
    assert difference[m - 1 :].min() > 0.05
    assert difference.max() > 0.2


def test_heads_are_honoured_where_the_reference_always_has_eight():
    eight = dict(EXAMPLE, heads=8)
    assert reference.RETRO(**dict(EXAMPLE, heads=2)).decoder.layers[0][0].fn.heads == 8  # its bug
    peer, ours, (seq, retrieved, _) = build(dict(EXAMPLE, heads=2), 0, b=1, n=16, k=2, r=16, retrieval=True)
    with corrected():
        assert_close(ours(seq, retrieved), peer(seq, retrieved=retrieved), atol=1e-5, rtol=1e-5)
    for heads in (1, 2, 8):
        model = RETRO(**dict(eight, heads=heads))
        for part in (*model.encoder.layers, *model.decoder.layers):
            assert part.attn.fn.heads == heads and part.attn.fn.to_q.out_features == heads * 32


def test_weights_of_another_configuration_are_refused():
    weights = reference.RETRO(**EXAMPLE).state_dict()
    for change in (dict(dec_dim=40), dict(dec_depth=4), dict(use_deepnet=True), dict(dec_cross_attn_layers=(2,))):
        with pytest.raises(ValueError, match="not the weights of retro_pytorch"):
            RETRO.from_retro_pytorch(weights, **(EXAMPLE | change))


@pytest.mark.parametrize("change", [{}, dict(use_deepnet=True), dict(gated_rmsnorm=True)])
def test_initial_weights_follow_the_reference_distributions(change):
    """Every parameter starts with the reference's mean and spread (DeepNet has gains of its own)."""
    config = EXAMPLE | dict(enc_dim=64, dec_dim=96) | change
    torch.manual_seed(0)
    expected = RETRO.from_retro_pytorch(reference.RETRO(**config).state_dict(), **config).state_dict()
    for name, value in RETRO(**config).state_dict().items():
        if expected[name].std() == 0:
            assert_close(value, expected[name], msg=name)
        else:
            tolerance = 6 / value.numel() ** 0.5
            assert abs(value.std() / expected[name].std() - 1) < tolerance, name
            assert abs(value.mean() - expected[name].mean()) < tolerance * value.std(), name
