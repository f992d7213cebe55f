"""What a training run leaves behind: its history, its log file and its checkpoints (used by `training.fit`).

    out_dir/log.jsonl                  one record a step
    out_dir/checkpoints/step-00000100  weights, optimizer, random states, settings

A run may be killed at any point. What it finds when it starts again is a whole checkpoint, and a log that is
cut back to it.
"""

import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm

from retro_nb.pretrained import load_weights
from retro_nb.storage import PathLike, replacing, write_json


class History(list[dict[str, Any]]):
    """One record a step: step, loss (nats per token), lr, grad_norm (before clipping), tokens (seen so far),
    tokens_per_second, seconds (spent training so far), waiting_seconds (those of them in which there was no
    batch yet), and valid_loss where it was measured."""

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


def read_log(path: PathLike) -> History:
    """Read a run's log.jsonl. A last line that a killed process left unfinished is not counted."""
    lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    return History(json.loads(line) for line in lines if line.endswith("\n"))


def _to_lines(records: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


class Log:
    """The records of a run in memory, on the progress bar and, given a file, on disk.

    Losses stay on the device until `collect` reads many at once: each reading makes a GPU wait.
    """

    def __init__(
        self, accelerator: Accelerator, out_dir: PathLike | None, done: int, steps: int, progress: bool
    ) -> None:
        path = Path(out_dir) / "log.jsonl" if out_dir else None
        self.accelerator, self.history, self.pending, self.waited = accelerator, History(), [], 0.0
        if path and path.exists():  # records beyond the checkpoint are of steps that will be done again
            self.history.extend(record for record in read_log(path) if record["step"] <= done)
        accelerator.wait_for_everyone()
        self.path = path if accelerator.is_main_process else None
        if self.path:
            with replacing(self.path) as temporary:
                temporary.write_text(_to_lines(self.history), encoding="utf-8")
        self.written = len(self.history)
        hidden = not (progress and accelerator.is_main_process)
        self.bar = tqdm(total=steps, initial=done, desc="training", unit="step", disable=hidden)

    def begin_step(self, stream: Iterator[Any]) -> Any:
        """The next of the stream; the wait for it is measured."""
        begun = time.perf_counter()
        if not self.pending:
            self.clock, self.waited = begun, 0.0
        item = next(stream)
        self.waited += time.perf_counter() - begun
        return item

    def end_step(self, step: int, lr: float, loss: Tensor, grad_norm: Tensor, tokens: Tensor) -> None:
        self.pending.append((step, lr, loss, grad_norm, tokens))
        self.bar.update()

    def collect(self) -> dict[str, Any]:
        """Turn the steps since the last call into records and return the newest."""
        steps, rates, losses, norms, tokens = zip(*self.pending, strict=True)
        losses = self.accelerator.reduce(torch.stack(losses)).tolist()
        norms, tokens = torch.stack(norms).tolist(), torch.stack(tokens).tolist()
        spent = time.perf_counter() - self.clock
        last = self.history[-1] if self.history else {}
        seen, seconds, waited = (last.get(name, 0) for name in ("tokens", "seconds", "waiting_seconds"))
        speed = sum(tokens) / spent
        pace = {"tokens_per_second": speed, "seconds": seconds + spent, "waiting_seconds": waited + self.waited}
        self.pending.clear()
        for step, lr, loss, norm, count in zip(steps, rates, losses, norms, tokens, strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self.write()
                raise FloatingPointError(
                    f"step {step}: the loss is {loss} and the gradient norm {norm}. Lower lr (now {lr:.2g}), "
                    f"lengthen the warm-up, or look for a batch without tokens; earlier checkpoints are sound"
                )
            seen += count
            record = {"step": step, "loss": loss, "lr": lr, "grad_norm": norm, "tokens": seen}
            self.history.append(record | pace)
        self.bar.set_postfix({"loss": f"{losses[-1]:.3f}", "tokens/s": f"{speed:,.0f}"})
        return self.history[-1]

    def write(self) -> None:
        if self.path:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_to_lines(self.history[self.written :]))
        self.written = len(self.history)

    def close(self) -> None:
        self.bar.close()


class Checkpoints:
    """The newest checkpoint of a run, in out_dir/checkpoints/step-N.

    It is written under another name and renamed when it is whole, and only then is the one before it removed:
    whenever the process is killed, the newest `step-N` is good.
    """

    def __init__(
        self, accelerator: Accelerator, retro: nn.Module, out_dir: PathLike | None, run: dict, resume: bool
    ) -> None:
        self.accelerator, self.retro = accelerator, retro
        self.folder = Path(out_dir) / "checkpoints" if out_dir else None
        self.identity = json.loads(json.dumps({"model": retro.config, "run": run}))
        if self.folder and not resume and accelerator.is_main_process:
            shutil.rmtree(self.folder, ignore_errors=True)
        accelerator.wait_for_everyone()
        self.newest = max(self.folder.glob("step-*"), default=None) if self.folder else None
        self.step = self._check(self.newest) if self.newest else 0
        accelerator.register_save_state_pre_hook(self._save_model)
        accelerator.register_load_state_pre_hook(self._load_model)

    def _check(self, newest: Path) -> int:
        saved = json.loads((newest / "fit.json").read_text(encoding="utf-8"))
        for part, settings in self.identity.items():
            for name in sorted(settings.keys() | saved[part].keys()):
                there, here = saved[part].get(name), settings.get(name)
                if there != here:
                    raise ValueError(
                        f"{newest} is of another {part}: {name} is {there!r} there and {here!r} here. Pass the "
                        f"same setting to go on, resume=False to start over, or another out_dir"
                    )
        return saved["step"]

    # Accelerate would save the model as several processes wrap it, with other names for its weights. Saved on
    # its own, it can go on with another number of processes, and from_pretrained reads it.
    def _save_model(self, models: list, weights: list, folder: str) -> None:
        weights.clear()
        if self.accelerator.is_main_process:
            self.retro.save_pretrained(folder)

    def _load_model(self, models: list, folder: str) -> None:
        models.clear()
        load_weights(self.retro.own_weights, folder)

    def load(self) -> None:
        if self.newest:
            self.accelerator.load_state(str(self.newest))

    def save(self, step: int) -> None:
        temporary, target = self.folder / "saving", self.folder / f"step-{step:08d}"
        if self.accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            self.accelerator.save_state(str(temporary))
        except Exception as error:
            raise OSError(f"could not save {target}: {error}. The one before it is untouched") from error
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            write_json(temporary / "fit.json", {"step": step, **self.identity})
            os.replace(temporary, target)
            for old in set(self.folder.glob("step-*")) - {target}:
                shutil.rmtree(old)


@contextmanager
def interrupt_between_steps(enabled: bool) -> Iterator[threading.Event]:
    """Let Ctrl-C set the yielded event, and raise KeyboardInterrupt only when the block has ended.

    Cutting a step in two would leave the weights half updated. A second Ctrl-C does not wait. Only the main
    thread can do this; elsewhere nothing changes.
    """
    asked = threading.Event()
    if not enabled or threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(signum: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
    if asked.is_set():
        raise KeyboardInterrupt
