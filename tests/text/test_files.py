"""Only what is meant as text gets in, and errors name file, line and mend."""

import gzip
import json
import os
import re
import resource
import signal
import warnings

import pytest

from retro_nb import jsonl, open_corpus, parquet, text_folder
from retro_nb.text.files import write_texts


def titles(corpus) -> list[str]:
    return [document.title for document in corpus]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (".ipynb_checkpoints/a-checkpoint.txt", "hidden"),
        ("deep/.git/HEAD.txt", "hidden"),
        ("._a.txt", "hidden"),
        ("__MACOSX/a.txt", "left by an archiver"),
        ("a.txt~", "an editor's backup"),
        ("#a.txt#", "an editor's backup"),
        ("b.bak", "an editor's backup"),
    ],
)
def test_what_nobody_means_as_text_is_left_out_and_named(tmp_path, name, reason):
    for file in ("a.txt", name):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("The tower stands by the river.")
    with pytest.warns(UserWarning, match=rf"files left out: 1 {reason}"):
        corpus = text_folder(tmp_path, "**/*")
    assert titles(corpus) == ["a"] and len(corpus) == 1


def test_a_hidden_folder_that_is_named_is_read(tmp_path):
    (tmp_path / ".notes").mkdir()
    (tmp_path / ".notes" / "a.txt").write_text("A note.")
    assert titles(text_folder(tmp_path, ".notes/*.txt")) == [".notes/a"]
    (tmp_path / "in" / ".hidden").mkdir(parents=True)
    (tmp_path / "in" / ".hidden" / "inside.txt").write_text("Inside.")
    assert titles(text_folder(tmp_path / "in" / ".hidden")) == ["inside"], "the folder itself may be hidden"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    (tmp_path / "a.txt").write_text("A text.")
    os.mkfifo(tmp_path / "b.txt")
    with pytest.warns(UserWarning, match=r"1 no regular file \('b.txt'\)"):
        assert titles(text_folder(tmp_path)) == ["a"]


def test_one_pattern_lets_in_no_more_than_it_asks_for(tmp_path):
    for name in ("a.txt", ".notes/b.txt", ".git/c.txt", "d.bak"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("A text.")
    with pytest.warns(UserWarning, match=r"1 hidden \('.git/c.txt'\)"):
        assert titles(text_folder(tmp_path, ["**/*.txt", ".notes/*.txt"])) == [".notes/b", "a"]
    assert titles(text_folder(tmp_path, "*.bak")) == ["d"]
    (tmp_path / "...and justice.txt").write_text("For all.")
    with pytest.warns(UserWarning, match="2 hidden"):
        assert titles(text_folder(tmp_path)) == ["...and justice", "a"]


@pytest.mark.parametrize(
    "data", [b"hello\0", b"abc\0" * 20, b"one\0two\0six\0ten\0", b"key\0value\0", b"\0hello", b"\0"]
)
def test_a_text_with_a_few_nuls_is_no_utf_16(tmp_path, data):
    (tmp_path / "a.txt").write_bytes(data)
    (document,) = text_folder(tmp_path, encoding=None)
    assert document.text == data.decode().replace("\0", "\ufffd") and document.replaced == data.count(0)


@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be"])
def test_utf_16_without_a_mark_is_found_out_or_counted(tmp_path, codec):
    text = "The tower stands by the river.\nNaïve façades, too. " * 20
    (tmp_path / "a.txt").write_bytes(text.encode(codec))
    (found,) = text_folder(tmp_path, encoding=None)
    assert (found.text, found.replaced) == (text, 0)
    (wrong,) = text_folder(tmp_path)
    assert "\0" not in wrong.text and wrong.replaced >= len(text) - 4


def test_packed_lines_and_endings_in_capitals_are_read(tmp_path):
    lines = "".join(json.dumps({"text": f"Text {number}."}) + "\n" for number in range(5))
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "A.JSONL").write_text(lines)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(lines)
    expected = [document.text for document in jsonl(tmp_path / "a.jsonl")]
    for name in ("A.JSONL", "b.jsonl.gz"):
        corpus = open_corpus(str(tmp_path / name))
        assert [document.text for document in corpus] == expected
        parts = corpus.split(3)
        assert [document.text for part in parts for document in part] == expected


def test_a_null_is_an_empty_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": null, "title": "nothing"}\n{"text": "Something."}\n')
    assert [(each.title, each.text) for each in jsonl(tmp_path / "a.jsonl")] == [
        ("nothing", ""),
        ("line 2", "Something."),
    ]


@pytest.mark.parametrize("line", ["[" * 100_000, '{"text": ' + "9" * 5000 + "}"])
def test_json_that_python_cannot_hold_names_file_and_line(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"text": "Fine."}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: not valid JSON"):
        list(jsonl(tmp_path / "a.jsonl"))


def test_a_folder_named_like_a_corpus_is_not_passed_over_silently(tmp_path, monkeypatch):
    (tmp_path / "almanac").mkdir()
    (tmp_path / "almanac" / "a.txt").write_text("My own text.")
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match=r"'./almanac' for the folder"):
        open_corpus("almanac")
    assert titles(open_corpus("./almanac")) == ["a"]


@pytest.mark.parametrize("cut", [40, -12])
def test_a_packed_file_that_was_cut_is_named(tmp_path, cut):
    lines = "".join(json.dumps({"text": f"Text {number} of a tower."}) + "\n" for number in range(500))
    whole = gzip.compress(lines.encode())
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:cut])
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz, after line \d+: damaged or cut"):
        list(jsonl(tmp_path / "a.jsonl.gz"))


@pytest.mark.parametrize(
    "names",
    [
        ("train-00000-of-00001", "test-00000-of-00001"),
        ("train/0", "validation/0"),
        ("train-00000-of-00001-2a1df75c6bce91ab", "test-00000-of-00001-aabbccdd"),
        ("partial-train/0000", "partial-test/0000"),
        ("Train", "test_0"),
    ],
)
def test_splits_do_not_get_into_one_database(tmp_path, names):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"text": ["One.", "Two."]})
    for name in names:
        path = tmp_path / "data" / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path)
    with pytest.raises(ValueError, match=r"files of the splits test, train|files of the splits train, validation"):
        parquet(tmp_path)
    (tmp_path / "data" / f"{names[1]}.parquet").unlink()
    assert len(parquet(tmp_path)) == 2


def test_names_that_only_look_like_splits_are_read(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name in ("training", "latest", "dev/a", "test/b"):
        path = tmp_path / f"{name}.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"text": ["One."]}), path)
    assert len(parquet(tmp_path)) == 4


def write(folder, *names) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("The tower stands by the river.")


def test_a_folders_other_files_are_counted_by_their_endings(tmp_path):
    write(tmp_path, "a.txt", "B.TXT", "c.Md", "d.pdf", "e.PDF", "LICENSE", "deep/f.r\x1b[31mst", ".git/g")
    with pytest.warns(UserWarning) as warned:
        assert titles(text_folder(tmp_path)) == ["B", "a", "c"]
    (line,) = (str(each.message) for each in warned)
    for part in ("2 .pdf ('d.pdf', …)", "1 without an ending ('LICENSE')", "1 hidden ('.git/g')", r"1 .r\x1b[31mst"):
        assert part in line
    assert "\x1b" not in line and "\n" not in line
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert titles(text_folder(tmp_path, "*.pdf")) == ["d"], "who names a pattern has chosen"


def test_installed_libraries_and_links_to_folders_are_left_out_and_named(tmp_path):
    write(tmp_path, "mine/a.txt", "mine/node_modules/left-pad/README.md", "mine/venv/site-packages/x/top_level.txt")
    write(tmp_path, "elsewhere/b.txt")
    (tmp_path / "mine" / "more").symlink_to(tmp_path / "elsewhere")
    with pytest.warns(UserWarning, match=r"2 of an installed library .*1 a link to a folder \('more'\)"):
        assert titles(text_folder(tmp_path / "mine")) == ["a"]


def test_a_folder_without_texts_says_what_it_has(tmp_path):
    write(tmp_path, "a.jsonl", "b.jsonl", "c.csv")
    with pytest.raises(FileNotFoundError, match=r"it has 2 \.jsonl \('a\.jsonl', …\), 1 \.csv"):
        open_corpus(tmp_path)


@pytest.mark.parametrize("names", [("train/a.txt", "test/b.txt"), ("train.txt", "valid.txt", "test.txt")])
def test_texts_of_several_splits_are_not_read_silently(tmp_path, names):
    write(tmp_path, *names)
    with pytest.warns(UserWarning, match="files of the splits test, train"):
        assert len(text_folder(tmp_path)) == len(names)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(text_folder(tmp_path, "**/*.txt")) == len(names), "who names a pattern has chosen"
        write(tmp_path / "other", "training/a.txt", "test/b.txt", "dev/c.txt")
        assert len(text_folder(tmp_path / "other")) == 3


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl.gz", b'{"text": "Not packed."}\n', "is not packed by gzip"),
        ("a.jsonl.gz", b"", "is not packed by gzip"),
        ("a.jsonl", '{"text": "One."}\n'.encode("utf-16"), "is UTF-16: convert it to UTF-8"),
        ("a.jsonl", b'{"text": 5}\n', r"line 1: no text under 'text', but 5 \(int\)"),
        ("a.csv", b"text\none\n", r"convert it"),
        ("a.txt", b"one", "pass the folder that holds it"),
    ],
)
def test_a_file_of_another_kind_than_its_name_is_refused(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises((ValueError, NotADirectoryError), match=rf"{re.escape(name)}.*{message}"):
        list(open_corpus(tmp_path / name))


def write_texts_on_full_disk(folder, text):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    with pytest.raises(OSError, match=r"could not write .*b\.txt: File too large"):
        write_texts({"a": "short", "b": text}, folder)


def test_a_full_disk_leaves_no_half_text(tmp_path, run_apart):
    write_texts({"b": "before"}, tmp_path)
    assert run_apart(write_texts_on_full_disk, tmp_path, "long " * 100) == [0]
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.txt": "short", "b.txt": "before"}


@pytest.mark.parametrize("glob", ["", "/etc/*.txt", "**a/*.txt", ["*.txt", ""]])
def test_a_glob_that_is_none_is_named(tmp_path, glob):
    write(tmp_path, "in/a.txt")
    with pytest.raises(ValueError, match=r"^glob '.*' is no pattern of files in .*in \(.*pass e\.g\."):
        text_folder(tmp_path / "in", glob)
    with pytest.raises(ValueError, match=r"^glob"):
        open_corpus(tmp_path / "in", glob=glob)
