"""The Python source files of the installed libraries: a corpus of code that every user has offline.

Code repeats itself: a library's files share names, idioms and whole passages, which a retrieval model can look up.
"""

import hashlib
import io
import json
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import Distribution, distributions
from pathlib import Path
from tokenize import detect_encoding

from retro_nb.common.digests import digest
from retro_nb.text.docstrings import source_files
from retro_nb.text.document import Document, part_of, shares

SMALLEST, LARGEST = 400, 120_000  # bytes: smaller files hold hardly any code, larger ones mostly tables


class code:
    """The Python source files of installed libraries, one document per file, in order of the packages and their paths.

    The title is the module, "numpy.linalg._linalg"; the source is the file's path in site-packages. Nothing is
    imported. Tests, copies of other projects, files below `min_bytes` or above `max_bytes`, byte-identical copies of
    an earlier file, and files that Python cannot decode are left out; `skipped` lists the last two, with the reason.

    packages   import names such as "numpy"; None for those of all installed distributions
    min_bytes, max_bytes   limits on the size of a file

    Raises ModuleNotFoundError for packages that are not installed as Python files, ValueError for an invalid package
    name or limits that exclude every file.
    """

    def __init__(
        self, packages: Sequence[str] | None = None, min_bytes: int = SMALLEST, max_bytes: int = LARGEST
    ) -> None:
        if not 1 <= min_bytes <= max_bytes:
            raise ValueError(f"sizes from {min_bytes} to {max_bytes} bytes leave no file: pass 1 <= min <= max")
        if isinstance(packages, str) or (packages is not None and not packages):
            raise ValueError(f"packages {packages!r} is no list of names: pass e.g. ['numpy'], or None for all")
        self._owners = _owners()
        found = {name: source_files(name) for name in packages or sorted(self._owners)}
        missing = [name for name, files in found.items() if not files]
        if packages and missing:
            raise ModuleNotFoundError(f"{', '.join(missing)}: no Python files here; install them, or leave them out")
        self.packages = [name for name, files in found.items() if files]
        self.min_bytes, self.max_bytes = min_bytes, max_bytes
        self.skipped: dict[str, str] = {}  # source -> the reason
        self._files = self._without_copies([file for files in found.values() for file in files])

    def _without_copies(self, files: list[tuple[str, Path]]) -> list[tuple[str, Path]]:
        """Files of the right size, each content once. Done at construction, so that all parts of the corpus agree."""
        first: dict[bytes, str] = {}
        kept = []
        for source, path in files:
            if not self.min_bytes <= path.stat().st_size <= self.max_bytes:
                continue
            content = hashlib.blake2b(path.read_bytes(), digest_size=16).digest()
            if content in first:
                self.skipped[source] = f"a copy of {first[content]}"
            else:
                first[content] = source
                kept.append((source, path))
        return kept

    def __iter__(self) -> Iterator[Document]:
        for source, path in self._files:
            try:
                text = _decode(path.read_bytes())
            except (SyntaxError, ValueError) as error:  # a wrong coding comment, or wrong bytes
                self.skipped[source] = str(error)
                continue
            yield Document(text, source.removesuffix(".py").removesuffix("/__init__").replace("/", "."), source)

    def split(self, count: int) -> "list[code]":
        """Divide the files, in order, into at most `count` corpora of similar size."""
        sizes = [path.stat().st_size for _, path in self._files]
        return [part_of(self, _files=self._files[some], skipped={}) for some in shares(sizes, count)]

    def fingerprint(self) -> dict:
        """The parameters, the versions of the packages and of Python, and a digest of each file's path and size."""
        return {
            "corpus": "code",
            "packages": {name: [dist.version for dist in self._distributions(name)] for name in self.packages},
            "min_bytes": self.min_bytes,
            "max_bytes": self.max_bytes,
            "python": "{}.{}".format(*sys.version_info),
            "files": digest([[source, path.stat().st_size] for source, path in self._files]),
        }

    def licences(self) -> dict[str, str]:
        """Licence of each distribution according to its metadata, by the distribution's name and version."""
        dists = [dist for name in self.packages for dist in self._distributions(name)]
        found = {f"{dist.metadata['Name']} {dist.version}": licence(dist) for dist in dists}
        return dict(sorted(found.items(), key=lambda item: item[0].lower()))

    def _distributions(self, package: str) -> list[Distribution]:
        return self._owners.get(package, [])


def licence(dist: Distribution) -> str:
    """A distribution's licence from its metadata: SPDX expression, classifiers, or first line of the licence text."""
    about = dist.metadata
    expression, text = (about[name].strip() if name in about else "" for name in ("License-Expression", "License"))
    if expression:
        return expression
    classifiers = [each for each in about.get_all("Classifier", []) if each.startswith("License ::")]
    if classifiers:
        return ", ".join(each.rpartition(" :: ")[2] for each in classifiers)
    return text.splitlines()[0] if text else "not stated"


def _owners() -> dict[str, list[Distribution]]:
    """Installed distributions by import name, for names with Python files; editable installs are left out.

    The files of a project installed by `pip install -e` change from commit to commit. Setuptools also leaves a record
    of such a project beside its files; `distributions()` finds it if that folder is on Python's path.
    """
    found: dict[str, dict[str, Distribution]] = {}
    installed = list(distributions())
    editable = {dist.metadata["Name"] for dist in installed if _is_editable(dist)}
    for dist in installed:
        if dist.metadata["Name"] in editable:
            continue
        for name in {file.parts[0].removesuffix(".py") for file in dist.files or () if file.suffix == ".py"}:
            if name.isidentifier():
                found.setdefault(name, {}).setdefault(dist.metadata["Name"], dist)  # the first on the path
    return {name: [dists[each] for each in sorted(dists)] for name, dists in found.items()}


def _is_editable(dist: Distribution) -> bool:
    origin = json.loads(dist.read_text("direct_url.json") or "{}")
    return bool(origin.get("dir_info", {}).get("editable"))


def _decode(data: bytes) -> str:
    """Decode a source file by its byte order mark or coding comment, else as UTF-8; lines end with \\n."""
    encoding, _ = detect_encoding(io.BytesIO(data).readline)
    return io.TextIOWrapper(io.BytesIO(data), encoding).read()
