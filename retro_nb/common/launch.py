"""The processes that `accelerate launch` or torchrun has started together, and how one is stopped."""

import os
from typing import Any


def launched() -> tuple[int, int]:
    """(rank, number of processes) of a launch by `accelerate launch` or torchrun; (0, 1) without one."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def broadcast(value: Any = None) -> Any:
    """Return process 0's value in every process of the launch; each waits for it."""
    processes = launched()[1]
    if processes == 1:
        return value
    import torch  # slow imports, not needed by a single process
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    joined = PartialState(cpu=not torch.cuda.is_available()).num_processes  # joins the processes unless already done
    if joined != processes:
        raise RuntimeError(f"{processes} processes were launched, but PartialState knows {joined}: give it cpu=True")
    return broadcast_object_list([value])[0]


class Interrupted(KeyboardInterrupt):
    """Work stopped by Ctrl-C; says what is kept and how to go on. IPython shows the message alone, no traceback."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]
