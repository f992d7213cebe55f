"""Doing the same once more without Python: functions of tensors, recorded as CUDA graphs.

A step of decoding is some 300 small kernels on a GPU, and starting them from Python takes several times as long
as running them. A recording starts them all at once.
"""

import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


def can_record(x: Tensor) -> bool:
    """Whether work on `x` can be recorded: on a CUDA GPU, without gradients."""
    return x.is_cuda and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


class Recording:
    """One function of tensors that is called again and again.

    The first call runs it as it is, the second records it, all later calls replay the record: the same kernels
    on the same memory. So shapes and Python numbers must be those of the first call, and what the function
    keeps between calls it must write in place. Where recording fails, the function simply runs each time.
    """

    def __init__(self):
        self.warm = self.refused = False
        self.inputs: tuple[Tensor, ...] = ()
        self.replay: Callable[[], None] | None = None
        self.result: Tensor | None = None

    def play(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """function(*inputs). The next call may write over the result."""
        if self.warm and self.replay is None and not self.refused:
            self._record(function, inputs)
        self.warm = True
        if self.replay is None:
            return function(*inputs)
        for place, each in zip(self.inputs, inputs, strict=True):
            place.copy_(each)
        self.replay()
        return self.result

    def _record(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
        self.inputs = tuple(each.clone() for each in inputs)
        try:
            self.replay, self.result = record(function, self.inputs)
        except RuntimeError as error:
            self.refused = True
            warnings.warn(f"decoding goes on without a CUDA graph, so more slowly: {error}", stacklevel=3)


def record(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> tuple[Callable[[], None], Tensor]:
    """Record function(*inputs). Returns what replays it, and the tensor in which a replay leaves the result."""
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.stream(_side_stream(inputs[0].device))
    # Weights that autocast has cast and keeps would be gone at a later replay: they are cast in the recording.
    no_cache = torch.autocast("cuda", enabled=torch.is_autocast_enabled("cuda"), cache_enabled=False)
    with side, no_cache:  # not torch.cuda.graph, which first empties the allocator's cache: that takes longer
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            result = function(*inputs)
        finally:
            graph.capture_end()
    return graph.replay, result


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Recording needs a stream that is not the default one; always the same, as each has memory of its own."""
    return torch.cuda.Stream(device)
