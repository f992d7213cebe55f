"""What all runs of experiments/sources.py found, in one file: see `collect`."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sources_store import read_documents

from retro_nb.evaluation import RESAMPLES
from retro_nb.storage import write_json

ABOUT_RUN = ("seed", "parameters", "seconds", "tokens", "device", "torch", "valid", "curves")


def collect(folder: Path, target: Path) -> None:
    """Write the results of all trainings that were tested, one number a seed.

    on, off, shuffled, oracle, …, baseline    bits per byte on the test documents
    ratios      on / baseline and the like, with an interval (`ratio`)
    unseen      the same of libraries that were not trained on, with a share of their other files in the memory
    sweeps      with k neighbours, and with those of a share of the database
    groups      by the tokens shared with ten neighbours; libraries: by library
    documents   titles, bytes, and the nats of each, seed by seed
    """
    runs = finished(folder)
    seeds = sorted(set(runs["retro"]) & set(runs["baseline"]))
    if not seeds:
        raise SystemExit(f"{folder} has no seed of which both models are trained and tested: run train and test first")
    retro, baseline = ([runs[model][seed] for seed in seeds] for model in ("retro", "baseline"))
    packed = folder / "packed"
    documents = read_documents(packed)
    test, unseen = ([each for each in documents if each["part"] == part] for part in ("test", "unseen"))
    nats = by_mode(retro, "nats") | {"baseline": [run["nats"]["off"] for run in baseline]}
    found = {mode: bits(each, test) for mode, each in nats.items()}
    found |= {"unit": "bits per byte", "command": "python experiments/sources.py train test collect", "seeds": seeds}
    found["ratios"] = {mode: ratio(nats[mode], nats["baseline"], test) for mode in nats if mode != "baseline"}
    found["unseen"] = unseen_results(retro, baseline, unseen)
    found["sweeps"] = {
        name: {point: bits([run[name][point] for run in retro], test) for point in retro[0][name]}
        for name in ("k", "database")
    }
    found["groups"] = grouped(retro, baseline)
    found["libraries"] = by_library(nats, test)
    found["documents"] = {"titles": [each["title"] for each in test], "bytes": sizes_of(test).tolist(), "nats": nats}
    for model in runs:
        found[f"{model}_runs"] = [{name: runs[model][seed][name] for name in ABOUT_RUN} for seed in seeds]
    found["corpus"] = json.loads((packed / "about.json").read_text(encoding="utf-8"))
    write_json(target, found | {"settings": retro[0]["settings"]})
    print(f"{target}: {len(seeds)} seeds, on / baseline {found['ratios']['on']}", flush=True)


def finished(folder: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """By model and seed what training and test have found, where both are there and have the same settings."""
    runs: dict[str, dict[int, dict[str, Any]]] = {"retro": {}, "baseline": {}}
    for file in folder.glob("*-*-test.json"):
        test = json.loads(file.read_text(encoding="utf-8"))
        trained = json.loads((folder / f"{test['model']}-{test['seed']}.json").read_text(encoding="utf-8"))
        if test["settings"] != trained["settings"]:
            raise SystemExit(f"{file} was made with other settings than its training: remove it, and test again")
        runs.setdefault(test["model"], {})[test["seed"]] = trained | test
    if len(settings := {json.dumps(run["settings"]) for each in runs.values() for run in each.values()}) > 1:
        raise SystemExit(f"the runs in {folder} were made with {len(settings)} recipes: remove those of the old ones")
    return runs


def by_mode(runs: Sequence[dict[str, Any]], name: str) -> dict[str, list[list[float]]]:
    return {mode: [run[name][mode] for run in runs] for mode in runs[0][name]}


def sizes_of(documents: Sequence[dict[str, Any]]) -> np.ndarray:
    return np.array([each["bytes"] for each in documents])


def bits(nats: Sequence[Sequence[float]], documents: Sequence[dict[str, Any]]) -> list[float]:
    """Bits per byte of all documents, one number a seed."""
    return [float(np.sum(each) / math.log(2) / sizes_of(documents).sum()) for each in nats]


def ratio(
    nats: Sequence[Sequence[float]], baseline: Sequence[Sequence[float]], documents: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Loss as a share of the baseline's: of all seeds, one number a seed, and where it lies with 95 % confidence.

    Bootstrap over seeds and documents: as many as there are of either are drawn with replacement, the same for both.
    """
    own, other = np.array(nats), np.array(baseline)
    rng, (seeds, count) = np.random.default_rng(0), own.shape
    weights = rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    drawn = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES)
    sums = [((weights @ each.T) * drawn).sum(axis=1) for each in (own, other)]
    low, high = np.quantile(sums[0] / sums[1], [0.025, 0.975])
    each = (own.sum(axis=1) / other.sum(axis=1)).tolist()
    return {"all": float(own.sum() / other.sum()), "seeds": each, "interval": [float(low), float(high)]}


def unseen_results(
    retro: Sequence[dict[str, Any]], baseline: Sequence[dict[str, Any]], documents: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Of all unseen libraries, and of each: by mode, and with a share of their other files in the memory."""
    nats = by_mode(retro, "unseen") | {f"memory {share}": each for share, each in by_mode(retro, "memory").items()}
    nats["baseline"] = [run["unseen"]["off"] for run in baseline]
    packages = sorted({each["package"] for each in documents})
    found = {}
    for name in ("all", *packages):
        rows = [row for row, each in enumerate(documents) if name in ("all", each["package"])]
        own = [documents[row] for row in rows]
        part = {mode: [[seed[row] for row in rows] for seed in each] for mode, each in nats.items()}
        found[name] = {mode: bits(each, own) for mode, each in part.items()}
        found[name]["ratios"] = {mode: ratio(part[mode], part["baseline"], own) for mode in part if mode != "baseline"}
        found[name] |= {"documents": len(own), "bytes": int(sizes_of(own).sum())}
    return found


def grouped(retro: Sequence[dict[str, Any]], baseline: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Bits per byte of groups of chunks, one number a seed, and the group's chunks, tokens and bytes."""
    found = {}
    for name, about in retro[0]["groups"].items():
        nats = by_mode([run["groups"][name] for run in retro], "nats")
        nats["baseline"] = [run["groups"][name]["nats"]["off"] for run in baseline]
        size = max(1, about["bytes"])
        values = {mode: [each / math.log(2) / size for each in seeds] for mode, seeds in nats.items()}
        found[name] = {part: about[part] for part in ("chunks", "tokens", "bytes")} | values
    return found


def by_library(nats: dict[str, list[list[float]]], documents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Bits per byte of each library's test documents, one number a seed; the largest library first."""
    rows: dict[str, list[int]] = {}
    for row, each in enumerate(documents):
        rows.setdefault(each["package"], []).append(row)
    found = {}
    for package, own in rows.items():
        about = [documents[row] for row in own]
        values = {mode: bits([[seed[row] for row in own] for seed in nats[mode]], about) for mode in ("on", "baseline")}
        found[package] = {"documents": len(own), "bytes": int(sizes_of(about).sum())} | values
    return dict(sorted(found.items(), key=lambda item: -item[1]["bytes"]))
