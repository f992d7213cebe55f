"""Capabilities of the machine's devices, torch.compile, and copies to a device without waiting."""

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

SAFE_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
CUDNN_TILE = 128  # queries, and keys, per tile of cuDNN's backward pass
THREADS_BESIDE_GPU = 4
if hasattr(os, "register_at_fork"):  # as in a DataLoader's workers: a forked child would wait for threads it lacks
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


def best_device() -> torch.device:
    """This process's GPU if the machine has any, else the CPU. Processes launched together have one GPU each."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the processor multiplies it natively, else float32.

    A CPU without AVX512-BF16 or AMX runs bfloat16 too, several times slower than float32.
    """
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        checks = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
        native = device.type == "cpu" and any(check() for check in checks if check)
    return torch.bfloat16 if native else torch.float32


@contextmanager
def few_cpu_threads(device: torch.device) -> Iterator[None]:
    """Context in which PyTorch uses at most 4 CPU threads if `device` is a GPU; on a CPU nothing changes.

    While a GPU computes, the CPU only looks for padding and copies batches. By default PyTorch shares even that among
    all cores, whose threads then wait for one another, spinning, and take the cores from whoever launches the GPU's
    kernels. On a host of 32 cores with two runs, a step of RETRO took 66 ms with 4 threads and 103 ms with 32, of
    which the GPU computed 51 ms (H200, 2026).
    """
    before = torch.get_num_threads()
    if device.type != "cpu":
        torch.set_num_threads(min(before, THREADS_BESIDE_GPU))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def attention_kernels(queries: int = 0, keys: int = 0) -> AbstractContextManager:
    """The kernels that `F.scaled_dot_product_attention` may choose from, inside a `with` block.

    The attention of the models, and of the language models that RETROfit runs, uses these kernels; a BERT, which
    needs no gradients, does not. cuDNN's kernels, the fastest on Hopper GPUs, are allowed only for whole tiles of
    queries and of keys. Otherwise their backward pass pads the last tile with keys of score 0. Then
    exp(0 − logsumexp) overflows if all scores of a query are below −88, and the gradients of the queries are NaN. The
    encoder's cross-attention, over the 64 tokens of a chunk, is such a case. Seen with torch 2.11 and cuDNN 9.19 on an
    H200 (docs/cudnn-attention.md); reported up to torch 2.13 and cuDNN 9.20 as pytorch/pytorch#196678.

    Args:
        queries, keys: number of each; if left out, cuDNN is not allowed.
    """
    whole_tiles = queries and keys and queries % CUDNN_TILE == 0 and keys % CUDNN_TILE == 0
    return sdpa_kernel([*SAFE_KERNELS, SDPBackend.CUDNN_ATTENTION] if whole_tiles else SAFE_KERNELS)


@lru_cache
def can_compile(device_type: str) -> bool:
    """Whether torch.compile works for "cuda" or "cpu": tried once, with a warning if it fails.

    It needs Triton on a GPU and a C++ compiler on a CPU.
    """
    try:
        compiled = torch.compile(lambda x: x.sin() + 1, dynamic=False)
        compiled(torch.ones(8, device=device_type))
    except Exception as error:  # compilers raise many kinds of error, and none is fatal
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        warnings.warn(f"torch.compile does not work here, so this runs without it, slower: {reason}", stacklevel=2)
        return False
    return True


def compile_in_place(modules: Iterable[nn.Module], **options: Any) -> None:
    """Compile modules with torch.compile and its options at their next call.

    einops caches each tensor type at first use. Within compiled code, Dynamo would see the changed cache at the second
    call and compile everything again. So einops is called on a parameter here first.
    """
    rearrange(nn.Parameter(torch.empty(1)), "d -> d")
    for module in modules:
        module.compile(**options)


def vary(module: nn.Module, arguments: Iterable[Tensor | None]) -> None:
    """Mark the first dimension of these arguments as dynamic if `module` is compiled.

    Otherwise torch.compile specialises on the first call's size and compiles again for any size at the second.
    """
    if module._compiled_call_impl is not None:
        for tensor in arguments:
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)


def send(x: Shaped[Tensor, "..."], device: torch.device) -> Shaped[Tensor, "..."]:
    """Copy `x` to the device without waiting for its computations, which requires pinned memory."""
    if x.device == device:
        return x
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)
