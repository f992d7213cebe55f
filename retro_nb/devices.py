"""What the machine's devices can do, and how numbers get there without anyone waiting."""

import warnings
from functools import lru_cache

import torch
from jaxtyping import Shaped
from torch import Tensor


@lru_cache
def can_compile(device_type: str) -> bool:
    """Whether torch.compile works for "cuda" or "cpu": tried once, with a warning where it does not.

    It needs Triton on a GPU and a C++ compiler on a CPU.
    """
    try:
        compiled = torch.compile(lambda x: x.sin() + 1, dynamic=False)
        compiled(torch.ones(8, device=device_type))
    except Exception as error:  # whatever the compilers say, there is a way without them
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        warnings.warn(f"torch.compile does not work here, so this runs without it, slower: {reason}", stacklevel=2)
        return False
    return True


def send(x: Shaped[Tensor, "..."], device: torch.device) -> Shaped[Tensor, "..."]:
    """`x` on the device, without waiting for what that is computing: only pinned memory is copied so."""
    if x.device == device:
        return x
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)
