"""The recipes of experiments/evidence.py, and what it takes for a perfect retriever; the training itself is fit's."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from retro_nb import RETRO

FILE = Path(__file__).resolve().parent.parent / "experiments" / "evidence.py"
spec = importlib.util.spec_from_file_location("evidence", FILE)
evidence = importlib.util.module_from_spec(spec)
spec.loader.exec_module(evidence)


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
    store = SimpleNamespace(ds=SimpleNamespace(doc_ids=doc_ids))
    found = evidence.Experiment._twins(SimpleNamespace(store=store, recipe={"knn": 2}))
    assert found[:, 0].tolist() == [3, 4, -1, 0, 1, 7, 8, 5, 6, -1, -1] and (found[:, 1] == -1).all()
