"""The runner: parameters, presets, one notebook, several, sweeps and refreshing, on throw-away notebooks."""

import csv
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from threading import Barrier

import nbformat
import psutil
import pytest
from hypothesis import given as given_values
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from retro_nb.__main__ import main
from retro_nb.common.arrays import write_json
from retro_nb.lab import refresh, runner, sweep
from retro_nb.lab.settings import parse_as, read_annotation, read_yaml

pytestmark = pytest.mark.slow

PRESETS = sorted((Path(__file__).resolve().parent.parent / "experiments").glob("*.yaml"))

PARAMETERS = """\
seed: int = 0  # random seed
lr: float = 0.1  # learning rate
out_dir: str = ""  # where results go
layers: list[int] = [1]  # layers
corpus: str = "speeches"  # name
fast: bool = False  # flag
"""
BODY = """\
import json, pathlib
if seed == 13:
    raise ValueError("thirteen is unlucky")
if out_dir:
    record = {"metrics": {"loss": lr * (1 + seed), "layers": layers, "text": corpus}}
    pathlib.Path(out_dir, "metrics.json").write_text(json.dumps(record))
"""


def write_notebook(path: Path, parameters: str, *bodies: str) -> Path:
    cells = [new_markdown_cell("# A lesson"), new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    notebook = new_notebook(cells=[*cells, *map(new_code_cell, bodies)])
    notebook.metadata["kernelspec"] = {"display_name": "mine", "language": "python", "name": "python3"}
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)
    return path


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with two notebooks, in a path with a space, seen from a working directory elsewhere."""
    home, elsewhere = tmp_path / "my home", tmp_path / "elsewhere"
    write_notebook(home / "notebooks" / "00_first.ipynb", PARAMETERS, BODY)
    write_notebook(home / "notebooks" / "10_late.ipynb", "steps: int = 3  # steps", "assert steps < 9")
    elsewhere.mkdir()
    monkeypatch.setattr(runner, "NOTEBOOKS", home / "notebooks")
    monkeypatch.setattr(runner, "RUNS", home / "runs")
    monkeypatch.chdir(elsewhere)
    yield home
    assert not list(elsewhere.iterdir()), "something was written into the working directory"


def preset(project: Path, text: str) -> Path:
    path = project / "preset.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["metrics"]


# choosing


def test_notebooks_by_stem_number_path_and_series(project):
    first, late = sorted((project / "notebooks").glob("*.ipynb"))
    for name in ("00_first", "00", "0", str(first)):
        assert runner.find_notebooks([name]) == [first]
    assert runner.find_notebooks(["10", "tutorial"]) == [late, first]
    with pytest.raises(ValueError, match=r"no notebook '05'.*00_first, 10_late"):
        runner.find_notebooks(["05"])


GOOD = [
    ("1e-4", float, 1e-4),
    (3, float, 3.0),
    ("12", int, 12),
    ("1e3", int, 1000),
    (2.0, int, 2),
    (2**70, int, 2**70),
    ("true", bool, True),
    ("0", bool, False),
    (1862, str, "1862"),
    ("1e-4", str, "1e-4"),
    ("[0,2]", list[int], [0, 2]),
    (["1e-4", 1], list[float], [1e-4, 1.0]),
    ("{a: 1}", dict, {"a": 1}),
    ("None", str | None, None),
    ("5", int | None, 5),
    ("{a: 1e-4}", dict[str, float], {"a": 1e-4}),
]
BAD = [
    ("fast", float),
    ("", int),
    ("1.5", int),
    (True, int),
    ("nan", int),
    ("inf", int),
    ("perhaps", bool),
    ("2", bool),
    (True, str),
    ("3", list[int]),
    ("[a]", list[int]),
    ("[1", list[int]),
    (None, int),
    (10**400, float),
    ("[" * 3000, list),
    ("[9" + "9" * 5000 + "]", list[int]),
    ("{a: b}", dict[str, int]),
]


@pytest.mark.parametrize(("value", "kind", "expected"), GOOD)
def test_cast(value, kind, expected):
    got = parse_as(value, kind)
    assert got == expected and type(got) is type(expected)


@pytest.mark.parametrize(("value", "kind"), BAD)
def test_an_impossible_cast_is_an_error(value, kind):
    with pytest.raises(ValueError):
        parse_as(value, kind)


# what a notebook declares


def given(project, parameters: str, **values) -> dict:
    path = write_notebook(project / "notebooks" / "20_own.ipynb", parameters)
    return runner.choose_parameters([path], given=values)[0]


@pytest.mark.parametrize(
    ("declaration", "value", "expected"),
    [
        ("x: int = 3", "5", 5),
        ("x: list[float] = [1]", "[1e-4]", [1e-4]),
        ("x: Optional[int] = None", "5", 5),
        ("x: Optional[int] = None", "null", None),
        ("x: int | None = None", "5", 5),
        ("x: Union[int, None] = None", "5", 5),
        ("x: 'float' = 0", "1e-4", 1e-4),
        ("x: List[Optional[int]] = []", "[1, null]", [1, None]),
        ("x: dict[str, float] = {}", "{a: 1e-4}", {"a": 1e-4}),
        ("x = 3  # type: float", "1", 1.0),
        ("x = -3  # help", "4", 4),
        ("x = [1]", "[a]", ["a"]),
        ("%matplotlib inline\nx: int = 1", "2", 2),
        ("x: int = 10 * 5", "60", 60),
        ("x: list[int] = [\n    1,  # one = 1\n]", "[2]", [2]),
    ],
)
def test_a_value_is_read_as_the_notebook_declares(project, declaration, value, expected):
    read = given(project, declaration, x=value)["x"]
    assert read == expected and type(read) is type(expected)


@pytest.mark.parametrize(
    ("declaration", "named"),
    [
        ("steps: Path = 3", ["20_own.ipynb", "steps", "'Path'", "Optional[X]"]),
        ("steps: list[Path] = 3", ["20_own.ipynb", "steps", "'list[Path]'"]),
        ("steps = 10 * 5", ["20_own.ipynb", "steps", "10 * 5", "steps: int"]),
        ("steps = int(5)", ["20_own.ipynb", "steps", "int(5)"]),
        ("steps: int = 3\nthis is no Python", ["20_own.ipynb", "no Python"]),
        ("steps: int = " + "[" * 3000, ["20_own.ipynb", "no Python"]),
        ("steps: int = 3", ["steps", "'many'", "steps: int = 3", "20_own.ipynb"]),
    ],
)
def test_what_cannot_be_read_names_notebook_and_parameter(project, declaration, named):
    with pytest.raises(ValueError) as caught:
        given(project, declaration, steps="many")
    assert all(part in str(caught.value) for part in named), caught.value


CALL = '__import__("pathlib").Path(r"{}").touch()'


@pytest.mark.parametrize(
    "declaration", ["x: {} = 1", "x = 1  # type: {}", "x: Optional[{}] = 1", "x = {}", "x: '''{}''' = 1"]
)
def test_nothing_in_a_notebook_is_evaluated(project, declaration):
    evaluated = project / "evaluated"
    call = CALL.format(evaluated).replace(" ", "")
    with pytest.raises(ValueError, match="parameter x"):
        given(project, declaration.format(call), x="2")
    path = sweep_file(project, "[0]", notebook="20_own", parameters="{}", grid="{x: [1]}", x="x")
    with pytest.raises(ValueError, match="parameter x"):
        sweep.read_sweep(path)
    assert not evaluated.exists()


def test_what_is_no_notebook_is_named(project):
    path = project / "notebooks" / "20_own.ipynb"
    for content in ("{", "[]", "[" * 100_000, '{"cells": 3, "nbformat": 4, "nbformat_minor": 5, "metadata": {}}'):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"20_own\.ipynb cannot be read as a notebook"):
            runner.choose_parameters([path], given={"x": 1})


@given_values(
    st.recursive(
        st.sampled_from([(int, "int"), (float, "float"), (str, "str"), (bool, "bool"), (list, "list"), (dict, "dict")]),
        lambda inner: st.one_of(
            inner.map(lambda each: (list[each[0]], f"list[{each[1]}]")),
            inner.map(lambda each: (each[0] | None, f"Optional[{each[1]}]")),
            inner.map(lambda each: (each[0] | None, f"{each[1]} | None")),
            st.tuples(inner, inner).map(lambda two: (dict[two[0][0], two[1][0]], f"dict[{two[0][1]}, {two[1][1]}]")),
        ),
        max_leaves=4,
    )
)
def test_an_annotation_means_what_python_says(kind):
    expected, text = kind
    assert read_annotation(text) == expected


# YAML


def nested_anchors(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (nested_anchors(9), "more than 100000 values"),
        ("a: " + "[" * 3000, "more than 30 lists"),
        ("a: " + "{b: " * 3000, "more than 30 lists"),
        ("- " * 3000, "more than 30 lists"),
        ("a: &b [*b]", "stands for what it lies in"),
        ("a: &b {c: {d: *b}}", "stands for what it lies in"),
        ("a: b" + "b" * 10**6, "more than 1000000 bytes"),
        ("a: 9" + "9" * 5000, "digits"),
        ("a: 2026-13-45", "month"),
        ("a: *none", "undefined alias"),
        ("seed: 1\nsteps: 10\nsteps: 20", "line 1: steps has two values"),
        ("seed: 1\ngrid: {k: [1], k: [2]}", "line 2: k has two values"),
        ("a: !!python/object/apply:os.getcwd []", "constructor"),
        ("a: \0", "cannot read"),
    ],
)
def test_yaml_that_holds_too_much_is_refused_by_name(project, text, reason, capsys):
    path = preset(project, text)
    with pytest.raises(ValueError, match=rf"preset\.yaml: .*{reason}" if reason != "cannot read" else reason):
        read_yaml(path)
    assert main(["run", "00", "-f", str(path)]) == 2
    assert len(capsys.readouterr().err) < 1000 and not (project / "runs").exists()


def test_yaml_of_everyday_is_read(project):
    text = "\ufeffbase: &base {k: 2}\nother: {<<: *base, lr: 1}\nlist: [*base, *base]\n"
    assert read_yaml(preset(project, text)) == {
        "base": {"k": 2},
        "other": {"k": 2, "lr": 1},
        "list": [{"k": 2}, {"k": 2}],
    }
    assert read_yaml(preset(project, "a: " + "[" * 20 + "]" * 20 + f"\nb: {list(range(20_000))}"))["b"][-1] == 19_999
    for path in PRESETS:
        assert read_yaml(path)


# presets


def test_presets_hold_the_series_parameters(project):
    notebooks = runner.find_notebooks(["tutorial"])
    values = preset(project, "seed: 1\nlr: 1e-4\nsteps: 5\n")
    first, late = runner.choose_parameters(notebooks, values, {"seed": "2"})
    assert first == {"seed": 2, "lr": 1e-4} and late == {"steps": 5}
    assert runner.choose_parameters(notebooks[:1], values) == [{"seed": 1, "lr": 1e-4}]


def test_a_corpus_is_a_path_from_where_the_command_is_given(project, monkeypatch):
    (project / "speeches").mkdir()
    (project / "my.jsonl").touch()
    monkeypatch.chdir(project)
    notebooks = runner.find_notebooks(["00"])
    kept = ["speeches", "hf:my.jsonl", "no_such_folder/", str(project / "my.jsonl")]
    moved = {"./speeches": str(project / "speeches"), "my.jsonl": str(project / "my.jsonl")}
    for given, meant in {**moved, **{name: name for name in kept}}.items():
        assert runner.choose_parameters(notebooks, given={"corpus": given}) == [{"corpus": meant}]
    assert runner.choose_parameters(notebooks, preset(project, "corpus: my.jsonl")) == [{"corpus": moved["my.jsonl"]}]


@pytest.mark.parametrize(
    ("text", "given", "message"),
    [
        ("sed: 1", {}, "preset.yaml: unknown parameter 'sed' (did you mean seed?); the series knows corpus,"),
        ("seed: 1", {"sed": 2}, "-p: unknown parameter 'sed' (did you mean seed?); 00_first knows corpus, "),
        ("seed: 1", {"steps": 2}, "unknown parameter 'steps'; 00_first knows corpus, fast, layers, lr, seed"),
        ("seed: 1", {"out_dir": "x"}, "out_dir, which the runner chooses"),
        ("out_dir: x", {}, "out_dir, which the runner chooses"),
        ("seed: many", {}, "parameter seed: cannot read 'many' as declared: seed: int = 0"),
        ("- seed", {}, "holds no `name: value` lines"),
        ("a: [", {}, "preset.yaml: while parsing"),
    ],
)
def test_a_bad_parameter_is_named_before_anything_runs(project, text, given, message, capsys):
    pairs = [part for name, value in given.items() for part in ("-p", name, str(value))]
    assert main(["run", "00", "-f", str(preset(project, text)), *pairs]) == 2
    assert message in capsys.readouterr().err
    assert not (project / "runs").exists()


# running


def test_run_one_notebook(project, capsys):
    folder, (result,) = runner.run(["00"], preset(project, "lr: 1e-4"), {"seed": "3", "layers": "[0,2]"})
    assert result.status == "done" and result.peak_mb > 10 and result.seconds > 0
    assert "100%|" in capsys.readouterr().err
    assert metrics(folder) == result.metrics == {"loss": 4e-4, "layers": [0, 2], "text": "speeches"}
    assert folder.parent == project / "runs" and folder.name.endswith("-00_first")
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    assert index["notebooks"][0]["metrics"]["loss"] == 4e-4
    assert "[00_first](00_first.ipynb)" in (folder / "index.md").read_text(encoding="utf-8")
    assert nbformat.read(folder / "00_first.ipynb", as_version=4).cells[-1].execution_count
    assert not (folder / "papermill.log").exists()


def test_a_failing_notebook_is_reported_and_the_others_go_on(project, capsys):
    assert main(["run", "tutorial", "-p", "seed", "13", "-p", "steps", "4"]) == 1
    said = capsys.readouterr()
    assert "FAILED 00_first, cell 3: ValueError: thirteen is unlucky" in said.err and "1 of 2 done" in said.out
    assert "%|" in said.err and "100%|" not in said.err, "the bar claims that all cells ran"
    (folder,) = (project / "runs").iterdir()
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))["notebooks"]
    assert [result["status"] for result in index] == ["failed", "done"]
    for result in index:
        link = f"{result['notebook']}/{result['notebook']}.ipynb"
        assert (folder / link).exists() and f"({link})" in (folder / "index.md").read_text(encoding="utf-8")


def test_the_command_works_from_anywhere_with_the_lesson_helpers(tmp_path):
    use = 'from retro_nb.lab.lesson import start\nrun = start(seed, out_dir)\nrun.save_metrics({"twice": 2 * seed})'
    path = write_notebook(tmp_path / "a b" / "own.ipynb", PARAMETERS, use)
    environment = os.environ | {"RETRO_NB_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "retro_nb", "run", os.path.relpath(path, tmp_path), "-p", "seed", "4"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "home" / "runs").iterdir()
    assert metrics(folder) == {"twice": 8} and "twice 8" in done.stdout
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a b", "home"]


def test_new_folders_never_collide(project, monkeypatch):
    monkeypatch.setattr(runner.time, "strftime", lambda form: "now")
    names = [runner._new_folder("-x").name for _ in range(3)]
    assert names == ["now-x", "now-x_2", "now-x_3"]


def test_the_terminals_table_is_narrow_and_index_json_has_all(tmp_path):
    metrics = {"text": "word " * 99, "layers": [1] * 99, "ok": True, "a": 1, "b": 1 / 3, "c": 10**6, "d": 2.0}
    results = [
        runner.Result("05_training", "done", 123.4, 1234, "", metrics),
        runner.Result("06_sampling", "failed", 1.0, 1, "cell 3: ValueError: " + "long " * 99),
    ]
    table = runner.results_table(results)
    assert "| a 1, b 0.3333, c 1000000 " in table and max(map(len, table.splitlines())) <= 120
    runner.write_index(tmp_path, results)
    written = (tmp_path / "index.md").read_text(encoding="utf-8")
    assert "[05_training](05_training/05_training.ipynb)" in written and max(map(len, written.splitlines())) <= 160
    stored = json.loads((tmp_path / "index.json").read_text(encoding="utf-8"))["notebooks"]
    assert stored[0]["metrics"] == metrics and stored[1]["error"] == results[1].error


def test_parameters_with_an_equals_sign(project, monkeypatch):
    seen = []
    result = runner.Result("00_first", "done", 1.0, 1)
    monkeypatch.setattr(runner, "run", lambda *said: seen.append(said) or (project, [result]))
    assert main(["run", "00", "-p", "seed=3", "-p", "corpus", "a=b", "-p", "layers=[1, 2]"]) == 0
    assert seen == [(["00"], None, {"seed": "3", "corpus": "a=b", "layers": "[1, 2]"})]


def test_a_table_keeps_one_line_a_row():
    rows = [{"a": 1 / 3, "b": "two\nlines | bar"}, {"a": None, "b": "x"}]
    header, rule, first, second = runner.markdown_table(rows).splitlines()
    assert first == "| 0.3333 | two lines \\| bar |" and len({len(header), len(rule), len(first), len(second)}) == 1


# sweeps


def sweep_file(project: Path, seeds: str, metric: str = "loss", **more: str) -> Path:
    lines = {"notebook": "00_first", "parameters": "{corpus: almanac}", "metric": metric, "x": "lr"}
    lines |= {"grid": f"{{lr: [1e-2, 1.0], seed: {seeds}}}"} | more
    path = project / "mine.yaml"
    path.write_text("".join(f"{name}: {value}\n" for name, value in lines.items()), encoding="utf-8")
    return path


def test_a_sweep_survives_a_failed_point_resumes_and_draws(project, capsys):
    assert main(["sweep", str(sweep_file(project, "[0, 13]", grid="{lr: [1e-2], seed: [0, 13]}"))]) == 1
    assert "thirteen is unlucky" in capsys.readouterr().err
    folder = project / "runs" / "sweep-mine"
    before = {path: path.stat().st_mtime_ns for path in folder.glob("lr=0.01,seed=0-*/result.json")}
    assert len(before) == 1

    _, results = sweep.run_sweep(sweep_file(project, "[0, 1]", grid="{lr: [1e-2], seed: [0, 1]}"))
    assert [result.status for result in results] == ["done"] * 2
    assert {path: path.stat().st_mtime_ns for path in before} == before, "a finished point ran again"
    with (folder / "points.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows] == pytest.approx([0.01, 0.02])
    assert "| 0.01 | 0.015" in (folder / "table.md").read_text(encoding="utf-8")
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_point_runs_until_it_is_done_and_again_with_other_parameters(project, monkeypatch):
    ran = []

    def fail_first(notebook, folder, parameters, progress):
        ran.append(parameters["corpus"])
        result = runner.Result(notebook.stem, "failed" if len(ran) == 1 else "done", 1.0, 1, "", {"loss": 1.0})
        write_json(folder / "result.json", asdict(result))
        return result

    monkeypatch.setattr(sweep, "execute", fail_first)
    same = {"grid": "{lr: [1e-2], seed: [0]}"}
    path = sweep_file(project, "[0]", **same)
    assert [sweep.run_sweep(path)[1][0].status for _ in range(3)] == ["failed", "done", "done"]
    sweep.run_sweep(sweep_file(project, "[0]", **same, parameters="{corpus: speeches}"))
    assert ran == ["almanac", "almanac", "speeches"]


def test_two_sweeps_at_once_share_the_points(project, monkeypatch):
    ran, both = [], Barrier(2)

    def slow(notebook, folder, parameters, progress):
        assert not folder.exists(), "a point that another sweep is running was deleted, or runs twice"
        if len(ran) < 2:
            both.wait(30)
        ran.append(parameters["seed"])
        folder.mkdir(parents=True)
        result = runner.Result(notebook.stem, "done", 1.0, 1, "", {"loss": float(parameters["seed"])})
        write_json(folder / "result.json", asdict(result))
        return result

    monkeypatch.setattr(sweep, "execute", slow)
    path = sweep_file(project, "[0, 1, 2, 3]", grid="{lr: [1e-2], seed: [0, 1, 2, 3]}")
    leftover = project / "runs" / "sweep-mine" / "table.md.123.tmp"
    leftover.parent.mkdir(parents=True)
    leftover.touch()
    with ThreadPoolExecutor(2) as pool:
        found = [each.result() for each in [pool.submit(sweep.run_sweep, path) for _ in range(2)]]
    assert sorted(ran) == [0, 1, 2, 3] and not leftover.exists()
    for _, results in found:
        assert [result.metrics["loss"] for result in results] == [0.0, 1.0, 2.0, 3.0]


def sweep_on_full_disk(path, folder):
    runner.RUNS, runner.NOTEBOOKS = folder / "runs", folder / "notebooks"
    sweep.execute = lambda *_: runner.Result("00_first", "done", 1.0, 1, "", {"loss": 1.0})
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    with pytest.raises(OSError, match=r"could not write .*plot\.png: File too large.*free some space"):
        sweep.run_sweep(path)


def test_a_full_disk_is_told_with_the_file_of_a_sweep(project, run_apart):
    path = sweep_file(project, "[0]", grid="{lr: [1e-2], seed: [0]}")
    assert run_apart(sweep_on_full_disk, path, project) == [0]
    assert not list((project / "runs" / "sweep-mine").glob("*.tmp"))


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGHUP, signal.SIGTERM])
def test_nothing_outlives_a_command_that_is_killed(tmp_path, signum):
    """Neither papermill nor the kernel, however busy: they have a GPU, and write into the folder of the run."""
    note = f"pathlib.Path({str(tmp_path / 'pids')!r}).write_text(f'{{os.getpid()}} {{os.getppid()}}')"
    cells = ["import os, pathlib, time", note, "while True:\n    time.sleep(0.1)"]
    notebook = write_notebook(tmp_path / "long.ipynb", "n: int = 1", *cells)
    command = [sys.executable, "-m", "retro_nb", "run", str(notebook)]
    process = subprocess.Popen(command, env=os.environ | {"RETRO_NB_HOME": str(tmp_path)}, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not (tmp_path / "pids").exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.1)
    time.sleep(0.5)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert all(map(alive, pids))
    process.send_signal(signum)
    process.wait(60)
    while any(map(alive, pids)):
        assert time.monotonic() < end, "a process goes on without its parent"
        time.sleep(0.1)


@pytest.mark.parametrize("written", ["{", "[]", '{"loss": 1}', '{"metrics": 3}'])
def test_damaged_metrics_are_a_failure_that_names_the_file(project, written):
    code = f"import pathlib\npathlib.Path(out_dir, 'metrics.json').write_text({written!r})"
    notebook = write_notebook(project / "notebooks" / "05_bad.ipynb", 'out_dir: str = ""', code)
    result = runner.execute(notebook, project / "runs" / "bad", {})
    assert result.status == "failed" and "metrics.json holds no metrics" in result.error


def fake_results(losses: list[float | None]) -> list[runner.Result]:
    return [
        runner.Result("00_first", "failed" if loss is None else "done", 1.0, 1, "", {"loss": loss}) for loss in losses
    ]


def test_a_sweeps_summary_is_over_seeds(project):
    plan = sweep.read_sweep(sweep_file(project, "[0, 1, 2]"))
    assert [point["lr"] for point in plan.points] == [0.01] * 3 + [1.0] * 3
    rows = sweep.summarise(plan, fake_results([1.0, 2.0, 3.0, None, 5.0, None]))
    assert rows == [
        {"lr": 0.01, "loss": 2.0, "std": 1.0, "n": 3},
        {"lr": 1.0, "loss": 5.0, "std": None, "n": 1},
    ]
    axes = sweep.draw(plan, rows).axes[0]
    assert axes.get_xlabel() == "lr" and axes.get_ylabel() == "loss" and axes.get_xscale() == "log"
    assert axes.lines[0].get_xydata().tolist() == [[0.01, 2.0], [1.0, 5.0]]


def test_one_line_for_each_other_name_and_names_on_the_axis(project):
    grid = "{corpus: [a, b], lr: [0.1, 0.2], seed: [0]}"
    plan = sweep.read_sweep(sweep_file(project, "", grid=grid, x="corpus", parameters="{}"))
    axes = sweep.draw(plan, sweep.summarise(plan, fake_results([1.0, 2.0, 3.0, 4.0]))).axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["lr 0.1", "lr 0.2"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b"]


def test_a_metric_that_is_no_number_is_a_failure_that_names_the_others(project, monkeypatch):
    result = runner.Result("00_first", "done", 1.0, 1, "", {"text": "no"})
    monkeypatch.setattr(sweep, "execute", lambda *_: result)
    (project / "runs" / "sweep-mine").mkdir(parents=True)
    _, results = sweep.run_sweep(sweep_file(project, "[0]", metric="lost"))
    assert {result.error for result in results} == {"no number 'lost' in its metrics: text"}


@pytest.mark.parametrize("loss", [True, math.inf, math.nan, 10**400, "1.0", None])
def test_what_has_no_mean_is_no_number(project, monkeypatch, loss):
    result = runner.Result("00_first", "done", 1.0, 1, "", {"loss": loss})
    monkeypatch.setattr(sweep, "execute", lambda *_: result)
    _, (found, *_) = sweep.run_sweep(sweep_file(project, "[0, 1]"))
    assert found.status == "failed" and "no number 'loss'" in found.error


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"colour": "red"}, "mine.yaml: not known: colour; see experiments/sweep_neighbours.yaml"),
        ({"x": "k"}, "x is 'k', but the grid varies lr, seed"),
        ({"grid": "{lr: 3}"}, "lists of values"),
        ({"grid": "{lr: [1], sed: [1]}"}, "unknown parameter 'sed'"),
        ({"notebook": "11_none"}, "no notebook '11_none'"),
        ({"parameters": "[corpus]"}, "parameters is ['corpus']"),
        ({"metric": "[loss]"}, "metric is ['loss']"),
        ({"grid": f"{{lr: {list(range(999))}, seed: {list(range(999))}}}"}, "the grid has more than 10000 points"),
        ({"grid": "{lr: [1, 2, 1.0]}"}, "has the point {'corpus': 'almanac', 'lr': 1.0} twice"),
        ({"x": "[lr]"}, "x is ['lr'], but the grid varies"),
    ],
)
def test_a_bad_sweep_file_is_refused(project, more, message, capsys):
    assert main(["sweep", str(sweep_file(project, "[0]", **more))]) == 2
    assert message in capsys.readouterr().err and not (project / "runs").exists()


def test_a_file_that_is_no_sweep_is_told_what_is_missing_and_what_is_not_known(project, capsys):
    assert main(["sweep", str(preset(project, "seed: 1\nx: k\nlr: 2\n"))]) == 2
    assert "missing: notebook, parameters, grid, metric; not known: seed, lr; see" in capsys.readouterr().err


# refreshing


def test_refresh_replaces_what_succeeds_by_its_normal_form(project):
    noisy = 'import sys\nprint("out")\nprint("err", file=sys.stderr)\nprint("more", flush=True)'
    shown = f"from IPython.display import display\ndisplay({{{refresh.WIDGET!r}: {{}}}}, raw=True)"
    path = write_notebook(project / "notebooks" / "01_noisy.ipynb", "n: int = 1  # n", noisy, shown, "2 * n")
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[-1].metadata = {"tags": ["nbval-check-output"], "execution": {"iopub": "2026"}}
    notebook.metadata["widgets"] = {}
    ids = [cell.id for cell in notebook.cells]
    nbformat.write(notebook, path)
    solution = write_notebook(path.parent / "solutions" / path.name, "n: int = 1  # n", "1 / 0")
    untouched = solution.read_bytes()

    assert [result.status for result in refresh.refresh(["01"])] == ["done", "failed"]
    assert solution.read_bytes() == untouched
    fresh = nbformat.read(path, as_version=4)
    assert fresh.metadata == {
        "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
        "language_info": {"name": "python", "pygments_lexer": "ipython3"},
    }
    assert [cell.id for cell in fresh.cells] == ids
    assert [cell.execution_count for cell in fresh.cells[1:]] == [1, 2, 3, 4]
    tags = [{}, {"tags": ["parameters"]}, {}, {}, {"tags": ["nbval-check-output"]}]
    assert [cell.metadata for cell in fresh.cells] == tags
    streams, widgets, (value,) = (cell.outputs for cell in fresh.cells[2:])
    assert [(stream.name, stream.text) for stream in streams] == [("stdout", "out\nmore\n")]
    assert widgets == [] and value.data == {"text/plain": "2"} and value.execution_count == 4


def test_a_learners_copies_are_updated_unless_they_were_changed(project, capsys):
    first, late = (project / "notebooks" / name for name in ("00_first.ipynb", "10_late.ipynb"))
    solution = write_notebook(project / "notebooks" / "solutions" / "10_late.ipynb", "n: int = 1", "2 * n")
    mine = project / "my_notebooks"
    refresh.copy_notebooks(mine)
    copies = [mine / path.relative_to(project / "notebooks") for path in (first, late, solution)]
    assert [copy.read_bytes() for copy in copies] == [path.read_bytes() for path in (first, late, solution)]

    copies[0].write_text("run and saved")
    refresh.copy_notebooks(mine)
    assert copies[0].read_text() == "run and saved" and not capsys.readouterr().out, "nothing was updated"

    write_notebook(first, PARAMETERS, "'an update'")
    write_notebook(late, "steps: int = 4", "'an update'")
    refresh.copy_notebooks(mine)
    assert copies[0].read_text() == "run and saved" and copies[1].read_bytes() == late.read_bytes()
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and f"delete {copies[0]}" in printed

    copies[0].unlink()
    (mine / ".copied.json").write_text("[")  # damaged: what is like the original is taken for a copy
    refresh.copy_notebooks(mine)
    assert copies[0].read_bytes() == first.read_bytes() and not capsys.readouterr().out


# a real notebook


@pytest.mark.skipif(not runner.series(), reason="no notebooks yet")
def test_the_first_lesson_runs_with_parameters_and_leaves_metrics(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "RUNS", tmp_path)
    tiny = runner.NOTEBOOKS.parent / "experiments" / "tiny.yaml"
    folder, (result,) = runner.run(["00"], tiny, {"seed": "1"})
    assert result.status == "done", result.error
    assert metrics(folder) == result.metrics != {}
    assert json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["seed"] == 1


def test_a_point_of_the_sweeps_of_memory(tmp_path, monkeypatch):
    """Three new towns and a single neighbour: the included model reads the facts that it is told."""
    monkeypatch.setattr(runner, "RUNS", tmp_path)
    notebook = runner.NOTEBOOKS.parent / "experiments" / "memory.ipynb"
    _, (result,) = runner.run([str(notebook)], None, {"towns": "3", "k": "1"})
    assert result.status == "done", result.error
    assert result.metrics["facts"] > 60 and result.metrics["finds"] > 0.5 and result.metrics["nats"] < 1


@pytest.mark.skipif(len(runner.series()) < 7, reason="the series is not complete yet")
@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_the_presets_fit_the_series(path):
    if path.stem.startswith("sweep_"):
        plan = sweep.read_sweep(path)
        assert sweep.point_folder(plan, plan.points[0]).parent.name == path.stem.replace("_", "-")
    elif not path.stem.startswith(("train_", "evidence", "retrofit", "sources")):  # other tests read those
        assert any(runner.choose_parameters(runner.series(), path))
