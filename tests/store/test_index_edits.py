"""An index and neighbours are edited to what filling and searching anew give."""

import faiss
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retro_nb.store.index import build_index, exact_search, innermost
from retro_nb.store.index_edits import comparing_pays, edit_lists, list_entries, may_be_nearer, renumber

faiss.omp_set_num_threads(1)


# an inverted file


def lists_of(index) -> list[tuple[list[int], bytes]]:
    inner = innermost(index)
    entries = (list_entries(inner.invlists, number, inner.code_size) for number in range(inner.nlist))
    return [(ids.tolist(), codes.tobytes()) for ids, codes in entries]


@pytest.mark.parametrize("spec", ["IVF8,Flat", "IVF8,SQ8", "IVF4,PQ4", "OPQ4,IVF4,PQ4", "IVF8_HNSW4,Flat"])
@pytest.mark.parametrize("seed", [0, 1])
def test_edited_lists_are_those_that_filling_gives(spec, seed):
    rng = np.random.default_rng(seed)
    old, new = (rng.normal(size=(count, 8)).astype(np.float32) for count in (600, 500))
    was = np.full(500, -1)
    was[np.sort(rng.choice(500, 300, replace=False))] = np.sort(rng.choice(600, 300, replace=False))
    if seed:
        was[:] = np.where(was < 300, was, -1)  # none of the last ones stays
    new[was >= 0] = old[was[was >= 0]]
    edited = build_index(old, spec)
    filled = faiss.clone_index(edited)
    edit_lists(edited, was, new)
    filled.reset()
    filled.add(new)
    assert edited.ntotal == filled.ntotal == innermost(edited).ntotal == 500
    assert lists_of(edited) == lists_of(filled)
    queries = rng.normal(size=(50, 8)).astype(np.float32)
    for ours, theirs in zip(edited.search(queries, 5), filled.search(queries, 5), strict=True):
        assert (ours == theirs).all()
    edit_lists(edited, np.arange(500)[::2], new[::2])  # once more
    filled.reset()
    filled.add(new[::2])
    assert lists_of(edited) == lists_of(filled)


# neighbours


@pytest.mark.parametrize("seed", range(4))
def test_rounding_hides_no_nearer_chunk(seed):
    """Vectors far from the origin, almost as near to one another as float32 can tell: an exact search of all gives an
    added chunk only to those who were said to be in its reach."""
    rng = np.random.default_rng(seed)
    centre = 3 * rng.normal(size=384)
    vectors = centre + rng.choice([0.3, 0.003, 0.00003]) * rng.normal(size=(40, 384))
    vectors = np.repeat(vectors, 25, axis=0) * (1 + 3e-7 * rng.normal(size=(1000, 1)))
    vectors = rng.permutation(vectors).astype(np.float32)
    kept, added = np.arange(0, 700), np.arange(700, 1000)
    own = np.stack([np.arange(1000), np.arange(1, 1001)], axis=1)
    before = exact_search(vectors[:700], vectors[:700], 5, own=own[:700])[1].astype(np.int32)
    after = exact_search(vectors, vectors[:700], 5, own=own[:700])[1]
    found = np.concatenate([before, np.full((300, 5), -1, np.int32)])
    flagged = may_be_nearer(vectors, found, kept, added)
    assert flagged[(after >= 700).any(axis=1)].all() and (after >= 700).any()


def test_to_those_that_have_too_few_neighbours_any_chunk_is_near():
    vectors = np.array([[0], [1], [100]], np.float32)
    for found, near in (([[1, -1], [0, -1]], [True, True]), ([[0, 1], [0, 1]], [False, False])):
        found = np.array([*found, [-1, -1]], np.int32)
        assert may_be_nearer(vectors, found, np.arange(2), np.array([2])).tolist() == near
        assert not may_be_nearer(vectors, found, np.arange(2), np.arange(0)).any(), "nothing came"


@given(st.data())
def test_neighbours_are_renumbered_and_losses_known(data):
    """Against a dictionary."""
    before = np.array(data.draw(st.lists(st.lists(st.integers(-1, 5), min_size=2, max_size=2), min_size=6, max_size=6)))
    was = np.array(data.draw(st.lists(st.sampled_from(range(6)), unique=True).map(sorted)) or [-1])
    for _ in range(data.draw(st.integers(0, 3))):
        was = np.insert(was, data.draw(st.integers(0, len(was))), -1)
    found, lost = renumber(before.astype(np.int32), was)
    now = {int(old): new for new, old in enumerate(was) if old >= 0}
    for row, old in enumerate(was.tolist()):
        expected = [now.get(int(each), -1) for each in before[old]] if old >= 0 else [-1, -1]
        assert found[row].tolist() == expected
        assert lost[row] == (old >= 0 and any(each >= 0 and each not in now for each in before[old].tolist()))


def test_chunks_are_compared_where_that_takes_less_than_searching():
    vectors = np.random.default_rng(0).normal(size=(640, 8)).astype(np.float32)
    index = build_index(vectors, "IVF8,Flat")
    index.nprobe = 2
    assert comparing_pays(index, 160) and not comparing_pays(index, 161)
    assert comparing_pays(build_index(vectors, "Flat"), 10**6)
    assert not any(comparing_pays(build_index(vectors, kind), 1) for kind in ("IVF8,SQ8", "HNSW8", "PCA4,IVF8,Flat"))
