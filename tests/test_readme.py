"""README.md promises nothing that is not there."""

import ast
import json
import re
import runpy
from pathlib import Path

import pytest

import retro_nb

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_links_lead_somewhere():
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in target]
    assert targets and [target for target in targets if not (ROOT / target).exists()] == []


def test_the_tests_that_pin_the_differences_exist():
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", README)
    missing = [
        (file, name)
        for file, name in named
        if not re.search(rf"^def {name}\(", (ROOT / "tests" / file).read_text(encoding="utf-8"), flags=re.M)
    ]
    assert len(named) > 10 and missing == []


def test_the_example_is_python_with_public_names():
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    tree = ast.parse(example)
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert set(names) <= set(retro_nb.__all__) and len(example.splitlines()) <= 20


def test_the_table_of_notebooks_is_the_measured_one():
    results = ROOT / "benchmarks" / "results" / "tutorial.json"
    if not results.exists():
        pytest.skip("not measured yet")
    script = runpy.run_path(str(ROOT / "benchmarks" / "readme.py"))
    table = script["notebook_table"](json.loads(results.read_text(encoding="utf-8")))
    assert script["replace_section"](README, "notebooks", table) == README
