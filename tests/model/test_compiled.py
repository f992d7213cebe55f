"""What torch.compile makes of the models computes what they compute, whatever chunks have neighbours."""

import subprocess
import sys
from pathlib import Path

import pytest
from tiny_language_models import TOKENIZERS

from retro_nb.common.devices import can_compile

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).parents[1] / "compiled_equals_eager.py"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["RETRO", "baseline", "RETROfit"])
def test_compiled_is_eager(kind, precision, tokenizers):
    if not can_compile("cpu"):
        pytest.skip("torch.compile needs a C++ compiler")
    command = [sys.executable, str(PROGRAM), kind, precision, str(tokenizers[TOKENIZERS["gpt2"]])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


COMPILED_ONCE = """
import torch
from torch._dynamo.utils import counters
from retro_nb import RETRO
from retro_nb.common.devices import compile_in_place

retro = RETRO(
    num_tokens=300, max_seq_len=32, enc_dim=16, enc_depth=1, dec_dim=16, dec_depth=1, dec_cross_attn_layers=(1,),
    heads=2, dim_head=8, chunk_size=16,
)
compile_in_place(retro.compilable, backend="eager")
for _ in range(3):
    retro(torch.ones(2, 33, dtype=torch.long), torch.ones(2, 2, 1, 32, dtype=torch.long), return_loss=True)
assert counters["stats"]["unique_graphs"] == 1, counters["stats"]
"""


def test_the_same_sizes_are_compiled_once():
    done = subprocess.run([sys.executable, "-c", COMPILED_ONCE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
