"""Does torch.compile work here? It needs Triton on a GPU and a C++ compiler on a CPU."""

import warnings
from functools import lru_cache

import torch


@lru_cache
def can_compile(device_type: str) -> bool:
    """Whether torch.compile works for "cuda" or "cpu": tried once, with a warning where it does not."""
    try:
        compiled = torch.compile(lambda x: x.sin() + 1, dynamic=False)
        compiled(torch.ones(8, device=device_type))
    except Exception as error:  # whatever the compilers say, there is a way without them
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        warnings.warn(f"torch.compile does not work here, so this runs without it, slower: {reason}", stacklevel=2)
        return False
    return True
