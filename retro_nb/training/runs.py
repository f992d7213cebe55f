"""Settings, data and folder of a training run, all checked before the first step (used by `fit`)."""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from torch.utils.data import Dataset, Subset

from retro_nb.common.arrays import PathLike, explain_write_errors, file_record, to_jsonable
from retro_nb.common.manifest import read_manifest
from retro_nb.model.base import ChunkedLM, check_model
from retro_nb.store.dataset import RETRODataset

PAPER_WARMUP_STEPS = 750  # appendix C.1
FREE_SETTINGS = (  # may change when a run resumes
    "epochs", "log_every", "eval_every", "checkpoint_every", "compile", "num_workers", "resume", "progress",
)  # fmt: skip
LEAST_NORM = 1e-8  # of clipped gradients: smaller ones vanish beside the eps of AdamW, and nothing is trained
LEAST = {
    "steps": 1, "epochs": 1, "batch_size": 1, "accumulate": 1, "warmup_steps": 0, "seed": 0, "log_every": 1,
    "eval_every": 1, "checkpoint_every": 1, "num_workers": 0,
}  # fmt: skip
MOST_SEED = 2**32 - 2**20  # NumPy's seeds have 32 bits, and each process adds its number
LEFT_OUT = ("steps", "epochs", "warmup_steps", "precision", "compile")  # None lets `fit` choose


# settings


def check_settings(settings: Mapping[str, Any]) -> None:
    """Reject settings of `fit` that are invalid for any data and machine.

    Raises:
        TypeError: a value has the wrong type, such as "3" or 2.5 steps.
        ValueError: a value is out of range.
    """
    given = {name: value for name, value in settings.items() if value is not None or name not in LEFT_OUT}
    for name in LEAST.keys() & given.keys():
        _check_whole(name, given[name])
    for name in {"lr", "wd", "grad_clip"} & given.keys():
        _check_number(name, given[name])
    for name in {"retrieval", "resume", "compile", "progress"} & given.keys():
        if not isinstance(given[name], bool):
            raise TypeError(f"{name} is {given[name]!r}, a {type(given[name]).__name__}: pass True or False")
    if given.get("precision", "no") not in ("no", "bf16"):
        raise ValueError(f'precision {given["precision"]!r} is unknown: pass "no" or "bf16"')
    if ("steps" in given) == ("epochs" in given):
        steps, epochs = settings.get("steps"), settings.get("epochs")
        raise ValueError(f"steps is {steps} and epochs {epochs}: pass exactly one of them")
    _check_warmup(given.get("warmup_steps", 0), given.get("steps", math.inf))


def _is_a(kind: type, value: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _check_whole(name: str, value: Any) -> None:
    if not _is_a(Integral, value):
        raise TypeError(f"{name} is {value!r}, a {type(value).__name__}: pass a whole number, e.g. {LEAST[name] or 1}")
    if value < LEAST[name]:
        raise ValueError(f"{name} is {value}: it must be at least {LEAST[name]}")
    if name == "seed" and value > MOST_SEED:
        raise ValueError(f"seed is {value}: it must be at most {MOST_SEED}")


def _check_number(name: str, value: Any) -> None:
    if not _is_a(Real, value):
        raise TypeError(f"{name} is {value!r}, a {type(value).__name__}: pass a number")
    if name == "lr" and not 0 < value < math.inf:
        raise ValueError(f"lr is {value}: it must be above 0 and finite, e.g. 3e-4")
    if name == "wd" and not 0 <= value < math.inf:
        raise ValueError(f"wd is {value}: it must be finite and at least 0, which means no weight decay")
    if name == "grad_clip" and not value >= LEAST_NORM:
        raise ValueError(
            f"grad_clip is {value}: it must be at least {LEAST_NORM}, e.g. 1.0, or math.inf for no clipping"
        )


def _check_warmup(warmup_steps: float | int | np.number, steps: float | int | np.number) -> None:
    if warmup_steps >= steps:
        raise ValueError(f"warmup_steps {warmup_steps} must be from 0 to below steps, {steps}")


def resolve_settings(
    settings: Mapping[str, Any], sequences: int, device: torch.device, processes: int = 1
) -> dict[str, Any]:
    """Check a run's settings and fill in those left out.

    Args:
        settings: the arguments of `fit`.
        sequences: number of training sequences.
        device, processes: the device to train on, and the number of processes that share each batch.

    Raises:
        TypeError, ValueError: see `check_settings`; or a batch has fewer sequences than processes.
    """
    check_settings(settings)
    numbers = {name: float for name in ("lr", "wd", "grad_clip")} | {name: int for name in LEAST}  # NumPy's to Python's
    run = {name: numbers[name](x) if name in numbers and x is not None else x for name, x in settings.items()}
    if run["batch_size"] < processes:
        raise ValueError(
            f"batch_size is {run['batch_size']}, which {processes} processes cannot share: pass at least {processes}"
        )
    if run["steps"] is None:
        run["steps"] = math.ceil(run["epochs"] * sequences / (run["batch_size"] * run["accumulate"]))
    if run["warmup_steps"] is None:
        run["warmup_steps"] = min(PAPER_WARMUP_STEPS, run["steps"] // 10)
    _check_warmup(run["warmup_steps"], run["steps"])
    if run["precision"] is None:
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        run["precision"] = "bf16" if bf16 else "no"
    return run


# data


def check_store(retro: ChunkedLM, data: Dataset | None) -> None:
    """Reject a store whose chunk size or tokenizer differs from the model's.

    Raises:
        ValueError: they differ; the message names both.
    """
    while isinstance(data, Subset):
        data = data.dataset
    if not isinstance(data, RETRODataset):
        return
    if data.chunk_size != retro.chunk_size:
        sizes = f"{data.chunk_size} tokens, the model's {retro.chunk_size}"
        raise ValueError(f"the store's chunks have {sizes}: build one for this model")
    theirs, own = data.tokenizer_fingerprint, retro.tokenizer
    if own is not None and theirs not in (None, own.fingerprint):
        names = f"tokenizer {theirs}, the model has {own.fingerprint}"
        raise ValueError(f"the store was cut by {names}: build one with the model's own")


def length(data: Dataset) -> int:
    """Number of sequences of a dataset.

    Raises:
        TypeError: it does not know it, as an `IterableDataset`.
    """
    if not isinstance(data, Sized):
        raise TypeError(f"{type(data).__name__} has no length: pass a dataset with `__len__` and `__getitem__`")
    return len(data)


def check_data(retro: ChunkedLM, train: Dataset, valid: Dataset | None) -> None:
    """Reject data on which the model cannot be trained or measured.

    Raises:
        TypeError: a model in a wrapper such as DataParallel, or a dataset without a length.
        ValueError: another chunk size or tokenizer, or no token to predict.
    """
    check_model(retro)
    for name, data in (("train", train), ("valid", valid)):
        check_store(retro, data)
        if data is None:
            continue
        if not length(data):
            raise ValueError(f"{name} holds 0 sequences: it needs at least 1, so pass a larger corpus or another share")
        if not any((data[i][0][1:] != retro.pad_id).any() for i in range(length(data))):
            raise ValueError(f"none of the {length(data)} sequences of {name} holds a token to predict: pass others")


def data_identity(data: Dataset) -> dict[str, Any]:
    """Identify the training data that a run's losses depend on, by digests that JSON can hold.

    A `RETRODataset` or a subset of it is identified by its arrays and the chosen sequences, another dataset by its
    number of sequences.
    """
    identity: dict[str, Any] = {"sequences": length(data)}
    chosen = None
    while isinstance(data, Subset):
        indices = np.asarray(data.indices, np.int64)
        chosen = indices if chosen is None else indices[chosen]
        data = data.dataset
    if chosen is not None:
        identity["chosen sequences"] = _digest(chosen)
    if isinstance(data, RETRODataset):
        arrays = {"chunks": "chunks", "seqs": "sequence starts", "doc_ids": "documents", "knns": "neighbours"}
        for name, (path, _) in data._paths.items():
            identity[arrays[name]] = _recorded(path)
        if data.given is not None:
            identity["neighbours"] = _digest(data.given)
        identity |= {"drawn neighbours": data.draw, "continuations": data.add_continuations}
    return to_jsonable(identity)


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()[:16]


def _recorded(path: Path) -> str:
    """Digest of an array's file, from its folder's manifest or else computed from the file."""
    records = (record["files"].get(path.name) for record in read_manifest(path.parent).values())
    record = next(filter(None, records), None) or file_record(path)
    return (record.get("sha256") or record["sample_sha256"])[:16]


# the folder, and the processes that share it

Result = TypeVar("Result")


def by_main(state: Accelerator | PartialState, work: Callable[[], Result]) -> Result:
    """Run `work` in the main process only. Every process gets its result, or its exception."""
    outcome: list[Any] = [None]
    if state.is_main_process:
        try:
            outcome = [(work(), None)]
        except Exception as raised:
            outcome = [(None, raised)]
    result, error = broadcast_object_list(outcome)[0]
    if error is not None:
        raise error
    return result


@contextmanager
def only_run(state: Accelerator | PartialState, out_dir: PathLike | None) -> Iterator[None]:
    """Keep other processes from training in `out_dir` during the block. Blocks in one thread may be nested.

    The operating system holds the lock and releases it when the process ends, even by a crash.

    Raises:
        BlockingIOError: another run is training there.
        OSError: the folder is not writable.
    """
    if out_dir is None:
        yield
        return
    lock = FileLock(Path(out_dir) / ".fit.lock", is_singleton=True)

    def take() -> None:
        with explain_write_errors(Path(out_dir)):
            Path(out_dir).mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise BlockingIOError(
                f"another run is training in {out_dir}: wait until it has ended, or pass another out_dir"
            ) from None
        except OSError as error:
            reason = error.strerror or str(error)
            raise OSError(error.errno, f"could not lock {lock.lock_file}: {reason}. Pass another out_dir") from error

    by_main(state, take)
    try:
        yield
    finally:
        lock.release()
