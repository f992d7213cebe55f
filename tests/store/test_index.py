"""The index against brute force with explicit loops: what is found, what must not be, and what fits where."""

import errno
import re

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_nb.store import index as index_module
from retro_nb.store.index import (
    build_index,
    choose_index,
    empty_index,
    exact_search,
    innermost,
    parse_bytes,
    read_index,
    recall,
    search,
    write_index,
)

faiss.omp_set_num_threads(1)

EXHAUSTIVE = ["Flat", "SQ8", "PQ8", "OPQ8,PQ8", "PCA8,Flat"]
KINDS = [*EXHAUSTIVE, "IVF8,Flat", "IVF8,PQ8", "OPQ8,IVF8,PQ8", "PCA8,IVF4,SQ8", "HNSW16", "PQ8np,RFlat"]


def random_vectors(count: int, dim: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)


def brute_force(vectors, query, k, ranges) -> list[tuple[float, int]]:
    """The k nearest (squared distance, id) in float64, one vector after the other."""
    found = []
    for number, vector in enumerate(np.asarray(vectors, np.float64)):
        if not any(first <= number < stop for first, stop in ranges):
            found.append((sum((a - b) ** 2 for a, b in zip(vector, np.float64(query), strict=True)), number))
    return sorted(found)[:k]


# the search


@st.composite
def searches(draw):
    """Whole numbers, so that distances are exact and ties are frequent."""
    count, k = draw(st.integers(1, 24)), draw(st.integers(1, 30))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    vectors, queries = (rng.integers(-2, 3, (n, 3)).astype(np.float32) for n in (count, draw(st.integers(1, 6))))
    ranges = st.tuples(st.integers(-3, count + 3), st.integers(-3, count + 3))
    exclude = draw(st.lists(ranges, max_size=3))
    own = draw(st.none() | st.lists(ranges, min_size=len(queries), max_size=len(queries)))
    return vectors, queries, k, exclude, own


@pytest.mark.parametrize("find", ["search", "exact_search"])
@settings(deadline=None, max_examples=80)
@given(case=searches(), block=st.integers(1, 30), group=st.integers(1, 6))
def test_flat_search_is_brute_force(find, case, block, group):
    vectors, queries, k, exclude, own = case
    owns = None if own is None else np.array(own, np.int64).reshape(-1, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "BLOCK", block)
        patch.setattr(index_module, "GROUP", group)
        if find == "search":
            distances, ids = search(build_index(vectors, "Flat"), queries, k, exclude=exclude, own=owns)
        else:
            distances, ids = exact_search(vectors, queries, k, exclude=exclude, own=owns)
    assert distances.shape == ids.shape == (len(queries), k)
    for row, query in enumerate(queries):
        ranges = [*exclude, *([own[row]] if own else [])]
        expected = brute_force(vectors, query, k, ranges)  # ties: the lowest id first
        assert list(zip(distances[row].tolist(), ids[row].tolist(), strict=True))[: len(expected)] == expected
        assert (ids[row, len(expected) :] == -1).all() and np.isinf(distances[row, len(expected) :]).all()


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30), group=st.integers(1, 200), seed=st.integers(0, 99)
)
def test_each_query_is_compared_once_with_every_vector_of_other_documents(lengths, group, seed):
    """However the documents are grouped, and whichever of their chunks ask."""
    rng = np.random.default_rng(seed)
    stops = np.cumsum(lengths)
    asking = np.sort(rng.choice(stops[-1], rng.integers(1, stops[-1] + 1), replace=False))
    documents = np.searchsorted(stops, asking, "right")
    own = np.stack([stops[documents] - np.array(lengths)[documents], stops[documents]], axis=1)
    seen = np.zeros((len(asking), stops[-1]), int)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "GROUP", group)
        for rows, stretches in index_module._comparisons(len(asking), int(stops[-1]), [(3, 5)], own):
            for first, stop in stretches:
                seen[rows, first:stop] += 1
    numbers = np.arange(stops[-1])
    others = (numbers < own[:, :1]) | (numbers >= own[:, 1:])
    assert (seen == (others & (numbers != 3) & (numbers != 4))).all()


@pytest.mark.parametrize("k", [1, 7])
def test_so_many_and_wide_vectors_that_faiss_multiplies_matrices(k):
    """Whole numbers, each vector four times; documents of one to 900 chunks."""
    rng = np.random.default_rng(k)
    vectors = np.tile(rng.integers(-2, 3, (600, 256)), (4, 1))
    stops = np.array([1, 2, 40, 300, 301, 1201, 1500, 2380, 2400])
    documents = np.searchsorted(stops, np.arange(2400), "right")
    own = np.stack([np.r_[0, stops[:-1]][documents], stops[documents]], axis=1)
    distances, ids = search(build_index(vectors.astype(np.float32), "Flat"), vectors.astype(np.float32), k, own=own)
    squares = (vectors**2).sum(axis=1)
    every = squares[:, None] + squares - 2 * vectors @ vectors.T
    every[documents[:, None] == documents] = 10**6
    nearest = np.argsort(every, axis=1, kind="stable")[:, :k]
    assert (ids == nearest).all() and (distances == np.take_along_axis(every, nearest, axis=1)).all()


@pytest.mark.parametrize("spec", KINDS)
def test_no_kind_of_index_finds_what_is_excluded(spec):
    vectors = random_vectors(400)
    own = np.repeat([[0, 150], [150, 151], [151, 400]], [30, 1, 9], axis=0)
    rows = np.r_[0:30, 150, 300:309]
    distances, ids = search(build_index(vectors, spec), vectors[rows], 12, exclude=[(20, 170), (390, 500)], own=own)
    for row, (first, stop) in enumerate(own):
        found = ids[row][ids[row] >= 0]
        assert not np.any((found >= first) & (found < stop)) and not np.any((found >= 20) & (found < 170))
        assert not np.any(found >= 390) and len(set(found)) == len(found)
    assert (distances[:, 1:] >= distances[:, :-1]).all()
    assert (np.isinf(distances) == (ids < 0)).all()


@pytest.mark.parametrize("spec", EXHAUSTIVE)
def test_an_exhaustive_index_finds_k_behind_hundreds_of_nearer_excluded_ones(spec):
    vectors = random_vectors(400)
    vectors[:300] = vectors[0] + 0.01 * vectors[:300]
    _, ids = search(build_index(vectors, spec), vectors[:40], 100, exclude=[(0, 300)])
    assert (np.sort(ids, axis=1) == np.arange(300, 400)).all()


def test_search_meets_bad_input_at_the_door():
    index = build_index(random_vectors(5), "Flat")
    with pytest.raises(ValueError, match="k = 0 neighbours: ask for 1 or more"):
        search(index, random_vectors(2), 0)
    with pytest.raises(ValueError, match="queries of width 3 for an index of width 16"):
        search(index, random_vectors(2, 3), 1)
    assert search(index, random_vectors(0), 3)[1].shape == (0, 3)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 999), k=st.integers(1, 8), scale=st.sampled_from([1e-4, 1.0, 1e4]))
def test_recall_is_the_share_of_the_true_neighbours(seed, k, scale):
    rng = np.random.default_rng(seed)
    vectors, queries = scale * random_vectors(40, 4, seed), scale * random_vectors(5, 4, seed + 1)
    truth = np.array([[number for _, number in brute_force(vectors, q, k, [])] for q in queries])
    found = np.stack([rng.permutation(40)[:k] for _ in queries])
    found[0, :] = -1
    shared = sum(len(set(a) & set(b)) for a, b in zip(found.tolist(), truth.tolist(), strict=True))
    assert recall(vectors, queries, found, truth) == pytest.approx(shared / truth.size)


def test_recall_counts_ties_and_the_absence_of_neighbours():
    vectors = np.array([[0], [1], [1], [5]], np.float32)
    query = np.zeros((1, 1), np.float32)
    assert recall(vectors, query, np.array([[0, 2]]), np.array([[0, 1]])) == 1
    assert recall(vectors, query, np.array([[0, 3]]), np.array([[0, 1]])) == 0.5
    assert recall(vectors, query, np.array([[3, -1]]), np.array([[-1, -1]])) == 1


# the choice and the building


@pytest.mark.parametrize(
    ("size", "expected"),
    [("100m", 100 * 2**20), ("1G", 2**30), ("1.5 kB", 1536), ("7", 7), ("2T", 2**41), (4096, 4096), (None, None)],
)
def test_sizes_in_bytes(size, expected):
    assert parse_bytes(size) == expected


@pytest.mark.parametrize("nonsense", ["", "lots", "100x", "-1m", "1GG", "m"])
def test_nonsense_sizes(nonsense):
    with pytest.raises(ValueError, match="is not a size in bytes: write e"):
        parse_bytes(nonsense)


def test_the_ladder_of_indices():
    assert choose_index(1, 384) == choose_index(100_000, 384) == "Flat"
    assert choose_index(100_001, 384) == "IVF1024,Flat" and choose_index(1_000_000, 384) == "IVF4096,Flat"
    gigabytes = [(1.6, "Flat"), (0.5, "SQ8"), (0.2, "PQ96"), (0.08, "PQ48")]
    assert [choose_index(1_000_000, 384, int(g * 1e9)) for g, _ in gigabytes] == [
        f"IVF4096,{kind}" for _, kind in gigabytes
    ]
    with pytest.raises(
        ValueError, match=r"need 62\d{6} bytes in the smallest index, IVF4096,PQ48, but 1000 are allowed"
    ):
        choose_index(1_000_000, 384, 1000)
    with pytest.raises(ValueError, match="smallest index, Flat, but 100 are"):
        choose_index(3, 6, 100)


@settings(deadline=None, max_examples=60)
@given(count=st.integers(1, 10**7), dim=st.integers(1, 800), smaller=st.floats(0, 1))
def test_less_memory_never_gives_a_larger_index(count, dim, smaller):
    kinds = ["Flat", "IVF,Flat", "IVF,SQ8", f"IVF,PQ{dim // 4}", f"IVF,PQ{dim // 8}"]

    def rung(limit):
        head, _, tail = choose_index(count, dim, limit).partition(",")
        return kinds.index(f"IVF,{tail}" if tail else head)

    limit = int(count * dim * 5 * smaller)
    try:
        assert rung(limit) >= rung(2 * limit) >= rung(None)
    except ValueError as error:
        assert "raise max_index_memory_usage" in str(error)


@pytest.mark.parametrize("limit", [None, 110_000, 60_000, 40_000])
def test_an_index_takes_no_more_than_it_is_allowed(limit, tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "FLAT_LIMIT", 1000)
    spec = choose_index(1500, 16, limit)
    write_index(build_index(random_vectors(1500), spec), tmp_path / "index")
    size = (tmp_path / "index").stat().st_size
    assert size <= (limit or 150_000)
    with pytest.raises(ValueError):
        choose_index(1500, 16, 10_000)


@pytest.mark.parametrize(
    ("spec", "count", "reason"),
    [
        ("IVF1024,Flat", 3, "an IVFn index needs n vectors to train on"),
        ("PQ8", 10, "a PQ one 256"),
        ("IVF0,Flat", 300, "use 'Flat' for a small corpus"),
    ],
)
def test_an_index_that_cannot_be_made(spec, count, reason):
    with pytest.raises(
        ValueError, match=f"(?s)cannot make the index '{spec}' from {count} vectors of width 16.*{reason}"
    ):
        build_index(random_vectors(count), spec)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("PQ7", "multiple of the number of subquantizers"),
        ("nonsense", "could not parse index string nonsense"),
        *((spec, "cannot leave documents out of a search") for spec in (
            "IVF8,LSQ2x8", "IVF8,RQ2x8", "IVF8,PRQ2x2x8", "IVF8,RQ2x4fs_Nrq2x4", "IVF8,ITQ,SH4", "IVF8,PQ8+8",
            "Residual2x4,PQ8", "IDMap,Flat", "IDMap2,Flat", "PCA8,IVF8,LSQ2x8",
        )),
    ],
)  # fmt: skip
def test_an_index_that_cannot_serve_is_refused_before_it_is_trained(spec, reason):
    with pytest.raises(ValueError, match=rf"(?s)'{re.escape(spec)}'.*{reason}.*pass e\.g\. 'Flat'"):
        empty_index(spec, 16)
    with pytest.raises(ValueError, match=reason):
        build_index(random_vectors(300), spec)


SERVING = [
    "Flat", "SQ8", "SQfp16", "HNSW16", "HNSW16,SQ8", "NSG16,Flat", "LSH", "ITQ8,LSH", "PQ8x4", "PQ8x4fs", "RQ2x4",
    "RaBitQ", "IVF8,Flat", "IVF8,SQ8", "IVF8,PQ8x4", "IVF8,PQ8x4fs", "IVF8,RaBitQ", "IVF8_HNSW4,Flat", "IMI2x3,Flat",
    "PCA8,IVF8,Flat", "OPQ4,PQ4x4", "L2norm,Flat", "IVF8,Flat,RFlat", "PQ8x4,RFlat", "ZnLattice2x4_4",
]  # fmt: skip


@pytest.mark.parametrize("spec", SERVING)
def test_whatever_is_not_refused_leaves_out_what_is_to_be_left_out(spec):
    vectors = random_vectors(300)
    own = np.arange(300)[:, None] // 30 * 30 + [0, 30]
    _, found = search(build_index(vectors, spec), vectors, 5, exclude=[(0, 40)], own=own)
    assert (found[0] >= 0).any(), "something is found"
    assert not ((found >= own[:, :1]) & (found < own[:, 1:])).any() and not ((found >= 0) & (found < 40)).any()


def test_no_vectors_make_no_index():
    with pytest.raises(ValueError, match="no vectors to index"):
        build_index(random_vectors(0))


def test_an_index_is_filled_in_blocks_from_a_memory_map(tmp_path, monkeypatch):
    np.save(tmp_path / "vectors.npy", random_vectors(100))
    monkeypatch.setattr(index_module, "BLOCK", 7)
    index = build_index(np.load(tmp_path / "vectors.npy", mmap_mode="r"))
    assert (index.reconstruct_n(0, 100) == random_vectors(100)).all()


def share_found(index, vectors, k=10) -> float:
    """Recall of 100 queries, by brute force."""
    rows = range(0, len(vectors), len(vectors) // 100)
    _, ids = search(index, vectors[rows], k)
    true = [((vectors - vectors[row]) ** 2).sum(axis=1).argsort()[:k].tolist() for row in rows]
    return np.mean([len({*found} & {*nearest}) / k for found, nearest in zip(ids.tolist(), true, strict=True)])


@pytest.mark.parametrize("spec", ["IVF32,Flat", "HNSW4"])
def test_effort_is_raised_until_95_in_100_are_found(spec):
    vectors = random_vectors(1500)
    index = build_index(vectors, spec)
    assert share_found(index, vectors) > 0.93  # 95 on a sample of its own
    inner = innermost(index)
    if spec == "HNSW4":
        inner.hnsw.efSearch = 16
    else:
        inner.nprobe = 1
    assert share_found(index, vectors) < 0.9


def test_effort_is_not_raised_in_vain():
    vectors = random_vectors(1500)
    index = build_index(vectors, "IVF32,PQ4")  # too coarse for 95 in 100 with all its lists
    effort, reached = index.nprobe, share_found(index, vectors)
    assert 1 < effort < 32
    index.nprobe = 32
    assert share_found(index, vectors) - 0.05 < reached < 0.95


# to disk


@pytest.mark.parametrize("spec", KINDS)
def test_an_index_is_read_as_it_was_written(spec, tmp_path):
    vectors = random_vectors(300)
    index = build_index(vectors, spec)
    write_index(index, tmp_path / "a.index")
    again = read_index(tmp_path / "a.index")
    for one, other in zip(*(search(i, vectors, 5, exclude=[(0, 9)]) for i in (index, again)), strict=True):
        assert (one == other).all()


def test_a_failed_write_leaves_the_old_index(tmp_path, monkeypatch):
    path = tmp_path / "a.index"
    write_index(build_index(random_vectors(5), "Flat"), path)
    before = path.read_bytes()

    def full_disk(index, name):
        with open(name, "wb") as file:
            file.write(b"half")
        raise RuntimeError("Error: 'ret == size' failed: write error in a.tmp: 1 != 2 (No space left on device)")

    monkeypatch.setattr(faiss, "write_index", full_disk)
    with pytest.raises(OSError, match=r"could not write .*a\.index: No space left on.*MB are free") as caught:
        write_index(build_index(random_vectors(9), "Flat"), path)
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["a.index"]


@pytest.mark.parametrize("spec", ["Flat", "IVF8,PQ8", "HNSW16", "OPQ8,IVF8,PQ8"])
def test_a_truncated_index_is_told(spec, tmp_path):
    path = tmp_path / "a.index"
    write_index(build_index(random_vectors(300), spec), path)
    whole = path.read_bytes()
    for length in (0, 3, 20, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"a\.index is truncated or corrupt: delete it and build it again"):
            read_index(path)
    path.write_bytes(b"something else altogether" * 100)
    with pytest.raises(ValueError, match="truncated or corrupt"):
        read_index(path)


def test_a_missing_index_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no index at .*gone\.index: build it"):
        read_index(tmp_path / "gone.index")


@pytest.mark.parametrize("spec", ["Flat", "IVF4,Flat", "HNSW8"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_vectors_that_are_not_finite_are_refused_and_named(spec, bad):
    vectors = np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32)
    vectors[[7, 90], 3] = bad
    with pytest.raises(FloatingPointError, match="2 of 300 vectors are not finite, the first is that of chunk 7"):
        build_index(vectors, spec)
