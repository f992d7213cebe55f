"""What torch.compile makes of the models computes what they compute, whatever chunks have neighbours."""

import subprocess
import sys
from pathlib import Path

import pytest
from tiny_language_models import TOKENIZERS

from retro_nb.devices import can_compile

PROGRAM = Path(__file__).with_name("compiled_equals_eager.py")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["RETRO", "baseline", "RETROfit"])
def test_compiled_is_eager(kind, precision, tokenizers):
    if not can_compile("cpu"):
        pytest.skip("torch.compile needs a C++ compiler")
    command = [sys.executable, str(PROGRAM), kind, precision, str(tokenizers[TOKENIZERS["gpt2"]])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
