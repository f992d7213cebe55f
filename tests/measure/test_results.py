"""experiments/evidence.py, from its recipes to the committed results, which must agree with one another."""

import csv
import importlib
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from retro_nb import RETRO
from retro_nb.common.arrays import ROOT
from retro_nb.lab.sweep import read_sweep
from retro_nb.measure.results import chunk_results, results

with pytest.MonkeyPatch.context() as patched:
    patched.syspath_prepend(ROOT / "experiments")
    evidence = importlib.import_module("evidence")


def parameters(model: RETRO, retrieval: bool) -> int:
    """Those that matter: without neighbours a random change of the others leaves the logits as they are."""
    return sum(p.numel() for name, p in model.named_parameters() if retrieval or not evidence.is_retrieval(name))


@pytest.mark.parametrize("name", evidence.CORPORA)
def test_the_baseline_is_as_large(name):
    recipe = evidence.read_recipe(name, {})
    with torch.device("meta"):
        retro, baseline = (RETRO(**recipe["model"] | recipe[model]) for model in evidence.MODELS)
    assert parameters(baseline, False) == pytest.approx(parameters(retro, True), rel=0.02)
    assert recipe["knn"] > 0 and recipe["fit"]["steps"] > 0


def test_what_only_reads_neighbours_is_told_by_its_name():
    sizes = dict(enc_dim=16, enc_depth=1, dec_dim=16, dec_depth=2, dec_cross_attn_layers=(2,), heads=2, dim_head=8)
    model = RETRO(num_tokens=50, max_seq_len=16, chunk_size=4, **sizes)
    seq = torch.randint(1, 50, (2, 17))
    model(seq, return_loss=True).backward()
    unused = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert {name for name in unused if not evidence.is_retrieval(name)} <= {"token_emb.weight"}
    assert {name for name, _ in model.named_parameters() if evidence.is_retrieval(name)} <= unused


def test_values_take_the_places_of_their_names():
    recipe = evidence.read_recipe("almanac", {"towns": "50", "dec_dim": "128", "steps": "7"})
    assert recipe["corpus"]["towns"] == 50 and recipe["model"]["dec_dim"] == 128 and recipe["fit"]["steps"] == 7
    with pytest.raises(SystemExit, match="-p town: not in the recipe of almanac"):
        evidence.read_recipe("almanac", {"town": "50"})


def test_a_perfect_retriever_finds_the_same_chunk_of_the_twin():
    doc_ids = np.repeat([0, 1, 2, 3], [3, 2, 2, 4])
    found = evidence.Experiment.twins(SimpleNamespace(doc_ids=doc_ids, recipe={"knn": 2}))
    assert found[:, 0].tolist() == [3, 4, -1, 0, 1, 7, 8, 5, 6, -1, -1] and (found[:, 1] == -1).all()


# a whole experiment, with two small trainings

SMALL = {"towns": "8", "keep_out": "0.25", "steps": "2", "batch_size": "2", "eval_every": "2"}
CHANGES = [("towns", "9"), ("steps", "3")]
THIN = {"enc_dim": "32", "dec_dim": "32", "heads": "2", "dim_head": "16"}


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    """The almanac's experiment on eight towns, once trained and measured, and where its results are."""
    folder = tmp_path_factory.mktemp("evidence")
    experiment = evidence.Experiment("almanac", evidence.read_recipe("almanac", SMALL | THIN), folder)
    for model in evidence.MODELS:
        experiment.run(model, 0)
    experiment.collect()
    return experiment, folder


def test_nothing_that_is_measured_was_trained_on_or_can_be_found(trial):
    experiment, _ = trial
    measured = set(experiment.measured)
    assert len(measured) == 2 and all(number % 2 for number in measured)
    trained = set(experiment.data.sequence_documents[experiment.train.indices].tolist())
    assert not trained & (measured | {number - 1 for number in measured}) and len(trained) == 12
    found = set(experiment.doc_ids[experiment.knns[experiment.knns >= 0]].tolist())
    assert not found & measured and found & {number - 1 for number in measured}


def test_a_smaller_database_has_so_many_documents(trial):
    experiment, _ = trial
    for share in evidence.SHARES.values():
        found = np.load(experiment.store / f"share-{share}-0.npy")
        documents = set(experiment.doc_ids[found[found >= 0]].tolist())
        assert len(documents) <= max(1, round(share * 14)) and not documents & set(experiment.measured)


def test_a_fact_counts_where_the_chunk_before_has_found_its_town(trial):
    experiment, _ = trial
    told = np.load(experiment.store / "facts.npy")
    for row, place in zip(*experiment.facts.nonzero(), strict=True):
        assert told[row, place] and experiment.doc_ids[row] == experiment.doc_ids[row - 1]
        near = experiment.knns[row - 1, : experiment.recipe["knn"]]
        assert experiment.doc_ids[row] // 2 in experiment.doc_ids[near[near >= 0]] // 2


def test_results_models_and_card_are_left_and_not_made_again(trial, capsys, monkeypatch):
    experiment, folder = trial
    found = json.loads((folder / "results" / "almanac.json").read_text(encoding="utf-8"))
    assert all(len(found[mode]) == 1 for mode in (*evidence.MODES, "baseline", "perfect"))
    assert list(found["sweeps"]["k"]) == ["0", "1", "2", "4", "8", "16"]
    assert list(found["sweeps"]["database"]) == ["1/16", "1/8", "1/4", "1/2", "1"]
    assert found["sweeps"]["database"]["1"] == found["sweeps"]["k"]["4"]
    assert RETRO.from_pretrained(folder / "checkpoints" / "almanac").config["dec_dim"] == 32
    assert f"{found['on'][0]:.4f} with its neighbours" in (folder / "checkpoints" / "almanac" / "README.md").read_text()
    monkeypatch.setattr(evidence, "fit", None)
    experiment.run("retro", 0)
    assert "is there already" in capsys.readouterr().out


def test_what_was_made_with_other_settings_is_refused(trial):
    _, folder = trial
    recipes = [evidence.read_recipe("almanac", SMALL | THIN | {name: value}) for name, value in CHANGES]
    with pytest.raises(SystemExit, match=r"store was made with .*'towns': 8.* this is .*'towns': 9.*remove it"):
        evidence.Experiment("almanac", recipes[0], folder)
    other = evidence.Experiment("almanac", recipes[1], folder)
    with pytest.raises(SystemExit, match=r"retro-0\.json was made with"):
        other.run("retro", 0)


# what is committed


RUN = [name for name in evidence.CORPORA if (evidence.RESULTS / f"{name}.json").exists()]  # others are recipes only


def test_results_of_the_first_three_are_committed():
    assert {"almanac", "speeches", "docstrings"} <= set(RUN)


@pytest.mark.parametrize("corpus", RUN)
def test_committed_results_are_of_the_recipe(corpus):
    found = results(corpus)
    assert found["settings"] == evidence.read_recipe(corpus, {})
    assert {len(found[mode]) for mode in ("baseline", "on", "off", "shuffled")} == {3}
    assert found["command"] == f"python experiments/evidence.py {corpus}"


@pytest.mark.parametrize("corpus", ["speeches", "docstrings"])
def test_bits_per_byte_follow_from_the_documents_and_these_from_the_chunks(corpus):
    found, chunks = results(corpus), chunk_results(corpus)
    size = sum(found["documents"]["bytes"])
    assert chunks["bytes"].sum() == size
    for mode in ("baseline", "on", "off", "shuffled"):
        nats = np.array(found["documents"]["nats"][mode])
        assert found[mode] == pytest.approx((nats.sum(axis=1) / size / math.log(2)).tolist())
        assert chunks[f"nats_{mode}"].sum(axis=1) == pytest.approx(nats.sum(axis=1), rel=1e-4)
    assert ((0 <= chunks["overlap"]) & (chunks["overlap"] <= 1)).all()
    assert not np.isin(chunks["knns"], chunks["rows"]).any(), "what is held out is in the database"


def test_the_almanacs_proof():
    """Where the town is found: a model that reads pays next to nothing, one that cannot pays the entropy."""
    found = results("almanac")
    assert max(found["on"]) <= 0.15 * min(found["baseline"])
    assert min(found["shuffled"]) >= max(found["off"])
    assert found["baseline"] == pytest.approx([math.log(40)] * 3, rel=0.01) and found["entropy"] == math.log(40)
    assert max(found["perfect"]) <= min(found["on"])


@pytest.mark.parametrize("name", ["k", "database"])
def test_the_sweeps_of_memory_ran_to_their_ends(name):
    plan = read_sweep(ROOT / "experiments" / f"sweep_{name}.yaml")
    with (evidence.RESULTS / f"sweep-{name}.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [[float(row[axis]) for axis in plan.axes] for row in rows] == [
        [point[axis] for axis in plan.axes] for point in plan.points
    ]
    assert all(row["status"] == "done" for row in rows)
    least = min(float(row["nats"]) for row in rows)
    assert least < 0.05 < 3 < max(float(row["nats"]) for row in rows), "from reading to guessing"


@pytest.mark.parametrize("name", [name for name in evidence.CARD_TEXTS if name in RUN])
def test_cards_say_what_was_measured(name):
    found, folder = results(name), ROOT / "data" / "checkpoints" / name
    card = " ".join((folder / "README.md").read_text(encoding="utf-8").split())
    for mode in ("on", "off", "shuffled", "baseline"):
        assert f"{found[mode][0]:.4f}" in card
    assert re.search(rf"{found['retro_runs'][0]['parameters'] / 1e6:.1f} million parameters", card)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    recipe = evidence.read_recipe(name, {})
    assert {key: config[key] for key in recipe["model"]} == recipe["model"]


def test_the_box_is_small():
    assert sum(file.stat().st_size for file in (ROOT / "data" / "checkpoints").rglob("*") if file.is_file()) <= 100e6


def test_results_that_are_not_there():
    with pytest.raises(FileNotFoundError, match=r"novels\.json is not in .*almanac\.json.*evidence\.py writes it"):
        results("novels")
