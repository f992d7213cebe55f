"""What every benchmark shares: two ways of doing the same, timed by turns, and a result file.

A benchmark checks that both sides give the same, times them alternately so that a slow minute of the machine
hurts both, and writes benchmarks/results/<name>-cpu.json, or -gpu.json on a machine with a GPU. `benchmarks/readme.py`
makes README's table of them.
"""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from retro_nb.common.arrays import write_json

RESULTS = Path(__file__).resolve().parent / "results"
BF16_PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16 operations a second, by datasheet
PACKAGES = ("torch", "numpy", "faiss-cpu", "transformers", "retro-pytorch")


@dataclass
class Comparison:
    """One row of the table: a rate of ours and of the reference's (medians), and what was held equal."""

    what: str  # "training step, CPU"
    unit: str  # "tokens/s": more is better
    ours: float
    peer: float
    target: float  # the ratio that was aimed at
    equal: str  # what was checked to be equal before anything was timed
    ours_runs: list[float]
    peer_runs: list[float]

    @property
    def ratio(self) -> float:
        return self.ours / self.peer


def compare(
    what: str,
    unit: str,
    ours: Callable[[], Any],
    peer: Callable[[], Any],
    *,
    amount: float,
    target: float,
    equal: str,
    repeats: int = 5,
    peer_amount: float | None = None,
) -> Comparison:
    """Time two functions by turns, after one unmeasured run of each, and compare `amount` a second.

    Args:
        amount, peer_amount: how many units one call does (the peer's, if it does another number).
        repeats: timed runs of each; the median counts.
    """
    runs: dict[Callable, list[float]] = {ours: [], peer: []}
    for round_ in range(repeats + 1):
        for run in (ours, peer):
            seconds = timed(run)
            if round_:
                runs[run].append(seconds)
    rates = [amount / s for s in runs[ours]], [(peer_amount or amount) / s for s in runs[peer]]
    result = Comparison(what, unit, *map(statistics.median, rates), target, equal, *rates)
    print(f"{what}: {result.ours:,.1f} {unit} against {result.peer:,.1f}, {result.ratio:.2f} times", flush=True)
    return result


def timed(run: Callable[[], Any]) -> float:
    """Seconds that a call takes, work left on the GPU included."""
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def write_results(name: str, comparisons: list[Comparison], settings: Mapping[str, Any], **more: Any) -> None:
    """Write `results_file(name)`: the rows with their ratios, settings, command, device and versions."""
    rows = [asdict(row) | {"ratio": row.ratio} for row in comparisons]
    record = {"command": COMMAND, **where(), "settings": dict(settings), "comparisons": rows, **more}
    RESULTS.mkdir(exist_ok=True)
    write_json(results_file(name), record)
    print(f"written: benchmarks/results/{results_file(name).name}")


def results_file(name: str) -> Path:
    """Where this machine's results of a benchmark lie: those of a GPU do not replace those of a CPU."""
    return RESULTS / f"{name}-{'gpu' if torch.cuda.is_available() else 'cpu'}.json"


# The command that is running, as one would type it in the root of the project (now: some change the folder later).
COMMAND = " ".join(["python", os.path.relpath(sys.argv[0], RESULTS.parent.parent), *sys.argv[1:]])


def where() -> dict[str, Any]:
    """Device, number of threads and versions."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def bf16_peak() -> float | None:
    """The datasheet's bfloat16 operations a second of this GPU, where it is known."""
    return next((rate for card, rate in BF16_PEAK.items() if card in torch.cuda.get_device_name()), None)


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except ModuleNotFoundError:
        return None


def read_results(name: str) -> dict[str, Any] | None:
    """What `write_results` wrote on a machine of this kind, or None."""
    file = results_file(name)
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
