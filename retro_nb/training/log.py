"""The log of a training run: one record per step, in memory, on the progress bar and in log.jsonl (used by `fit`)."""

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from retro_nb.common.arrays import PathLike, replacing, settle


class History(list[dict[str, Any]]):
    """One record per step: step, loss (nats per token), lr, grad_norm (before clipping), tokens (seen so far),
    skipped (steps so far that changed no weight because loss or gradient norm was not finite; records omit non-finite
    numbers), tokens_per_second, seconds (of training so far), waiting_seconds (the part of them spent waiting for a
    batch), and valid_loss where it was measured."""

    def curve(self, name: str) -> tuple[list[int], list]:
        """Steps and values of a quantity where it was recorded: `plt.plot(*history.curve("valid_loss"))`."""
        records = [record for record in self if name in record]
        return [record["step"] for record in records], [record[name] for record in records]

    @property
    def steps(self) -> list[int]:
        return self.curve("loss")[0]

    @property
    def losses(self) -> list[float]:
        return self.curve("loss")[1]


def whole_records(path: PathLike) -> tuple[History, str | None]:
    """The records of a log before its first damaged line, and a description of the damage (None if there is none).

    An unfinished last line, left by a killed process, is not damage. A missing file has no records and is reported.
    """
    path, records = Path(path), History()
    if not path.exists():
        return records, f"{path.name} is missing"
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        try:
            record = json.loads(line)
            if not isinstance(record["step"], int):
                raise ValueError(f"its step is {record['step']!r}")
        except (ValueError, KeyError, TypeError) as error:
            return records, f"line {number} of {path.name} is damaged ({error})"
        records.append(record)
    return records, None


def read_log(path: PathLike) -> History:
    """Read a run's log.jsonl, ignoring an unfinished last line left by a killed process.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a line is damaged.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"there is no log {path}: `fit` writes it into its out_dir")
    records, damage = whole_records(path)
    if damage is not None:
        raise ValueError(f"{damage}, in {Path(path).parent}: restore the file, or delete what is not a record")
    return records


def _to_lines(records: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)


class Skipped(NamedTuple):
    """A step that changed no weight because its loss or gradient norm was not finite."""

    step: int
    loss: float
    grad_norm: float
    in_a_row: int  # consecutive skipped steps up to this one


class Log:
    """The records of a run in memory, on the progress bar and, given a file, on disk.

    Losses stay on the device until `collect` reads many at once, because each read makes a GPU wait.
    """

    def __init__(
        self, accelerator: Accelerator, out_dir: PathLike | None, done: int, steps: int, progress: bool
    ) -> None:
        path = None if out_dir is None else Path(out_dir) / "log.jsonl"
        self.history, self.waited = History(), 0.0
        self.pending: list[tuple[int, float, Tensor, Tensor]] = []  # what `end_step` was given
        self.newly_skipped: list[Skipped] = []  # among the steps of the last `collect`
        self._in_a_row = 0
        if path:  # steps after the checkpoint will be repeated, so their records are dropped
            self.history.extend(record for record in whole_records(path)[0] if record["step"] <= done)
        accelerator.wait_for_everyone()
        self.path = path if accelerator.is_main_process else None
        if self.path:
            with replacing(self.path) as temporary:
                temporary.write_text(_to_lines(self.history), encoding="utf-8")
        self.written = len(self.history)
        hidden = not (progress and accelerator.is_main_process)
        self.bar = tqdm(total=steps, initial=done, desc="training", unit="step", disable=hidden)

    def begin_step(self, stream: Iterator[Any]) -> Any:
        """Return the next item of the stream, and measure the wait for it."""
        begun = time.perf_counter()
        if not self.pending:
            self.clock, self.waited = begun, 0.0
        item = next(stream)
        self.waited += time.perf_counter() - begun
        return item

    def end_step(self, step: int, lr: float, loss_and_norm: Float[Tensor, "2"], tokens: Int[Tensor, ""]) -> None:
        """Keep a step's results on the device: its loss and gradient norm, and the number of tokens it predicted."""
        self.pending.append((step, lr, loss_and_norm, tokens))
        self.bar.update()

    def collect(self) -> dict[str, Any]:
        """Turn the steps since the last call into records and return the newest."""
        steps, rates, results, counts = zip(*self.pending, strict=True)
        numbers, tokens = torch.stack(results).tolist(), torch.stack(counts).tolist()
        spent = time.perf_counter() - self.clock
        last = self.history[-1] if self.history else {}
        seen, skipped, seconds, waited = (last.get(x, 0) for x in ("tokens", "skipped", "seconds", "waiting_seconds"))
        speed = sum(tokens) / spent
        pace = {"tokens_per_second": speed, "seconds": seconds + spent, "waiting_seconds": waited + self.waited}
        self.pending.clear()
        self.newly_skipped = []
        for step, lr, (loss, norm), count in zip(steps, rates, numbers, tokens, strict=True):
            self._in_a_row = 0 if math.isfinite(loss) and math.isfinite(norm) else self._in_a_row + 1
            if self._in_a_row:
                self.newly_skipped.append(Skipped(step, loss, norm, self._in_a_row))
            seen, skipped = seen + count, skipped + (self._in_a_row > 0)
            record = {"step": step, "loss": loss, "lr": lr, "grad_norm": norm, "tokens": seen, "skipped": skipped}
            self.history.append({name: x for name, x in (record | pace).items() if math.isfinite(x)})
        shown = {"loss": f"{numbers[-1][0]:.3f}", "tokens/s": f"{speed:,.0f}"}
        self.bar.set_postfix(shown | ({"skipped": skipped} if skipped else {}))
        return self.history[-1]

    def write(self, on_disk: bool = False) -> None:
        """Append the new records to the file. `on_disk` waits until a machine crash cannot lose them."""
        new, self.written = self.history[self.written :], len(self.history)
        if self.path:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_to_lines(new))
            if on_disk:
                settle(self.path)

    def close(self) -> None:
        """Close the progress bar and write the remaining records, also of a run that failed."""
        self.bar.close()
        self.write()
