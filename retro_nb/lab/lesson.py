"""Common steps of all notebooks: start, show the library's source, check exercises, save metrics."""

import inspect
import math
import platform
import random
import re
import time
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from numbers import Number
from pathlib import Path
from typing import Any

import numpy as np
import torch

from retro_nb.common.arrays import READ_ONLY, ROOT, where_to_write, write_json
from retro_nb.lab.parameters import ParameterError, check_parameters

PACKAGES = ("torch", "faiss-cpu", "transformers", "numpy", "retro-nb")


def _versions() -> dict[str, str]:
    """Versions of Python and the PACKAGES, from their metadata, because importing them would take seconds."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def _relative(path: Path) -> str:
    """A path relative to the project's root or, outside it, its name alone: never this machine's folders."""
    path, root = path.resolve(), ROOT.resolve()
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name


def _plain(value: Any) -> Any:
    """A JSON-able copy: tensors and NumPy values become numbers and lists, NaN and infinity become None."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | None) else str(value)


@dataclass(frozen=True)
class Run:
    """One execution of a notebook: made by `start`, closed by `save_metrics`."""

    seed: int
    device: torch.device
    out_dir: Path = field(repr=False)  # existing folder for all results of this execution
    config: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    def save_metrics(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """Write `metrics.json` into `out_dir`, atomically, and return the metrics as plain values.

        The file also records settings, seed, device, versions and the seconds since `start`. Tensors and NumPy
        values become numbers and lists; NaN and infinity, which JSON lacks, become null.
        """
        record = {"metrics": _plain(metrics), "config": _plain(self.config), "seed": self.seed}
        record |= {"device": str(self.device), "versions": _versions()}
        record |= {"seconds": round(time.perf_counter() - self.started, 2)}
        write_json(self.out_dir / "metrics.json", record)
        return record["metrics"]


def start(seed: int = 0, out_dir: str | Path = "", name: str = "notebook", device: str = "", **config: Any) -> Run:
    """Seed everything, choose the device, and print versions, device and seed.

    Args:
        seed: for torch (all devices), NumPy and random.
        out_dir: folder for results, created if missing; a relative path starts at the project's root, not at the
            working directory. Default: `runs/interactive/<name>`.
        name: the notebook's stem, such as "03_faiss_knn".
        device: "cpu", "cuda", "mps" …; by default a CUDA GPU if available, else the CPU. Apple's MPS is used only
            on request, because its numbers differ from those in the notebooks.
        **config: the notebook's other parameters, checked (`parameters.LIMITS`) and recorded in metrics.json.

    Raises:
        ParameterError: a parameter has an impossible value. A notebook shows only the message, one line.
    """
    check_parameters({"seed": seed, **config})
    from retro_nb.plotting import use_style  # imported here because matplotlib is slow to import

    chosen, folder = _choose_device(device), _make_folder(out_dir or Path("runs", "interactive", name))
    random.seed(int(seed))
    np.random.seed(seed)
    torch.manual_seed(seed)
    use_style()
    print(" · ".join(f"{package} {number}" for package, number in _versions().items()))
    where = f"device {chosen} · {torch.get_num_threads()} threads"
    print(f"{where} · seed {seed} · results in {_relative(folder)}/")
    return Run(seed=seed, device=chosen, out_dir=folder, config=config)


def _choose_device(device: str) -> torch.device:
    """The device of this name, or the best one; one that this machine lacks is refused."""
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ParameterError(
            f"device is {device!r}, which cannot be used here ({reason:.80}): pass 'cpu', 'cuda' or 'mps', or nothing "
            f"to have it chosen"
        ) from error


def _make_folder(out_dir: str | Path) -> Path:
    try:
        folder = ROOT / out_dir
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    except (OSError, ValueError, TypeError) as error:
        mend = "pass another folder in quotes, or '' for the usual one"
        if getattr(error, "errno", None) in READ_ONLY:
            mend = where_to_write(ROOT / out_dir)
        raise ParameterError(f"out_dir is {str(out_dir)!r}, where no folder can be made ({error}): {mend}") from error


def show(obj: Any) -> None:
    """Display the source of a function, class or module of the library as a Python block.

    Raises:
        TypeError: `obj` is a value, which has no source.
    """
    from IPython.display import Markdown, display

    source = inspect.getsource(obj).rstrip()
    longest = max((len(ticks) for ticks in re.findall("`+", source)), default=0)
    fence = "`" * max(3, longest + 1)
    # The frame is for nbconvert's pages, which take the fixed-width font from it.
    frame = '<div style="font-family: monospace; font-size: 0.9em">\n\n{}\n\n</div>'
    display(Markdown(frame.format(f"{fence}python\n{source}\n{fence}")))


@dataclass(frozen=True)
class Verdict:
    """Result of `check`: true or false, and displays nothing as the last value of a cell."""

    passed: bool

    def __bool__(self) -> bool:
        return self.passed

    def _ipython_display_(self) -> None:
        pass  # check has printed its line already


def _agrees(answer: Any, expected: Any, tolerance: float) -> bool:
    if isinstance(answer, torch.Tensor | np.ndarray | Number | list | tuple) and not isinstance(answer, bool):
        with suppress(TypeError, ValueError):  # not numbers, or ragged: compared with ==
            mine, right = np.asarray(answer, dtype=float), np.asarray(expected, dtype=float)
            return mine.shape == right.shape and np.allclose(mine, right, rtol=tolerance, atol=tolerance)
    return bool(answer == expected)


def check(name: str, answer: Any, expected: Any = True, hint: str = "", tolerance: float = 1e-4) -> Verdict:
    """Check an exercise: print ✔, ✗ with the hint, or ○ while it is unanswered. Never raises.

    Args:
        name: the exercise, such as "3.1".
        answer: the learner's answer, or a function without arguments that computes it, so that an error
            in it also becomes a ✗. None and `...` mean: not answered yet.
        expected: the right answer; numbers, arrays and tensors are compared up to `tolerance`, shapes included.
        hint: printed with ✗ only; with ○ it would appear before the first try.

    Returns:
        A value that is true if the answer is right, so that a solution can say `assert check(…)`.
    """
    mark, remark, passed = "✗", "not yet", False
    try:
        value: Any = answer() if callable(answer) and not isinstance(answer, type) else answer
        if value is None or value is ...:
            mark, remark = "○", "waits for your answer"
        elif passed := _agrees(value, expected, tolerance):
            mark, remark = "✔", "right"
    except Exception as error:
        remark = f"{type(error).__name__}: {error}"
    print(f"{mark} {name}: {remark}" + (f" — {hint}" if hint and mark == "✗" else ""))
    return Verdict(passed)
