"""The count of operations: by hand for a tiny model, and against PyTorch's own counter for whole models."""

from unittest.mock import patch

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from retro_nb.model import layers
from retro_nb.model.presets import PRESETS
from retro_nb.model.retro import RETRO
from retro_nb.planning.flops import flops_per_token

TINY = dict(
    num_tokens=50, max_seq_len=32, enc_dim=6, enc_depth=2, dec_dim=10, dec_depth=3, dec_cross_attn_layers=(2, 3),
    heads=2, dim_head=4, chunk_size=4,
)  # fmt: skip
PAPER = dict(
    enc_cross_attn_layers=(1,), enc_heads=3, enc_dim_head=2, separate_embeddings=True, absolute_positions=False,
    tied_output=True, project_encoded=False, ff_mult=2,
)  # fmt: skip


def counted_by_torch(retro: RETRO, n: int, k: int, r: int, training: bool) -> int:
    seq = torch.ones(1, n + training, dtype=torch.int64)
    retrieved = torch.ones(1, n // retro.chunk_size, k, r, dtype=torch.int64) if k else None
    plain = patch.object(layers, "attention_kernels", lambda *sizes, **named: sdpa_kernel(SDPBackend.MATH))
    with FlopCounterMode(display=False) as counter, plain:  # whose operations are all counted
        if training:
            retro(seq, retrieved, return_loss=True).backward()
        else:
            retro(seq, retrieved)
    return counter.get_total_flops()


def computed_in_vain(about: dict, n: int, m: int, k: int, r: int) -> int:
    """What is multiplied although nobody needs it: masked pairs, and the rows that fill up the last chunk."""
    d, inner = about["dec_dim"], about["heads"] * about["dim_head"]
    masked = about["dec_depth"] * 4 * inner * (n * n - n * (n + 1) // 2)
    filling = len(about["dec_cross_attn_layers"]) * (m - 1) * (4 * d * inner + 4 * inner * (k * r + 1))
    return masked + (filling if k else 0)


@pytest.mark.parametrize("changes", [{}, PAPER])
@pytest.mark.parametrize("k, r", [(2, 8), (1, 5), (0, 8)])
@pytest.mark.parametrize("training", [False, True])
def test_as_torch_counts(changes, k, r, training):
    retro, n, m = RETRO(**TINY, **changes), 16, 4
    mine = flops_per_token(retro, n=n, k=k, r=r, training=training) * n
    in_vain = computed_in_vain(retro.config, n, m, k, r) * (3 if training else 1)
    assert mine + in_vain == counted_by_torch(retro, n, k, r, training)


def test_by_hand():
    """Width 2, one head of 2, vocabulary 3, two tokens, no neighbours: one layer and the output."""
    retro = RETRO(
        num_tokens=3, enc_dim=2, enc_depth=1, dec_dim=2, dec_depth=1, dec_cross_attn_layers=(1,), heads=1,
        dim_head=2, chunk_size=2, ff_mult=4,
    )  # fmt: skip
    projections = 4 * (2 * 2 * 2 * 2)  # q, k, v, out: 2 tokens by 2 by 2, twice
    pairs = 2 * 2 * 2 * 3  # score and value, of width 2, for 3 pairs
    feed_forward = 2 * (2 * 2 * 2 * 8)
    logits = 2 * 2 * 2 * 3
    assert flops_per_token(retro, n=2, k=0, training=False) == (projections + pairs + feed_forward + logits) / 2
    assert flops_per_token(retro, n=2, k=0) == 3 * flops_per_token(retro, n=2, k=0, training=False)


@pytest.mark.parametrize("name", PRESETS)
def test_six_operations_a_weight_is_the_rule_of_thumb(name):
    with torch.device("meta"):
        retro = RETRO.preset(name, num_tokens=1)
    decoder = sum(p.numel() for p in retro.decoder.parameters())
    without = flops_per_token(retro, n=2048, k=0)
    assert 6 * decoder * 0.8 < without < 6 * decoder * 1.3
    assert flops_per_token(retro, n=2048) > 1.1 * without
