"""What people name: every kind of corpus by its name or path, bad names, and where the files of each go."""

import hashlib
import json
import re
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retro_nb import Document, almanac, code, docstrings, hf_dataset, jsonl, parquet, speeches, text_folder
from retro_nb.common.arrays import WORK
from retro_nb.lab.commands import choose_corpus, choose_settings
from retro_nb.text.opening import NAMED, as_corpus, open_corpus, recognise

RUSSIAN = "Ночью шёл снег, и к утру вся деревня стала белой; дети побежали к реке, а старики затопили печи.\n"


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A working directory with one of everything that has a path."""
    monkeypatch.chdir(tmp_path)
    for name in ("texts/a.txt", "texts/b.md", "texts/c.rst", "mixed/a.txt", "mixed/README.md", "state/a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "state" / "state.json").write_text("{}")  # not one that save_to_disk left
    (tmp_path / "my.jsonl").write_text('{"text": "line", "body": "other"}\n')
    table = pa.table({"text": ["row"], "body": ["other"]})
    for name in ("my.parquet", "tables/deep/my.parquet", "tables/README.md", "mixed/my.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        pq.write_table(table, name) if name.endswith("parquet") else (tmp_path / name).write_text("of a table")
    datasets.Dataset.from_dict({"text": ["saved"], "body": ["other"]}).save_to_disk("saved")
    return tmp_path


def texts(corpus) -> list[str]:
    return [document.text for document in corpus]


@pytest.mark.parametrize("name", NAMED)
def test_names_mean_the_corpora_without_a_path(name, place):
    made = {"speeches": speeches(), "almanac": almanac(), "docstrings": docstrings(), "code": code()}[name]
    (place / name).mkdir()  # a folder called so is ./name
    (place / name / "own.txt").write_text("own")
    assert type(open_corpus(name)) is type(made) and open_corpus(name).fingerprint() == made.fingerprint()
    assert texts(open_corpus(f"./{name}")) == texts(open_corpus(Path(name))) == ["own"]


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize(
    ("where", "options", "reader", "expected"),
    [
        ("texts", {}, text_folder, ["texts/a.txt", "texts/b.md"]),
        ("texts/", {"glob": "**/*.txt"}, text_folder, ["texts/a.txt"]),
        ("texts", {"glob": ["*.rst", "*.txt"]}, text_folder, ["texts/a.txt", "texts/c.rst"]),
        ("state", {}, text_folder, ["state/a.txt"]),
        ("my.jsonl", {}, jsonl, ["line"]),
        ("my.jsonl", {"text_field": "body"}, jsonl, ["other"]),
        ("my.jsonl", {"glob": "*.txt"}, jsonl, ["line"]),
        ("my.parquet", {}, parquet, ["row"]),
        ("tables", {}, parquet, ["row"]),
        ("tables", {"glob": "**/*.txt"}, parquet, ["row"]),
        ("tables", {"glob": "*.md"}, text_folder, ["of a table"]),
        ("tables", {"text_field": "body"}, parquet, ["other"]),
        ("mixed", {}, parquet, ["row"]),
        ("mixed", {"glob": "**/*.txt"}, text_folder, ["mixed/a.txt"]),
        ("saved", {}, hf_dataset, ["saved"]),
        ("saved", {"text_field": "body", "glob": "**/*.txt"}, hf_dataset, ["other"]),
    ],
)  # fmt: skip
def test_paths_are_recognised_by_what_they_hold(place, kind, where, options, reader, expected):
    corpus = open_corpus(kind(where), **options)
    assert type(corpus) is reader and texts(corpus) == expected
    assert texts(recognise(place / where, **options)()) == expected


def test_an_encoding_reaches_the_texts(place):
    (place / "texts" / "a.txt").write_bytes(RUSSIAN.encode("cp1251"))
    for encoding in ("cp1251", None):
        assert texts(open_corpus("texts", glob="*.txt", encoding=encoding)) == [RUSSIAN]


def test_a_corpus_is_itself():
    for corpus in (speeches(2), [Document("a", "a", "a")], iter([])):
        assert open_corpus(corpus) is open_corpus(corpus, glob="*.txt", encoding="utf-8", text_field="text") is corpus


@pytest.mark.parametrize(("where", "options"), [("hf:user/some", {}), ("hf:user/some:small", {"name": "small"})])
def test_a_hub_name_is_streamed_and_not_asked_for_before_it_is_opened(monkeypatch, where, options):
    asked = []

    def load_dataset(path, **options):
        asked.append((path, options))
        return datasets.Dataset.from_dict({"body": ["from the hub"]}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    opening = recognise(where, text_field="body")
    assert not asked and texts(opening()) == ["from the hub"]
    assert asked == [("user/some", {"split": "train", "streaming": True} | options)]


@pytest.mark.parametrize(
    ("where", "options", "error", "message"),
    [
        ("speach", {}, FileNotFoundError, "corpus 'speach' is no folder, no .jsonl or .parquet file, nor hf:NAME or"),
        ("speach", {}, FileNotFoundError, "or speeches or almanac or docstrings or code (did you mean speeches?)"),
        ("nowhere/at/all", {}, FileNotFoundError, "corpus 'nowhere/at/all' is no folder"),
        ("nowhere.jsonl", {}, FileNotFoundError, "nowhere.jsonl is not a file"),
        ("nowhere.parquet", {}, FileNotFoundError, "nowhere.parquet is no .parquet file"),
        ("texts/a.txt", {}, NotADirectoryError, "texts/a.txt is a file, neither .jsonl nor .parquet: pass the folder"),
        ("texts", {"glob": "*.x"}, FileNotFoundError, "no file in texts matches glob '*.x'"),
        ("texts", {"text_field": "body"}, ValueError, "text_field is 'body', but corpus texts has only encoding"),
        ("my.jsonl", {"encoding": None}, ValueError, "encoding is None, but corpus my.jsonl has only text_field and"),
        ("almanac", {"encoding": "cp1251"}, ValueError, "encoding is 'cp1251', but corpus almanac has no such options"),
        ("hf:x", {"encoding": "cp1251"}, ValueError, "encoding is 'cp1251', but corpus hf:x has only text_field and"),
        ("hf:", {}, FileNotFoundError, "corpus 'hf:' names no dataset: pass e.g. hf:user/name"),
        ("texts", {"enc": "cp1251"}, ValueError, "unknown option 'enc': open_corpus knows glob, encoding, text_field"),
        ("hf:somebody/nothing", {}, ConnectionError, "set HF_HUB_OFFLINE=0"),
    ],
)
def test_bad_names_and_options_are_met_at_the_door(place, where, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        open_corpus(where, **options)


# where the files go


def folder(kind: str, described: object) -> Path:
    return WORK / f"{kind}-{hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:10]}"


def test_each_path_has_a_folder_of_its_own_whatever_is_in_it(place):
    """The first three as before there were others, so that what was built then is found."""
    root = str(place.resolve())
    glob = "**/*.txt"
    assert as_corpus("texts")[1] == folder("text_folder", [f"{root}/texts", glob])
    assert as_corpus(Path("texts"), "*.md")[1] == folder("text_folder", [f"{root}/texts", "*.md"])
    assert as_corpus("my.jsonl")[1] == folder("jsonl", [f"{root}/my.jsonl", glob])
    assert as_corpus("my.parquet")[1] == folder("parquet", [f"{root}/my.parquet", glob])
    assert as_corpus(speeches(3))[1] == folder("speeches", speeches(3).fingerprint())
    assert as_corpus("almanac")[1] == as_corpus(almanac())[1] == folder("almanac", almanac().fingerprint())
    assert as_corpus([Document("a", "a", "a")])[1] is None
    before = as_corpus("texts")[1]
    (place / "texts" / "a.txt").write_text("changed")
    assert as_corpus("texts", encoding="utf-8")[1] == before != as_corpus("texts", encoding=None)[1]
    usual = {"text_field": "text", "title_field": "title"}
    assert as_corpus("my.jsonl", **usual)[1] == as_corpus("my.jsonl")[1] != as_corpus("my.jsonl", text_field="body")[1]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"corpus": "my.parquet"}, ["row"]),
        ({"corpus": "my.parquet", "text_field": "body"}, ["other"]),
        ({"corpus": "tables/"}, ["row"]),
        ({"corpus": "saved"}, ["saved"]),
        ({"corpus": "texts", "encoding": "null"}, ["texts/a.txt", "texts/b.md"]),
        ({"corpus": "texts", "glob": "*.txt"}, ["texts/a.txt"]),
        ({"corpus": "texts", "glob": '["*.txt", "*.md"]'}, ["texts/a.txt", "texts/b.md"]),
        ({"corpus": "texts", "glob": "*.md"}, ["texts/b.md"]),
        ({"corpus": "almanac", "towns": "2"}, texts(almanac(2))),
    ],
)
def test_the_commands_name_corpora_the_same_way(place, given, expected):
    corpus, work_dir = choose_corpus(choose_settings("build", given=given))
    assert texts(corpus) == expected and work_dir.parent == WORK
    assert choose_corpus(choose_settings("build", given=given | {"work_dir": "mine"}))[1] == Path("mine")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"corpus": "my.jsonl", "encoding": "cp1251"}, "encoding is 'cp1251', but corpus my.jsonl has only text_field"),
        ({"corpus": "speeches", "text_field": "body"}, "text_field is 'body', but corpus speeches has no such options"),
        ({"corpus": "my.parquet", "towns": "3"}, "towns is 3, but corpus my.parquet has none: only almanac has"),
    ],
)
def test_settings_of_another_corpus_are_refused(place, given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        choose_settings("build", given=given)


def test_a_hub_name_is_a_setting(monkeypatch):
    rows = datasets.Dataset.from_dict({"text": ["from the hub"]})
    settings = choose_settings("build", given={"corpus": "hf:wikitext:wikitext-2-raw-v1"})  # asks no network
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: rows.to_iterable_dataset())
    corpus, work_dir = choose_corpus(settings)
    assert texts(corpus) == ["from the hub"] and corpus.fingerprint()["options"] == {"name": "wikitext-2-raw-v1"}
    assert work_dir == folder("hf_dataset", corpus.fingerprint())


@pytest.mark.parametrize("where", [None, 5, b"texts", ["one text", "another"], [("text", "title")]])
def test_what_is_no_corpus_is_refused_at_the_door(where):
    with pytest.raises(TypeError, match=r"^corpus .* is a \w+( of \w+)?: pass a name, a path, or Document"):
        open_corpus(where)
