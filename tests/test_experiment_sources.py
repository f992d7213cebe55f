"""experiments/sources.py: a trial from source files to results, and its parts against slow and plain ones."""

import importlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_nb import RETRO, code, get_tokenizer
from retro_nb.chunking import documents_to_chunks_, special_ids
from retro_nb.duplicates import near_duplicates
from retro_nb.leakage import shared_runs
from retro_nb.storage import ROOT
from retro_nb.tokens import SpecialIds

with pytest.MonkeyPatch.context() as patched:
    patched.syspath_prepend(ROOT / "experiments")
    sources, results, store = (importlib.import_module(f"sources{part}") for part in ("", "_results", "_store"))

SMALL = {"packages": "[alpha, beta, other]", "unseen": "[other]", "tokenizer": "600", "test": "0.2", "valid": "0.1"}
NAMES = ("chunks", "seqs", "doc_ids", "chunks.bytes")
THIN = {"max_seq_len": "256", "enc_dim": "16", "dec_dim": "16", "heads": "2", "dim_head": "8", "enc_depth": "1"}
BRIEF = {"steps": "2", "batch_size": "2", "eval_every": "2", "checkpoint_every": "2", "num_workers": "0"}


def recipe_of(**changes: str) -> dict:
    return sources.read_recipe("code", SMALL | THIN | BRIEF | changes, sources.__file__)


def write_library(folder: Path, name: str, files: int) -> None:
    """Some files with functions of a few lines, no two alike."""
    rng = np.random.default_rng(files)
    for number in range(files):
        lines = [f"def {name}_{number}_{i}(x):\n    return x + {a} * {b}  # é\n" for i, (a, b) in
                 enumerate(rng.integers(0, 99, (rng.integers(12, 30), 2)))]  # fmt: skip
        (folder / name).mkdir(exist_ok=True)
        (folder / name / f"part{number}.py").write_text("\n".join(lines), encoding="utf-8")


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """Three libraries that can be imported."""
    folder = tmp_path_factory.mktemp("libraries")
    for name, files in {"alpha": 12, "beta": 5, "other": 8}.items():
        write_library(folder, name, files)
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(folder)
        yield


@pytest.fixture(scope="module")
def trial(tmp_path_factory, libraries, tiny_bert):
    """One seed of both models, and the folder with everything."""
    folder, recipe = tmp_path_factory.mktemp("code"), recipe_of()
    store.pack(recipe, folder / "packed")
    store.build_store(folder / "packed", folder / "store", 256, str(tiny_bert))
    experiment = sources.Experiment(recipe, folder)
    for model in sources.MODELS:
        experiment.train(model, 0)
        experiment.test(model, 0)
    results.collect(folder, folder / "results" / "code.json")
    return experiment, folder


def part_of(experiment, rows: np.ndarray) -> np.ndarray:
    """The part of each chunk's document."""
    return np.array([about["part"] for about in experiment.packed.documents])[experiment.doc_ids[rows]]


def test_the_store_is_that_of_the_texts(trial, tmp_path):
    experiment, folder = trial
    kept = {about["source"] for about in experiment.packed.documents}
    documents = [document for document in code(experiment.recipe["corpus"]["packages"]) if document.source in kept]
    paths = {f"{name}_memmap_path": tmp_path / f"{name}.npy" for name in ("chunks", "seqs", "doc_ids")}
    tokenizer = get_tokenizer(folder / "packed" / "tokenizer")
    documents_to_chunks_(documents, **paths, seq_len=256, tokenizer=tokenizer, progress=False)
    texts, packed = ({name: np.load(where / f"{name}.npy") for name in NAMES} for where in (tmp_path, folder / "store"))
    assert all((texts[name] == packed[name]).all() for name in NAMES[:3])
    sizes = np.bincount(packed["doc_ids"], packed["chunks.bytes"])
    assert (sizes == np.bincount(texts["doc_ids"], texts["chunks.bytes"])).all()
    assert special_ids(folder / "store" / "chunks.npy") == tokenizer.ids
    assert [about["bytes"] for about in experiment.packed.documents] == [len(d.text.encode()) for d in documents]


def test_nothing_that_is_measured_was_trained_on_or_can_be_found(trial):
    experiment, _ = trial
    documents, rows = experiment.packed.documents, np.arange(len(experiment.doc_ids))
    parts = {part: set(experiment.documents(part)) for part in ("train", "valid", "test", "unseen")}
    assert sum(map(len, parts.values())) == len(documents) and all(parts.values())
    assert {documents[number]["package"] for number in parts["unseen"]} == {"other"}
    trained = parts["train"] | parts["valid"] | parts["test"]
    assert "other" not in {documents[number]["package"] for number in trained}
    found = experiment.knns >= 0
    own = np.broadcast_to(experiment.doc_ids[rows][:, None], found.shape)[found]
    near = experiment.knns[found]
    assert (part_of(experiment, near) == "train").all() and (experiment.doc_ids[near] != own).all()


def test_the_memory_holds_more_and_more_of_the_other_files(trial):
    experiment, _ = trial
    rows = store.rows_of(experiment.packed, experiment.doc_ids, "unseen")
    shares = []
    for name in store.MEMORY:
        knns = experiment.with_rows("unseen", experiment.neighbours[f"memory-{name}"])
        assert (experiment.doc_ids[knns[rows]] != experiment.doc_ids[rows][:, None]).all()
        shares.append((part_of(experiment, knns[rows].ravel()) == "unseen").mean())
    assert 0 < shares[0] < shares[1] < shares[2]


def test_no_document_that_is_trained_on_nearly_repeats_one_that_is_held_out(trial):
    """Of two copies of a held-out file one is dropped, and it is not the one that is measured."""
    text = np.arange(100)
    pairs = near_duplicates([text, np.arange(500, 600), text[3:], text[2:]], [2, 3])
    assert store.dropped_of(pairs, ["train", "train", "test", "unseen"]) == {0, 3}


def test_a_document_stays_in_its_part_when_others_come_and_go(libraries):
    documents, recipe = list(code(["alpha", "beta", "other"])), recipe_of()
    before = dict(zip([d.source for d in documents], store.split(documents, recipe), strict=True))
    after = dict(zip([d.source for d in documents[1:]], store.split(documents[1:], recipe), strict=True))
    assert before["other/part0.py"] == "unseen" and sum(before[name] != part for name, part in after.items()) <= 2


@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_neighbours_are_those_of_sorting_all_distances(seed, documents, k):
    rng = np.random.default_rng(seed)
    doc_ids = np.repeat(np.arange(documents), rng.integers(1, 9, documents))
    vectors = rng.normal(size=(len(doc_ids), 5)).astype(np.float32)
    database, queries = (np.flatnonzero(rng.random(len(doc_ids)) < share) for share in (0.7, 0.5))
    if not len(database) or not len(queries):
        return
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(store, "TILES", {"cpu": (3, 64)})
        distances, found = store.nearest(vectors, queries, database, doc_ids, k, torch.device("cpu"))
    for query, near, far in zip(queries, found, distances, strict=True):
        others = database[doc_ids[database] != doc_ids[query]]
        exact = ((vectors[others].astype(np.float64) - vectors[query]) ** 2).sum(axis=1)
        order = np.argsort(exact)[:k]
        assert near[: len(order)].tolist() == others[order].tolist() and (near[len(order) :] == -1).all()
        np.testing.assert_allclose(far[: len(order)], exact[order], rtol=1e-4, atol=1e-4)


@given(st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_runs_are_as_long_as_those_of_the_suffix_automaton(seed):
    rng, special = np.random.default_rng(seed), SpecialIds(0, 1, 2)
    chunks, texts = rng.integers(0, 6, (4, 16)), rng.integers(0, 6, (4, 3, 32))
    texts[0, 0, 5:21] = chunks[0]
    found = store.longest_runs(torch.from_numpy(chunks), torch.from_numpy(texts), special)
    assert found.tolist() == [int(shared_runs(*each, special).max()) for each in zip(chunks, texts, strict=True)]


def test_both_models_have_as_many_parameters():
    recipe, sizes = sources.read_recipe("code", {}, sources.__file__), {}
    for model, retrieval in sources.MODELS.items():
        with torch.device("meta"):
            weights = RETRO(num_tokens=recipe["tokenizer"], **recipe["model"] | recipe[model]).named_parameters()
        sizes[model] = sum(each.numel() for name, each in weights if retrieval or not sources.is_retrieval(name))
    assert sizes["retro"] <= sizes["baseline"] <= 1.05 * sizes["retro"]


def test_results_follow_from_the_nats_of_the_documents(trial):
    experiment, folder = trial
    found = json.loads((folder / "results" / "code.json").read_text(encoding="utf-8"))
    sizes, nats = sum(found["documents"]["bytes"]), found["documents"]["nats"]
    assert set(nats) == {"on", "off", "shuffled", "oracle", "N only", "F only", "baseline"} and found["seeds"] == [0]
    for mode, each in nats.items():
        assert found[mode] == [pytest.approx(sum(each[0]) / math.log(2) / sizes)]
    assert found["ratios"]["on"]["all"] == pytest.approx(found["on"][0] / found["baseline"][0])
    low, high = found["ratios"]["on"]["interval"]
    assert low <= found["ratios"]["on"]["all"] <= high
    assert found["sweeps"]["k"]["2"] == found["on"] and set(found["sweeps"]["database"]) == set(store.SHARES)
    groups = [found["groups"][name] for name in sources.RUNS_OF_TOKENS]
    assert sum(each["bytes"] for each in groups) == sizes
    assert sum(each["bytes"] * each["on"][0] for each in groups) == pytest.approx(sizes * found["on"][0], rel=1e-4)
    assert sum(each["bytes"] for each in found["libraries"].values()) == sizes
    assert found["unseen"]["all"]["documents"] == len(experiment.documents("unseen"))
    assert {"on", "off", "memory 1/4", "memory 1", "oracle", "baseline"} <= set(found["unseen"]["other"])
    assert found["retro_runs"][0]["curves"]["oracle"][0] == [2] and "licences" in found["corpus"]


def test_what_is_there_is_not_repeated_and_another_recipe_is_refused(trial, capsys):
    experiment, folder = trial
    before = {file: file.stat().st_mtime_ns for file in folder.glob("*.json")}
    experiment.train("retro", 0)
    experiment.test("retro", 0)
    assert before == {file: file.stat().st_mtime_ns for file in folder.glob("*.json")}
    with pytest.raises(SystemExit, match="made with"):
        sources.Experiment(recipe_of(steps="3"), folder).train("retro", 0)
    with pytest.raises(SystemExit, match="was packed with"):
        sources.Experiment(recipe_of(tokenizer="700"), folder)


def test_a_store_is_built_again_without_bert_from_the_neighbours(trial, tmp_path):
    _, folder = trial
    store.build_store(folder / "packed", tmp_path, 256, "no/such/bert")
    assert (np.load(tmp_path / "knns.npy") == np.load(folder / "store" / "knns.npy"))[:, : store.KEPT].all()


def test_ratios_are_of_sums_and_their_interval_is_of_the_same_documents():
    documents = [{"bytes": 10}] * 50
    baseline = np.random.default_rng(0).uniform(1, 9, (3, 50))
    found = results.ratio((0.9 * baseline).tolist(), baseline.tolist(), documents)
    assert found["all"] == pytest.approx(0.9) and found["seeds"] == [pytest.approx(0.9)] * 3
    assert found["interval"] == [pytest.approx(0.9), pytest.approx(0.9)]
