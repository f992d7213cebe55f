"""Functions of tensors, recorded as CUDA graphs and replayed without Python.

A decoding step is some 300 small kernels on a GPU. Launching them from Python takes several times as long as
running them; a recording launches them all at once.
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
    """A function of tensors that is called repeatedly.

    The first call runs the function, the second records it, and later calls replay the recording: the same
    kernels on the same memory. So shapes and Python numbers must stay the same in all calls, and the function
    must update its state in place. If recording fails, every call runs the function.
    """

    result: Tensor  # of the recording, once there is one

    def __init__(self):
        self.warm = self.refused = False
        self.inputs: tuple[Tensor, ...] = ()
        self.replay: Callable[[], None] | None = None

    def play(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Compute function(*inputs). The next call may overwrite the result."""
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
    """Record function(*inputs). Returns a function that replays it, and the tensor that holds the result."""
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.stream(_side_stream(inputs[0].device))
    # Casts of weights in autocast's cache would be gone at a later replay, so the recording casts them itself.
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
    """The stream for recording, which must not be the default one. Cached, because every stream has its own memory."""
    return torch.cuda.Stream(device)
