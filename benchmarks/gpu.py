"""Every measurement on a GPU, one after another, each in a process of its own: `python benchmarks/gpu.py`.

    python benchmarks/gpu.py                        all, on an H100 or H200; less than half an hour
    python benchmarks/gpu.py embedding sampling     these two

First gpu_check.py looks whether the GPU computes what it should; if not, nothing is measured. A measurement that
fails or takes too long is reported and the others go on. The results lie in benchmarks/results/*-gpu.json.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
CHECK = "gpu_check"
LIMITS = {CHECK: 600, "embedding": 300, "dataset": 240, "training": 480, "sampling": 300, "scaling": 420}  # seconds


def run(name: str) -> str:
    """Run one benchmark; how it went."""
    print(f"— {name}", flush=True)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py")]
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        code = process.wait(LIMITS[name])
    except BaseException as error:  # too long, or Ctrl-C: leave no process on the GPU
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        return f"stopped after its {LIMITS[name]} s"
    return f"{'done' if code == 0 else f'FAILED ({code})'} in {time.perf_counter() - started:.0f} s"


def main() -> int:
    every = [name for name in LIMITS if name != "scaling" or torch.cuda.device_count() > 1]
    names = [name for name in sys.argv[1:] or every if name != CHECK]
    if unknown := set(names) - set(LIMITS):
        sys.exit(f"no benchmark {', '.join(sorted(unknown))}: choose from {', '.join(LIMITS)}")
    if not torch.cuda.is_available():
        sys.exit("no GPU here: `make bench` measures the CPU")
    outcomes = {CHECK: run(CHECK)}
    if outcomes[CHECK].startswith("done"):
        outcomes |= {name: run(name) for name in names}
    print("\n".join(f"{name}: {outcome}" for name, outcome in outcomes.items()))
    return int(any(not outcome.startswith("done") for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
