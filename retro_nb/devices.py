"""What the machine's devices can do, and how numbers get there without anyone waiting."""

import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager
from functools import lru_cache

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

SAFE_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
CUDNN_TILE = 128  # keys that cuDNN's backward pass takes at a time


def attention_kernels(*, causal: bool = False, keys: int = 0) -> AbstractContextManager:
    """The kernels that `F.scaled_dot_product_attention` may choose from, inside a `with` block.

    All attention of this package, and of language models that RETROfit runs, takes its kernels from here. They are
    all but cuDNN's, whose gradients of the queries are NaN where three things meet: the number of keys is an odd
    multiple of 64, attention is not causal or has a mask, and all scores of a query are below −88. Its backward
    pass fills the last tile of 128 keys with keys of score 0, and exp(0 − logsumexp) overflows
    (pytorch/pytorch#196678; seen with torch 2.11 and cuDNN 9.19 on an H200, reported up to torch 2.13; the
    encoder's cross-attention, over the 64 tokens of a chunk, meets all three). Causal self-attention over whole
    tiles has no such keys: there cuDNN, the fastest on Hopper GPUs, may be chosen, too.

    Args:
        causal: each of `keys` queries sees the keys up to its own, and there is no other mask.
        keys: number of keys.
    """
    whole_tiles = causal and keys % CUDNN_TILE == 0
    return sdpa_kernel([*SAFE_KERNELS, SDPBackend.CUDNN_ATTENTION] if whole_tiles else SAFE_KERNELS)


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


def vary(module: nn.Module, arguments: Iterable[Tensor | None]) -> None:
    """Tell torch.compile, if `module` is compiled, that the first size of these arguments varies from call to call.

    Otherwise it compiles for the first size alone, and a second time, for any size, at the second call.
    """
    if module._compiled_call_impl is not None:
        for tensor in arguments:
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)


def send(x: Shaped[Tensor, "..."], device: torch.device) -> Shaped[Tensor, "..."]:
    """`x` on the device, without waiting for what that is computing: only pinned memory is copied so."""
    if x.device == device:
        return x
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)
