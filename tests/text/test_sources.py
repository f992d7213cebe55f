"""Source code of installed libraries: which files, once each, how they are read, whose they are."""

import importlib.metadata
import json
import pickle
import re
import sys
from pathlib import Path

import pytest

from retro_nb.text.document import Corpus
from retro_nb.text.sources import code

LINES = "value = 'a line of code'\n" * 20  # 500 bytes


def write(folder: Path, files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def install(site: Path, name: str, files: dict[str, str | bytes], metadata: str = "", **others: str) -> None:
    """A distribution as pip leaves it: files, METADATA and RECORD."""
    about = site / f"{name}-1.0.dist-info"
    write(site, files)
    write(about, {"METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{metadata}"} | others)
    write(about, {"RECORD": "".join(f"{file},,\n" for file in files)})


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    """A folder with two installed libraries in it, the only ones."""
    install(tmp_path, "Fake-Lib", {"fakelib/__init__.py": LINES, "fakelib/deep/_shapes.py": f"# shapes\n{LINES}"})
    install(tmp_path, "alone", {"alone.py": f"# alone\n{LINES}"}, "License-Expression: MIT")
    monkeypatch.syspath_prepend(tmp_path)
    found = importlib.metadata.distributions
    monkeypatch.setattr("retro_nb.text.sources.distributions", lambda: found(path=[str(tmp_path)]))
    return tmp_path


def sources(corpus: code) -> list[str]:
    return [document.source for document in corpus]


def test_a_document_is_a_file(site):
    before = set(sys.modules)
    documents = list(code())
    assert [document.title for document in documents] == ["alone", "fakelib", "fakelib.deep._shapes"]
    assert sources(code()) == ["alone.py", "fakelib/__init__.py", "fakelib/deep/_shapes.py"]
    assert all(document.text == (site / document.source).read_text() for document in documents)
    assert isinstance(code(), Corpus) and list(code()) == documents and set(sys.modules) == before


def test_order_is_that_of_the_packages_given(site):
    assert sources(code(["fakelib", "alone"])) == ["fakelib/__init__.py", "fakelib/deep/_shapes.py", "alone.py"]


def test_sizes_are_limited_both_ends_included(site):
    sizes = {"a.py": 399, "b.py": 400, "c.py": 600, "d.py": 601}
    write(site / "fakelib" / "sized", {name: name * 200 for name in sizes})
    for name, size in sizes.items():
        (site / "fakelib" / "sized" / name).write_text(f"{name:<{size}}")
    found = sources(code(["fakelib"], max_bytes=600))
    assert [name for name in found if "sized" in name] == ["fakelib/sized/b.py", "fakelib/sized/c.py"]


def test_tests_and_copies_of_other_projects_are_left_out(site):
    own = ["attesting.py", "sub/latest.py"]
    other = ["tests/a.py", "_testing.py", "conftest.py", "test_a.py", "_vendor/a.py", "thirdparty_files/a.py"]
    write(site / "fakelib", {name: f"# {name}\n{LINES}" for name in [*own, *other]})
    found = sources(code(["fakelib"]))
    assert found == sorted(f"fakelib/{name}" for name in ["__init__.py", "deep/_shapes.py", *own])


def test_each_content_comes_once(site):
    write(site / "fakelib", {"again.py": LINES, "zz.py": LINES, "other.py": f"{LINES}\n"})
    corpus = code()
    assert "fakelib/again.py" not in sources(corpus) and "fakelib/other.py" in sources(corpus)
    copies = {f"fakelib/{name}.py": "a copy of fakelib/__init__.py" for name in ("again", "zz")}
    assert corpus.skipped == copies


def test_files_are_read_as_python_reads_them(site):
    text = f"name = 'é'\n{LINES}"
    files = {
        "latin.py": f"# coding: latin-1\n{text}".encode("latin-1"),
        "mark.py": b"\xef\xbb\xbf" + text.encode(),
        "dos.py": f"# dos\n{text}".replace("\n", "\r\n").encode(),
    }
    bad = {"bytes.py": text.encode("latin-1"), "codec.py": f"# coding: no-such-codec\n{text}".encode()}
    write(site / "fakelib" / "read", files | bad)
    corpus = code(["fakelib"])
    read = {document.source.rpartition("/")[2]: document.text for document in corpus}
    assert read["latin.py"] == f"# coding: latin-1\n{text}" and read["mark.py"] == text
    assert read["dos.py"] == f"# dos\n{text}"
    assert sorted(corpus.skipped) == [f"fakelib/read/{name}" for name in bad] and all(corpus.skipped.values())


def test_projects_under_development_are_not_installed_libraries(site):
    origin = json.dumps({"url": "file:///here", "dir_info": {"editable": True}})
    install(site, "mine", {"mine.py": LINES.replace("a", "b")}, **{"direct_url.json": origin})
    install(site, "fixed", {"fixed.py": LINES.replace("a", "c")}, **{"direct_url.json": '{"url": "file:///there"}'})
    assert code().packages == ["alone", "fakelib", "fixed"]
    # What setuptools leaves in the project's folder, which is on the path when its tests run.
    write(site / "mine.egg-info", {"PKG-INFO": "Metadata-Version: 2.1\nName: mine\n", "SOURCES.txt": "mine.py\n"})
    assert code().packages == ["alone", "fakelib", "fixed"]


def test_licences_are_those_of_the_metadata(site):
    text = "License: BSD 3-Clause License\n        All rights\n        reserved\n"
    install(site, "long", {"long.py": LINES.replace("a", "b")}, text)
    classified = "License: a\nClassifier: Topic :: Text\nClassifier: License :: OSI Approved :: MIT License"
    install(site, "classified", {"classified.py": LINES.replace("a", "c")}, classified)
    assert code().licences() == {
        "alone 1.0": "MIT",
        "classified 1.0": "MIT License",
        "Fake-Lib 1.0": "not stated",
        "long 1.0": "BSD 3-Clause License",
    }
    assert code(["alone"]).licences() == {"alone 1.0": "MIT"}


def test_a_namespace_has_several_owners(site):
    install(site, "part-one", {"shared/one/a.py": LINES.replace("a", "b")}, "License-Expression: MIT")
    install(site, "part-two", {"shared/two/a.py": LINES.replace("a", "c")}, "License-Expression: BSD-3-Clause")
    corpus = code(["shared"])
    assert sources(corpus) == ["shared/one/a.py", "shared/two/a.py"]
    assert corpus.licences() == {"part-one 1.0": "MIT", "part-two 1.0": "BSD-3-Clause"}


@pytest.mark.parametrize("count", [1, 2, 3, 99])
def test_a_corpus_is_its_parts(site, count):
    write(site / "fakelib", {f"m{n}.py": f"# {n}\n{LINES * n}" for n in range(1, 9)} | {"m9.py": f"# 1\n{LINES}"})
    write(site / "fakelib", {"bad.py": LINES.encode() + b"\xff"})
    whole = code()
    parts = [pickle.loads(pickle.dumps(part)) for part in whole.split(count)]
    assert 0 < len(parts) <= count
    assert [document for part in parts for document in part] == list(whole)
    assert [source for part in parts for source in part.skipped] == ["fakelib/bad.py"]
    prints = {json.dumps(part.fingerprint()) for part in parts}
    assert len(prints) == len(parts) and (json.dumps(whole.fingerprint()) in prints) == (count == 1)


def test_a_fingerprint_changes_with_what_the_documents_depend_on(site):
    before = code().fingerprint()
    assert json.loads(json.dumps(before)) == before == code().fingerprint()
    assert before["packages"] == {"alone": ["1.0"], "fakelib": ["1.0"]}
    prints = [
        before,
        code(["fakelib"]).fingerprint(),
        code(min_bytes=1).fingerprint(),
        code(max_bytes=999).fingerprint(),
    ]
    (site / "fakelib" / "new.py").write_text(f"# new\n{LINES}")
    prints.append(code().fingerprint())
    metadata = site / "alone-1.0.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("Version: 1.0", "Version: 1.1"))
    prints.append(code().fingerprint())
    assert len({json.dumps(each) for each in prints}) == len(prints)


def test_real_ones():
    import six  # noqa: F401  once imported, it says that it is a package without a folder

    corpus = code(["einops", "six"])
    documents = {document.title: document.text for document in corpus}
    assert "einops" in documents and "six" in documents and not corpus.skipped
    assert "\ndef rearrange(" in documents["einops.einops"]
    assert set(corpus.licences().values()) == {"MIT License"}
    assert corpus.packages == ["einops", "six"] and "retro_nb" not in code().packages


@pytest.mark.parametrize(
    ("options", "error", "complaint"),
    [
        ({"packages": ["fakelib", "nowhere"]}, ModuleNotFoundError, "nowhere: no Python files here"),
        ({"packages": ["fakelib.deep"]}, ValueError, "package 'fakelib.deep' is not a name to import"),
        ({"packages": "fakelib"}, ValueError, "packages 'fakelib' is no list of names"),
        ({"packages": []}, ValueError, "packages [] is no list of names"),
        ({"min_bytes": 0}, ValueError, "sizes from 0 to 120000 bytes leave no file"),
        ({"min_bytes": 9, "max_bytes": 8}, ValueError, "sizes from 9 to 8 bytes leave no file"),
    ],
)
def test_bad_arguments_are_refused(site, options, error, complaint):
    with pytest.raises(error, match=re.escape(complaint)):
        code(**options)
