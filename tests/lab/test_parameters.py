"""What `start` refuses, and that it knows every parameter of every notebook."""

import ast
import json
import math
from pathlib import Path

import numpy as np
import pytest
from IPython.core.interactiveshell import InteractiveShell

from retro_nb.lab.lesson import start
from retro_nb.lab.parameters import LIMITS, ParameterError, check_parameters

ROOT = Path(__file__).resolve().parents[2]
LESSONS = [*sorted((ROOT / "notebooks").glob("*.ipynb")), ROOT / "experiments" / "memory.ipynb"]


def parameters(path: Path) -> dict[str, object]:
    """The defaults in a notebook's parameters cell."""
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if "parameters" in cell["metadata"].get("tags", []):
            found = ast.parse("".join(cell["source"])).body
            return {node.target.id: ast.literal_eval(node.value) for node in found}
    raise AssertionError(f"{path} has no parameters")


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_every_parameter_has_limits_and_its_default_is_within(path):
    given = parameters(path)
    assert given.keys() - {"out_dir"} <= LIMITS.keys()
    check_parameters(given)


@pytest.mark.parametrize(
    ("name", "value", "limit"),
    [
        ("steps", "fifty", "a whole number of at least 1"),
        ("steps", 2.5, "a whole number of at least 1"),
        ("steps", True, "a whole number of at least 1"),
        ("k", 0, "a whole number of at least 1"),
        ("lr", -1, "a number of at least 1e-08 and at most 1"),
        ("lr", math.nan, "a number of at least"),
        ("temperature", math.inf, "a number of at least 0"),
        ("dim", 100, "a multiple of 32"),
        ("max_chars", 50, "a whole number of at least 500, or 0 for all"),
        ("seed", -1, "a whole number of at least 0"),
        ("live", "yes", "True or False"),
        ("prompt", 3, "text in quotes"),
        ("prompt", " ", "not blank"),
        ("about", "(", "a regular expression"),
        ("about", "a{99999999999}", "a regular expression"),
        ("steps", 10**400, "a whole number of at least 1"),
        ("lr", 10**400, "at most 1"),
        ("lr", 1j, "a number of at least 1e-08"),
        ("towns", None, "a whole number of at least 2"),
        ("batch_size", [4], "a whole number of at least 1"),
        ("device", "gpu", "pass 'cpu'"),
        ("device", "cuda:99", "pass 'cpu'"),
    ],
)
def test_impossible_values_are_named_before_anything_is_done(tmp_path, name, value, limit):
    with pytest.raises(ParameterError, match=name) as caught:
        start(out_dir=tmp_path / "out", **{name: value})
    assert str(caught.value).startswith(f"{name} is {value!r:.80}") and limit in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out_dir", ["a\0b", "/dev/null/out", __file__])
def test_a_folder_that_cannot_be_made_is_named(out_dir):
    with pytest.raises(ParameterError, match=r"^out_dir is .*pass another folder"):
        start(out_dir=out_dir)


def test_a_number_too_long_to_show_is_refused_all_the_same(tmp_path):
    with pytest.raises(ParameterError, match=r"^seed is too long to show, a int: pass a whole number"):
        start(seed=10**5000, out_dir=tmp_path)


def test_all_is_0():
    check_parameters({"max_chars": 0, "max_documents": 0, "temperature": 0, "lr": 1e-3, "share": 1, "own": object()})
    check_parameters({"about": "", "index": "", "steps": np.int64(3)})


def test_a_notebook_shows_one_line(capsys):
    shell = InteractiveShell.instance()
    shell.run_cell("from retro_nb import start\nstart(steps='fifty')")
    shown = capsys.readouterr().out.strip()
    assert "\n" not in shown and "steps is 'fifty'" in shown
    InteractiveShell.clear_instance()
