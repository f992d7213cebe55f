"""Docstrings of installed libraries: what a reader that imports them sees, nothing imported, bad files, versions."""

import importlib
import importlib.metadata
import inspect
import json
import pickle
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_nb.text import docstrings as docstrings_module
from retro_nb.text.docstrings import docstrings
from retro_nb.text.document import Corpus

INIT = '''
    """A fake library."""

    def area(width: float, height: float = 1.0, *, unit="m") -> float:
        """The area of a rectangle.

        >>> if True:
        ...     area(2, unit="km")
            more
        """

    def undocumented():
        def inner():
            """Nobody reads this."""
'''
SHAPES = '''
    # -*- coding: latin-1 -*-
    """Shapes, à la carte."""
    import nowhere_to_be_found

    raise RuntimeError("imported!")

    class Shape(object):
        """What has an area."""

        def __init__(self, side, /, *sides, name=None):
            """Shapes have sides."""

        @property
        def corners(self) -> int:
            """As many as sides."""

        @corners.setter
        def corners(self, number):
            """Cut or grow some."""

        @classmethod
        def of(cls, text): "Read a shape."

        @staticmethod
        def units(self_or_not):
            """Of a side."""

        class Side:
            """A side of it."""

            async def walk(self):
                """From one corner to the next: "\\d"."""

        if True:
            def within(self):
                """A method all the same."""

    try:
        def pi():
            """The ratio."""
    except ImportError:
        class Pi:
            """The constant."""

            def __init__(self): pass

    def stretch(self, *by): "A function with an odd parameter."
'''


def write(folder: Path, files: dict[str, str | bytes]) -> None:
    """Files of a package, dedented."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else textwrap.dedent(content).strip().encode("latin-1"))


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    """A folder of installed packages with one in it, `fakelib` 1.0."""
    write(tmp_path, {"fakelib/__init__.py": INIT, "fakelib/deep/_shapes.py": SHAPES, "fakelib/deep/__init__.py": ""})
    write(tmp_path, {"fakelib-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: fakelib\nVersion: 1.0"})
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_a_document_reads_like_a_page_of_a_manual(site):
    top, shapes = docstrings(["fakelib"], min_chars=1)
    assert (top.title, top.source) == ("fakelib", "fakelib/__init__.py")
    assert top.text == (
        "fakelib\nA fake library.\n\n"
        "fakelib.area(width: float, height: float=1.0, *, unit='m') -> float\n"
        'The area of a rectangle.\n\n>>> if True:\n...     area(2, unit="km")\n    more'
    )
    assert (shapes.title, shapes.source) == ("fakelib.deep._shapes", "fakelib/deep/_shapes.py")
    entries = [entry.split("\n") for entry in shapes.text.split("\n\n")]
    assert entries == [
        ["fakelib.deep._shapes", "Shapes, à la carte."],
        ["class fakelib.deep.Shape(side, /, *sides, name=None)", "What has an area."],
        ["fakelib.deep.Shape.__init__(side, /, *sides, name=None)", "Shapes have sides."],
        ["fakelib.deep.Shape.corners", "As many as sides."],
        ["fakelib.deep.Shape.corners", "Cut or grow some."],
        ["fakelib.deep.Shape.of(text)", "Read a shape."],
        ["fakelib.deep.Shape.units(self_or_not)", "Of a side."],
        ["class fakelib.deep.Shape.Side", "A side of it."],
        ["fakelib.deep.Shape.Side.walk()", 'From one corner to the next: "\\d".'],
        ["fakelib.deep.Shape.within()", "A method all the same."],
        ["fakelib.deep.pi()", "The ratio."],
        ["class fakelib.deep.Pi()", "The constant."],
        ["fakelib.deep.stretch(self, *by)", "A function with an odd parameter."],
    ]


def test_nothing_is_imported(site):
    before = set(sys.modules)
    assert len(list(docstrings(["fakelib"], min_chars=1))) == 2
    assert set(sys.modules) == before


def test_the_default_packages_are_found_but_not_imported():
    code = (
        "import sys; from retro_nb.text.docstrings import PACKAGES, docstrings; before = {*sys.modules};"
        "corpus = docstrings(); next(iter(corpus));"
        "print(corpus.packages == sorted(PACKAGES), {*sys.modules} & {*PACKAGES} <= before, {*PACKAGES} <= before)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["True", "True", "False"]


def documented(owner, name: str, module: str) -> Iterator[tuple[str, object]]:
    """(full name, object) of the classes, functions and properties that an imported module or class defines."""
    for own, value in vars(owner).items():
        value = getattr(value, "fget", getattr(value, "__func__", value))
        if (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__ == module:
            if value.__doc__:
                yield f"{name}.{own}", value
            if inspect.isclass(value):
                yield from documented(value, f"{name}.{own}", module)


@pytest.mark.parametrize("name", ["textwrap", "shelve", "shlex", "socketserver"])
def test_it_is_what_inspect_sees_in_the_imported_module(name):
    module = importlib.import_module(name)
    (document,) = docstrings([name], min_chars=1)
    text = f"{document.text}\n\n"
    for full, value in [(name, module), *documented(module, name, name)]:
        heading = rf"(class )?{re.escape(full)}(\(.*\))?"
        found = re.search(rf"^{heading}\n{re.escape(inspect.cleandoc(value.__doc__))}\n\n", text, re.MULTILINE)
        assert found, full
        if inspect.isfunction(value) and (listed := found.group(2)):
            shown = eval(f"lambda {listed[1:-1]}: 0", vars(module))
            wanted = [each for each in inspect.signature(value).parameters.values() if each.name not in ("self", "cls")]
            assert [*inspect.signature(shown).parameters.values()] == wanted, full
        text = text.replace(found.group(), "", 1)
    assert text == ""  # and nothing else


@given(st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_any_docstring_is_cleaned_as_getdoc_does(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("any") / "some.py"
    source = "".join(f"def f{i}(x):\n    {text!r}\n" for i, text in enumerate(texts))
    path.write_text(source, encoding="utf-8")
    names = {}
    exec(source, names)
    wanted = [(f"some.f{i}(x)", inspect.getdoc(names[f"f{i}"])) for i in range(len(texts))]
    assert list(docstrings_module._read(path, "some")) == [(name, text) for name, text in wanted if text]


def test_tests_and_copies_of_other_projects_are_left_out(site):
    own = ["attesting.py", "external.py", "hypotests.py", "sub/_testable.py", "sub/latest.py"]
    other = ["tests/a.py", "sub/test/a.py", "testing/a.py", "_testing.py", "conftest.py", "test_a.py", "test-b/a.py"]
    other += ["_vendor/a.py", "vendored_things/a.py", "externals/a.py", "array_api_compat/a.py", "notes.txt", "a.pyc"]
    write(site / "manylib", dict.fromkeys([*own, *other], '"""A docstring."""'))
    write(site / "manylib", {"__init__.py": '"""A package."""'})
    sources = [document.source for document in docstrings(["manylib"], min_chars=1)]
    assert sources == sorted(f"manylib/{name}" for name in ["__init__.py", *own])


def test_bad_files_are_skipped_and_counted(site):
    write(
        site / "fakelib" / "bad",
        {
            "syntax.py": "def f(:",
            "latin.py": '"""caf\xe9"""'.encode("latin-1"),
            "null.py": b'"""a"""\0',
            "codec.py": "# coding: no-such-codec",
            "good.py": b'\xef\xbb\xbf"""Good."""',
            "none.py": "x = 1",
            "empty.py": b"",
        },
    )
    corpus = docstrings(["fakelib"], min_chars=1)
    assert not corpus.skipped  # nothing was read yet
    for _ in range(2):
        titles = [document.title for document in corpus]
        assert titles == ["fakelib", "fakelib.bad.good", "fakelib.deep._shapes"]
        bad = [f"fakelib/bad/{name}.py" for name in ("codec", "latin", "null", "syntax")]
        assert sorted(corpus.skipped) == bad and all(corpus.skipped.values())


def test_min_chars_counts_docstrings_alone(site):
    write(site / "fakelib", {"long_name_of_a_module.py": '"""12345"""\ndef f(a_parameter, another): "678"'})
    for limit, found in [(8, True), (9, False)]:
        assert ("fakelib.long_name_of_a_module" in [d.title for d in docstrings(["fakelib"], limit)]) is found


def test_order_is_that_of_the_packages_given_and_their_paths(site):
    write(site, {"alone.py": '"""A module without a package."""', "spread/part/a.py": '"""No __init__."""'})
    titles = [document.title for document in docstrings(["spread", "fakelib", "alone"], min_chars=1)]
    assert titles == ["spread.part.a", "fakelib", "fakelib.deep._shapes", "alone"]
    (document,) = docstrings(["alone"], min_chars=1)
    assert (document.text, document.source) == ("alone\nA module without a package.", "alone.py")


def test_it_is_a_corpus_that_reads_a_file_when_its_turn_comes(site):
    corpus = docstrings(["fakelib"], min_chars=1)
    assert isinstance(corpus, Corpus)
    first = list(corpus)
    assert all(a == b == c for a, b, c in zip(corpus, corpus, first, strict=True))
    documents = iter(corpus)
    next(documents)
    write(site, {"fakelib/deep/_shapes.py": '"""Changed since."""'})
    assert next(documents).text.endswith("Changed since.")


def test_a_real_one():
    corpus = docstrings(["networkx"])
    documents = list(corpus)
    assert not corpus.skipped and len(documents) > 200 and sum(len(d.text) for d in documents) > 10**6
    assert len({document.title for document in documents}) == len(documents)
    assert all(d.source.startswith("networkx/") for d in documents)
    clique = next(document for document in documents if document.title == "networkx.algorithms.clique")
    assert "\n\nnetworkx.algorithms.clique.find_cliques(G, nodes=None)\nReturns all maximal cliques" in clique.text


# --- fingerprints and errors --------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 5, 99])
def test_a_library_is_its_parts(site, count):
    write(site, {f"fakelib/m{n}.py": f'"""Module {n}. {"Words. " * n}"""' for n in range(0, 90, 10)})
    write(site, {"fakelib/m5.py": "no python"})
    whole = docstrings(["fakelib"], min_chars=20)
    parts = [pickle.loads(pickle.dumps(part)) for part in whole.split(count)]
    assert 0 < len(parts) <= count and len(whole._files) == 13
    assert [document for part in parts for document in part] == list(whole)
    assert [source for part in parts for source in part.skipped] == list(whole.skipped) == ["fakelib/m5.py"]
    prints = {json.dumps(part.fingerprint()) for part in parts}
    assert len(prints) == len(parts) and (json.dumps(whole.fingerprint()) in prints) == (count == 1)
    sizes = [sum(path.stat().st_size for _, path in part._files) for part in parts]
    longest = max(path.stat().st_size for _, path in whole._files)
    assert max(sizes) <= sum(sizes) / len(parts) + longest + len(whole._files)


def test_a_fingerprint_changes_with_what_the_documents_depend_on(site):
    write(site, {"other.py": '"""Another."""'})
    before = docstrings(["fakelib"]).fingerprint()
    assert before["packages"] == {"fakelib": "1.0"} and json.loads(json.dumps(before)) == before
    prints = [before, docstrings(["fakelib"], 999).fingerprint(), docstrings(["other"]).fingerprint()]
    prints += [docstrings(names).fingerprint() for names in (["fakelib", "other"], ["other", "fakelib"])]
    metadata = site / "fakelib-1.0.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("Version: 1.0", "Version: 1.1"))
    prints.append(docstrings(["fakelib"]).fingerprint())
    assert prints[-1]["packages"] == {"fakelib": "1.1"}
    (site / "fakelib" / "new.py").write_text("")
    prints.append(docstrings(["fakelib"]).fingerprint())
    (site / "fakelib" / "new.py").write_text("1")
    prints.append(docstrings(["fakelib"]).fingerprint())
    assert len({json.dumps(each) for each in prints}) == len(prints)
    assert docstrings(["fakelib"]).fingerprint() == prints[-1]


def test_versions_are_asked_by_the_names_that_pip_knows():
    found = docstrings(["sklearn", "json"]).fingerprint()["packages"]
    assert found == {"sklearn": importlib.metadata.version("scikit-learn"), "json": None}
    assert set(docstrings().fingerprint()["packages"].values()) & {None} == set()


def test_a_default_package_may_be_missing_but_not_all(site, monkeypatch):
    monkeypatch.setattr(docstrings_module, "PACKAGES", {"nowhere": "nowhere-python", "fakelib": "fakelib"})
    assert docstrings().packages == ["fakelib"]
    assert docstrings().fingerprint() == docstrings(["fakelib"]).fingerprint()
    monkeypatch.setattr(docstrings_module, "PACKAGES", {"nowhere": "nowhere-python"})
    with pytest.raises(ModuleNotFoundError, match="nowhere: no Python files here, try: pip install nowhere-python"):
        docstrings()


@pytest.mark.parametrize(
    ("packages", "error", "complaint"),
    [
        (["fakelib", "nowhere", "gone"], ModuleNotFoundError, "nowhere, gone: no Python files here, try: pip install"),
        (["sys"], ModuleNotFoundError, "sys: no Python files here"),
        (["fakelib.deep"], ValueError, "package 'fakelib.deep' is not a name to import: pass the outermost one"),
        (["scikit-learn"], ValueError, "package 'scikit-learn' is not a name to import"),
        ([""], ValueError, "package '' is not a name to import"),
        ([], ValueError, "packages [] is no list of names: pass e.g. ['numpy'], or None"),
        ("fakelib", ValueError, "packages 'fakelib' is no list of names"),
    ],
)
def test_bad_names_are_met_at_the_door_and_import_nothing(site, packages, error, complaint):
    with pytest.raises(error, match=re.escape(complaint)):
        docstrings(packages)
    assert "fakelib" not in sys.modules


@pytest.mark.parametrize("limit", [0, -3])
def test_a_limit_below_one_is_refused(limit):
    with pytest.raises(ValueError, match=f"min_chars {limit} is less than 1: pass a positive number"):
        docstrings(min_chars=limit)
