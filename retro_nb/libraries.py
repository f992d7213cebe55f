"""The docstrings of the libraries installed beside this project: real text that everyone has, offline.

Manuals repeat one another as speeches do not: a parameter that many functions take is explained in many modules.
So a neighbour from another module often tells what comes next (notebook 10).
"""

import ast
import importlib.util
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from retro_nb.corpus import Document, digest

# Packages that are always installed with this project, by the name that one imports -> the name that pip knows.
PACKAGES = {"matplotlib": "matplotlib", "networkx": "networkx", "numpy": "numpy", "sklearn": "scikit-learn"}

# Parts of a path that are not the library's own manual.
TESTS = re.compile(r"_?tests?|_?testing|test[-_].*|conftest")
VENDORED = re.compile(r"_?vendor.*|externals?|third_party|array_api_(compat|extra)")

Function = ast.FunctionDef | ast.AsyncFunctionDef
Block = ast.If | ast.Try | ast.ExceptHandler | ast.With  # whose definitions are the module's or the class's own


class docstrings:
    """The docstrings of installed libraries, one document a module, in order of package and path.

    A document reads like a page of a manual. The module comes first, then its classes, methods and functions in
    order of the source, each under its name and signature:

        numpy.linalg.norm(x, ord=None, axis=None, keepdims=False)
        Matrix or vector norm.

    A file whose own name is private, numpy/linalg/_linalg.py here, lends its names to the package above it. Files are parsed, one at a time, and nothing is imported. Left out are tests, copies of other
    projects, names without a docstring, and files that Python cannot decode or parse: `skipped` says which, and
    why, as they are met.

    packages   import names, e.g. ["numpy"]; None for those of `PACKAGES` that are installed
    min_chars  leave out modules with fewer characters of docstrings

    Raises ModuleNotFoundError for a package that is not installed as Python files, ValueError for what is not
    the name of one, and for `min_chars` below 1.
    """

    def __init__(self, packages: Sequence[str] | None = None, min_chars: int = 1000) -> None:
        if min_chars < 1:
            raise ValueError(f"min_chars {min_chars} is less than 1: pass a positive number")
        named = PACKAGES if packages is None else packages
        found = {package: _files(package) for package in named}
        self.packages = list(found)
        self.min_chars = min_chars
        self.skipped: dict[str, str] = {}
        self._files = [f for files in found.values() for f in files]

    def __iter__(self) -> Iterator[Document]:
        for source, path in self._files:
            module = source.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            try:
                entries = list(_read(path, module))
            except (SyntaxError, ValueError) as error:
                self.skipped[source] = str(error)
                continue
            if sum(len(docstring) for _, docstring in entries) >= self.min_chars:
                yield Document("\n\n".join(map("\n".join, entries)), module, source)


def _files(package: str) -> list[tuple[str, Path]]:
    spec = importlib.util.find_spec(package)
    if spec is None:
        return []
    if spec.submodule_search_locations is None:
        files = [Path(spec.origin)]
        return [(f.name, f) for f in files]
    found = {}
    for folder in map(Path, spec.submodule_search_locations):
        found |= {path.relative_to(folder.parent).as_posix(): path for path in folder.rglob("*.py")}
    return sorted((s, p) for s, p in found.items() if not any(TESTS.fullmatch(x) or VENDORED.fullmatch(x) for x in s.removesuffix(".py").split("/")))


def _read(path: Path, module: str) -> Iterator[tuple[str, str]]:
    with warnings.catch_warnings(action="ignore") if sys.version_info >= (3, 11) else warnings.catch_warnings():
        tree = ast.parse(path.read_bytes())
    if docstring := ast.get_docstring(tree):
        yield module, docstring
    parent, _, own = module.rpartition(".")
    yield from _entries(tree, parent if own.startswith("_") and parent else module)


def _entries(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | Function):
            qualified = f"{name}.{child.name}"
            if docstring := ast.get_docstring(child):
                yield _heading(child, qualified, isinstance(node, ast.ClassDef)), docstring
        if isinstance(child, ast.ClassDef):
            yield from _entries(child, qualified)
        elif isinstance(child, Block):
            yield from _entries(child, name)


def _heading(node, name: str, in_class) -> str:
    if isinstance(node, ast.ClassDef):
        inits = [c for c in node.body if isinstance(c, Function) and c.name == "__init__"]
        return f"class {name}" + (f"({_parameters(inits[0], True)})" if inits else "")
    if any("property" in ast.unparse(d) for d in node.decorator_list):
        return name
    r = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{name}({_parameters(node, in_class)}){r}"

def _parameters(node, in_class):
    p = ast.unparse(node.args)
    return re.sub(r"^(self|cls)(, /)?(, |$)", "", p) if in_class else p
