"""Sweeps: one notebook over a grid of parameters, a table of its metrics, and a plot.

A sweep file names the notebook, the parameters that all points share, the grid, the metric and the x axis:

    notebook: 05_training
    parameters: {steps: 40}
    grid: {k: [0, 1, 2, 4], seed: [0, 1, 2]}
    metric: valid_loss
    x: k

A point is identified by its parameters: its folder's name contains their hash. A sweep that was stopped, or has a
larger grid now, therefore runs only the missing points.
"""

import csv
import itertools
import math
import re
import shutil
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from retro_nb.common.arrays import explain_write_errors, read_json, write_text, writing
from retro_nb.common.digests import digest
from retro_nb.common.extras import extra
from retro_nb.lab import runner
from retro_nb.lab.runner import Result, choose_parameters, execute, find_notebooks, is_number, markdown_table
from retro_nb.lab.settings import read_yaml
from retro_nb.plotting.style import literal

with extra("notebooks"):
    from matplotlib.figure import Figure


MOST_POINTS = 10_000


@dataclass(frozen=True)
class Sweep:
    """Contents of a sweep file; `points` holds all parameters of each point, cast to their types."""

    name: str
    notebook: Path
    metric: str
    x: str
    axes: list[str]  # the grid's names
    points: list[dict[str, Any]]


def read_sweep(path: Path) -> Sweep:
    """Read a sweep file.

    Raises:
        ValueError: a key or parameter is missing, unknown, or of the wrong type, two points are the same, or there
            are more than MOST_POINTS.
    """
    content, complaints = read_yaml(path), []
    wanted = ("notebook", "parameters", "grid", "metric", "x")
    if missing := [name for name in wanted if name not in content]:
        complaints.append(f"missing: {', '.join(missing)}")
    if strange := [str(name) for name in content if name not in wanted]:
        complaints.append(f"not known: {', '.join(strange)}")
    if complaints:
        raise ValueError(f"{path}: {'; '.join(complaints)}; see experiments/sweep_neighbours.yaml")
    grid, x, base = content["grid"], content["x"], content["parameters"] or {}
    if not isinstance(base, dict):
        raise ValueError(f"{path}: parameters is {base!r:.80}: let it map names to values, such as {{steps: 40}}")
    if not isinstance(content["metric"], str):
        raise ValueError(f"{path}: metric is {content['metric']!r:.80}: let it be a name, such as valid_loss")
    if not isinstance(grid, dict) or not all(values and isinstance(values, list) for values in grid.values()):
        raise ValueError(f"{path}: grid maps names to lists of values, such as {{k: [0, 2], seed: [0, 1]}}")
    if x not in list(grid):
        raise ValueError(f"{path}: x is {x!r:.80}, but the grid varies {', '.join(grid)}: let x be one of these")
    if math.prod(map(len, grid.values())) > MOST_POINTS:
        raise ValueError(f"{path}: the grid has more than {MOST_POINTS} points: leave values out")
    named = str(content["notebook"])
    beside = path.parent / named  # a notebook's path may be relative to the sweep file
    notebooks = find_notebooks([str(beside) if named.endswith(".ipynb") and beside.is_file() else named])
    combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    points = [choose_parameters(notebooks, given=base | point)[0] for point in combinations]
    if twice := [point for point, count in Counter(map(str, points)).items() if count > 1]:
        raise ValueError(f"{path}: the grid has the point {twice[0]:.200} twice, which would count as two runs")
    return Sweep(path.stem.removeprefix("sweep_"), notebooks[0], content["metric"], x, list(grid), points)


def point_folder(sweep: Sweep, point: dict[str, Any]) -> Path:
    """Folder of a point: its name has the grid values, to be readable, and a hash of all parameters, to be unique."""
    label = re.sub(r"[^\w=,.+-]", "_", ",".join(f"{name}={point[name]}" for name in sweep.axes))
    identity = digest([sweep.notebook.stem, point], 10)
    return runner.RUNS / f"sweep-{sweep.name}" / f"{label[:80]}-{identity}"


def _finished(folder: Path) -> Result | None:
    with suppress(OSError, ValueError, TypeError):
        result = Result(**read_json(folder / "result.json"))
        return result if result.status == "done" and isinstance(result.metrics, dict) else None
    return None


def _run_point(sweep: Sweep, point: dict[str, Any], progress: Callable[[int], object], wait: bool) -> Result | None:
    """The result of a point, run now unless it is finished; None, without `wait`, if another process is running it."""
    folder = point_folder(sweep, point)
    with explain_write_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{folder}.lock", timeout=-1 if wait else 0):
            result = _finished(folder)
            if result is None:
                shutil.rmtree(folder, ignore_errors=True)
                result = execute(sweep.notebook, folder, point, progress)
    except Timeout:
        return None
    if result.status == "done" and not is_number(result.metrics.get(sweep.metric)):
        known = ", ".join(result.metrics) or "none"
        result.status, result.error = "failed", f"no number {sweep.metric!r} in its metrics: {known}"
    return result


def run_sweep(path: Path) -> tuple[Path, list[Result]]:
    """Run the unfinished points of a sweep, then write its table and plot.

    A point that fails, or gives no number for the metric, is reported and does not stop the rest. Failed points
    are tried again the next time. Several processes may run the same sweep: they share its points.

    Returns:
        The sweep's folder, with points.csv, table.md and plot.png, and a result for each point.

    Raises:
        ValueError: the file is invalid; no point has run then.
    """
    sweep = read_sweep(path)
    found: dict[int, Result] = {}
    with tqdm(sweep.points, unit="point", miniters=0, mininterval=1) as bar:

        def tick(cells: int) -> None:
            bar.update(0)  # keeps the clock running

        for wait in (False, True):  # first what no other sweep is running, then what another has begun
            for number, point in enumerate(sweep.points):
                bar.set_description(", ".join(f"{name} {point[name]}" for name in sweep.axes))
                if number not in found and (result := _run_point(sweep, point, tick, wait)):
                    found[number] = result
                    bar.update()
    results = [found[number] for number in range(len(sweep.points))]
    folder = runner.RUNS / f"sweep-{sweep.name}"
    with FileLock(folder / "summary.lock"):
        for left in folder.glob("*.tmp"):  # by a kill
            left.unlink()
        _write_points(sweep, results, folder / "points.csv")
        summary = summarise(sweep, results)
        write_text(folder / "table.md", f"# {sweep.name}: {sweep.metric}\n\n{markdown_table(summary)}\n")
        with writing(folder / "plot.png") as file, explain_write_errors(folder / "plot.png"):
            draw(sweep, summary).savefig(file, format="png", dpi=120)
    return folder, results


def _write_points(sweep: Sweep, results: Sequence[Result], path: Path) -> None:
    columns = [*sweep.axes, sweep.metric, "status", "seconds", "peak_mb", "error"]
    with writing(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for point, result in zip(sweep.points, results, strict=True):
            value = result.metrics.get(sweep.metric)
            outcome = [value, result.status, result.seconds, result.peak_mb, result.error]
            writer.writerow([*(point[name] for name in sweep.axes), *outcome])


def summarise(sweep: Sweep, results: Sequence[Result]) -> list[dict[str, Any]]:
    """One row for each grid point without its seed: mean and standard deviation over the seeds, and their count.

    It is the sample standard deviation (n − 1), None for fewer than two seeds. The mean is None if all seeds failed.
    """
    axes = [name for name in sweep.axes if name != "seed" or name == sweep.x]
    groups: dict[str, list[float]] = defaultdict(list)
    places: dict[str, dict[str, Any]] = {}
    for point, result in zip(sweep.points, results, strict=True):
        place = {name: point[name] for name in axes}
        places[str(place)] = place
        if result.status == "done":
            groups[str(place)].append(result.metrics[sweep.metric])
    rows = []
    for key, place in places.items():
        values = groups[key]
        mean = statistics.fmean(values) if values else None
        deviation = statistics.stdev(values) if len(values) > 1 else None
        rows.append(place | {sweep.metric: mean, "std": deviation, "n": len(values)})
    return rows


def draw(sweep: Sweep, summary: Sequence[dict[str, Any]]) -> Figure:
    """Plot the metric against x: a line for each combination of the other grid parameters, bars for the deviation."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    values = [row[sweep.x] for row in summary]
    numeric = all(map(is_number, values))
    labels = list(dict.fromkeys(map(str, values)))
    others = [name for name in sweep.axes if name not in (sweep.x, "seed")]
    lines: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in summary:
        if row[sweep.metric] is not None:
            lines[", ".join(f"{name} {row[name]}" for name in others)].append(row)
    for label, rows in lines.items():
        places = [row[sweep.x] if numeric else labels.index(str(row[sweep.x])) for row in rows]
        bars = [row["std"] or math.nan for row in rows]
        axes.errorbar(places, [row[sweep.metric] for row in rows], bars, marker="o", capsize=3, label=literal(label))
    if not numeric:
        axes.set_xticks(range(len(labels)), map(literal, labels))
    elif min(values) > 0 and max(values) >= 100 * min(values):
        axes.set_xscale("log")
    axes.set(xlabel=literal(sweep.x), ylabel=literal(sweep.metric))
    axes.set_title(literal(f"{sweep.name} ({sweep.notebook.stem})"))
    if others:
        axes.legend()
    return figure
