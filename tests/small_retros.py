"""Small RETROs of every kind, and batches for them, that several test modules use."""

import pytest
import torch
from torch import Tensor

from retro_nb import RETRO

SMALL = dict(
    num_tokens=40, max_seq_len=24, enc_dim=12, enc_depth=2, dec_dim=16, dec_depth=3,
    dec_cross_attn_layers=(2, 3), heads=2, dim_head=8, chunk_size=4,
)  # fmt: skip
OPTIONS = {
    "reference": {},
    "paper": dict(
        enc_heads=3, enc_dim_head=6, enc_cross_attn_layers=(1,), separate_embeddings=True,
        absolute_positions=False, tied_output=True, project_encoded=False,
    ),
    "deepnet": dict(use_deepnet=True),
    "gated": dict(gated_rmsnorm=True, enc_cross_attn_layers=()),
}  # fmt: skip
every_option = pytest.mark.parametrize("option", OPTIONS)


def make(seed: int = 0, **changes) -> RETRO:
    """A small model whose every weight matters: norms and biases are moved off 1 and 0."""
    torch.manual_seed(seed)
    model = RETRO(**{**SMALL, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def batch(n: int, k: int = 2, r: int = 8, b: int = 2, m: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randint(1, 40, (b, n)), torch.randint(1, 40, (b, n // m, k, r))
