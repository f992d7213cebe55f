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

from retro_nb import RETRO, Store, StoreSettings, code, get_tokenizer
from retro_nb.common.arrays import ROOT
from retro_nb.measure.evaluation import token_losses
from retro_nb.measure.leakage import shared_runs
from retro_nb.model.pretrained import INCLUDED
from retro_nb.reference import documents_to_chunks_
from retro_nb.store.chunking import special_ids
from retro_nb.text.duplicates import near_duplicates
from retro_nb.text.tokens import SpecialIds

pytestmark = pytest.mark.slow

with pytest.MonkeyPatch.context() as patched:
    patched.syspath_prepend(ROOT / "experiments")
    parts = ("", "_export", "_knnlm", "_models", "_results", "_search", "_store")
    sources, release, knnlm, models, results, search, store = (
        importlib.import_module(f"sources{part}") for part in parts
    )

SMALL = {"packages": "[alpha, beta, other]", "unseen": "[other]", "tokenizer": "600", "test": "0.2", "valid": "0.1"}
TRIED = ("retro", "baseline", "decoder", "mixed", "bm25", "retrofit", "longer")
NAMES = ("chunks", "seqs", "doc_ids", "chunks.bytes")
THIN = {
    "max_seq_len": "256",
    "dec_depth": "6",
    "enc_dim": "16",
    "dec_dim": "16",
    "heads": "2",
    "dim_head": "8",
    "enc_depth": "1",
}
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
    """One seed of most models, and the folder with everything."""
    folder, recipe = tmp_path_factory.mktemp("code"), recipe_of()
    store.pack(recipe, folder / "packed")
    for retriever in store.RETRIEVERS:
        store.build_store(folder / "packed", folder / "store", 256, str(tiny_bert), retriever)
    experiment = sources.Experiment(recipe, folder)
    for model in TRIED:
        experiment.train(model, 0)
        experiment.test(model, 0)
    experiment.knnlm(0)
    results.collect(folder / "packed", folder, folder / "results" / "code.json")
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
    for model in ("retro", "bm25"):
        knns = experiment.knns(model)
        own, near = np.broadcast_to(experiment.doc_ids[rows][:, None], knns.shape)[knns >= 0], knns[knns >= 0]
        assert (part_of(experiment, near) == "train").all() and (experiment.doc_ids[near] != own).all()
    assert (experiment.knns("retro") != experiment.knns("bm25")).any()


def test_the_memory_holds_more_and_more_of_the_other_files(trial):
    experiment, _ = trial
    rows = store.rows_of(experiment.packed, experiment.doc_ids, "unseen")
    shares, found = [], np.load(experiment.folder / "packed" / "neighbours.npz")
    for name in store.MEMORY:
        knns = experiment.with_rows(experiment.knns("retro"), "unseen", found[f"memory-{name}"])
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
        patched.setattr(search, "TILES", {"cpu": (3, 64)})
        distances, found = search.nearest(vectors, queries, database, doc_ids, k, torch.device("cpu"))
    for query, near, far in zip(queries, found, distances, strict=True):
        others = database[doc_ids[database] != doc_ids[query]]
        exact = ((vectors[others].astype(np.float64) - vectors[query]) ** 2).sum(axis=1)
        order = np.argsort(exact)[:k]
        assert near[: len(order)].tolist() == others[order].tolist() and (near[len(order) :] == -1).all()
        np.testing.assert_allclose(far[: len(order)], exact[order], rtol=1e-4, atol=1e-4)


@given(st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_runs_are_as_long_as_those_of_the_library(seed):
    rng, special = np.random.default_rng(seed), SpecialIds(0, 1, 2)
    chunks, texts = rng.integers(0, 6, (4, 16)), rng.integers(0, 6, (4, 3, 32))
    texts[0, 0, 5:21] = chunks[0]
    found = store.longest_runs(torch.from_numpy(chunks), torch.from_numpy(texts), special)
    assert found.tolist() == [int(shared_runs(*each, special).max()) for each in zip(chunks, texts, strict=True)]


@given(st.integers(0, 2**32), st.integers(1, 25), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_matches_are_those_of_all_scores_in_a_loop(seed, documents, k):
    rng, special = np.random.default_rng(seed), SpecialIds(0, 1, 2)
    doc_ids = np.repeat(np.arange(documents), rng.integers(1, 9, documents))
    chunks = rng.integers(0, 12, (len(doc_ids), 7)).astype(np.uint16)
    database, queries = (np.flatnonzero(rng.random(len(doc_ids)) < share) for share in (0.7, 0.5))
    if not len(database) or not len(queries):
        return
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(search, "TILES", {"cpu": (3, 64)})
        scores, found = search.best_matches(chunks, 12, special, queries, database, doc_ids, k, torch.device("cpu"))
    words = [[token for token in chunk if token not in special] for chunk in chunks.tolist()]
    mean = sum(len(words[row]) for row in database) / len(database)
    having = [sum(word in words[row] for row in database) for word in range(12)]

    def bm25(query: int, row: int) -> float:
        total = 0.0
        for word in words[query]:
            often, length = words[row].count(word), len(words[row]) / mean if mean else 0
            idf = math.log(1 + (len(database) - having[word] + 0.5) / (having[word] + 0.5))
            total += idf * often / (often + search.K1 * (1 - search.B + search.B * length)) if often else 0
        return total

    for query, near, high in zip(queries, found, scores, strict=True):
        others = database[doc_ids[database] != doc_ids[query]]
        exact = {row: bm25(query, row) for row in others.tolist()}
        best = sorted(exact.values(), reverse=True)[:k]
        assert (near[len(best) :] == -1).all()
        np.testing.assert_allclose(high[: len(best)], best, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose([exact[row] for row in near[: len(best)].tolist()], best, rtol=1e-4, atol=1e-5)


@given(st.integers(0, 2**32), st.floats(0, 0.5), st.floats(0, 0.5))
@settings(max_examples=40, deadline=None)
def test_replaced_neighbours_tell_nothing_of_what_comes(seed, random, own):
    rng = np.random.default_rng(seed)
    doc_ids = np.repeat(np.arange(30), rng.integers(1, 30, 30))
    database = np.flatnonzero(np.isin(doc_ids, np.flatnonzero(rng.random(30) < 0.7)))
    if len(set(doc_ids[database])) < 2:
        return
    knns = np.full((len(doc_ids), 2), -1)  # whatever is no neighbour any more was replaced
    mixed = search.mixed(knns, doc_ids, database, random, own, seed)
    changed = (mixed >= 0).all(axis=1)
    assert (changed == (mixed >= 0).any(axis=1)).all() and not changed[
        np.setdiff1d(np.arange(len(knns)), database)
    ].any()
    rows, taken = np.nonzero(changed)[0][:, None], mixed[changed]
    assert np.isin(taken, database).all() and (knns == -1).all()
    alike = doc_ids[taken] == doc_ids[rows]
    assert (alike.all(axis=1) == alike.any(axis=1)).all() and (
        taken[alike] + 1 <= np.broadcast_to(rows, taken.shape)[alike]
    ).all()
    error = 4 * (0.25 / len(database)) ** 0.5
    assert abs((~alike.any(axis=1)).sum() / len(database) - random) < error
    inner = np.append(False, doc_ids[1:] == doc_ids[:-1])[database].mean()
    assert abs(alike.any(axis=1).sum() / len(database) - own * inner) < error


def test_the_models_are_as_large_as_they_are_said_to_be():
    recipe = sources.read_recipe("code", {}, sources.__file__)
    costs = {model: models.cost(recipe, model) for model in models.MODELS}
    sizes = {model: cost["parameters"] for model, cost in costs.items()}
    assert sizes["retro"] <= sizes["baseline"] <= 1.05 * sizes["retro"]
    assert 2 * sizes["box"] < release.LARGEST - 20_000  # what a file has beside the weights
    training = {model: cost["flops_a_token"]["training"] for model, cost in costs.items()}
    assert training["retro"] <= training["flops"] <= 1.05 * training["retro"]
    assert recipe["decoder"]["dec_depth"] == recipe["retro"]["dec_depth"] and sizes["decoder"] < sizes["retro"]


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
    assert found["sweeps"]["k"]["2"] == found["on"]
    assert set(found["sweeps"]["database"]) == {*store.SHARES, "ratios"}
    assert found["sweeps"]["k"]["ratios"]["2"] == found["ratios"]["on"]
    groups = [found["groups"][name] for name in sources.RUNS_OF_TOKENS if found["groups"][name]["bytes"]]
    assert sum(each["bytes"] for each in groups) == sizes
    assert sum(each["bytes"] * each["on"][0] for each in groups) == pytest.approx(sizes * found["on"][0], rel=1e-4)
    for each in groups:
        assert each["ratios"]["on"]["all"] == pytest.approx(each["on"][0] / each["baseline"][0])
        assert each["ratios"]["on"]["interval"][0] <= each["ratios"]["on"]["all"] <= each["ratios"]["on"]["interval"][1]
    for parts in (found["libraries"], found["copied"]):
        assert sum(each["bytes"] for each in parts.values()) == sizes
        assert sum(each["bytes"] * each["on"][0] for each in parts.values()) == pytest.approx(sizes * found["on"][0])
    assert set(found["controls"]) == set(TRIED) - {"retro", "baseline"} and set(found["costs"]) == set(TRIED)
    # Of the same depth here, and so the same model on the same batches.
    assert found["controls"]["decoder"]["ratios"]["off"]["seeds"] == [1]
    assert found["unseen"]["all"]["documents"] == len(experiment.documents("unseen"))
    assert {"on", "off", "memory 1/4", "memory 1", "oracle", "baseline"} <= set(found["unseen"]["other"])
    assert {"memory 1/4", "memory 1/2", "memory 1"} <= set(found["unseen"]["all"]["ratios"])
    assert found["retro_runs"][0]["curves"]["oracle"][0] == [2] and "licences" in found["corpus"]


def runs_of(tokens: np.ndarray) -> set[tuple[int, ...]]:
    return {tuple(tokens[i : i + 13].tolist()) for i in range(len(tokens) - 12)}


def test_what_is_copied_is_found_by_sets_of_runs(trial):
    experiment, folder = trial
    tokens = dict(enumerate(experiment.packed.tokens()))
    database = set().union(*(runs_of(tokens[number]) for number in experiment.documents("train")))
    own = [runs_of(tokens[number]) for number in experiment.documents("test")]
    assert store.copied(folder / "packed") == pytest.approx([len(each & database) / len(each) for each in own])


def test_states_are_before_the_tokens_whose_losses_evaluation_has(trial):
    experiment, _ = trial
    retro, documents = experiment.trained("baseline", 0), experiment.documents("valid")
    each = list(knnlm.states_of(retro, experiment.found, documents))
    states, tokens, nats, owners = (torch.cat(values) for values in zip(*each, strict=True))
    torch.testing.assert_close(retro.to_logits(states).log_softmax(1).gather(1, tokens[:, None])[:, 0], -nats)
    text, losses = (
        tokens != experiment.found.eos_id,
        experiment.losses(retro, "off", documents, experiment.knns("retro")),
    )
    np.testing.assert_allclose(nats[text], losses[~np.isnan(losses)], rtol=1e-4, atol=1e-5)
    assert owners[text].tolist() == np.repeat(experiment.doc_ids, 64)[~np.isnan(losses).ravel()].tolist()


def test_knnlm_is_that_of_comparing_all_states(trial, monkeypatch):
    experiment, _ = trial
    retro, train = experiment.trained("baseline", 0), experiment.documents("train")
    monkeypatch.setattr(knnlm, "SAMPLED", 300)
    monkeypatch.setattr(knnlm, "BLOCK", 64)
    some = knnlm.sample(retro, experiment.found, experiment.documents("test"), 0)
    distances, tokens = knnlm.neighbours(retro, experiment.found, train, some.states)
    each = list(knnlm.states_of(retro, experiment.found, train))
    memory, following = (torch.cat([values[i] for values in each]).double() for i in (0, 1))
    assert 100 < len(some.tokens) < 600 and len(memory) > 2 * knnlm.K
    exact, order = torch.cdist(some.states.double(), memory).square().topk(knnlm.K, largest=False)
    torch.testing.assert_close(distances.double(), exact, rtol=1e-3, atol=1e-3)
    for weight, temperature in ((0.3, 5.0), (0.0, 1.0)):
        found = knnlm.mixture(some, distances, tokens, temperature, torch.tensor([weight]))[:, 0]
        for i in range(0, len(found), 29):
            near = [math.exp(-distance / temperature) for distance in exact[i].tolist()]
            right = [following[j] == some.tokens[i] for j in order[i]]
            share = sum(value for value, same in zip(near, right, strict=True) if same) / sum(near)
            loss = -math.log(weight * share + (1 - weight) * math.exp(-some.nats[i]))
            assert found[i].item() == pytest.approx(loss, rel=0.02)


def test_the_weight_of_the_memory_is_chosen_on_validation_alone(trial):
    experiment, folder = trial
    there = json.loads((folder / "knnlm-0.json").read_text(encoding="utf-8"))
    assert there["valid"]["knnlm"] <= there["valid"]["model"]  # a weight of 0 is among the choices
    data = experiment.found.with_neighbours(experiment.knns("retro")[:, :1])
    parts = {"train": experiment.documents("train"), "valid": experiment.documents("valid")}
    other = knnlm.measure(experiment.trained("baseline", 0), data, parts | {"test": parts["train"]}, 0)
    assert [other[name] for name in ("weight", "temperature")] == [there[name] for name in ("weight", "temperature")]
    assert sum(there["tokens"]) == there["test"]["tokens"]
    assert sum(there["nats"]["knnlm"]) == pytest.approx(there["test"]["knnlm"] * there["test"]["tokens"])


@pytest.fixture
def readers(trial, tmp_path, monkeypatch):
    """A folder in which the trial's RETRO is the one for the box, and how its test is changed."""
    folder = tmp_path / "runs"
    folder.mkdir()
    for name in ("packed", "weights", "retro-0.json"):
        (folder / name).symlink_to(trial[1] / name)
    monkeypatch.setattr(release, "MODEL", "retro")

    def with_oracle(gain: float) -> Path:
        test = json.loads((trial[1] / "retro-0-test.json").read_text(encoding="utf-8"))
        test["nats"]["oracle"] = [(1 - gain) * nats for nats in test["nats"]["off"]]
        (folder / "retro-0-test.json").write_text(json.dumps(test), encoding="utf-8")
        return folder

    return with_oracle


def test_a_model_that_reads_is_exported_and_one_that_does_not_is_refused(trial, readers, tmp_path, monkeypatch):
    target = tmp_path / "box"
    with pytest.raises(SystemExit, match=r"cannot read: the very pages that come next save it 19\.0%"):
        release.export(*[readers(0.19)] * 2, target)
    with monkeypatch.context() as patched, pytest.raises(SystemExit, match="more than 1,000"):
        patched.setattr(release, "LARGEST", 1000)
        release.export(*[readers(0.21)] * 2, target)
    with monkeypatch.context() as patched, pytest.raises(SystemExit, match="seed 0 of box is not there"):
        patched.setattr(release, "MODEL", "box")
        release.export(*[readers(0.21)] * 2, target)
    assert not target.exists()
    release.export(*[readers(0.21)] * 2, target)
    retro, tokenizer = RETRO.from_pretrained(target), get_tokenizer(target)
    weights = dict(trial[0].trained("retro", 0).named_parameters())
    assert all(torch.equal(each, weights[name]) for name, each in retro.named_parameters())
    assert retro.num_tokens == tokenizer.size == trial[0].packed.tokenizer.size
    assert "save 21%" in " ".join((target / "README.md").read_text(encoding="utf-8").split())


def test_runs_from_before_a_control_was_added_still_count(trial, tmp_path):
    """Their settings had other models' entries than the recipe has now."""
    experiment, folder = trial
    before = {name: value for name, value in experiment.recipe.items() if name not in ("mixed", "bm25", "box")}
    for name in ("packed", "retro-0-test.json"):
        (tmp_path / name).symlink_to(folder / name)
    old = json.loads((folder / "retro-0.json").read_text(encoding="utf-8"))
    (tmp_path / "retro-0.json").write_text(json.dumps(old | {"settings": before}), encoding="utf-8")
    assert results.finished(tmp_path)["retro"][0]["seconds"] == old["seconds"]
    first = {model: json.loads((folder / f"{model}-0-test.json").read_text(encoding="utf-8")) for model in TRIED[:2]}
    groups = results.grouped([first["retro"]], [first["baseline"]])
    for run in first.values():  # one sum where there are documents now
        for each in run["groups"].values():
            each["nats"] = {mode: sum(nats) for mode, nats in each["nats"].items()}
    sums = results.grouped([first["retro"]], [first["baseline"]])
    for name in [name for name, each in groups.items() if each["bytes"]]:
        assert sums[name]["ratios"]["on"]["all"] == pytest.approx(groups[name]["ratios"]["on"]["all"])
        assert sums[name]["on"] == [pytest.approx(groups[name]["on"][0])]
    other = before | {"retro": {"dec_depth": 7}}
    (tmp_path / "retro-0.json").write_text(json.dumps(old | {"settings": other}), encoding="utf-8")
    with pytest.raises(SystemExit, match="other settings than its training"):
        results.finished(tmp_path)


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
    baseline = np.random.default_rng(0).uniform(1, 9, (3, 50))
    found = results.ratio((0.9 * baseline).tolist(), baseline.tolist())
    assert found["all"] == pytest.approx(0.9) and found["seeds"] == [pytest.approx(0.9)] * 3
    assert found["interval"] == [pytest.approx(0.9), pytest.approx(0.9)]


def test_a_retrofit_leaves_the_baseline_as_it_was(trial):
    experiment, _ = trial
    before, after, longer = (
        dict(experiment.trained(model, 0).named_parameters()) for model in ("baseline", "retrofit", "longer")
    )
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.startswith(("encoder.", "enc_")) or "cross_attn" in name for name in moved)
    assert any(not torch.equal(before[name], longer[name]) for name in set(before) - moved)


def test_a_retrofit_begins_as_the_baseline(trial):
    experiment, _ = trial
    begun = experiment.untrained("retrofit", 0).eval()
    tokens, near = (part[None] for part in experiment.trained_on("retrofit", 0)[0])
    with torch.no_grad():
        assert torch.equal(begun(tokens[:, :-1], near), begun(tokens[:, :-1]))


def test_the_included_model_of_code_reads(tmp_path):
    retro = RETRO.from_pretrained("code")
    settings = StoreSettings(tokenizer=str(INCLUDED / "code"), seq_len=retro.seq_len)
    store = Store.build(code(["einops"]), tmp_path, settings, progress=False)
    document = int(np.bincount(store.dataset(2).doc_ids).argmin())
    off, oracle = (
        np.nanmean(token_losses(retro, store.dataset(2), [document], mode, progress=False))
        for mode in ("off", "oracle")
    )
    assert off < 3 and oracle < 0.8 * off
