"""What experiments/sources.py trains: RETRO, its baseline, and the controls. The recipe has an entry of each name.

retro       reads the neighbours that MiniLM's vectors find
baseline    a transformer with as many parameters
decoder     RETRO's own decoder without what reads: the paper's baseline
flops       a transformer that takes as many operations a token in training
mixed       RETRO trained with some chunks' neighbours replaced (sources_search.mixed)
bm25        RETRO trained and measured with the neighbours that BM25 finds
box         a RETRO small enough to come with the project
retrofit    the trained baseline, frozen, with what reads trained on top of it (RETROfit, paper, section 4.2)
longer      the trained baseline, trained on for as many tokens, without neighbours
"""

from typing import Any, NamedTuple

import torch
from evidence import is_retrieval

from retro_nb import RETRO
from retro_nb.planning.flops import flops_per_token


class Kind(NamedTuple):
    retrieves: bool
    retriever: str = "minilm"
    begins_as: str | None = None  # another model, whose trained weights it begins with


MODELS = {
    "retro": Kind(True),
    "baseline": Kind(False),
    "decoder": Kind(False),
    "flops": Kind(False),
    "mixed": Kind(True),
    "bm25": Kind(True, "bm25"),
    "box": Kind(True),
    "retrofit": Kind(True, begins_as="baseline"),
    "longer": Kind(False, begins_as="baseline"),
}
COMPARED = ("retro", "baseline")  # the others are trained if they are named
REPLACED = ("random", "own")  # shares of chunks whose neighbours are replaced in training
FITTED = ("steps", "lr")  # settings of the training that a model may have of its own


def settings_of(recipe: dict[str, Any], model: str) -> dict[str, Any]:
    """The part of a recipe on which a model depends: without the entries of the others."""
    return {name: value for name, value in recipe.items() if name not in MODELS or name == model}


def replaced(recipe: dict[str, Any], model: str) -> dict[str, float]:
    """The shares of chunks whose neighbours are replaced in training; empty for all models but "mixed"."""
    return {name: recipe[model][name] for name in REPLACED if name in recipe[model]}


def build_model(recipe: dict[str, Any], model: str, v: int) -> RETRO:
    """The model, untrained, for a vocabulary of v tokens."""
    own = {name: value for name, value in recipe[model].items() if name not in (*REPLACED, *FITTED)}
    return RETRO(num_tokens=v, **recipe["model"] | own)


def fit_settings(recipe: dict[str, Any], model: str) -> dict[str, Any]:
    """The arguments of `fit`."""
    return recipe["fit"] | {name: recipe[model][name] for name in FITTED if name in recipe[model]}


@torch.no_grad()
def with_readers(trained: RETRO) -> RETRO:
    """A model that was trained without neighbours, of which only what reads is trained from here on.

    The last linear map of every cross-attention begins at zero, so that at first the neighbours change nothing.
    """
    for name, weight in trained.named_parameters():
        weight.requires_grad_(is_retrieval(name))
        if "cross_attn" in name and "decoder." in name and "to_out" in name:
            weight.zero_()
    return trained


def parameters(retro: RETRO, retrieves: bool) -> int:
    """How many are used: without those that only read neighbours if none are read."""
    return sum(each.numel() for name, each in retro.named_parameters() if retrieves or not is_retrieval(name))


def cost(recipe: dict[str, Any], model: str) -> dict[str, float]:
    """Parameters, and floating-point operations a token (retro_nb.planning.flops) in training and in use."""
    retrieves = MODELS[model].retrieves
    with torch.device("meta"):
        retro = build_model(recipe, model, recipe["tokenizer"])
    sizes = {"n": recipe["model"]["max_seq_len"], "k": recipe["knn"] if retrieves else 0}
    operations = {name: flops_per_token(retro, **sizes, training=name == "training") for name in ("training", "use")}
    return {"parameters": parameters(retro, retrieves), "flops_a_token": operations}
