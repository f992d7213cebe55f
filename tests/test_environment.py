"""The files that say what is installed, and the package's own shape, agree with each other."""

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import retro_nb

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "retro_nb"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT, CONTRACTS = PYPROJECT["project"], PYPROJECT["tool"]["importlinter"]["contracts"]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def requirements(lines: list[str]) -> dict[str, Requirement]:
    found = [Requirement(line) for line in lines]
    assert len({each.name for each in found}) == len(found), "something is required twice"
    return {each.name: each for each in found}


def required() -> dict[str, Requirement]:
    extras = PROJECT["optional-dependencies"]
    installed = re.search(r"-e \"\.\[(.*)\]\"", MAKEFILE)[1].split(",")  # by `make setup`
    assert set(extras) - set(installed) == {"translations"}
    return requirements([*PROJECT["dependencies"], *(each for name in installed for each in extras[name])])


def constraints() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {name.lower(): line for name, line in requirements([x for x in lines if x[:1] != "#"]).items()}


def test_conda_and_pip_install_the_same():
    python, pip, block = CONDA["dependencies"]
    assert CONDA["channels"] == ["conda-forge"] and pip == "pip"
    assert python == f"python{PROJECT['requires-python']}"
    assert block["pip"][-1] == "-e ."
    conda = requirements(block["pip"][:-1])
    assert {name: str(each.specifier) for name, each in conda.items()} == {
        name: str(each.specifier) for name, each in required().items()
    }


def test_torch_is_pinned_everywhere():
    assert str(required()["torch"].specifier) == "==2.13.0"
    assert str(constraints()["torch"].specifier) == "==2.13.0"
    assert re.search(r"^TORCH +:= torch==2\.13\.0$", MAKEFILE, re.MULTILINE)


def test_constraints_are_exact_and_within_the_ranges():
    pinned = constraints()
    for name, each in pinned.items():
        assert [clause.operator for clause in each.specifier] == ["=="], name
        assert str(each.marker) == 'python_version >= "3.11"', name
    for name, each in required().items():
        (clause,) = pinned[name.lower()].specifier
        assert Version(clause.version) in each.specifier, f"{each} does not allow {clause.version}"


def test_every_import_is_a_declared_dependency():
    called = {"faiss": "faiss-cpu", "yaml": "pyyaml", "PIL": "pillow", "charset_normalizer": "charset-normalizer"}
    called |= {"docstring_parser": "docstring-parser"}
    comes_with = {"IPython": "jupyterlab", "nbformat": "papermill"}
    comes_with |= {"tokenizers": "transformers", "triton": "torch"}  # Triton with torch for CUDA only
    called |= comes_with
    for path in PACKAGE.rglob("*.py"):
        for module in imported(path):
            name = module.split(".")[0]
            if name != "retro_nb" and name not in sys.stdlib_module_names:
                assert called.get(name, name) in required(), f"{path.name} imports {name}"


def test_python_is_the_same_everywhere():
    assert PROJECT["requires-python"] == ">=3.10" and "sys.version_info < (3, 10)" in MAKEFILE
    matrix = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"]["test"]
    versions = [Version(job["python"]) for job in matrix["strategy"]["matrix"]["include"]]
    assert min(versions) == Version("3.10")


def test_ci_runs_what_people_run():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    job = workflow["jobs"]["test"]
    systems = {each["os"].split("-")[0] for each in job["strategy"]["matrix"]["include"]}
    assert systems == {"ubuntu", "macos"}
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert commands == ["make test", "make tutorial"]
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK) and script.read_text(encoding="utf-8").rstrip().endswith("make test")


def test_make_help_lists_every_target():
    said = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE).group(1).split()
    assert re.findall(r"^  make (\w+)", said, re.MULTILINE) == targets


# the package


def imported(path: Path) -> list[str]:
    """Full names of the modules that a file imports, at any depth of its code."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def test_modules_say_what_they_are_and_keep_annotations_alive():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert ast.get_docstring(ast.parse(text)), f"{path} has no docstring"
        assert "from __future__ import annotations" not in text, f"{path}: jaxtyping could not check its shapes"


def test_every_room_has_a_place_in_the_order_of_imports():
    (layers,) = (each["layers"] for each in CONTRACTS if each["type"] == "layers")
    placed = {name.strip().removeprefix("retro_nb.") for layer in layers for name in layer.split("|")}
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix in ("", ".py")}
    assert placed == rooms - {"__init__", "__pycache__"}


def test_public_names_have_docstrings():
    for name in retro_nb.__all__:
        value = getattr(retro_nb, name)
        if callable(value):
            assert inspect.getdoc(value), f"{name} has no docstring"
        for method, body in inspect.getmembers(value, inspect.isfunction) if inspect.isclass(value) else ():
            if not method.startswith("_") and body.__module__.startswith("retro_nb"):
                assert inspect.getdoc(body), f"{name}.{method} has no docstring"


def test_every_module_imports():
    for path in PACKAGE.rglob("*.py"):
        importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
