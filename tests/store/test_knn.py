"""Neighbours: k of them, never the own document's, as near as brute force says; and their files."""

import itertools
import os
import shutil
import signal

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_nb.common.arrays import ResumableRows, open_array
from retro_nb.reference import chunks_to_index_and_embed, chunks_to_precalculated_knn_, documents_to_chunks_
from retro_nb.store import knn as knn_module
from retro_nb.store.files import knn_path
from retro_nb.store.index import build_index
from retro_nb.store.knn import document_ranges, knn_stats, measure_recall, neighbours, own_ranges
from retro_nb.text.document import Document

faiss.omp_set_num_threads(1)


# issue 3, point 4: proven against brute force


def random_corpus(rng):
    return rng.normal(size=(900, 16)), np.repeat(np.arange(18), 50)


def clustered_corpus(rng):
    """Three documents of 300 chunks, each chunk nearer to all the others of its document than to any other."""
    centres = np.repeat(10 * rng.normal(size=(3, 16)), 300, axis=0)
    return centres + rng.normal(size=(900, 16)), np.repeat([2, 3, 9], 300)


def duplicated_corpus(rng):
    """Nine documents that are all the same."""
    return np.tile(rng.normal(size=(100, 16)), (9, 1)), np.repeat(np.arange(9), 100)


CORPORA = {"random": random_corpus, "clustered": clustered_corpus, "duplicated": duplicated_corpus}
K = 5


@pytest.fixture(scope="module", params=CORPORA)
def corpus(request):
    """Vectors, document ids and, by brute force, squared distances with the own document at infinity."""
    vectors, doc_ids = CORPORA[request.param](np.random.default_rng(3))
    vectors, distances = vectors.astype(np.float32), np.empty((len(vectors), len(vectors)))
    for row, query in enumerate(vectors.astype(np.float64)):
        distances[row] = ((vectors - query) ** 2).sum(axis=1)
        distances[row, doc_ids == doc_ids[row]] = np.inf
    return vectors, doc_ids, distances


SPECS = ["Flat", "SQ8", "IVF16,Flat", "HNSW16", "PQ8", "IVF16,PQ8", "OPQ4,IVF8,PQ4", "PCA8,Flat"]


@pytest.mark.parametrize("spec", SPECS)
def test_k_neighbours_of_other_documents_from_every_kind_of_index(corpus, spec):
    vectors, doc_ids, distances = corpus
    found = neighbours(build_index(vectors, spec), vectors, doc_ids, K)
    assert found.shape == (len(vectors), K) and found.min() >= 0
    assert not np.any(doc_ids[found] == doc_ids[:, None])
    assert all(len(set(row)) == K for row in found.tolist())

    near, nearest = np.take_along_axis(distances, found, axis=1), np.sort(distances, axis=1)[:, :K]
    if spec == "Flat":
        np.testing.assert_allclose(near, nearest, rtol=1e-5, atol=1e-5)
    true = np.mean(near <= nearest[:, -1:] * (1 + 1e-5))
    assert measure_recall(vectors, doc_ids, found) == pytest.approx(true, abs=0.01)
    assert true > (0.95 if spec in ("Flat", "SQ8") else 0.15)


def test_recall_is_measured_on_a_sample_of_a_large_corpus(corpus, monkeypatch):
    vectors, doc_ids, distances = corpus
    found = neighbours(build_index(vectors, "IVF16,PQ8"), vectors, doc_ids, K)
    near, nearest = np.take_along_axis(distances, found, axis=1), np.sort(distances, axis=1)[:, :K]
    hits = (near <= nearest[:, -1:] * (1 + 1e-5)).mean(axis=1)
    monkeypatch.setattr(knn_module, "RECALL_QUERIES", 300)
    sample = np.linspace(0, 899, 300).astype(int)
    assert measure_recall(vectors, doc_ids, found) == pytest.approx(hits[sample].mean(), abs=0.001)


def others_by_brute_force(vectors, doc_ids, row, max_similarity) -> list[tuple[float, int]]:
    """(squared distance, id) of the chunks of other documents that are not too similar, nearest first."""
    found, query = [], vectors[row].tolist()
    for number, vector in enumerate(vectors.tolist()):
        product = sum(a * b for a, b in zip(vector, query, strict=True))
        lengths = sum(a * a for a in vector) ** 0.5 * sum(b * b for b in query) ** 0.5
        similar = max_similarity is not None and product / (lengths or 1) > max_similarity + 1e-9
        if doc_ids[number] != doc_ids[row] and not similar:
            found.append((sum((a - b) ** 2 for a, b in zip(vector, query, strict=True)), number))
    return sorted(found)


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    k=st.integers(1, 12),
    max_similarity=st.sampled_from([None, 1.0, 0.8765, 0.5432, 0.0123, -0.9]),
    spec=st.sampled_from(["Flat", "HNSW4", "SQfp16"]),
    most=st.integers(1, 200),
    seed=st.integers(0, 999),
)
def test_neighbours_are_what_brute_force_finds(lengths, k, max_similarity, spec, most, seed):
    """Small whole numbers: ties, duplicates and zero vectors abound. Document ids have gaps."""
    rng = np.random.default_rng(seed)
    doc_ids = np.repeat(np.cumsum(rng.integers(1, 5, len(lengths))), lengths).astype(np.int32)
    vectors = rng.integers(-2, 3, (len(doc_ids), 3)).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knn_module, "MOST_AT_ONCE", most)
        found = neighbours(build_index(vectors, spec), vectors, doc_ids, k, max_similarity=max_similarity)
        cut = len(vectors) // 2
        blocks = [range(0, cut), range(cut, len(vectors))]  # the cut goes through a document
        parts = [
            neighbours(build_index(vectors, spec), vectors, doc_ids, k, max_similarity=max_similarity, rows=rows)
            for rows in blocks
        ]
        assert (np.concatenate(parts) == found).all()
    for row, ids in enumerate(found):
        others = others_by_brute_force(vectors, doc_ids, row, max_similarity)
        distances = {number: distance for distance, number in others}
        ids = [int(i) for i in ids]
        count = min(k, len(others))
        assert ids[count:] == [-1] * (k - count) and len(set(ids[:count])) == count
        assert set(ids[:count]) <= set(distances)
        if spec == "Flat":
            assert [distances[i] for i in ids[:count]] == [distance for distance, _ in others[:k]]


@pytest.mark.parametrize("spec", SPECS)
def test_documents_kept_out_have_neighbours_and_are_nobodys(corpus, spec):
    vectors, doc_ids, distances = corpus
    documents = np.unique(doc_ids)
    out = documents[: len(documents) // 2]
    ranges = document_ranges(doc_ids, out.tolist())
    assert ranges == [(0, np.isin(doc_ids, out).sum())]  # documents that follow one another are one range
    rows = np.arange(0, len(doc_ids), 3)
    found = neighbours(build_index(vectors, spec), vectors, doc_ids, K, exclude=ranges, rows=rows)
    assert found.min() >= 0 and not np.isin(doc_ids[found], out).any()
    assert not np.any(doc_ids[found] == doc_ids[rows][:, None])
    if spec == "Flat":
        allowed = np.where(np.isin(doc_ids, out), np.inf, distances)[rows]
        near, nearest = np.take_along_axis(allowed, found, axis=1), np.sort(allowed, axis=1)[:, :K]
        np.testing.assert_allclose(near, nearest, rtol=1e-5, atol=1e-5)


def test_an_unknown_document_cannot_be_kept_out(corpus):
    with pytest.raises(ValueError, match="document 12345 has no chunk"):
        document_ranges(corpus[1], [12345])


def test_near_duplicates_are_left_out_however_many():
    rng = np.random.default_rng(0)
    vectors = np.concatenate([np.ones((300, 8)) + 0.001 * rng.normal(size=(300, 8)), rng.normal(size=(5, 8))])
    vectors, doc_ids = vectors.astype(np.float32), np.arange(305)
    for spec in ("Flat", "IVF4,Flat", "PQ4"):
        found = neighbours(build_index(vectors, spec), vectors, doc_ids, 3, max_similarity=0.99)
        assert found[:300].min() >= 300
    vectors = np.ones((90, 8), np.float32)  # all the same
    assert (neighbours(build_index(vectors), vectors, np.arange(90), 2, max_similarity=0.99) == -1).all()
    assert (neighbours(build_index(vectors), vectors, np.arange(90), 2, max_similarity=1.0) >= 0).all()
    assert measure_recall(vectors, np.arange(90), np.full((90, 2), -1), max_similarity=0.99) == 1


def test_one_document_and_three_chunks():
    vectors = np.eye(3, dtype=np.float32)
    assert (neighbours(build_index(vectors), vectors, np.zeros(3, np.int32), 2) == -1).all()
    assert neighbours(build_index(vectors), vectors, np.array([7, 9, 9]), 2).tolist() == [[1, 2], [0, -1], [0, -1]]


def test_a_documents_chunks_lie_together():
    assert own_ranges(np.array([3, 3, 8]), range(3)).tolist() == [[0, 2], [0, 2], [2, 3]]
    with pytest.raises(ValueError, match="chunk 2 goes back to document 0"):
        own_ranges(np.array([0, 1, 0]), range(3))


# to disk

M = 8


def prepare(folder, documents, bert) -> dict:
    """Chunk documents; the arguments that the steps after it have in common."""
    stats = documents_to_chunks_(
        documents,
        chunks_memmap_path=folder / "chunks.npy",
        seqs_memmap_path=folder / "seqs.npy",
        doc_ids_memmap_path=folder / "doc_ids.npy",
        chunk_size=M,
        seq_len=2 * M,
        tokenizer=bert,
        progress=False,
    )
    return dict(num_chunks=stats["chunks"], chunk_size=M, chunk_memmap_path=folder / "chunks.npy", bert=bert)


def build(folder, prepared, **options):
    defaults = dict(num_nearest_neighbors=2, doc_ids_memmap_path=folder / "doc_ids.npy", progress=False)
    return chunks_to_precalculated_knn_(**{**prepared, **defaults, **options})


def contents(folder) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.name not in (".lock", "manifest.json")}


def times(folder) -> dict[str, int]:
    return {name: (folder / name).stat().st_mtime_ns for name in contents(folder)}


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_bert):
    """A finished build, and its arguments."""
    words = "law peace war trade union state people power treaty silver gold navy army land tax vote".split()
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, n)) for n in (60, 5, 90, 40, 7, 64)]
    documents = [Document(text, f"t{i}", "s") for i, text in enumerate(texts)]
    folder = tmp_path_factory.mktemp("base")
    prepared = prepare(folder, documents, tiny_bert)
    build(folder, prepared)
    return folder, prepared


@pytest.fixture
def built(base, tmp_path):
    """A copy of it to play with."""
    folder, prepared = base
    shutil.copytree(folder, tmp_path / "work")
    return tmp_path / "work", {**prepared, "chunk_memmap_path": tmp_path / "work" / "chunks.npy"}


def test_what_lies_on_disk(built):
    folder, prepared = built
    before = times(folder)
    path, index = build(folder, prepared)
    assert times(folder) == before and path == knn_path(folder / "chunks.npy") == folder / "chunks.knn.npy"
    vectors, doc_ids = open_array(folder / "chunks.embedded.npy"), open_array(folder / "doc_ids.npy")
    found, count = open_array(path), prepared["num_chunks"]
    assert found.dtype == np.int32 and found.shape == (count, 2) and index.ntotal == count
    for row in range(count):
        true = [distance for distance, _ in others_by_brute_force(vectors, doc_ids, row, None)][:2]
        np.testing.assert_allclose(((vectors[found[row]] - vectors[row]) ** 2).sum(axis=1), true, rtol=1e-4, atol=1e-5)
    stats = knn_stats(folder / "chunks.npy")
    assert stats["recall"] == 1 and stats["missing"] == 0 and stats["k"] == 2 and stats["vectors"] == count
    assert stats["index"] == "Flat" and stats["bytes"] == (folder / "knn.index").stat().st_size


def changed(folder, before) -> set[str]:
    return {name for name, time in times(folder).items() if before.get(name) != time}


@pytest.mark.filterwarnings("ignore:building")
@pytest.mark.parametrize(
    ("options", "rebuilt", "why"),
    [
        ({"num_nearest_neighbors": 3}, {"chunks.knn.npy"}, "k was 2 and is 3"),
        ({"max_similarity": 0.9}, {"chunks.knn.npy"}, "max_similarity was None and is 0.9"),
        ({"index": "IVF2,Flat"}, {"knn.index", "chunks.knn.npy"}, "index was Flat and is IVF2,Flat"),
        ({"use_cls_repr": True}, {"chunks.embedded.npy", "knn.index", "chunks.knn.npy"}, "pooling was mean and is cls"),
        ({"force_reprocess": True}, {"chunks.embedded.npy", "knn.index", "chunks.knn.npy"}, "REPROCESS"),
    ],
)
def test_a_changed_setting_rebuilds_what_depends_on_it(built, options, rebuilt, why):
    folder, prepared = built
    before = times(folder)
    with pytest.warns(UserWarning, match=why):
        build(folder, prepared, **options)
    assert changed(folder, before) == rebuilt


def test_other_documents_rebuild_the_neighbours(built):
    folder, prepared = built
    before = times(folder)
    np.save(folder / "doc_ids.npy", np.arange(prepared["num_chunks"], dtype=np.int32))
    with pytest.warns(UserWarning, match="doc_ids was"):
        path, _ = build(folder, prepared)
    assert changed(folder, before) == {"doc_ids.npy", "chunks.knn.npy"}
    assert np.any(own_ranges(open_array(folder / "doc_ids.npy"), open_array(path)[:, 0])[:, 0] > 0)


@pytest.mark.parametrize("name", ["chunks.embedded.npy", "knn.index", "chunks.knn.npy"])
@pytest.mark.parametrize("harm", ["truncated", "corrupt", "gone"])
def test_a_damaged_file_is_built_again(built, name, harm, recwarn):
    folder, prepared = built
    before = contents(folder)
    if harm == "gone":
        (folder / name).unlink()
    else:
        data = bytearray(before[name])
        data[-20:] = b"" if harm == "truncated" else b"!" * 20
        (folder / name).write_bytes(data)
    build(folder, prepared)
    assert contents(folder) == before
    if harm != "gone":
        assert f"building {name} again: {name} is truncated or corrupt" in str(recwarn[0].message)


def test_memory_limits_choose_the_index(built):
    folder, prepared = built
    smaller = dict(max_index_memory_usage="1G", current_memory_available=8_000)
    with pytest.warns(UserWarning, match="index was Flat and is IVF1,SQ8"):
        index, _ = chunks_to_index_and_embed(**prepared, **smaller, progress=False)
    assert (folder / "knn.index").stat().st_size <= 8_000 and isinstance(index, faiss.IndexIVFScalarQuantizer)
    with pytest.raises(ValueError, match="but 100 are allowed: raise max_index_memory_usage"):
        build(folder, prepared, max_index_memory_usage="100")
    with pytest.raises(ValueError, match="'plenty' is not a size in bytes"):
        build(folder, prepared, current_memory_available="plenty")


@pytest.mark.filterwarnings("ignore:building")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_nearest_neighbors": 0}, "num_nearest_neighbors 0: ask for 1 or more"),
        ({"max_similarity": 1.5}, "max_similarity 1.5 is a cosine"),
        ({"max_similarity": float("nan")}, "max_similarity nan is a cosine"),
        ({"index": "PQ8"}, "cannot make the index 'PQ8'.*a PQ one 256"),
        ({"index": "IVF1024,Flat"}, "an IVFn index needs n vectors"),
        ({"index": "nonsense"}, "could not parse index string nonsense"),
        ({"embed_dim": 768}, "embed_dim 768, but this BERT gives vectors of 32"),
        ({"num_chunks": 10_000}, "has shape .*build it again"),
    ],
)
def test_bad_settings_change_nothing(built, options, message):
    folder, prepared = built
    before = times(folder)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        build(folder, prepared, **options)
    assert times(folder) == before


def test_an_index_may_lie_elsewhere(built, tmp_path):
    folder, prepared = built
    with pytest.warns(UserWarning, match=r"building chunks\.knn\.npy again|index was"):
        build(folder, prepared, index_file=str(tmp_path / "elsewhere" / "a.index"), index="IVF2,Flat")
    assert knn_stats(folder / "chunks.npy", str(tmp_path / "elsewhere" / "a.index"))["index"] == "IVF2,Flat"


def test_raw_memory_maps_as_the_reference_writes_them(built, tmp_path):
    folder, prepared = built
    raw = tmp_path / "raw"
    raw.mkdir()
    for name in ("chunks", "doc_ids"):
        array = np.load(folder / f"{name}.npy").astype(np.int32)
        (raw / f"{name}.npy").write_bytes(array.tobytes() + bytes(4096))  # it leaves room at the end
    path, _ = build(raw, {**prepared, "chunk_memmap_path": raw / "chunks.npy"})
    assert (open_array(path) == open_array(folder / "chunks.knn.npy")).all()


# killed, full

ROWS = 4  # saved at a time


def build_until_killed(folder, prepared, options, point):
    """Build, and be killed at the given one of the moments at which something is opened, moved or deleted."""
    import sys

    moments = itertools.count()

    def watch(event, args):
        if event in ("open", "os.rename", "os.remove") and str(args[0]).startswith(str(folder)):
            if next(moments) == point:
                os.kill(os.getpid(), signal.SIGKILL)

    def write_index(index, path, write=knn_module.write_index):
        write(index, path)
        if next(moments) == point:
            os.kill(os.getpid(), signal.SIGKILL)

    faiss.omp_set_num_threads(1)
    knn_module.write_index = write_index
    sys.addaudithook(watch)
    build(folder, prepared, max_rows_per_file=ROWS, **options)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:building")
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
def test_a_search_killed_at_any_point_is_finished_as_if_nothing_had_been(built, tmp_path, run_apart):
    folder, prepared = built
    options = dict(num_nearest_neighbors=3, index="IVF2,Flat")
    finished = tmp_path / "finished"
    shutil.copytree(folder, finished)
    build(finished, {**prepared, "chunk_memmap_path": finished / "chunks.npy"}, max_rows_per_file=ROWS, **options)
    resumed = 0
    for point in itertools.count(step=7):
        work = tmp_path / f"killed {point}"
        shutil.copytree(folder, work)
        mine = {**prepared, "chunk_memmap_path": work / "chunks.npy"}
        (code,) = run_apart(build_until_killed, work, mine, options, point)
        resumed += (work / "chunks.knn.npy.partial").exists()
        build(work, mine, max_rows_per_file=ROWS, **options)
        # Killed after the last record, before the tidying: the note of what was done stays, and harms nothing.
        (work / "chunks.knn.npy.progress").unlink(missing_ok=True)
        assert contents(work) == contents(finished), f"killed at moment {point}"
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert resumed > 2


@pytest.mark.filterwarnings("ignore:building")
def test_an_interrupted_search_is_not_repeated(built, monkeypatch):
    folder, prepared = built
    asked, search = [], knn_module.neighbours

    def interrupted(*args, rows, **options):
        asked.append(rows)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return search(*args, rows=rows, **options)

    monkeypatch.setattr(knn_module, "neighbours", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt) if len(asked) < 3 else pytest.MonkeyPatch.context():
            build(folder, prepared, num_nearest_neighbors=3, max_rows_per_file=ROWS)
    starts = [rows.start for rows in asked]
    assert starts[:4] == [0, ROWS, 2 * ROWS, 2 * ROWS] and starts[3:] == list(
        range(2 * ROWS, prepared["num_chunks"], ROWS)
    )


@pytest.mark.filterwarnings("ignore:building")
def test_a_full_disk_leaves_the_old_index_and_neighbours(built, monkeypatch):
    folder, prepared = built
    before = contents(folder)

    def full(index, name):
        raise RuntimeError("Error: 'ret == size' failed: write error: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(faiss, "write_index", full)
        with pytest.raises(OSError, match=r"could not write .*knn\.index: .*No space left on device"):
            build(folder, prepared, index="IVF2,Flat")
    assert contents(folder) == before

    def full_rows(self, block, values):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ResumableRows, "write", full_rows)
        with pytest.raises(OSError, match="No space left"):
            build(folder, prepared, num_nearest_neighbors=3)
    assert contents(folder) == before


def test_tiny_and_lonely_corpora(tmp_path, tiny_bert):
    prepared = prepare(tmp_path, [Document("a b c " * 9, "only", "s")], tiny_bert)
    path, _ = build(tmp_path, prepared)
    assert (open_array(path) == -1).all() and len(open_array(path)) == prepared["num_chunks"] > 3
    stats = knn_stats(tmp_path / "chunks.npy")
    assert stats["missing"] == 2 * prepared["num_chunks"] and stats["recall"] == 1

    three = tmp_path / "three"
    prepared = prepare(three, [Document(text, text, "s") for text in ("peace", "war", "peace")], tiny_bert)
    path, _ = build(three, prepared, num_nearest_neighbors=3)
    assert prepared["num_chunks"] == 3 and open_array(path).tolist() == [[2, 1, -1], [0, 2, -1], [0, 1, -1]]
