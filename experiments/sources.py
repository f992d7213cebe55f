"""What retrieval is worth on source code: RETRO and its baseline, trained on the libraries installed here.

    python experiments/sources.py prepare                       minutes on one core, where the libraries are
    python experiments/sources.py build --bert FOLDER           a minute on a GPU: chunks, vectors, neighbours
    python experiments/sources.py train test --seeds 0 --models retro baseline      a part of the work
    python experiments/sources.py collect
    python experiments/sources.py prepare build train test collect --seeds 0 --runs /tmp/trial -p steps 4 …    a trial

The recipe is in experiments/sources.yaml. Everything lands in runs/code: `packed` is what `prepare` made and what is to
be copied to a GPU (sources_store.py), `store` is built from it. For each seed a RETRO is trained with its neighbours,
and a transformer with as many parameters without, for as many steps on the same batches. `train` measures on the
validation documents alone, and recipes are chosen by them; a training that was stopped goes on, one that is finished is
not repeated. `test` measures the float16 weights that were saved, on the test documents, which no model has seen and
the database leaves out, and on two libraries that are left out of both, first as they are, then with more and more of
their other files in the database, nothing being trained. `collect` writes experiments/results/code.json from all runs
that are there; with --runs, results lie in that folder.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evidence import device_name, is_retrieval, read_recipe
from sources_results import collect
from sources_store import FOUND, MEMORY, SHARES, Packed, build_store, built_with, pack, rows_of

from retro_nb import RETRO, RETRODataset, fit
from retro_nb.evaluation import MODES, bytes_of_chunks, score, token_losses
from retro_nb.evidence import RESULTS
from retro_nb.storage import ROOT, open_array, write_json
from retro_nb.training import of_documents

RUNS = ROOT / "runs" / "code"
STEPS = ("prepare", "build", "train", "test", "collect")
MODELS = {"retro": True, "baseline": False}  # whether they retrieve
SEEDS = (0, 1, 2)
WATCHED = 60  # validation documents on which training is watched
READ = (1, 2, 4, 8, FOUND)  # neighbours that a trained model is given
RUNS_OF_TOKENS = {"<8": (0, 7), "8-15": (8, 15), "16-31": (16, 31), ">=32": (32, 64)}  # shared with ten neighbours


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
        found = RETRODataset(
            num_chunks=len(open_array(paths["doc_ids"])), chunk_size=64, seq_len=recipe["model"]["max_seq_len"],
            num_neighbors=FOUND, num_sequences=len(open_array(paths["seqs"])), chunk_memmap_path=paths["chunks"],
            chunk_nn_memmap_path=paths["knns"], seq_memmap_path=paths["seqs"], doc_ids_memmap_path=paths["doc_ids"],
        )  # fmt: skip
        self.knns, self.doc_ids = np.load(paths["knns"]), np.array(found.doc_ids)
        self.data = found.with_neighbours(self.knns[:, : recipe["knn"]])
        self.bytes = np.array(bytes_of_chunks(paths["chunks"]))
        self.neighbours = dict(np.load(folder / "packed" / "neighbours.npz"))

    def documents(self, part: str) -> list[int]:
        return [number for number, about in enumerate(self.packed.documents) if about["part"] == part]

    # training

    def train(self, model: str, seed: int) -> None:
        """Train one model and measure it on the validation documents, unless that has been done."""
        file, started = self.folder / f"{model}-{seed}.json", time.perf_counter()
        if self._is_there(file):
            return
        recipe, retrieval = self.recipe, MODELS[model]
        torch.manual_seed(seed)
        retro = RETRO(num_tokens=self.packed.tokenizer.size, **recipe["model"] | recipe[model])
        watched = self.documents("valid")[:WATCHED]

        def watch() -> dict[str, float]:
            values = self.values(retro, ("on", "shuffled", "oracle") if retrieval else ("off",), watched)
            print(f"{model} {seed}: {time.perf_counter() - started:.0f} s {values}", flush=True)
            return values

        history = fit(
            retro, of_documents(self.data, self.documents("train")), of_documents(self.data, watched[:8]),
            measure=watch, progress=False, retrieval=retrieval, seed=seed,
            out_dir=self.folder / f"{model}-{seed}", **recipe["fit"],
        )  # fmt: skip
        used = sum(p.numel() for name, p in retro.named_parameters() if retrieval or not is_retrieval(name))
        about = {"model": model, "seed": seed, "parameters": used, "device": device_name(), "torch": torch.__version__}
        about |= {"seconds": history[-1]["seconds"], "tokens": history[-1]["tokens"]}
        about["curves"] = {name: history.curve(name) for name in ("valid_loss", "on", "shuffled", "oracle", "off")}
        modes = ("on", "off", "shuffled", "oracle") if retrieval else ("off",)
        about["valid"] = self.values(retro, modes, self.documents("valid"))
        retro.half().save_pretrained(self.folder / "weights" / f"{model}-{seed}")
        write_json(file, about | {"settings": recipe})
        print(f"{model}, seed {seed}: {about['seconds'] / 60:.1f} minutes, validation {about['valid']}", flush=True)

    def _is_there(self, file: Path) -> bool:
        if not file.exists():
            return False
        there = json.loads(file.read_text(encoding="utf-8"))["settings"]
        if there != self.recipe:
            raise SystemExit(f"{file} was made with {there}, not {self.recipe}: remove it, or pass another --runs")
        print(f"{file} is there already", flush=True)
        return True

    # measuring

    def losses(self, retro: RETRO, mode: str, documents: list[int], knns: np.ndarray | None = None) -> np.ndarray:
        data = self.data if knns is None else self.data.with_neighbours(knns)
        return token_losses(retro, data, documents, mode, batch_size=32, progress=False)

    def values(self, retro: RETRO, modes: tuple[str, ...], documents: list[int]) -> dict[str, float]:
        """Bits per byte in each mode."""
        scores = {
            mode: score(self.losses(retro, mode, documents), documents, self.doc_ids, self.bytes) for mode in modes
        }
        return {mode: each.bits_per_byte for mode, each in scores.items()}

    def nats(self, losses: np.ndarray, documents: list[int]) -> list[float]:
        """Nats of each document."""
        return [round(each, 3) for each in score(losses, documents, self.doc_ids, self.bytes).nats.tolist()]

    def test(self, model: str, seed: int) -> None:
        """Measure a trained model on the test documents and the unseen libraries, unless that has been done."""
        file = self.folder / f"{model}-{seed}-test.json"
        if self._is_there(file):
            return
        device = "cuda" if torch.cuda.is_available() else "cpu"
        retro = RETRO.from_pretrained(self.folder / "weights" / f"{model}-{seed}", device)
        test, unseen = self.documents("test"), self.documents("unseen")
        modes = MODES if MODELS[model] else ("off",)
        losses = {mode: self.losses(retro, mode, test) for mode in modes}
        found: dict[str, Any] = {"nats": {mode: self.nats(each, test) for mode, each in losses.items()}}
        found["groups"] = {name: self.sums(losses, rows) for name, rows in self.groups().items()}
        found["unseen"] = {mode: self.nats(self.losses(retro, mode, unseen), unseen) for mode in modes}
        if MODELS[model]:
            found |= self.sweeps(retro, test, unseen)
        write_json(file, {"model": model, "seed": seed, **found, "settings": self.recipe})
        print(f"{file} is written", flush=True)

    def sweeps(self, retro: RETRO, test: list[int], unseen: list[int]) -> dict[str, Any]:
        """Nats of each document with more or fewer neighbours, and with those of other databases."""
        k, swept = self.recipe["knn"], {"k": {}, "database": {}, "memory": {}}
        for read in READ:
            swept["k"][str(read)] = self.nats(self.losses(retro, "on", test, self.knns[:, :read]), test)
        for name in SHARES:
            knns = self.with_rows("test", self.neighbours[f"share-{name}"])[:, :k]
            swept["database"][name] = self.nats(self.losses(retro, "on", test, knns), test)
        for name in MEMORY:
            knns = self.with_rows("unseen", self.neighbours[f"memory-{name}"])[:, :k]
            swept["memory"][name] = self.nats(self.losses(retro, "on", unseen, knns), unseen)
        return swept

    def with_rows(self, part: str, knns: np.ndarray) -> np.ndarray:
        """All neighbours, with others for the chunks of a part's documents."""
        changed = self.knns[:, : knns.shape[1]].copy()
        changed[rows_of(self.packed, self.doc_ids, part)] = knns
        return changed

    def groups(self) -> dict[str, np.ndarray]:
        """Chunks of the test documents: by the longest run shared with ten neighbours, and all after the first."""
        shared = np.full(len(self.doc_ids), -1)
        shared[self.neighbours["rows"]] = self.neighbours["overlap"]
        test = rows_of(self.packed, self.doc_ids, "test")
        groups = {
            name: test[(shared[test] >= low) & (shared[test] <= high)] for name, (low, high) in RUNS_OF_TOKENS.items()
        }
        return groups | {"after the first chunk": test[self.doc_ids[test] == self.doc_ids[test - 1]]}

    def sums(self, losses: dict[str, np.ndarray], rows: np.ndarray) -> dict[str, Any]:
        """Bytes and tokens of some chunks, and their nats in each mode."""
        tokens = int(np.count_nonzero(~np.isnan(next(iter(losses.values()))[rows])))
        nats = {mode: float(np.nansum(each[rows], dtype=np.float64)) for mode, each in losses.items()}
        return {"chunks": len(rows), "tokens": tokens, "bytes": int(self.bytes[rows].sum()), "nats": nats}


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="+", choices=STEPS, help="what to do, in this order")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="which to train; all three")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="which to train; all")
    parser.add_argument("--bert", help="folder with the weights of all-MiniLM-L6-v2; the installed package's")
    parser.add_argument("--runs", type=Path, default=RUNS, help="a folder of its own, for a trial")
    changes = {"nargs": 2, "action": "append", "default": [], "metavar": ("NAME", "VALUE")}
    parser.add_argument("-p", dest="given", help="a setting of the recipe; goes with --runs", **changes)
    said = parser.parse_args()
    if said.given and said.runs == RUNS:
        parser.error("-p changes the recipe of what is committed: pass --runs FOLDER too")
    return said


def main() -> None:
    said = read_arguments()
    recipe = read_recipe("code", dict(said.given), __file__)
    if "prepare" in said.steps:
        pack(recipe, said.runs / "packed")
    if "build" in said.steps:
        build_store(said.runs / "packed", said.runs / "store", recipe["model"]["max_seq_len"], said.bert)
    if {"train", "test"} & set(said.steps):
        experiment = Experiment(recipe, said.runs)
        for seed in said.seeds:
            for model in said.models:
                if "train" in said.steps:
                    experiment.train(model, seed)
                if "test" in said.steps:
                    experiment.test(model, seed)
    if "collect" in said.steps:
        results = RESULTS if said.runs == RUNS else said.runs / "results"
        collect(said.runs, results / "code.json")


if __name__ == "__main__":
    main()
