"""The helpers around every notebook: seeding, results inside the project, checks that never raise."""

import errno
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from retro_nb.common import arrays
from retro_nb.lab import lesson, runner


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A project root of its own, and a working directory elsewhere."""
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir(), elsewhere.mkdir()
    monkeypatch.setattr(lesson, "ROOT", home)
    monkeypatch.chdir(elsewhere)
    yield home
    assert not list(elsewhere.iterdir()), "something was written into the working directory"


def draws():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_start_seeds_all_three_generators(root):
    lesson.start(seed=3)
    first = draws()
    lesson.start(seed=3)
    assert draws() == first
    lesson.start(seed=4)
    assert all(a != b for a, b in zip(draws(), first, strict=True))


def test_a_project_that_may_not_be_written_names_the_setting_that_moves_its_results(root, monkeypatch):
    def refuse(path, *_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    for module in (arrays, runner):
        monkeypatch.setattr(module, "ROOT", root)
    monkeypatch.setattr(runner, "RUNS", root / "runs")
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ValueError, match=r"^out_dir is 'runs/.*Read-only.*RETRO_NB_HOME"):
        lesson.start(name="03_faiss_knn")
    with pytest.raises(OSError, match=r"could not write .*runs.*Read-only.*RETRO_NB_HOME"):
        runner._new_folder("-x")


@pytest.mark.parametrize(("out_dir", "expected"), [("", "runs/interactive/03_faiss_knn"), ("runs/mine", "runs/mine")])
def test_results_lie_under_the_root_and_are_named_relative_to_it(root, capsys, out_dir, expected):
    run = lesson.start(out_dir=out_dir, name="03_faiss_knn")
    assert run.out_dir == root / expected and run.out_dir.is_dir()
    printed = capsys.readouterr().out
    assert expected in printed and str(root) not in printed and str(root) not in repr(run)


def test_an_out_dir_elsewhere_is_used_and_its_place_not_printed(root, tmp_path, capsys):
    run = lesson.start(out_dir=tmp_path / "far" / "away")
    assert run.out_dir == tmp_path / "far" / "away"
    printed = capsys.readouterr().out
    assert str(tmp_path) not in printed and "away/" in printed


def test_start_prints_what_it_runs_on(root, capsys):
    lesson.start(seed=7, device="cpu")
    printed = capsys.readouterr().out
    assert f"torch {torch.__version__}" in printed and "device cpu" in printed and "seed 7" in printed
    assert len(printed.splitlines()) == 2


def test_save_metrics_writes_plain_json_with_settings(root):
    run = lesson.start(seed=5, steps=10, lr=1e-4)
    values = {"loss": torch.tensor(1.5), "ids": np.arange(3), "shape": (2, 3), "lost": np.nan, "no": None}
    expected = {"loss": 1.5, "ids": [0, 1, 2], "shape": [2, 3], "lost": None, "no": None}
    assert run.save_metrics(values) == expected

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    record = json.loads((run.out_dir / "metrics.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert record["metrics"] == expected
    assert record["config"] == {"steps": 10, "lr": 1e-4} and record["seed"] == 5
    assert record["versions"]["torch"] == torch.__version__ and record["seconds"] >= 0
    assert [path.name for path in run.out_dir.iterdir()] == ["metrics.json"]


def fenced():
    """Holds ```a fence``` of its own."""


def test_show_displays_the_source_in_a_fence_it_cannot_break(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    lesson.show(fenced)
    frame, _, first, *body, last, _, end = shown[0].data.splitlines()
    assert frame.startswith('<div style="font-family: monospace') and end == "</div>"
    assert first == "````python" and last == "````"
    assert body == ["def fenced():", '    """Holds ```a fence``` of its own."""']
    lesson.show(lesson.check)
    assert "\n\n```python\ndef check(" in shown[1].data


RIGHT = [
    (3, 3),
    (3.00001, 3),
    (True, True),
    ("a", "a"),
    (torch.ones(2), [1, 1]),
    (np.ones((2, 2)), torch.ones(2, 2)),
    (torch.Size([2, 3]), (2, 3)),
    ((1, "a"), (1, "a")),
    ({"a": 1}, {"a": 1}),
    (lambda: 4, 4),
]
WRONG = [
    (3, 4),
    (3.1, 3),
    (False, True),
    (torch.ones(2), 1),  # would broadcast
    (torch.ones(2), torch.ones(3)),
    (float("nan"), 1.0),
    ("a", 1),
    (np.array(["a"]), np.array([1])),
    ([[1], [1, 2]], [1]),
    (lambda: 1 / 0, 1),
]


@pytest.mark.parametrize(("answer", "expected"), RIGHT)
def test_check_accepts(answer, expected, capsys):
    assert lesson.check("3.1", answer, expected, hint="look again")
    printed = capsys.readouterr().out
    assert printed.startswith("✔ 3.1") and "look again" not in printed


@pytest.mark.parametrize(("answer", "expected"), WRONG)
def test_check_rejects_with_the_hint_and_never_raises(answer, expected, capsys):
    assert not lesson.check("3.1", answer, expected, hint="look again")
    printed = capsys.readouterr().out
    assert printed.startswith("✗ 3.1") and "look again" in printed and len(printed.splitlines()) == 1


@pytest.mark.parametrize("answer", [None, ..., lambda: None])
def test_check_waits_for_an_answer_and_keeps_the_hint_till_then(answer, capsys):
    assert not lesson.check("3.1", answer, 3, hint="look again")
    printed = capsys.readouterr().out
    assert printed.startswith("○ 3.1") and "look again" not in printed


def test_a_verdict_at_the_end_of_a_cell_shows_nothing():
    from IPython.core.formatters import DisplayFormatter

    data, _ = DisplayFormatter().format(lesson.Verdict(True))
    assert data == {}
