"""experiments/evidence.py: which facts of an almanac are measured."""

import importlib

import numpy as np
import pytest

from retro_nb.common.arrays import ROOT
from retro_nb.text.document import Document

pytestmark = pytest.mark.slow

with pytest.MonkeyPatch.context() as patched:
    patched.syspath_prepend(ROOT / "experiments")
    evidence = importlib.import_module("evidence")


@pytest.mark.parametrize("corpus", ["almanac", "unaligned"])
def test_facts_are_measured_where_the_chunk_before_found_the_town_and_unaligned_ones_where_their_word_was_read(
    corpus, tmp_path
):
    recipe = evidence.read_recipe(corpus, {"towns": "40", "keep_out": "0.1"})
    experiment = evidence.Experiment(corpus, recipe, tmp_path)
    chunks, doc_ids = np.load(experiment.store / "chunks.npy"), experiment.doc_ids
    expected = np.zeros_like(experiment.facts)
    for row, column in np.argwhere(np.load(experiment.store / "facts.npy")):
        near = experiment.knns[row - 1, : recipe["knn"]] if row else []
        own_town = [i for i in near if i >= 0 and doc_ids[i] // 2 == doc_ids[row] // 2]
        read = {int(token) for i in near if i >= 0 for token in chunks[i, :-1]}
        continued = [i + 1 for i in near if i >= 0 and i + 1 < len(doc_ids) and doc_ids[i + 1] == doc_ids[i]]
        read |= {int(token) for i in continued for token in chunks[i, :-1]}
        follows = row > 0 and doc_ids[row] == doc_ids[row - 1]
        on_page = corpus == "almanac" or int(chunks[row, column]) in read
        expected[row, column] = follows and bool(own_town) and on_page
    assert np.array_equal(experiment.facts, expected) and expected[experiment.rows].sum() > 20
    assert all(number % 2 for number in experiment.measured)


def test_books_that_are_measured_are_trained_on_in_no_translation_and_found_in_the_others(tmp_path, monkeypatch):
    words = "the king went to the river and the people sang of the sea and the old stone house on the hill".split()

    class Versions(list):
        def fingerprint(self):
            return {"chapters": len(self)}

    def translations(versions):
        rng, chapters = np.random.default_rng(0), Versions()
        for version in ("kjv", "web"):
            for book in range(1, 60):
                chapters.append(
                    Document(" ".join(rng.permutation(words * 8)), f"{book} {version}", f"{version}/{book}/1")
                )
        return chapters

    monkeypatch.setitem(evidence.CORPORA, "translations", translations)
    recipe = evidence.read_recipe("translations", {})
    experiment = evidence.Experiment("translations", recipe, tmp_path)
    books, titles = recipe["keep_out"]["books"], experiment.about["titles"]
    assert [titles[number] for number in experiment.measured] == [f"{book} web" for book in books]
    trained = set(experiment.train.dataset.sequence_documents[experiment.train.indices].tolist())
    assert {titles[number] for number in trained} == {title for title in titles if int(title.split()[0]) not in books}
    near = experiment.knns[experiment.rows, : recipe["knn"]]
    found = {titles[number] for number in experiment.doc_ids[near[near >= 0]].tolist()}
    assert not any(title == f"{book} web" for title in found for book in books)
    assert any(title == f"{book} kjv" for title in found for book in books)
