"""Bytes, hours and comparisons: against files that were written, by hand, and against what was measured."""

import json
import math

import faiss
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retro_nb.planning.costs import index_bytes, lists_of
from retro_nb.planning.scale import (
    PAPER,
    RESULTS,
    Plan,
    embedding_rate,
    embedding_rates,
    papers_plan,
    recall_runs,
    search_rate,
    search_rates,
)
from retro_nb.reference import chunks_to_precalculated_knn_, documents_to_chunks_
from retro_nb.store.chunking import MOST_CHUNKS, Tokens, tokens_to_chunks
from retro_nb.store.index import FLAT_LIMIT, build_index, write_index
from retro_nb.text.document import Document
from retro_nb.text.speeches import speeches
from retro_nb.text.tokens import get_tokenizer

# bytes


def chunked(folder, documents, m=64, tokenizer=None):
    paths = {f"{name}_memmap_path": folder / f"{name}.npy" for name in ("chunks", "seqs", "doc_ids")}
    options = {"chunk_size": m, "seq_len": m, "tokenizer": tokenizer, "progress": False}
    return documents_to_chunks_(documents, **paths, **options)


def test_the_files_of_a_store_have_these_bytes(tmp_path):
    stats = chunked(tmp_path, [Document(" ".join(["river"] * 700), "t", "s")], m=16)
    chunks_to_precalculated_knn_(
        num_nearest_neighbors=3,
        num_chunks=stats["chunks"],
        chunk_size=16,
        chunk_memmap_path=tmp_path / "chunks.npy",
        doc_ids_memmap_path=tmp_path / "doc_ids.npy",
        progress=False,
    )
    plan = Plan(stats["tokens"], chunk_size=16, knn=3)
    assert plan.chunks == stats["chunks"] == 44 and plan.spec == "Flat"
    assert plan.bytes == {name: (tmp_path / name).stat().st_size for name in plan.bytes}
    left_out = {path.name for path in tmp_path.iterdir()} - set(plan.bytes)
    assert left_out <= {"seqs.npy", "chunks.documents.jsonl", "chunks.tokenizer.json", "manifest.json", ".lock"}


def test_a_large_vocabulary_takes_four_bytes_a_token():
    narrow, wide = (Plan(6401, token_bytes=width).bytes["chunks.npy"] for width in (2, 4))
    assert (narrow - 128, wide - 128) == (100 * 65 * 2, 100 * 65 * 4)
    assert get_tokenizer().dtype.itemsize == 2


@given(length=st.integers(1, 500), m=st.integers(1, 70))
def test_one_document_has_as_many_chunks_as_it_is_cut_into(length, m):
    ids, spans = np.ones(length, np.int32), np.zeros((length, 2), np.int64)
    cut = sum(len(each.rows) for each in tokens_to_chunks([Tokens(ids, spans)], m))
    assert Plan(length, chunk_size=m).chunks == cut


def test_many_documents_have_about_as_many(tmp_path):
    stats = chunked(tmp_path, speeches(max_documents=60, max_chars=4000), m=16)
    plan = Plan(stats["tokens"], documents=stats["docs"], chunk_size=16)
    assert plan.chunks == pytest.approx(stats["chunks"], rel=0.003)


@pytest.mark.parametrize("spec", ["Flat", "IVF16,Flat", "IVF16,SQ8", "IVF16,PQ8", "HNSW8"])
def test_an_index_has_about_the_bytes_of_its_file(spec, tmp_path):
    vectors = np.random.default_rng(0).normal(size=(4000, 32)).astype(np.float32)
    write_index(build_index(vectors, spec), tmp_path / "index")
    plan = Plan(4000 * 64 + 1, dim=32, index=spec)
    assert plan.bytes["knn.index"] == pytest.approx((tmp_path / "index").stat().st_size, rel=0.01)


def test_ids_are_wider_beyond_two_to_the_thirty_first():
    largest, larger = (Plan(64 * chunks + 1, knn=2, index="Flat") for chunks in (2**31 - 1, 2**31))
    assert largest.chunks == MOST_CHUNKS and largest.fits_int32 and not larger.fits_int32
    assert np.iinfo(np.int32).max == largest.chunks, "as many as a store takes"
    assert largest.bytes["chunks.knn.npy"] == 128 + 8 * (2**31 - 1)
    assert larger.bytes["chunks.knn.npy"] == 128 + 16 * 2**31
    assert larger.bytes["doc_ids.npy"] == 128 + 4 * 2**31, "there are fewer documents"


# the paper


def test_the_papers_keys_are_its_tokens_in_chunks():
    assert papers_plan().chunks == PAPER["tokens"].value / 64 == PAPER["keys"].value


def test_the_papers_bytes_are_about_those_of_rows_and_whole_vectors():
    bytes_ = papers_plan("Flat").bytes
    assert bytes_["chunks.npy"] + bytes_["chunks.embedded.npy"] == pytest.approx(PAPER["bytes"].value, rel=0.01)


def test_every_figure_says_where_it_stands():
    assert all(figure.value > 0 and figure.what and figure.where for figure in PAPER.values())


# hours


def test_hours_are_counts_divided_by_rates():
    plan = Plan(64 * 7_200_000 + 1)
    assert plan.embedding_hours(1000) == 2 and plan.embedding_hours(1000, gpus=4) == 0.5
    flat = Plan(64 * 1000 + 1, dim=10, index="Flat")
    assert flat.comparisons() == 1000 and flat.query_seconds(500) == 2
    assert flat.neighbour_hours(1000) == 1000 / 3600 and flat.neighbour_hours(1000, machines=4) == 250 / 3600


def test_an_inverted_file_reads_its_centres_and_some_lists():
    plan = Plan(64 * 100_000 + 1, index="OPQ48,IVF1000,PQ48")
    assert plan.lists == 1000 and plan.comparisons(10) == 1000 + 10 * 100
    assert plan.comparisons(5000) == 1000 + 100_000, "there are no more lists than there are"
    assert Plan(641, index="HNSW32").lists == Plan(641, index="Flat").lists == 0
    rotated = "OPQ48_192,IVF16,PQ48"  # an index within another
    assert Plan(64_001, index=rotated).lists == lists_of(rotated, 384) == 16


def test_comparisons_are_what_faiss_counts():
    vectors = np.random.default_rng(0).normal(size=(5000, 16)).astype(np.float32)
    index = build_index(vectors, "IVF20,Flat")
    faiss.cvar.indexIVF_stats.reset()
    index.nprobe = 4
    index.search(vectors, 1)
    counted = faiss.cvar.indexIVF_stats.ndis / len(vectors)
    # Lists are not equally long, and more queries fall into the longer ones.
    assert Plan(64 * 5000 + 1, dim=16, index="IVF20,Flat").comparisons(4) - 20 == pytest.approx(counted, rel=0.15)


@given(chunks=st.integers(1, 10**11), dim=st.sampled_from([384, 768]))
def test_there_is_a_plan_of_any_size(chunks, dim):
    plan = Plan(64 * chunks + 1, dim=dim)
    assert plan.chunks == chunks and bool(plan.lists) == (chunks > FLAT_LIMIT)
    if chunks <= 10**7:  # an index of a million lists takes seconds to make, even empty
        assert plan.bytes["knn.index"] == index_bytes(plan.spec, chunks, dim) > plan.bytes["chunks.embedded.npy"] - 128
    assert 0 < plan.comparisons() <= max(chunks, 1) + plan.lists


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"tokens": 0}, "tokens 0 is less than 1"),
        ({"knn": 0}, "knn 0"),
        ({"documents": 200}, "200 documents of 100 tokens"),
        ({"token_bytes": 3}, "token_bytes 3: 2 for a vocabulary"),
    ],
)
def test_a_plan_that_cannot_be_is_met_at_the_door(wrong, said):
    with pytest.raises(ValueError, match=said):
        Plan(**{"tokens": 100} | wrong)


# what was measured


def test_rates_are_read_from_the_benchmarks():
    rates = embedding_rates()
    record = json.loads((RESULTS / "embedding-gpu.json").read_text(encoding="utf-8"))
    what = f"embedding, GPU, MiniLM, bfloat16, {record['device']}"
    assert rates[what] == record["comparisons"][0]["ours"]
    assert [name.split(",")[1] for name in rates].count(" CPU") == 2, "named apart: with AVX-512 and without"
    assert embedding_rate("GPU, MiniLM") == rates[what]
    with pytest.raises(ValueError, match="for 'TPU', but for: embedding, CPU, MiniLM"):
        embedding_rate("TPU")


def test_without_benchmarks_the_mend_is_said(tmp_path):
    for read, name in ((embedding_rates, "embedding"), (recall_runs, "recall"), (search_rates, "recall")):
        with pytest.raises(FileNotFoundError, match=rf"benchmarks/{name}\.py.*pass a rate of your own"):
            read(tmp_path)


def results(folder):
    """Invented results of a recall benchmark."""
    trials = [{"effort": 1, "recall@10": 0.4, "ms_per_query": 0.1}, {"effort": 4, "recall@10": 0.9, "ms_per_query": 2}]
    exact = [{"effort": None, "recall@10": 1.0, "ms_per_query": 5}]
    runs = [
        {"index": "Flat", "trials": exact},
        {"index": "IVF10,PQ8", "trials": trials},
        {"index": "HNSW32", "trials": trials},
    ]
    record = {"settings": {"chunks": 1000, "width": 32}, "runs": runs}
    (folder / "recall-cpu.json").write_text(json.dumps(record), encoding="utf-8")
    return runs


def test_comparisons_a_second_follow_from_the_slowest_trial(tmp_path):
    assert recall_runs(results(tmp_path) and tmp_path) == results(tmp_path)
    assert search_rates(tmp_path) == {"Flat": 1000 / 0.005, "IVF10,PQ8": pytest.approx((10 + 400) / 0.002)}


def test_the_rate_of_an_index_is_that_of_one_that_keeps_its_vectors_alike(tmp_path):
    results(tmp_path)
    rates = search_rates(tmp_path)
    assert search_rate("IVF524288,PQ8", tmp_path) == rates["IVF10,PQ8"]
    assert search_rate("Flat", tmp_path) == rates["Flat"]
    for spec in ("IVF4,Flat", "HNSW32", "PQ8"):
        with pytest.raises(ValueError, match=f"like '{spec}' was measured, but Flat, IVF10,PQ8"):
            search_rate(spec, tmp_path)


@pytest.mark.skipif(not (RESULTS / "recall-cpu.json").exists(), reason="not measured yet: python benchmarks/recall.py")
def test_the_measured_indexes_have_the_bytes_that_are_computed():
    settings = json.loads((RESULTS / "recall-cpu.json").read_text(encoding="utf-8"))["settings"]
    for run in recall_runs():
        plan = Plan(64 * settings["chunks"] + 1, dim=settings["width"], index=run["index"])
        assert math.isclose(plan.bytes["knn.index"], run["bytes"], rel_tol=0.01), run["index"]
