"""Train RETRO and its baseline on a corpus, several times, and measure what the neighbours are worth.

    python experiments/evidence.py almanac                        three seeds; minutes on a GPU
    python experiments/evidence.py speeches docstrings --seeds 0 1
    python experiments/evidence.py almanac --seeds 0 -p towns 300 -p steps 4 -p batch_size 2      to try it on a CPU

The recipes are in experiments/evidence.yaml. For each seed a RETRO is trained with its neighbours, and a transformer
with as many parameters without, for as many steps on the same batches. Both are measured on documents that neither
has seen and that the database leaves out: RETRO with its neighbours (on), without (off), with those of another
document (shuffled), with half of each (N only, F only), and the baseline.

Each training leaves a file in runs/evidence/<corpus>, and one that is there is not repeated. From all of them comes
experiments/results/<corpus>.json: under `baseline`, `on`, `off`, … one number a seed, bits per byte, or for the
almanac nats per fact token. The first seed's models are kept in runs/evidence/<corpus>, as float16.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from retro_nb import RETRO, TrainingWrapper, almanac, docstrings, fit, speeches
from retro_nb.evaluation import MODES, bytes_of_chunks, fact_tokens, found_twins, score, token_losses
from retro_nb.storage import ROOT, write_json
from retro_nb.training import hold_out, of_documents, without_documents

RUNS, RESULTS = ROOT / "runs" / "evidence", ROOT / "experiments" / "results"
CORPORA: dict[str, Callable] = {"almanac": almanac, "speeches": speeches, "docstrings": docstrings}
MODELS = ("retro", "baseline")
WATCHED = 40  # documents of the almanac on which copying is watched during training


def read_recipe(name: str, given: dict[str, str]) -> dict[str, Any]:
    """A corpus's recipe, with the values that were given on the command line in the places of their names."""
    recipe = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))[name]
    for key, text in given.items():
        places = [part for part in (recipe, *recipe.values()) if isinstance(part, dict) and key in part]
        if not places:
            raise SystemExit(f"-p {key}: not in the recipe of {name}, which has {', '.join(recipe)}")
        for part in places:
            part[key] = yaml.safe_load(text)
    return recipe


class Experiment:
    """One corpus, its database, and which documents are trained on, left out and measured."""

    def __init__(self, name: str, recipe: dict[str, Any]) -> None:
        self.name, self.recipe, self.folder = name, recipe, RUNS / name
        corpus = CORPORA[name](**recipe["corpus"])
        keep_out: Any = recipe["keep_out"]
        if name == "almanac":  # document 2t of a town that is left out stays in the database: there it can be found
            towns = hold_out(np.arange(corpus.towns), keep_out)
            keep_out = (2 * towns + 1).tolist()
        self.store = TrainingWrapper(
            retro=RETRO(**recipe["model"]), chunk_size=64, documents_path=corpus, knn=recipe["knn"], keep_out=keep_out
        )
        self.measured, self.datasets = self.store.kept_out, {}
        unseen = [*self.measured, *(number - 1 for number in self.measured if name == "almanac")]
        self.train = without_documents(self.store.ds, unseen)
        self.bytes = bytes_of_chunks(self.store.work_dir / "chunks.npy")
        self.facts = None
        if name == "almanac":
            doc_ids = self.store.ds.doc_ids
            found = found_twins(self.store.ds.knns, doc_ids)
            reads = np.append(False, found[:-1] & (doc_ids[1:] == doc_ids[:-1]))  # what the chunk before has found
            self.facts = fact_tokens(corpus, doc_ids, 64) & reads[:, None]
            self.hits = self._hit_rates(found)
            self.datasets["perfect"] = self.store.ds.with_neighbours(self._twins())

    def _twins(self) -> np.ndarray:
        """What a perfect retriever would find: the chunk with the same number of the document's twin."""
        doc_ids = self.store.ds.doc_ids
        number = np.arange(len(doc_ids)) - np.searchsorted(doc_ids, doc_ids)
        twin = np.searchsorted(doc_ids, doc_ids ^ 1) + number
        inside = (twin < len(doc_ids)) & (doc_ids[np.minimum(twin, len(doc_ids) - 1)] == doc_ids ^ 1)
        found = np.full((len(doc_ids), self.recipe["knn"]), -1, dtype=np.int64)
        found[:, 0] = np.where(inside, twin, -1)
        return found

    def _hit_rates(self, found: np.ndarray) -> list[float]:
        """How often chunk 0, 1, … of the measured documents finds the right town."""
        firsts = np.searchsorted(self.store.ds.doc_ids, self.measured)
        lengths = np.searchsorted(self.store.ds.doc_ids, self.measured, "right") - firsts
        return [float(found[firsts[lengths > u] + u].mean()) for u in range(lengths.max())]

    def measure(self, retro: RETRO, mode: str, documents: list[int]) -> dict[str, Any]:
        """Nats per fact token for the almanac, else bits per byte and the nats of each document."""
        dataset = self.datasets.get(mode, self.store.ds)
        asked = mode if mode in MODES else "on"
        losses = token_losses(retro, dataset, documents, asked, batch_size=32, progress=False)
        if self.facts is not None:
            return {"value": float(np.nanmean(losses[self.facts & ~np.isnan(losses)]))}
        found = score(losses, documents, self.store.ds.doc_ids, self.bytes)
        return {"value": found.bits_per_byte, "nats": found.nats.tolist(), "chunks": np.nansum(losses, axis=1)}

    def run(self, model: str, seed: int) -> None:
        """Train one model and measure it, unless its results are there."""
        file = self.folder / f"{model}-{seed}.json"
        if file.exists():
            return print(f"{file} is there already", flush=True)
        recipe, retrieval, started = self.recipe, model == "retro", time.perf_counter()
        torch.manual_seed(seed)
        retro = RETRO(**recipe["model"] | recipe[model])
        watched, settings = self.measured[:WATCHED], recipe["fit"] | {"retrieval": retrieval, "seed": seed}

        def watch() -> dict[str, float]:
            modes = ("on", "shuffled") if retrieval and self.facts is not None else ()
            return {mode: self.measure(retro, mode, watched)["value"] for mode in modes}

        history = fit(retro, self.train, of_documents(self.store.ds, watched), measure=watch, **settings)
        minutes = (time.perf_counter() - started) / 60
        modes = (*MODES, *self.datasets) if retrieval else ("off",)
        found = {mode: self.measure(retro, mode, self.measured) for mode in modes}
        chunks = {mode: each.pop("chunks") for mode, each in found.items() if "chunks" in each}
        used = sum(p.numel() for name, p in retro.named_parameters() if retrieval or not is_retrieval(name))
        curves = {name: history.curve(name) for name in ("valid_loss", "on", "shuffled")}
        tokens = [record["tokens"] for record in history if "valid_loss" in record]
        about = {"model": model, "seed": seed, "parameters": used, "minutes": minutes, "device": device_name()}
        self.folder.mkdir(parents=True, exist_ok=True)
        if seed == 0:
            np.savez_compressed(self.folder / f"{model}-chunks.npz", **chunks)
            retro.half().save_pretrained(self.folder / model)
        write_json(file, about | {"found": found, "curves": curves, "tokens": tokens, "settings": self.recipe})
        values = {mode: round(each["value"], 4) for mode, each in found.items()}
        print(f"{self.name}, {model}, seed {seed}: {values}, {minutes:.1f} minutes", flush=True)

    def collect(self) -> None:
        """Write experiments/results/<corpus>.json from all the runs that are there."""
        runs = {model: self._finished(model) for model in MODELS}
        values = {mode: [run["found"][mode]["value"] for run in runs["retro"]] for mode in runs["retro"][0]["found"]}
        values["baseline"] = [run["found"]["off"]["value"] for run in runs["baseline"]]
        about = {"unit": "bits per byte", "command": f"python experiments/evidence.py {self.name}"}
        if self.facts is not None:
            counted = int(self.facts[np.isin(self.store.ds.doc_ids, self.measured)].sum())
            about |= {"unit": "nats per fact token", "entropy": almanac().fact_entropy, "facts": counted}
            about |= {"hit_rates": self.hits}
        else:
            nats = {mode: [run["found"][mode]["nats"] for run in runs["retro"]] for mode in MODES}
            nats["baseline"] = [run["found"]["off"]["nats"] for run in runs["baseline"]]
            sizes = [int(self.bytes[self.store.ds.doc_ids == number].sum()) for number in self.measured]
            titles = [self.store.retriever.documents[number]["title"] for number in self.measured]
            about |= {"documents": {"titles": titles, "bytes": sizes, "nats": nats}}
        for model, each in runs.items():
            names = ("seed", "parameters", "minutes", "device", "curves", "tokens")
            about[f"{model}_runs"] = [{name: run[name] for name in names} for run in each]
        write_json(RESULTS / f"{self.name}.json", values | about | {"settings": runs["retro"][0]["settings"]})
        print(f"written: experiments/results/{self.name}.json", flush=True)

    def _finished(self, model: str) -> list[dict[str, Any]]:
        files = sorted(self.folder.glob(f"{model}-*.json"), key=lambda file: int(file.stem.rpartition("-")[2]))
        return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def is_retrieval(name: str) -> bool:
    """Whether a parameter serves only to read neighbours."""
    return name.startswith(("encoder.", "enc_")) or ("decoder." in name and "cross_attn" in name)


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpora", nargs="+", choices=CORPORA)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("-p", dest="given", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    said = parser.parse_args()
    for name in said.corpora:
        experiment = Experiment(name, read_recipe(name, dict(said.given)))
        if experiment.facts is not None:
            print("hit rates:", [round(rate, 3) for rate in experiment.hits], flush=True)
        for seed in said.seeds:
            for model in said.models:
                experiment.run(model, seed)
        if all(any(experiment.folder.glob(f"{model}-*.json")) for model in MODELS):
            experiment.collect()


if __name__ == "__main__":
    main()
