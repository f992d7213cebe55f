"""Checkpoints of a training run, and how it stops between two steps (used by `training.fit`).

    out_dir/checkpoints/step-00000100  weights, optimizer, random states; fit.json: settings, digests of the files

A run may be killed at any point, and the machine may crash. The restarted run still finds an intact checkpoint: the
newest one, or the one before it.
"""

import json
import math
import pickle
import random
import re
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch.optim import Optimizer
from torch.utils.data import Dataset

from retro_nb.common.arrays import PathLike, file_record, inside, move_settled, settle, to_jsonable, write_json
from retro_nb.common.launch import Interrupted
from retro_nb.model.base import ChunkedLM
from retro_nb.model.pretrained import load_weights, not_finite
from retro_nb.training.log import whole_records
from retro_nb.training.runs import by_main, data_identity

MARK = "fit.json"  # marks every folder that `fit` created: written first, deleted last
WEIGHTS, OPTIMIZER = "model.safetensors", "optimizer.bin"
START_OVER = "resume=False to start over, or another out_dir"


def random_states(device: torch.device) -> dict[str, Any]:
    """Random states of Python, NumPy and torch, as tensors and plain numbers."""
    of_numpy = np.random.get_state(legacy=False)
    of_numpy["state"]["key"] = of_numpy["state"]["key"].tolist()
    states = {"python": random.getstate(), "numpy": of_numpy, "torch": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Restore the random states that `random_states` returned."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def _load_plain(path: Path) -> Any:
    """Load a file of torch.save that holds only tensors and plain values; nothing in it is executed."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError):  # torch's own message suggests executing it
        raise ValueError(
            f"{path} holds more than tensors and plain values, or is damaged: `fit` has not written it so"
        ) from None


class Checkpoints:
    """The two newest checkpoints of a run, in out_dir/checkpoints/step-N.

    Each is written under a temporary name and renamed once it is complete and on disk. Only then are all but the two
    newest deleted. Digests reveal files that were damaged later.

    Args:
        accelerator, retro, train, valid: the run's Accelerator, model, training and validation data.
        out_dir: the run's folder; None saves nothing.
        run: the settings that the losses depend on.
        resume: continue from the newest intact checkpoint; False deletes the existing checkpoints.

    Raises:
        ValueError: the newest checkpoint belongs to another model, other settings or other data; or none is intact.
        FileExistsError: `fit` did not create the folder where a checkpoint would be saved.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        retro: ChunkedLM,
        train: Dataset,
        valid: Dataset | None,
        out_dir: PathLike | None,
        run: dict[str, Any],
        resume: bool,
    ) -> None:
        self.accelerator, self.retro = accelerator, retro
        self.folder: Path | None = None
        self.newest: Path | None = None  # the newest checkpoint known to be intact
        if out_dir is None:
            return
        self.folder, self.log_path = Path(out_dir) / "checkpoints", Path(out_dir) / "log.jsonl"
        if accelerator.is_main_process:
            settings = {name: "inf" if value == math.inf else value for name, value in run.items()}  # JSON lacks it
            self.identity = to_jsonable({"model": retro.config, "run": settings, "data": data_identity(train)})
            self.valid = None if valid is None else data_identity(valid)
        self.newest = by_main(accelerator, partial(self._begin, self.folder, resume))

    @property
    def step(self) -> int:
        """The step of the newest checkpoint; 0 without one."""
        return _step(self.newest) if self.newest else 0

    # finding

    def _begin(self, home: Path, resume: bool) -> Path | None:
        if not resume:
            self._delete([*_all(home), home / "saving"])
        newest = self._find(home) if resume else None
        self._warn_of_other_validation(newest)
        done = _step(newest) if newest else 0
        self._delete([folder for folder in _all(home) if _step(folder) < done][1:])  # left behind by a kill
        for folder in (home / "saving", *(later for later in _all(home) if _step(later) > done)):
            if folder.exists() and not _made_by_fit(folder):
                raise FileExistsError(
                    f"{folder} has no {MARK}, so `fit` has not made it and does not delete it, but a checkpoint may "
                    f"have to be saved there: move it away"
                )
        return newest

    def _find(self, home: Path) -> Path | None:
        """The newest intact checkpoint; warns if newer ones are damaged."""
        damaged: list[str] = []
        for folder in _all(home):
            damage = self._damage(folder)
            if damage is None:
                if damaged:
                    warnings.warn(f"going on from {folder}, since {'; '.join(damaged)}", stacklevel=2)
                return folder
            damaged.append(f"{folder.name}: {damage}")
        if damaged:
            raise ValueError(
                f"no checkpoint in {home} is whole: {'; '.join(damaged)}. Put the files back from a copy to go "
                f"on, or pass {START_OVER}"
            )
        return None

    def _damage(self, folder: Path) -> str | None:
        """Describe what is wrong with a checkpoint; None if it is intact.

        Raises:
            ValueError: it belongs to another run.
        """
        try:
            saved = json.loads((folder / MARK).read_text(encoding="utf-8"))
            files, identity = saved["files"], {part: saved[part] for part in self.identity}
            parts = (files, *files.values(), *identity.values()) if isinstance(files, dict) else (files,)
            if saved["step"] != _step(folder) or not all(isinstance(part, dict) for part in parts):
                raise ValueError(f"of step {saved['step']}")
        except FileNotFoundError:
            return f"{MARK} is missing"
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            return f"{MARK} is empty, damaged or of an earlier version ({error!r})"
        self._refuse_other(folder, identity)
        if unlisted := sorted({WEIGHTS, OPTIMIZER, _states_name(0)} - files.keys()):
            return f"{MARK} does not list {', '.join(unlisted)}"
        for name, record in files.items():
            try:
                path = inside(folder, name)
            except ValueError as error:
                return f"{MARK} is damaged ({error})"
            if not path.is_file():
                return f"{name} is missing"
            if (now := file_record(path, whole=True)) != record:
                return f"{name} is damaged ({now['bytes']} of {record['bytes']} bytes)"
        records, damage = whole_records(self.log_path)
        steps = [record["step"] for record in records]
        if steps[: _step(folder)] != list(range(1, _step(folder) + 1)):
            return damage or f"{self.log_path.name} does not have each of its steps once"
        return None

    def _refuse_other(self, folder: Path, saved: dict[str, dict]) -> None:
        for part, settings in self.identity.items():
            for name in sorted(settings.keys() | saved[part].keys()):
                before, now = saved[part].get(name), settings.get(name)
                if before != now:
                    kind = "other training data" if part == "data" else f"another {part}"
                    raise ValueError(
                        f"{folder} is of {kind}: {name} is {before!r} there and {now!r} here. Pass the same to go on, "
                        f"{START_OVER}"
                    )

    def _warn_of_other_validation(self, newest: Path | None) -> None:
        saved = {} if newest is None else json.loads((newest / MARK).read_text(encoding="utf-8"))
        if self.valid is not None and saved.get("valid") not in (None, self.valid):
            warnings.warn(
                f"{newest} was saved by a run with another validation set: valid_loss cannot be compared before and "
                f"after step {saved['step']}. Pass the same valid, or {START_OVER}",
                stacklevel=2,
            )

    # loading and saving

    def load(self, optimizer: Optimizer) -> None:
        """Restore model, optimizer and random states from the newest checkpoint, if any."""
        if self.newest is None:
            return
        try:
            load_weights(self.retro.own_weights, self.newest)
            self._load_optimizer(optimizer, self.newest / OPTIMIZER)
            self._load_random_states(self.newest / _states_name(self.accelerator.process_index))
        except (ValueError, SafetensorError) as error:
            raise ValueError(f"could not load {self.newest}: {error}. Pass {START_OVER}") from error

    def _load_optimizer(self, optimizer: Optimizer, path: Path) -> None:
        try:
            optimizer.load_state_dict(_load_plain(path))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} holds no state of an optimizer ({error!r})") from error
        if not optimizer.state:  # every step leaves moments
            raise ValueError(f"{path} holds no moments of a weight")

    def _load_random_states(self, path: Path) -> None:
        saved, processes = len(list(path.parent.glob(_states_name("*")))), self.accelerator.num_processes
        if saved != processes and self.accelerator.is_main_process:
            warnings.warn(
                f"{path.parent} was saved by {saved} process(es) and goes on with {processes}: dropout draws other "
                f"random numbers than before",
                stacklevel=5,
            )
        if not path.exists():
            return
        try:
            states, device = _load_plain(path), self.accelerator.device
            if (device.type == "cuda") != ("cuda" in states):
                before = "a GPU" if "cuda" in states else "a CPU"
                warnings.warn(
                    f"{path.parent} was saved on {before} and goes on on {device.type}: dropout draws other random "
                    f"numbers than before",
                    stacklevel=5,
                )
            set_random_states(states, device)
        except (LookupError, TypeError, RuntimeError) as error:
            raise ValueError(f"{path} holds no random states ({error!r})") from error

    def save(self, step: int, optimizer: Optimizer) -> None:
        """Save a checkpoint, then delete all older ones but the previous. Non-finite values are rejected.

        Raises:
            FloatingPointError: a weight or an optimizer moment is not finite.
            OSError: writing failed.
        """
        self._refuse_not_finite(step, optimizer)
        if self.folder is None:
            return
        target, saving = self.folder / f"step-{step:08d}", self.folder / "saving"
        try:
            by_main(self.accelerator, partial(self._open, saving, step))
            states = random_states(self.accelerator.device)
            torch.save(states, saving / _states_name(self.accelerator.process_index))
            self.accelerator.wait_for_everyone()
            by_main(self.accelerator, partial(self._close, saving, target, step, optimizer))
        except Exception as error:
            raise OSError(f"could not save {target}: {error}. The one before it is untouched") from error
        self.newest = target

    def _refuse_not_finite(self, step: int, optimizer: Optimizer) -> None:
        weights = list(self.retro.own_weights.named_parameters())
        moments = [(f"{k} of {name}", x) for name, p in weights for k, x in optimizer.state.get(p, {}).items()]
        if names := not_finite([*weights, *moments]):
            raise FloatingPointError(
                f"after step {step}, {len(names)} tensors of model and optimizer hold numbers that are not finite, "
                f"{names[0]} first. No checkpoint was saved; {self.last_good()}. Start over with a lower lr or a "
                f"smaller grad_clip (resume=False)"
            )

    def last_good(self) -> str:
        """The last good checkpoint, as a phrase for error messages."""
        return f"the last good checkpoint is {self.newest}" if self.newest else "there is no good checkpoint"

    def _open(self, saving: Path, step: int) -> None:
        _remove(saving)
        saving.mkdir(parents=True)
        write_json(saving / MARK, {"unfinished": step})

    def _close(self, saving: Path, target: Path, step: int, optimizer: Optimizer) -> None:
        self.retro.save_pretrained(saving)
        torch.save(optimizer.state_dict(), saving / OPTIMIZER)
        files = {file.name: file_record(file, whole=True) for file in sorted(saving.iterdir()) if file.name != MARK}
        for name in files:
            settle(saving / name)
        write_json(saving / MARK, {"step": step, "files": files, "valid": self.valid, **self.identity})
        _remove(target)  # a damaged checkpoint of the same step
        move_settled(saving, target)
        self._delete(set(_all(target.parent)) - {target, self.newest})

    def _delete(self, folders: Iterable[Path]) -> None:
        """Delete the folders that `fit` created."""
        for folder in filter(_made_by_fit, folders):
            _remove(folder)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _all(home: Path) -> list[Path]:
    """All folders in `home` that are named like a checkpoint, newest first."""
    found = [path for path in home.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=_step, reverse=True)


def _states_name(process: int | str) -> str:
    return f"random_states_{process}.bin"


def _made_by_fit(folder: Path) -> bool:
    """Whether `fit` created a folder: it contains the mark, possibly half written, or is empty."""
    return folder.is_dir() and (any(folder.glob(f"{MARK}*")) or not any(folder.iterdir()))


def _remove(folder: Path) -> None:
    """Delete a folder that `fit` created, if it exists. The mark goes last, so a kill leaves the folder marked."""
    if not folder.exists():
        return
    if not _made_by_fit(folder):
        raise FileExistsError(f"{folder} has no {MARK}, so `fit` has not made it and does not delete it: move it away")
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name.startswith(MARK)):
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    folder.rmdir()


@contextmanager
def interrupt_between_steps(enabled: bool) -> Iterator[threading.Event]:
    """Let Ctrl-C or SIGTERM set the yielded event, and raise `Interrupted` only after the block.

    Interrupting a step would leave the weights half updated. A second one interrupts at once. Schedulers send SIGTERM
    before they kill. Only the main thread can handle signals; in other threads nothing changes.
    """
    asked = threading.Event()
    if not enabled or threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(signum: int, frame: Any) -> None:
        if asked.is_set():
            raise Interrupted(
                "stopped at once, in the midst of a step: the weights in memory may be half updated. The same call "
                "goes on from the newest checkpoint, if there is one"
            )
        asked.set()
        print("\nstopping after this step; interrupt again to stop at once", file=sys.stderr, flush=True)

    before = {each: signal.signal(each, ask) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    if asked.is_set():
        raise Interrupted("stopped after the last step: the run is complete")
