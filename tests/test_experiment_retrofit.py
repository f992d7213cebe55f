"""experiments/retrofit.py, from its recipes to the committed results and models, which must agree with one another."""

import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from retro_nb import RETROfit
from retro_nb.common.arrays import ROOT
from retro_nb.measure.results import results
from retro_nb.model import pretrained
from retro_nb.store import embedding

pytestmark = pytest.mark.slow

with pytest.MonkeyPatch.context() as patched:
    patched.syspath_prepend(ROOT / "experiments")
    experiment = importlib.import_module("retrofit")

MODELS, BOX = experiment.MODELS, ("almanac-lm", "almanac-retrofit")
CORPUS = {"towns": "4", "keep_out": "0.5", "tokenizer": "400", "n_positions": "256", "max_seq_len": "256"}
TRAINING = {"steps": "20", "batch_size": "1", "eval_every": "10", "lr": "0.01"}
THIN = {"n_embd": "32", "n_layer": "2", "n_head": "2", "n_inner": "48", "enc_dim": "32", "heads": "2", "dim_head": "16"}
SMALL = CORPUS | TRAINING | THIN


def call(*arguments: object, settings: dict[str, str] | None = None) -> None:
    """The script with these arguments, and settings of the recipe."""
    given = [part for pair in (settings or {}).items() for part in ("-p", *pair)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["retrofit.py", *map(str, arguments), *given])
        experiment.main()


def read(folder: Path) -> dict:
    return json.loads((folder / "results" / "almanac-retrofit.json").read_text(encoding="utf-8"))


def saved(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def size(folder: Path) -> int:
    return sum(weight.numel() for weight in saved(folder).values())


def check_results(found: dict, corpus: str, models: list[str], seeds: list[int]) -> None:
    """All seeds of these models, each measured in every way, and what must be so whatever they have learnt."""
    part = f" --models {' '.join(models)}" if len(models) < len(MODELS) else ""
    assert found["command"] == f"python experiments/retrofit.py {corpus}{part}"
    assert list(found["runs"]) == models and [name for name in MODELS if name in found] == models
    recipe = found["settings"]
    for model in models:
        modes = ["off"] if model == "baseline" else ["on", "off", "shuffled"]
        assert list(found[model]) == modes and {len(found[model][mode]) for mode in modes} == {len(seeds)}
        assert [run["seed"] for run in found["runs"][model]] == seeds
        if model.startswith("retrofit"):
            assert found[model]["off"] == found["baseline"]["off"], "the language model has changed"
        ten = 10 if model.endswith("-tenth") else 1
        steps, every = (max(1, recipe["fit"][name] // ten) for name in ("steps", "eval_every"))
        for run in found["runs"][model]:
            counted = list(range(every, steps + 1, every))
            assert {name: at for name, (at, _) in run["curves"].items()} == dict.fromkeys(modes, counted)
            assert len(run["tokens"]) == len(counted) and run["tokens"] == sorted(run["tokens"])
            n = recipe["model"]["max_seq_len"]
            assert 0 < run["tokens"][-1] <= steps * recipe["fit"]["batch_size"] * n


def check_sizes(found: dict) -> tuple[int, int]:
    """Weights of the language model, and what is added to it: of all models, which train one or other or both."""
    runs = found["runs"].items()
    counts = {model: {(run["parameters"], run["trained"]) for run in each} for model, each in runs}
    ((own, trained),) = counts.pop("baseline")
    assert own == trained
    ((whole, _),) = counts["scratch"]
    for model, each in counts.items():
        assert each == {(whole, whole - own if model.startswith("retrofit") else whole)}
    return own, whole - own


def check_cards(found: dict, box: Path) -> None:
    lm, added = (" ".join((box / name / "README.md").read_text(encoding="utf-8").split()) for name in BOX)
    on, off, shuffled = (f"{found['retrofit'][mode][0]:.3f}" for mode in ("on", "off", "shuffled"))
    assert f"{on} with its neighbours, {off} without (which is almanac-lm, to the last bit), {shuffled} with" in added
    assert f"nats per fact: {found['baseline']['off'][0]:.3f} (guessing: {found['entropy']:.3f})" in lm
    assert f"on one {found['runs']['baseline'][0]['device']}," in lm
    recipe = found["settings"]
    assert f"{recipe['tokenizer']} entries" in lm and f"of {recipe['corpus']['towns']} invented towns" in lm
    for card, model in ((lm, "baseline"), (added, "retrofit")):
        assert f"the first of {len(found['retrofit']['on'])} seeds of `{found['command']}`" in card
        assert f"{found['runs'][model][0]['trained'] / 1e6:.2f} million" in card


# a whole comparison, with five small trainings


@pytest.fixture(scope="module")
def trial(tmp_path_factory, tiny_bert) -> Path:
    """The almanac of four towns: all five models of one seed, trained and measured, and what is made of them."""
    folder = tmp_path_factory.mktemp("retrofit")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedding, "bert_folder", lambda bert=None: str(tiny_bert))
        call("almanac", "--seeds", 0, "--runs", folder, settings=SMALL)
    return folder


def test_results_are_complete_and_consistent(trial):
    found = read(trial)
    check_results(found, "almanac", list(MODELS), seeds=[0])
    assert found["settings"] == experiment.read_recipe("almanac", SMALL, experiment.__file__)
    assert found["unit"] == "nats per fact token" and found["facts"] > 0
    for model in MODELS[1:]:
        assert found[model]["on"] != found[model]["off"] != found[model]["shuffled"], "nothing was read"
    values = [found[model]["on"][0] for model in MODELS[1:]]
    assert len(set(values)) == 4 and min(values) > 0
    for model in MODELS:  # all documents that are measured were watched
        run = json.loads((trial / "almanac" / f"{model}-0.json").read_text(encoding="utf-8"))
        assert {mode: curve[-1] for mode, (_, curve) in run["curves"].items()} == run["values"]


def test_what_is_trained_is_what_is_saved(trial):
    own, added = check_sizes(read(trial))
    assert own == size(trial / "almanac" / "lm-0") and added == size(trial / "almanac" / "retrofit")


def test_the_language_model_is_saved_with_its_tokenizer_and_the_two_go_together(trial):
    retro = RETROfit.from_pretrained(trial / "almanac" / "retrofit")
    assert retro.frozen and list(retro.blocks) == [2] and retro.tokenizer.size == 400
    lm = saved(trial / "almanac" / "lm-0")
    for name, weight in retro.backbone.named_parameters():
        assert torch.equal(weight, lm[name])


def test_what_is_there_is_not_made_again(trial, capsys, monkeypatch):
    before, results_file = read(trial), trial / "results" / "almanac-retrofit.json"
    monkeypatch.setattr(experiment, "fit", None)
    results_file.unlink()
    call("almanac", "--seeds", 0, "--runs", trial, settings=SMALL)
    assert capsys.readouterr().out.count("is there already") == len(MODELS)
    assert read(trial) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"towns": "5"}, r"store was made with .*'towns': 4.* this is .*'towns': 5.*remove it"),
        ({"tokenizer": "300"}, r"store was made with .*'tokenizer': 400.* this is .*'tokenizer': 300"),
        ({"steps": "3"}, r"baseline-0\.json was made with"),
        ({"n_inner": "32"}, r"baseline-0\.json was made with"),
    ],
)
def test_what_was_made_with_other_settings_is_refused(trial, changes, message):
    with pytest.raises(SystemExit, match=message):
        call("almanac", "--seeds", 0, "--runs", trial, settings=SMALL | changes)


def test_a_recipe_is_changed_in_a_folder_of_its_own(capsys):
    with pytest.raises(SystemExit):
        call("almanac", settings={"steps": "3"})
    assert "-p changes the recipe of what is committed: pass --runs FOLDER too" in capsys.readouterr().err


# a part of it


@pytest.fixture
def part(trial, tmp_path) -> Path:
    """A copy of the five models, of which nothing has been made yet."""
    shutil.copytree(trial / "almanac", tmp_path / "almanac")
    return tmp_path


def test_models_of_which_all_seeds_are_there_are_collected(part, monkeypatch):
    """Whichever these are. The box is left as it is without the two that belong in it."""
    first = (part / "almanac" / "scratch-0.json").read_text(encoding="utf-8")
    (part / "almanac" / "scratch-1.json").write_text(first.replace('"seed": 0', '"seed": 1'), encoding="utf-8")
    call("almanac", "--seeds", 0, 1, "--models", "scratch", "--runs", part, settings=SMALL)
    found = read(part)
    check_results(found, "almanac", ["scratch"], seeds=[0, 1])
    assert found["settings"] == experiment.read_recipe("almanac", SMALL, experiment.__file__)
    shutil.rmtree(part / "results")
    monkeypatch.setattr(experiment.Comparison, "run", lambda self, model, seed: None)
    call("almanac", "--seeds", 0, 1, "--models", "scratch", "retrofit", "--runs", part, settings=SMALL)
    assert [path.name for path in part.iterdir()] == ["almanac"], "another process is still at work"


def test_models_of_two_recipes_are_not_collected(part):
    file = part / "almanac" / "scratch-tenth-0.json"
    about = json.loads(file.read_text(encoding="utf-8"))
    about["settings"]["dropout"] = 0.5
    file.write_text(json.dumps(about), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"scratch-tenth-0\.json was made with .*'dropout': 0\.5"):
        call("almanac", "--seeds", 0, "--models", "baseline", "--runs", part, settings=SMALL)
    assert not (part / "results").exists()


# the box


def test_what_is_in_the_box_is_found_by_its_name_and_scores_the_same(trial, monkeypatch):
    box, found = trial / "checkpoints", read(trial)
    monkeypatch.setattr(pretrained, "INCLUDED", box)
    boxed, whole = (RETROfit.from_pretrained(each) for each in ("almanac-retrofit", trial / "almanac" / "retrofit"))
    names = [each.config["backbone"].pop("name") for each in (boxed, whole)]
    assert names == ["almanac-lm", str(trial / "almanac" / "lm-0")]
    for weight, exact in zip(boxed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(weight, exact.half().float())
    comparison = experiment.Comparison("almanac", experiment.read_recipe("almanac", SMALL, experiment.__file__), trial)
    for mode, (value,) in found["retrofit"].items():
        assert comparison.value(comparison.losses(boxed, mode)) == pytest.approx(value, abs=2e-4)
    assert abs(found["retrofit"]["on"][0] - found["retrofit"]["off"][0]) > 2e-3, "or the comparison says nothing"

    lm, tokenizer = (kind.from_pretrained(box / "almanac-lm") for kind in (AutoModelForCausalLM, AutoTokenizer))
    seq = torch.randint(3, 400, (2, 100), generator=torch.Generator().manual_seed(0))
    assert lm.dtype == torch.float32 and torch.equal(boxed(seq), lm.eval()(seq).logits)
    text = "The town of Alder lies by a river."
    assert [tokenizer.encode(text, add_special_tokens=False)] == boxed.tokenizer.encode([text])


def test_the_box_holds_halves_and_nothing_else(trial):
    names = {"almanac-lm": {"tokenizer.json", "tokenizer_config.json"}, "almanac-retrofit": set()}
    for name, more in names.items():
        folder = trial / "checkpoints" / name
        assert {file.name for file in folder.iterdir()} == {"README.md", "config.json", "model.safetensors", *more}
        assert {weight.dtype for weight in saved(folder).values()} == {torch.float16}


def test_cards_say_what_was_measured(trial):
    check_cards(read(trial), trial / "checkpoints")


# what is committed


@pytest.mark.parametrize("corpus", ["almanac", "speeches"])
def test_committed_results_are_of_the_recipe_and_of_three_seeds(corpus):
    found = results(f"{corpus}-retrofit")
    check_results(found, corpus, [model for model in MODELS if model in found["runs"]], seeds=[0, 1, 2])
    assert found["settings"] == experiment.read_recipe(corpus, {}, experiment.__file__)
    assert corpus != "almanac" or list(found["runs"]) == list(MODELS)
    check_sizes(found)


def test_the_almanacs_comparison():
    """RETROfit learns to copy facts, but not in a tenth of the training; from scratch that goes faster and further."""
    found = results("almanac-retrofit")
    assert max(found["retrofit"]["on"]) < 0.1 * found["entropy"]
    assert min(found["retrofit-tenth"]["on"]) > 0.99 * found["entropy"] > 2.5 > max(found["scratch-tenth"]["on"][1:])
    assert max(found["scratch"]["on"]) < min(found["retrofit"]["on"])
    assert min(found["retrofit"]["shuffled"]) > max(found["baseline"]["off"]) >= found["entropy"]


def test_committed_models_are_those_of_the_results():
    found, box = results("almanac-retrofit"), ROOT / "data" / "checkpoints"
    check_cards(found, box)
    assert check_sizes(found) == tuple(size(box / name) for name in BOX)
    retro, recipe = RETROfit.from_pretrained("almanac-retrofit"), found["settings"]
    assert {name: retro.config[name] for name in recipe["model"]} == recipe["model"]
    architecture = retro.config["backbone"]["architecture"]
    assert {name: architecture[name] for name in recipe["backbone"]} == recipe["backbone"]
    assert retro.config["backbone"]["name"] == "almanac-lm" and retro.tokenizer.size == recipe["tokenizer"]
    run = found["runs"]["retrofit"][0]
    assert retro.trained_share == run["trained"] / run["parameters"]
