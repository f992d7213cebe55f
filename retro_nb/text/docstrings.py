"""The docstrings of the installed libraries: real text that every user has offline.

Unlike speeches, manuals repeat one another: many modules explain the same arguments and return values. Of the chunks
of 64 tokens, 17 in 100 share a run of 32 tokens with another document; among the speeches, 1 in 100.
"""

import ast
import importlib.util
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from retro_nb.common.digests import digest
from retro_nb.text.document import Document, part_of, shares

# Import name -> pip's name, of the packages with the longest manuals that this project always installs.
# transformers, nearly as long as all of these, is left out: its models, and so their docstrings, copy one another.
PACKAGES = {
    "matplotlib": "matplotlib",
    "networkx": "networkx",  # with torch
    "numpy": "numpy",
    "scipy": "scipy",  # with the default BERT, as is scikit-learn
    "sklearn": "scikit-learn",
}

# Folders and files that hold a library's tests or its copies of other projects.
TESTS = r"_?tests?|_?testing|test[-_].*|conftest"
LEFT_OUT = re.compile(rf"{TESTS}|_?vendor.*|externals|third_?party.*|array_api_(compat|extra)")

PROPERTY = re.compile(r"property|\.(setter|deleter)$")  # decorators of methods used like attributes

Function = ast.FunctionDef | ast.AsyncFunctionDef
Block = ast.If | ast.Try | ast.ExceptHandler | ast.With  # definitions inside belong to the module or class


class docstrings:
    """The docstrings of installed libraries, one document per module, in order of the packages and their paths.

    A document reads like a page of a manual: the module, then its classes, methods and functions in source order,
    each under its name and signature.

        numpy.linalg.norm(x, ord=None, axis=None, keepdims=False)
        Matrix or vector norm.

    The names defined in a private module, here numpy.linalg._linalg, appear under the package around it. Files are
    parsed one at a time, and nothing is imported. Tests, copies of other projects, definitions without a docstring,
    and files that Python cannot decode or parse are left out. Iterating adds these last files to `skipped`, with the
    reason.

    packages   import names such as "numpy"; None for those of `PACKAGES` that are installed
    min_chars  leave out modules with fewer characters of docstrings

    Raises ModuleNotFoundError for packages that are not installed as Python files, ValueError for an invalid package
    name or `min_chars` below 1.
    """

    def __init__(self, packages: Sequence[str] | None = None, min_chars: int = 1000) -> None:
        if min_chars < 1:
            raise ValueError(f"min_chars {min_chars} is less than 1: pass a positive number")
        if isinstance(packages, str) or (packages is not None and not packages):
            raise ValueError(f"packages {packages!r} is no list of names: pass e.g. ['numpy'], or None for the usual")
        found = {name: source_files(name) for name in packages or PACKAGES}
        missing = [name for name, files in found.items() if not files]
        if missing and (packages or len(missing) == len(PACKAGES)):
            wanted = " ".join(PACKAGES.get(name, name) for name in missing)
            raise ModuleNotFoundError(f"{', '.join(missing)}: no Python files here, try: pip install {wanted}")
        self.packages = [name for name in found if name not in missing]
        self.min_chars = min_chars
        self.skipped: dict[str, str] = {}  # source -> the reason
        self._files = [file for files in found.values() for file in files]

    def __iter__(self) -> Iterator[Document]:
        for source, path in self._files:
            module = source.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            try:
                entries = list(_read(path, module))
            except (SyntaxError, ValueError) as error:
                self.skipped[source] = str(error)
                continue
            if sum(len(docstring) for _, docstring in entries) >= self.min_chars:
                text = "\n\n".join(f"{heading}\n{docstring}" for heading, docstring in entries)
                yield Document(text, module, source)

    def split(self, count: int) -> "list[docstrings]":
        """Divide the modules, in order, into at most `count` corpora of similar size, measured by their files."""
        sizes = [path.stat().st_size for _, path in self._files]
        return [part_of(self, _files=self._files[some], skipped={}) for some in shares(sizes, count)]

    def fingerprint(self) -> dict:
        """The parameters, the versions of the packages and of Python, and a digest of each file's path and size."""
        return {
            "corpus": "docstrings",
            "packages": {name: _version(name) for name in self.packages},
            "min_chars": self.min_chars,
            "python": "{}.{}".format(*sys.version_info),  # another version may parse other files
            "files": digest([[source, path.stat().st_size] for source, path in self._files]),
        }


def source_files(package: str) -> list[tuple[str, Path]]:
    """A package's own Python files, with paths relative to site-packages; empty if it is not installed."""
    if not package.isidentifier():
        raise ValueError(f"package {package!r} is not a name to import: pass the outermost one, e.g. 'sklearn'")
    spec = importlib.util.find_spec(package)  # a top-level name, so that nothing is imported
    if spec is None:
        return []
    if not spec.submodule_search_locations:  # a single-file module, or a compiled one
        origin = spec.origin or ""
        return [(f"{package}.py", Path(origin))] if origin.endswith(".py") else []
    found: dict[str, Path] = {}
    for folder in map(Path, spec.submodule_search_locations):
        found |= {path.relative_to(folder.parent).as_posix(): path for path in folder.rglob("*.py")}
    own = (source for source in found if not any(map(LEFT_OUT.fullmatch, source[:-3].split("/")[1:])))
    return [(source, found[source]) for source in sorted(own)]


def _version(package: str) -> str | None:
    """The installed version; None if pip does not know this name, such as a module of the standard library."""
    try:
        return version(PACKAGES.get(package, package))
    except PackageNotFoundError:
        return None


# --- one module ---------------------------------------------------------------------------------------------


def _read(path: Path, module: str) -> Iterator[tuple[str, str]]:
    """(heading, docstring) of a module and of each definition in it, in source order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of invalid escapes, such as "\d"
        tree = ast.parse(path.read_bytes())
    if docstring := ast.get_docstring(tree):
        yield module, docstring
    package, _, own = module.rpartition(".")
    yield from _definitions(tree, package if package and own.startswith("_") else module)


def _definitions(node: ast.AST, name: str, in_class: bool = False) -> Iterator[tuple[str, str]]:
    """(heading, docstring) of the classes and functions defined in a module or class `name`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Block):
            yield from _definitions(child, name, in_class)
        elif isinstance(child, ast.ClassDef | Function):
            own = f"{name}.{child.name}"
            if docstring := ast.get_docstring(child):
                yield _heading(child, own, in_class), docstring
            if isinstance(child, ast.ClassDef):
                yield from _definitions(child, own, in_class=True)


def _heading(node: ast.ClassDef | Function, name: str, in_class: bool) -> str:
    """A heading such as "class sklearn.svm.SVC(*, C=1.0)", "sklearn.svm.SVC.fit(X, y)" or "sklearn.svm.SVC.coef_"."""
    if isinstance(node, ast.ClassDef):
        made = [child for child in node.body if isinstance(child, Function) and child.name == "__init__"]
        return f"class {name}{_parameters(made[-1], in_class=True)}" if made else f"class {name}"
    if any(PROPERTY.search(ast.unparse(decorator)) for decorator in node.decorator_list):
        return name
    returned = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{name}{_parameters(node, in_class)}{returned}"


def _parameters(function: Function, in_class: bool) -> str:
    """The parameters as in the source, without a method's `self` or `cls`."""
    listed = ast.unparse(function.args)
    return f"({re.sub(r'^(self|cls)(, /)?(, |$)', '', listed) if in_class else listed})"
