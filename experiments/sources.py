"""What retrieval is worth on source code: RETRO and its baseline, trained on the libraries installed here.

    python experiments/sources.py prepare                       minutes on one core, where the libraries are
    python experiments/sources.py build --bert FOLDER           a minute on a GPU: chunks, vectors, neighbours
    python experiments/sources.py train test --seeds 0 --models retro baseline      a part of the work
    python experiments/sources.py build --retriever bm25; python experiments/sources.py train test --models bm25
    python experiments/sources.py knnlm --seeds 0               minutes on a GPU, after the baseline
    python experiments/sources.py collect export
    python experiments/sources.py prepare build train test collect --seeds 0 --runs /tmp/trial -p steps 4 …    a trial

The recipe is in experiments/sources.yaml. Everything lands in runs/code: `packed` is what `prepare` made and what is to
be copied to a GPU (sources_store.py), `store` is built from it. For each seed a RETRO is trained with its neighbours,
and a transformer with as many parameters without, for as many steps on the same batches; the controls
(sources_models.py) are trained if they are named. `train` measures on the validation documents alone, and recipes are
chosen by them; a training that was stopped goes on, one that is finished is not repeated, unless its weights are gone
and it has not been tested. `test` measures the float16
weights that were saved, on the test documents, which no model has seen and the database leaves out, and on two
libraries that are left out of both, first as they are, then with more and more of their other files in the database,
nothing being trained. `knnlm` measures the baseline with a memory of all its training tokens (sources_knnlm.py).
`collect` writes experiments/results/code.json from all runs that are there (sources_results.py), `export` puts the
small RETRO into data/checkpoints/code if it can read (sources_export.py); with --runs, both write into that folder.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evidence import device_name, read_recipe, read_training_arguments
from sources_export import export
from sources_knnlm import measure
from sources_models import (
    COMPARED,
    MODELS,
    build_model,
    fit_settings,
    parameters,
    replaced,
    settings_of,
    with_readers,
)
from sources_results import collect
from sources_search import mixed
from sources_store import FOUND, MEMORY, RETRIEVERS, SHARES, Packed, build_store, built_with, pack, rows_of

from retro_nb import RETRO, RETRODataset, fit
from retro_nb.common.arrays import ROOT, open_array, write_json
from retro_nb.measure.evaluation import MODES, bytes_of_chunks, score, token_losses
from retro_nb.measure.results import RESULTS
from retro_nb.model.pretrained import INCLUDED
from retro_nb.planning.prediction import RUNS as RUNS_OF_TOKENS
from retro_nb.store.splits import of_documents

RUNS = ROOT / "runs" / "code"
STEPS = ("prepare", "build", "train", "test", "knnlm", "collect", "export")
WATCHED = 60  # validation documents on which training is watched
READ = (1, 2, 4, 8, FOUND)  # neighbours that a trained model is given


class Experiment:
    """The store, and which of its documents are trained on and measured."""

    def __init__(self, recipe: dict[str, Any], folder: Path) -> None:
        self.recipe, self.folder, self.packed = recipe, folder, Packed(folder / "packed")
        if self.packed.about["built"] != built_with(recipe):
            raise SystemExit(
                f"{folder} was packed with {self.packed.about['built']}: remove it, or pass another --runs"
            )
        store = folder / "store"
        paths = {name: store / f"{name}.npy" for name in ("chunks", "seqs", "doc_ids", "knns")}
        self.found = RETRODataset(
            num_chunks=len(open_array(paths["doc_ids"])), chunk_size=64, seq_len=recipe["model"]["max_seq_len"],
            num_neighbors=FOUND, num_sequences=len(open_array(paths["seqs"])), chunk_memmap_path=paths["chunks"],
            chunk_nn_memmap_path=paths["knns"], seq_memmap_path=paths["seqs"], doc_ids_memmap_path=paths["doc_ids"],
        )  # fmt: skip
        self.doc_ids, self.bytes = np.array(self.found.doc_ids), np.array(bytes_of_chunks(paths["chunks"]))
        with np.load(folder / "packed" / "neighbours.npz") as neighbours:
            self.overlap = dict(zip(neighbours["rows"].tolist(), neighbours["overlap"].tolist(), strict=True))

    def documents(self, part: str) -> list[int]:
        return [number for number, about in enumerate(self.packed.documents) if about["part"] == part]

    def knns(self, model: str) -> np.ndarray:
        """(c, FOUND) what the model's retriever found for every chunk."""
        file = self.folder / "store" / f"{RETRIEVERS[MODELS[model].retriever][1]}.npy"
        if not file.exists():
            raise SystemExit(f"{file} is missing: run build --retriever {MODELS[model].retriever}")
        return np.load(file)

    def trained_on(self, model: str, seed: int) -> RETRODataset:
        """The corpus as the model sees it in training."""
        knns = self.knns(model)[:, : self.recipe["knn"]]
        if shares := replaced(self.recipe, model):
            knns = mixed(knns, self.doc_ids, rows_of(self.packed, self.doc_ids, "train"), **shares, seed=seed)
        return self.found.with_neighbours(knns)

    # training

    def train(self, model: str, seed: int) -> None:
        """Train one model and measure it on the validation documents, unless that has been done."""
        file, started = results_of(self.folder) / f"{model}-{seed}.json", time.perf_counter()
        settings, tested = fit_settings(self.recipe, model), file.with_stem(f"{model}-{seed}-test").exists()
        if (tested or self._weights(model, seed).exists()) and self._is_done(file, model):
            return
        retrieves, knns = MODELS[model].retrieves, self.knns(model)[:, : self.recipe["knn"]]
        torch.manual_seed(seed)
        retro = self.untrained(model, seed)
        watched, data = self.documents("valid")[:WATCHED], self.trained_on(model, seed)

        def watch() -> dict[str, float]:
            values = self.values(retro, ("on", "shuffled", "oracle") if retrieves else ("off",), watched, knns)
            print(f"{model} {seed}: {time.perf_counter() - started:.0f} s {values}", flush=True)
            return values

        valid = of_documents(self.found.with_neighbours(knns), watched[:8])
        history = fit(
            retro, of_documents(data, self.documents("train")), valid, measure=watch, progress=False,
            retrieval=retrieves, seed=seed, out_dir=self.folder / f"{model}-{seed}", **settings,
        )  # fmt: skip
        about = {"model": model, "seed": seed, "parameters": parameters(retro, retrieves), "device": device_name()}
        about |= {"torch": torch.__version__}
        about |= {name: history[-1][name] for name in ("seconds", "waiting_seconds", "tokens", "tokens_per_second")}
        about["curves"] = {name: history.curve(name) for name in ("valid_loss", "on", "shuffled", "oracle", "off")}
        modes = ("on", "off", "shuffled", "oracle") if retrieves else ("off",)
        about["valid"] = self.values(retro, modes, self.documents("valid"), knns)
        retro.half().save_pretrained(self._weights(model, seed))
        write_json(file, about | {"settings": settings_of(self.recipe, model)})
        print(f"{model}, seed {seed}: {about['seconds'] / 60:.1f} minutes, validation {about['valid']}", flush=True)

    def _is_done(self, file: Path, model: str) -> bool:
        if not file.exists():
            return False
        recorded = settings_of(json.loads(file.read_text(encoding="utf-8"))["settings"], model)
        if recorded != (wanted := settings_of(self.recipe, model)):
            raise SystemExit(f"{file} was made with {recorded}, not {wanted}: remove it, or pass another --runs")
        print(f"{file} is there already", flush=True)
        return True

    def _weights(self, model: str, seed: int) -> Path:
        return self.folder / "weights" / f"{model}-{seed}"

    def untrained(self, model: str, seed: int) -> RETRO:
        """The model as its training begins.

        Raises:
            SystemExit: it begins with the weights of another model, which are not there.
        """
        first = MODELS[model].begins_as
        if first is None:
            return build_model(self.recipe, model, self.packed.tokenizer.size)
        if not (weights := self._weights(first, seed)).exists():
            raise SystemExit(f"{weights} is missing: run train --models {first} --seeds {seed} first")
        begun = self.trained(first, seed).float()
        return with_readers(begun) if MODELS[model].retrieves else begun

    def trained(self, model: str, seed: int) -> RETRO:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return RETRO.from_pretrained(self._weights(model, seed), device)

    # measuring

    def losses(self, retro: RETRO, mode: str, documents: list[int], knns: np.ndarray) -> np.ndarray:
        data = self.found.with_neighbours(knns)
        return token_losses(retro, data, documents, mode, batch_size=32, progress=False)

    def values(self, retro: RETRO, modes: tuple[str, ...], documents: list[int], knns: np.ndarray) -> dict[str, float]:
        """Bits per byte in each mode."""
        losses = {mode: self.losses(retro, mode, documents, knns) for mode in modes}
        return {mode: score(each, documents, self.doc_ids, self.bytes).bits_per_byte for mode, each in losses.items()}

    def nats(self, losses: np.ndarray, documents: list[int]) -> list[float]:
        """Nats of each document."""
        return [round(each, 3) for each in score(losses, documents, self.doc_ids, self.bytes).nats.tolist()]

    def test(self, model: str, seed: int) -> None:
        """Measure a trained model on the test documents and the unseen libraries, unless that has been done."""
        file = results_of(self.folder) / f"{model}-{seed}-test.json"
        if self._is_done(file, model):
            return
        retro, retrieves, knns = self.trained(model, seed), MODELS[model].retrieves, self.knns(model)
        test, unseen, read = self.documents("test"), self.documents("unseen"), knns[:, : self.recipe["knn"]]
        modes = MODES if retrieves else ("off",)
        losses = {mode: self.losses(retro, mode, test, read) for mode in modes}
        found: dict[str, Any] = {"nats": {mode: self.nats(each, test) for mode, each in losses.items()}}
        found["groups"] = {name: self.sums(losses, rows) for name, rows in self.groups().items()}
        found["unseen"] = {mode: self.nats(self.losses(retro, mode, unseen, read), unseen) for mode in modes}
        if retrieves:
            found |= self.sweeps(retro, model, knns, test, unseen)
        write_json(file, {"model": model, "seed": seed, **found, "settings": settings_of(self.recipe, model)})
        print(f"{file} is written", flush=True)

    def sweeps(self, retro: RETRO, model: str, knns: np.ndarray, test: list[int], unseen: list[int]) -> dict[str, Any]:
        """Nats of each document with more or fewer neighbours, and with those of other databases."""
        k, swept = self.recipe["knn"], {"k": {}, "database": {}, "memory": {}}
        with np.load(self.folder / "packed" / f"{RETRIEVERS[MODELS[model].retriever][0]}.npz") as found:
            for read in READ:
                swept["k"][str(read)] = self.nats(self.losses(retro, "on", test, knns[:, :read]), test)
            for name in SHARES:
                other = self.with_rows(knns, "test", found[f"share-{name}"])[:, :k]
                swept["database"][name] = self.nats(self.losses(retro, "on", test, other), test)
            for name in MEMORY:
                other = self.with_rows(knns, "unseen", found[f"memory-{name}"])[:, :k]
                swept["memory"][name] = self.nats(self.losses(retro, "on", unseen, other), unseen)
        return swept

    def with_rows(self, knns: np.ndarray, part: str, found: np.ndarray) -> np.ndarray:
        """All neighbours, with others for the chunks of a part's documents."""
        changed = knns[:, : found.shape[1]].copy()
        changed[rows_of(self.packed, self.doc_ids, part)] = found
        return changed

    def groups(self) -> dict[str, np.ndarray]:
        """Chunks of the test documents: by the longest run shared with ten neighbours, and all but the first of each.

        Of the latter one in sixteen begins a sequence, and reads nothing either.
        """
        test = rows_of(self.packed, self.doc_ids, "test")
        shared = np.array([self.overlap[row] for row in test.tolist()])
        groups = {name: test[(shared >= low) & (shared <= high)] for name, (low, high) in RUNS_OF_TOKENS.items()}
        return groups | {"after the first chunk": test[self.doc_ids[test] == self.doc_ids[test - 1]]}

    def sums(self, losses: dict[str, np.ndarray], rows: np.ndarray) -> dict[str, Any]:
        """Bytes and tokens of some chunks of the test documents, and their nats in each mode, document by document."""
        documents = np.searchsorted(test := self.documents("test"), self.doc_ids[rows])
        tokens = int(np.count_nonzero(~np.isnan(next(iter(losses.values()))[rows])))
        nats = {
            mode: np.bincount(documents, np.nansum(each[rows], axis=1, dtype=np.float64), len(test)).round(3).tolist()
            for mode, each in losses.items()
        }
        return {"chunks": len(rows), "tokens": tokens, "bytes": int(self.bytes[rows].sum()), "nats": nats}

    def knnlm(self, seed: int) -> None:
        """Measure the baseline with a memory of its training tokens, unless that has been done."""
        file = results_of(self.folder) / f"knnlm-{seed}.json"
        if self._is_done(file, "baseline"):
            return
        parts = {part: self.documents(part) for part in ("train", "valid", "test")}
        data = self.found.with_neighbours(self.knns("baseline")[:, :1])  # they are not read: the fewer, the faster
        found = measure(self.trained("baseline", seed), data, parts, seed)
        write_json(file, {"seed": seed, **found, "settings": settings_of(self.recipe, "baseline")})
        print(f"{file} is written", flush=True)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="+", choices=STEPS, help="what to do, in this order")
    parser.add_argument("--retriever", choices=RETRIEVERS, default="minilm", help="by which neighbours are found")
    parser.add_argument("--bert", help="folder with the weights of all-MiniLM-L6-v2; the installed package's")
    return read_training_arguments(parser, MODELS, COMPARED, RUNS)


def results_of(folder: Path) -> Path:
    """Where the results of single runs lie: those that are committed add up over machines and days."""
    results = RESULTS / "code" if folder == RUNS else folder
    results.mkdir(parents=True, exist_ok=True)
    return results


def run_models(experiment: Experiment, arguments: argparse.Namespace) -> None:
    torch.set_float32_matmul_precision("high")  # losses are measured in float32, multiplied in tf32 where a GPU has it
    for seed in arguments.seeds:
        for model in arguments.models:
            if "train" in arguments.steps:
                experiment.train(model, seed)
            if "test" in arguments.steps:
                experiment.test(model, seed)
        if "knnlm" in arguments.steps:
            experiment.knnlm(seed)


def main() -> None:
    arguments = read_arguments()
    recipe = read_recipe("code", dict(arguments.given), __file__)
    results, checkpoints = RESULTS, INCLUDED
    if arguments.runs != RUNS:
        results, checkpoints = arguments.runs / "results", arguments.runs / "checkpoints"
    if "prepare" in arguments.steps:
        pack(recipe, arguments.runs / "packed")
    if "build" in arguments.steps:
        seq_len = recipe["model"]["max_seq_len"]
        build_store(arguments.runs / "packed", arguments.runs / "store", seq_len, arguments.bert, arguments.retriever)
    if {"train", "test", "knnlm"} & set(arguments.steps):
        run_models(Experiment(recipe, arguments.runs), arguments)
    if "collect" in arguments.steps:
        collect(arguments.runs / "packed", results_of(arguments.runs), results / "code.json")
    if "export" in arguments.steps:
        export(arguments.runs, results_of(arguments.runs), checkpoints / "code")


if __name__ == "__main__":
    main()
