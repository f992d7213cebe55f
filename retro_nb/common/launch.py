"""The processes that `accelerate launch` or torchrun has started together."""

import os
from typing import Any


def launched() -> tuple[int, int]:
    """Which process of a launch this is, and how many there are: of `accelerate launch` or torchrun; else (0, 1)."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def broadcast(value: Any = None) -> Any:
    """Give process 0's value to every process of the launch; each waits here for it."""
    processes = launched()[1]
    if processes == 1:
        return value
    import torch  # these are slow to import, and not for a process that is alone
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    joined = PartialState(cpu=not torch.cuda.is_available()).num_processes  # it joins them unless that has been done
    if joined != processes:
        raise RuntimeError(f"{processes} processes were launched, but PartialState knows {joined}: give it cpu=True")
    return broadcast_object_list([value])[0]
