"""experiments/evidence.py: which facts of an almanac are measured."""

import importlib

import numpy as np
import pytest

from retro_nb.common.arrays import ROOT

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
