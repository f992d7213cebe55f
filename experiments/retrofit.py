"""RETROfit a language model, and compare it with RETRO from scratch (paper, section 4.2 and figure 5).

    python experiments/retrofit.py almanac                        three seeds; minutes on a GPU
    python experiments/retrofit.py speeches --seeds 1 --models baseline retrofit    a part of the work
    python experiments/retrofit.py almanac --runs /tmp/trial -p towns 300 -p steps 20 -p batch_size 2    on a CPU

The recipes are in experiments/retrofit.yaml. For each seed five models are trained that have the same layers:

    baseline         a language model without retrieval
    retrofit-tenth   the baseline, frozen, with what is added trained for a tenth of the baseline's steps
    retrofit         the same for as many steps as the baseline
    scratch-tenth    RETRO from scratch: all of the same weights trained with retrieval, for a tenth of the steps
    scratch          the same for all of them

and measured on documents that none has seen and that the database leaves out, with their neighbours (on), without
(off) and with those of another document (shuffled).

Everything lands in runs/retrofit/<corpus>; evidence.py explains how to share the work and copy its store.
The models of which all three seeds are there replace experiments/results/<corpus>-retrofit.json. The almanac's
baseline of the first seed, and what its RETROfit adds to it, replace data/checkpoints/almanac-lm and almanac-retrofit,
as float16.
"""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from evidence import WATCHED, Experiment, device_name, read_arguments, read_recipe
from evidence_store import SEEDS
from transformers import GPT2Config, GPT2LMHeadModel

from retro_nb import RETROfit, fit, get_tokenizer, retrofit
from retro_nb.common.arrays import ROOT, write_json
from retro_nb.model.backbone import load_backbone
from retro_nb.store.splits import of_documents

RUNS = ROOT / "runs" / "retrofit"
MODELS = ("baseline", "retrofit-tenth", "retrofit", "scratch-tenth", "scratch")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")

CARDS = {
    "almanac-lm": """# A language model of the almanac

A GPT-2 of {parameters:.2f} million parameters with a byte-level BPE of {tokenizer} entries, the baseline of the first
of {seeds} seeds of `{command}`: trained without retrieval on one
{device}, which other trainings shared.
AutoModelForCausalLM and AutoTokenizer read it.

- data: the almanac of {towns} invented towns, two documents of each; recipe: `almanac` in experiments/retrofit.yaml.
- nats per fact: {baseline:.3f} (guessing: {entropy:.3f}).

It knows how an almanac is written, and nothing of any town. Its word vectors began wider than GPT-2's usual 0.02, so
that what is frozen can tell words apart (see the recipe). MIT licence.
""",
    "almanac-retrofit": """# What reads for it: RETROfit of almanac-lm

{added:.2f} million weights that let the frozen language model almanac-lm read neighbours, the first of {seeds} seeds of
`{command}`. `RETROfit.from_pretrained("almanac-retrofit")` puts both together.

- nats per fact, where the right town was found: {on:.3f} with its neighbours, {off:.3f} without (which is almanac-lm,
  to the last bit), {shuffled:.3f} with those of another document. All seeds:
  experiments/results/almanac-retrofit.json.

MIT licence.
""",
}


class Comparison(Experiment):
    """The five models of one corpus."""

    default_runs = RUNS

    def backbone_folder(self, seed: int) -> Path:
        return self.folder / f"lm-{seed}"

    def make(self, model: str, seed: int) -> RETROfit:
        """The model before its training."""
        tokenizer, frozen = get_tokenizer(self.store / "tokenizer"), model.startswith("retrofit")
        options = self.recipe["model"] | {"dropout": self.recipe["dropout"]}
        torch.manual_seed(seed)
        if frozen:
            return retrofit(str(self.backbone_folder(seed)), **options)
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), self.recipe["dropout"])
        special = {"bos_token_id": tokenizer.ids.sos, "eos_token_id": tokenizer.ids.eos}
        config = GPT2Config(vocab_size=tokenizer.size, **special, **dropout, **self.recipe["backbone"])
        return retrofit(GPT2LMHeadModel(config), tokenizer=tokenizer, freeze=False, **options)

    def run(self, model: str, seed: int) -> None:
        """Train one model and measure it, unless its results are there."""
        file = self.folder / f"{model}-{seed}.json"
        if file.exists():
            self._check_settings(file, json.loads(file.read_text(encoding="utf-8"))["settings"], self.recipe)
            return print(f"{file} is there already", flush=True)
        modes = ("off",) if model == "baseline" else ("on", "off", "shuffled")
        retro, started, watched = self.make(model, seed), time.perf_counter(), self.measured[:WATCHED]

        def watch() -> dict[str, float]:
            values = {each: self.value(self.losses(retro, each, documents=watched), watched) for each in modes}
            print(f"{self.name} {model} {seed}: {time.perf_counter() - started:.0f} s {values}", flush=True)
            return values

        settings = self.recipe["fit"] | {"retrieval": model != "baseline", "seed": seed}
        settings |= self.recipe["retrofit"] if retro.frozen else {}
        if model.endswith("-tenth"):
            settings |= {name: max(1, settings[name] // 10) for name in ("steps", "eval_every", "log_every")}
        valid = of_documents(self.data, watched[:8])
        history = fit(retro, self.train, valid, measure=watch, progress=False, **settings)
        minutes = (time.perf_counter() - started) / 60
        values = {mode: self.value(self.losses(retro, mode)) for mode in modes}
        counts = {"parameters": sum(p.numel() for p in self._used(retro, model))}
        counts |= {"trained": sum(p.numel() for p in self._used(retro, model) if p.requires_grad)}
        about = {"model": model, "seed": seed, **counts, "minutes": minutes, "device": device_name(), "values": values}
        about["curves"] = {name: history.curve(name) for name in modes}
        about["tokens"] = [record["tokens"] for record in history if "valid_loss" in record]
        self._save(retro, model, seed)
        write_json(file, about | {"settings": self.recipe})
        print(f"{self.name}, {model}, seed {seed}: {values}, {minutes:.1f} minutes", flush=True)

    @staticmethod
    def _used(retro: RETROfit, model: str) -> list[torch.nn.Parameter]:
        return list((retro.backbone if model == "baseline" else retro).parameters())

    def _save(self, retro: RETROfit, model: str, seed: int) -> None:
        """The baseline as any language model is saved, with its tokenizer; and what RETROfit adds to it."""
        if model == "baseline":
            folder = self.backbone_folder(seed)
            retro.backbone.save_pretrained(folder)
            for name in TOKENIZER:
                shutil.copy(self.store / "tokenizer" / name, folder)
        elif model == "retrofit" and seed == 0:
            retro.save_pretrained(self.folder / "retrofit")

    def collect(self, models: list[str]) -> None:
        """Write experiments/results/<corpus>-retrofit.json from the runs of these models."""
        runs = {model: self._finished(model) for model in models}
        for run in (run for each in runs.values() for run in each):  # some may have been made long ago
            self._check_settings(self.folder / f"{run['model']}-{run['seed']}.json", run["settings"], self.recipe)
        found: dict[str, Any] = {
            model: {mode: [run["values"][mode] for run in each] for mode in each[0]["values"]}
            for model, each in runs.items()
        }
        part = "" if len(models) == len(MODELS) else f" --models {' '.join(models)}"
        found |= {"unit": "bits per byte", "command": f"python experiments/retrofit.py {self.name}{part}"}
        if self.facts is not None:
            counted = int(self.facts[self.rows].sum())
            found |= {"unit": "nats per fact token", "entropy": self.about["entropy"], "facts": counted}
            found |= {"hit_rates": self.hit_rates()}
        names = ("seed", "parameters", "trained", "minutes", "device", "curves", "tokens")
        found["runs"] = {model: [{name: run[name] for name in names} for run in each] for model, each in runs.items()}
        found["settings"] = self.recipe
        write_json(self.results / f"{self.name}-retrofit.json", found)
        print(f"written: {self.results / self.name}-retrofit.json", flush=True)
        complete = {"baseline", "retrofit"} <= set(models) and (self.folder / "retrofit").exists()
        if self.name == "almanac" and complete:
            export(self.folder, self.checkpoints, found)


def export(folder: Path, checkpoints: Path, found: dict[str, Any]) -> None:
    """Write the first seed's baseline as a language model, what its RETROfit adds to it, and their cards."""
    lm, added = checkpoints / "almanac-lm", checkpoints / "almanac-retrofit"
    backbone = load_backbone(folder / "lm-0")
    backbone.config.name_or_path = lm.name  # found by it wherever the project lies
    retro = RETROfit.from_pretrained(folder / "retrofit", backbone, tokenizer=folder / "lm-0")
    retro.reader.half()
    retro.save_pretrained(added)
    backbone.half().save_pretrained(lm)
    config = json.loads((lm / "config.json").read_text(encoding="utf-8"))
    write_json(lm / "config.json", config | {"dtype": "float32"})  # to compute in; it is stored in half of it
    (lm / "generation_config.json").unlink()
    for name in TOKENIZER:
        shutil.copy(folder / "lm-0" / name, lm)
    recipe, first = found["settings"], found["runs"]["retrofit"][0]
    facts = {name: found["retrofit"][name][0] for name in ("on", "off", "shuffled")}
    facts |= {"baseline": found["baseline"]["off"][0], "entropy": found["entropy"], "command": found["command"]}
    facts |= {"tokenizer": recipe["tokenizer"], "towns": recipe["corpus"]["towns"]}
    facts |= {"device": found["runs"]["baseline"][0]["device"], "seeds": len(found["retrofit"]["on"])}
    facts |= {"added": first["trained"] / 1e6, "parameters": (first["parameters"] - first["trained"]) / 1e6}
    for target in (lm, added):
        card = CARDS[target.name].format(**facts)
        (target / "README.md").write_text(card, encoding="utf-8")
        print(f"written: {target}", flush=True)


def main() -> None:
    arguments = read_arguments(__doc__, ("almanac", "speeches"), MODELS, RUNS)
    for name in arguments.corpora:
        comparison = Comparison(name, read_recipe(name, dict(arguments.given), __file__), arguments.runs)
        for seed in arguments.seeds:
            for model in arguments.models:
                comparison.run(model, seed)
        wanted = SEEDS if arguments.runs == RUNS else arguments.seeds
        names = {file.stem for file in comparison.folder.glob("*-*.json")}
        done = [model for model in MODELS if all(f"{model}-{seed}" in names for seed in wanted)]
        if set(arguments.models) <= set(done):
            comparison.collect(done)


if __name__ == "__main__":
    main()
