"""torch.compile against eager, as a program: `python tests/compiled_equals_eager.py RETRO float32 TOKENIZER`.

pytest puts checks of shapes around every function of the package, and these cannot be compiled.
"""

import copy
import sys

import torch
import torch._dynamo.utils
from tiny_language_models import language_model, move
from torch import Tensor, nn
from torch.testing import assert_close

from retro_nb import RETRO, retrofit

B, L, M, K = 4, 3, 16, 2
MISSING = {  # which of the b·l chunks have no neighbours
    "some": [1, 2, 5, 9, 10, 11],
    "others": [0, 3, 7],
    "all but one": [number for number in range(B * L) if number != 4],
    "all": list(range(B * L)),
    "none": [],
    "some again": [1, 2, 5, 9, 10, 11],
}


def small_retro() -> RETRO:
    return RETRO(
        num_tokens=300, max_seq_len=L * M, enc_dim=16, enc_depth=1, dec_dim=16, dec_depth=1, dec_cross_attn_layers=(1,),
        heads=2, dim_head=8, chunk_size=M, absolute_positions=False, tied_output=True,
    )  # fmt: skip


def small_retrofit(tokenizer: str) -> nn.Module:
    backbone = language_model("gpt2", n_positions=L * M)
    model = retrofit(
        backbone, start=2, every=2, chunk_size=M, enc_dim=16, enc_depth=1, heads=2, dim_head=8, tokenizer=tokenizer
    )
    move(model.reader)  # at first it reads nothing
    return model


def batch(missing: list[int], tokens: int, pad_id: int) -> tuple[Tensor, Tensor]:
    """Random sequences, with neighbours for all chunks but those missing."""
    generator = torch.Generator().manual_seed(len(missing))
    seq = torch.randint(1, tokens, (B, L * M + 1), generator=generator)
    retrieved = torch.randint(1, tokens, (B * L, K, 2 * M), generator=generator)
    retrieved[missing] = pad_id
    retrieved[:, 1, M + 5 :] = pad_id  # a continuation that ends
    return seq, retrieved.view(B, L, K, 2 * M)


def loss_and_gradient(model: nn.Module, seq: Tensor, retrieved: Tensor | None, bf16: bool) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model(seq, retrieved, return_loss=True)
    loss.backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return loss.detach(), torch.cat(gradients)


def check(kind: str, bf16: bool, tokenizer: str) -> None:
    """Loss and all gradients of one model and its compiled copy, for batches that miss other neighbours each time."""
    torch.manual_seed(0)
    model = small_retrofit(tokenizer) if kind == "RETROfit" else small_retro()
    compiled = copy.deepcopy(model)
    for module in compiled.compilable:
        module.compile()
    for name, missing in MISSING.items():
        seq, retrieved = batch(missing, 300, model.pad_id)
        retrieved = None if kind == "baseline" else retrieved
        (loss, gradient), (its_loss, its_gradient) = (
            loss_and_gradient(each, seq, retrieved, bf16) for each in (model, compiled)
        )
        if not bf16:
            assert_close(its_loss, loss, atol=1e-6, rtol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
            assert_close(its_gradient, gradient, atol=1e-6, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
            continue
        exact_loss, exact = loss_and_gradient(model, seq, retrieved, bf16=False)  # each rounds at places of its own
        error, rounding = (its_gradient - exact).norm(), (gradient - exact).norm()
        assert error <= 1.5 * rounding + 1e-3 * exact.norm(), f"{name}: {error} from float32, eager {rounding}"
        assert (its_loss - exact_loss).abs() <= 2e-3 * exact_loss, f"{name}: {its_loss} and {exact_loss} in float32"
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0, "nothing was compiled"


if __name__ == "__main__":
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # otherwise it would go on in eager, silently
    check(sys.argv[1], sys.argv[2] == "bfloat16", sys.argv[3])
