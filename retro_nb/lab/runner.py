"""Notebooks as experiments: run them with other parameters, sweep a grid, execute the committed ones again.

Every notebook runs under papermill in a separate process, so that a crash, a leak or a full GPU ends with the
notebook that caused it. One folder holds all its results: the executed notebook, its parameters, and the
`metrics.json` it wrote. Nothing here parses a notebook's printed output.

papermill only warns about an unknown parameter, and passes YAML's `1e-4` as text. Here an unknown parameter is an
error, and every value is cast to the type declared in the notebook's parameters cell. That cell is parsed, never
evaluated.
"""

import ast
import itertools
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from retro_nb.common.extras import extra

with extra("notebooks"):
    import nbformat
    from IPython.core.inputtransformer2 import TransformerManager

from retro_nb.common.arrays import ROOT, explain_write_errors, read_json, write_json, write_text
from retro_nb.lab.settings import read_annotation, read_value, read_yaml, refuse_unknown, write_yaml

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
RUNS = ROOT / "runs"


def no_progress(cells: int) -> None:
    """Ignore the number of cells executed so far."""


# which notebooks


def series() -> list[Path]:
    """The numbered notebooks, in reading order."""
    return sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))


def find_notebooks(names: Iterable[str]) -> list[Path]:
    """Find notebooks by stems ("05_training"), numbers ("05"), paths, or "tutorial" for all of them.

    Raises:
        ValueError: a name matches no notebook; the message lists the known ones.
    """
    found: dict[Path, None] = {}
    for name in names:
        if name.endswith(".ipynb"):
            matches = [Path(name).resolve()] if Path(name).is_file() else []
        elif name == "tutorial":
            matches = series()
        else:
            matches = [path for path in series() if name == path.stem or name.zfill(2) == path.stem[:2]]
        if not matches:
            known = ", ".join(path.stem for path in series()) or f"none in {NOTEBOOKS}"
            raise ValueError(f"no notebook {name!r}: say a path, a number, tutorial, or one of {known}")
        found |= dict.fromkeys(matches)
    return list(found)


# which parameters


@dataclass(frozen=True)
class Parameter:
    """One parameter as declared in a notebook's parameters cell: `name: annotation = default`."""

    notebook: Path
    name: str
    annotation: str | None
    default: str | None

    def __str__(self) -> str:
        annotation = f": {self.annotation}" if self.annotation else ""
        return f"{self.name}{annotation}" + (f" = {self.default:.80}" if self.default else "")

    def kind(self) -> Any:
        """Type of the parameter, from its annotation or else from its default.

        Raises:
            ValueError: the annotation is unknown, or there is none and the default is not a literal.
        """
        if self.annotation is not None:
            try:
                return read_annotation(self.annotation)
            except ValueError as error:
                raise ValueError(f"{self.notebook}: parameter {self.name}: {error}") from None
        try:
            return type(ast.literal_eval(self.default or ""))
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            raise ValueError(
                f"{self.notebook}: parameter {self.name} is set by an expression, {self}, of which only running it "
                f"tells the type: write its value, as in `{self.name} = 50`, or its type, as in `{self.name}: int = …`"
            ) from None

    def read(self, value: Any) -> Any:
        """Cast a value, possibly text, to the parameter's type.

        Raises:
            ValueError: the value cannot be cast, or the type is unknown.
        """
        return read_value(self.name, value, self.kind(), f"{self} in {self.notebook.name}")


def declared(notebook: Path) -> dict[str, Parameter]:
    """The parameters in a notebook's first cell with the tag `parameters`, by name.

    Raises:
        ValueError: the file is not a notebook, or that cell is not Python.
    """
    try:
        cells = nbformat.read(notebook, as_version=4).cells
        sources = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{notebook} cannot be read as a notebook: {error!s:.200}") from error
    return {each.name: each for source in sources[:1] for each in _assigned(notebook, source)}


def _assigned(notebook: Path, source: str) -> Iterator[Parameter]:
    """Yield the names that a cell assigns, in order."""
    try:
        source = TransformerManager().transform_cell(source)  # the cell may contain magics
        lines = ast.parse(source, type_comments=True).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{notebook}: the cell of parameters is no Python: {error}") from error

    def text(node: ast.expr | None) -> str | None:
        return None if node is None else ast.get_source_segment(source, node)

    for line in lines:
        match line:
            case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation, value=default):
                yield Parameter(notebook, name, text(annotation), text(default))
            case ast.Assign(targets=targets, value=value, type_comment=comment):
                names = [each.id for each in targets if isinstance(each, ast.Name)]
                yield from (Parameter(notebook, name, comment, text(value)) for name in names)


def _from_here(name: str, value: Any) -> Any:
    """Make a corpus path absolute, because the notebook runs in another working directory."""
    if name != "corpus":
        return value
    from retro_nb.text.opening import is_path  # slow to import

    return str(Path(value).resolve()) if is_path(value) and Path(value).exists() else value


def _refuse(names: Iterable[str], known: set[str], where: str, knower: str) -> None:
    if "out_dir" in names:
        raise ValueError(f"{where} names out_dir, which the runner chooses: leave it out")
    refuse_unknown(names, known - {"out_dir"}, where, knower)


def choose_parameters(
    notebooks: Sequence[Path], preset: Path | None = None, given: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """The parameters for each notebook, cast to its declared types.

    Args:
        notebooks: the notebooks to run.
        preset: a flat YAML file for the whole series. Parameters that only other notebooks declare are ignored.
        given: values that override the preset's; one of `notebooks` must declare each.

    A `corpus` that is a path is relative to the current directory.

    Raises:
        ValueError: an unknown name (the message lists the known ones) or a value of the wrong type.
    """
    given = given or {}
    selected = {notebook: declared(notebook) for notebook in notebooks}
    mine = set().union(*selected.values())
    _refuse(given, mine, "-p", ", ".join(path.stem for path in notebooks))
    values = {}
    if preset is not None:
        values = read_yaml(preset)
        every = mine.union(*(declared(notebook) for notebook in series()))
        _refuse(values, every, str(preset), "the series")
    values |= given
    return [
        {name: known[name].read(_from_here(name, value)) for name, value in values.items() if name in known}
        for known in selected.values()
    ]


# one notebook


@dataclass
class Result:
    """Outcome of executing one notebook."""

    notebook: str
    status: str  # "done" or "failed"
    seconds: float
    peak_mb: int  # of the kernel and its children, in 10^6 bytes
    error: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)


def _tree_mb(process: psutil.Process) -> int:
    resident = 0
    with suppress(psutil.NoSuchProcess):
        for child in process.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                resident += child.memory_info().rss
    return resident // 10**6


def _watch(process: psutil.Popen, log: Path, progress: Callable[[int], object]) -> int:
    """Wait for a papermill process and report its cells; return the peak memory of its children."""
    peak = 0
    try:
        while process.poll() is None:
            peak = max(peak, _tree_mb(process))
            if cells := re.findall(rb"(\d+)/\d+ \[", log.read_bytes()[-500:]):
                progress(int(cells[-1]))
            time.sleep(0.2)
    except BaseException:  # Ctrl-C: leave no kernel behind
        for victim in [*process.children(recursive=True), process]:
            with suppress(psutil.NoSuchProcess):
                victim.kill()
        raise
    return peak


def _error_in(notebook: Path, log: Path) -> str:
    """The error that ended an execution: that of a cell, numbered as In [N], or the last line of papermill's log."""
    with suppress(OSError, ValueError):
        for cell in reversed(nbformat.read(notebook, as_version=4).cells):
            for output in cell.get("outputs", []):
                if output.output_type == "error":
                    return f"cell {cell.execution_count}: {output.ename}: {output.evalue}".strip()
    return (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no message"])[-1]


# papermill in a process that ends with its parent, however that ends: its standard input is a pipe from the parent.
BOUND = """
import os, runpy, threading
import psutil

def end_with_parent():
    os.read(0, 1)
    for child in psutil.Process().children(recursive=True):
        child.kill()
    os._exit(1)

threading.Thread(target=end_with_parent, daemon=True).start()
runpy.run_module("papermill", run_name="__main__", alter_sys=True)
"""


def _papermill(notebook: Path, folder: Path, arguments: Sequence[str], progress: Callable[[int], object]) -> Result:
    """Execute `notebook` into `folder` in a new process. It works in the notebook's directory, as in JupyterLab."""
    output, log, started = folder / notebook.name, folder / "papermill.log", time.perf_counter()
    command = [sys.executable, "-c", BOUND, str(notebook), str(output), "-k", "python3", *arguments]
    environment = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **os.environ}
    with log.open("wb") as stream:
        process = psutil.Popen(
            [*command, "--cwd", str(notebook.parent), "--progress-bar"],
            stdin=subprocess.PIPE,
            stdout=stream,
            stderr=stream,
            env=environment,
        )
        peak = _watch(process, log, progress)
    seconds = round(time.perf_counter() - started, 1)
    if process.returncode:
        return Result(notebook.stem, "failed", seconds, peak, _error_in(output, log))
    log.unlink()
    return Result(notebook.stem, "done", seconds, peak)


def execute(
    notebook: Path,
    folder: Path,
    parameters: dict[str, Any],
    progress: Callable[[int], object] = no_progress,
) -> Result:
    """Execute a notebook into `folder`, with parameters.yaml, metrics.json and result.json.

    Args:
        parameters: declared in the notebook and cast to its types, as `choose_parameters` returns them.
        progress: called with the number of finished cells.
    """
    chosen = folder / "parameters.yaml"
    write_yaml(chosen, parameters)
    out_dir = ["-r", "out_dir", str(folder)] if "out_dir" in declared(notebook) else []
    result = _papermill(notebook, folder, ["-f", str(chosen), *out_dir], progress)
    try:
        record = read_json(folder / "metrics.json")
        result.metrics = dict(record["metrics"])
    except FileNotFoundError:
        pass
    except (KeyError, TypeError, ValueError, OSError) as error:
        result.status, result.error = "failed", f"{folder / 'metrics.json'} holds no metrics ({error!r:.200})"
    write_json(folder / "result.json", asdict(result))
    return result


def execute_as_committed(notebook: Path, folder: Path) -> Result:
    """Execute a notebook into `folder` without adding parameters; it chooses where its metrics go."""
    return _papermill(notebook, folder, [], no_progress)


# several notebooks


def _new_folder(label: str) -> Path:
    """Create a folder in runs/, named by the time."""
    name = time.strftime("%Y-%m-%d_%H-%M-%S") + label
    for suffix in itertools.chain([""], (f"_{number}" for number in itertools.count(2))):
        folder = RUNS / (name + suffix)
        with suppress(FileExistsError), explain_write_errors(folder):
            folder.mkdir(parents=True)
            return folder
    raise AssertionError("unreachable")


def _text(value: Any) -> str:
    """Format a value in one line: floats with four digits, None as nothing."""
    text = f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
    return " ".join(text.split())


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format rows with equal keys as a Markdown table, padded so that it also reads well in a terminal."""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    texts = [[_text(cell).replace("|", "\\|") for cell in line] for line in lines]
    widths = [max(3, *map(len, column)) for column in zip(*texts, strict=True)]
    texts.insert(1, ["-" * width for width in widths])
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in texts]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def is_number(value: Any) -> bool:
    """Whether a metric is a number, which true and false, infinity, and integers beyond any float are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def results_table(results: Sequence[Result], name: Callable[[str], str] = str) -> str:
    """Markdown table of results, kept narrow by only the first three numeric metrics; index.json has all.

    Args:
        results: one row each.
        name: formats a notebook's stem, for instance as a link.
    """
    rows = []
    for result in results:
        numbers = [f"{key} {_text(value)}" for key, value in result.metrics.items() if is_number(value)]
        row = {"notebook": name(result.notebook), "status": result.status, "seconds": result.seconds}
        row |= {"MB": result.peak_mb, "metrics": ", ".join(numbers[:3]) or _text(result.error)[:60]}
        rows.append(row)
    return markdown_table(rows)


INDEX = """# Run {name}

{table}

Seconds are those of the whole process, MB its peak memory; `seconds` in a metrics.json leave out the start of Python
and the first imports. All metrics are in [index.json](index.json).
"""


def write_index(folder: Path, results: Sequence[Result]) -> None:
    """Write index.json and, for people, index.md: notebooks, status, seconds and metrics."""
    write_json(folder / "index.json", {"notebooks": [asdict(result) for result in results]})

    def link(stem: str) -> str:
        beside = (folder / f"{stem}.ipynb").exists()
        return f"[{stem}]({'' if beside else stem + '/'}{stem}.ipynb)"

    write_text(folder / "index.md", INDEX.format(name=folder.name, table=results_table(results, link)))


def run(
    names: Sequence[str], preset: Path | None = None, given: dict[str, Any] | None = None
) -> tuple[Path, list[Result]]:
    """Execute notebooks one by one into a new folder in runs/; a failure does not stop the rest.

    Args:
        names: see `find_notebooks`.
        preset: see `choose_parameters`.
        given: see `choose_parameters`.

    Returns:
        The folder, with index.json and index.md, and the results. A single notebook lies directly in the folder,
        several in one subfolder each.

    Raises:
        ValueError: an unknown notebook or parameter, or a value of the wrong type; no notebook has run then.
    """
    notebooks = find_notebooks(names)
    parameters = choose_parameters(notebooks, preset, given)
    alone = len(notebooks) == 1
    folder = _new_folder("-" + notebooks[0].stem if alone else "")
    cells = [len(nbformat.read(notebook, as_version=4).cells) for notebook in notebooks]
    results: list[Result] = []
    # With miniters 0 an update by zero cells refreshes the clock, at most once per mininterval.
    with tqdm(total=sum(cells), unit="cell", miniters=0, mininterval=1) as bar:
        for notebook, values, most in zip(notebooks, parameters, cells, strict=True):
            bar.set_description(notebook.stem)
            end = int(bar.n) + most

            def progress(done: int, end: int = end, most: int = most) -> None:
                bar.update(max(0, min(end - most + done, end - 1) - bar.n))  # papermill also counts a failing cell

            results.append(execute(notebook, folder if alone else folder / notebook.stem, values, progress))
            if results[-1].status == "done":  # a failure keeps the bar from reaching its end
                bar.update(end - bar.n)
            write_index(folder, results)
    return folder, results
