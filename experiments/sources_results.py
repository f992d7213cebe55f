"""What all runs of experiments/sources.py found, in one file: see `collect`."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sources_models import COMPARED, MODELS, cost, settings_of
from sources_store import copied, read_documents

from retro_nb.common.arrays import write_json
from retro_nb.measure.evaluation import RESAMPLES

ABOUT_RUN = ("seed", "parameters", "seconds", "tokens", "device", "torch", "valid", "curves")
COPIED = {"<10 %": (0, 0.1), "10-50 %": (0.1, 0.5), "50-80 %": (0.5, 0.8), ">=80 %": (0.8, 1.01)}
Nats = Sequence[Sequence[float]]  # of each document, seed by seed
Documents = Sequence[dict[str, Any]]
Runs = Sequence[dict[str, Any]]  # one a seed


def collect(packed: Path, folder: Path, target: Path) -> None:
    """Write the results of all trainings that were tested, one number a seed.

    on, off, shuffled, oracle, …, baseline    bits per byte on the test documents
    ratios      on / baseline and the like, with an interval (`ratio`)
    controls    of every other model its bits per byte, and its ratio to the baseline of the same seeds
    knnlm       of the tokens that were sampled: the baseline with a memory, as a ratio to the baseline alone
    costs       of every model parameters, floating-point operations, minutes
    unseen      bits per byte of libraries that were not trained on, with a share of their other files in the memory
    sweeps      with k neighbours, and with those of a share of the database, and the ratios to the baseline
    copied      by the share of a document's 13-grams that stand in the database's documents
    groups      by the tokens shared with ten neighbours; libraries: by library
    documents   titles, bytes, and the nats of each, seed by seed
    """
    runs = finished(folder)
    seeds = sorted(set(runs.get("retro", ())) & set(runs.get("baseline", ())))
    if not seeds:
        raise SystemExit(f"{folder} has no seed of which both models are trained and tested: run train and test first")
    retro, baseline = ([runs[model][seed] for seed in seeds] for model in COMPARED)
    test, unseen = ([each for each in read_documents(packed) if each["part"] == part] for part in ("test", "unseen"))
    nats = by_mode(retro, "nats") | {"baseline": [run["nats"]["off"] for run in baseline]}
    found = {mode: bits(each, test) for mode, each in nats.items()}
    found |= {"unit": "bits per byte", "command": "python experiments/sources.py train test collect", "seeds": seeds}
    found |= {"ratios": ratios(nats), "controls": controls(runs, test), "costs": costs(runs)}
    found["knnlm"] = knnlm(folder, seeds)
    found["unseen"] = unseen_results(retro, baseline, unseen)
    found["sweeps"] = {name: swept(by_mode(retro, name), nats["baseline"], test) for name in ("k", "database")}
    found["copied"] = by_copied(nats, test, copied(packed))
    found["groups"] = grouped(retro, baseline)
    found["libraries"] = by_library(nats, test)
    found["documents"] = {"titles": [each["title"] for each in test], "bytes": sizes_of(test).tolist(), "nats": nats}
    for model, each in runs.items():
        found[f"{model}_runs"] = [{name: each[seed][name] for name in ABOUT_RUN} for seed in sorted(each)]
    found["corpus"] = json.loads((packed / "about.json").read_text(encoding="utf-8"))
    write_json(target, found | {"settings": retro[0]["settings"]})
    print("\n".join([f"{target}, {len(seeds)} seeds", *report(found)]), flush=True)


def finished(folder: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """By model and seed what training and test have found, where both are there and have the same settings."""
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    for file in sorted(folder.glob("*-*-test.json")):
        test = json.loads(file.read_text(encoding="utf-8"))
        model, seed = test["model"], test["seed"]
        trained = json.loads((folder / f"{model}-{seed}.json").read_text(encoding="utf-8"))
        settings = settings_of(trained["settings"], model)
        if settings_of(test["settings"], model) != settings:
            raise SystemExit(f"{file} was made with other settings than its training: remove it, and test again")
        runs.setdefault(model, {})[seed] = trained | test | {"settings": settings}
    common = {
        json.dumps({name: value for name, value in each["settings"].items() if name != model}, sort_keys=True)
        for model, run in runs.items()
        for each in run.values()
    }
    if len(common) > 1:
        raise SystemExit(f"the runs in {folder} were made with {len(common)} recipes: remove those of the old ones")
    return runs


# bits and ratios


def by_mode(runs: Runs, name: str) -> dict[str, Nats]:
    return {mode: [run[name][mode] for run in runs] for mode in runs[0][name]}


def sizes_of(documents: Documents) -> np.ndarray:
    return np.array([each["bytes"] for each in documents])


def bits(nats: Nats, documents: Documents) -> list[float]:
    """Bits per byte of all documents, one number a seed."""
    return [float(np.sum(each) / math.log(2) / sizes_of(documents).sum()) for each in nats]


def ratio(nats: Nats, baseline: Nats) -> dict[str, Any]:
    """Loss as a share of the baseline's: of all seeds, one number a seed, and where it lies with 95 % confidence.

    Bootstrap over seeds and documents: as many as there are of either are drawn with replacement, the same for both.
    `per_cent` is by how much it is more, and the interval of that.
    """
    own, other = (np.array(each).reshape(len(each), -1) for each in (nats, baseline))  # or a sum per seed
    rng, (seeds, count) = np.random.default_rng(0), own.shape
    weights = rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    drawn = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES)
    sums = [((weights @ each.T) * drawn).sum(axis=1) for each in (own, other)]
    drawn_ratios = sums[0][sums[1] > 0] / sums[1][sums[1] > 0]  # documents without a sampled token may have been drawn
    low, high = np.quantile(drawn_ratios, [0.025, 0.975]).tolist()
    each, mean = (own.sum(axis=1) / other.sum(axis=1)).tolist(), float(own.sum() / other.sum())
    per_cent = [round(100 * (value - 1), 2) for value in (mean, low, high)]
    return {"all": mean, "seeds": each, "interval": [low, high], "per_cent": per_cent}


def ratios(nats: dict[str, Nats]) -> dict[str, Any]:
    """Of each mode to the baseline."""
    return {mode: ratio(each, nats["baseline"]) for mode, each in nats.items() if mode != "baseline"}


def swept(points: dict[str, Nats], baseline: Nats, documents: Documents) -> dict[str, Any]:
    """Bits per byte at each point, one number a seed, and under `ratios` what they are to the baseline's."""
    values = {point: bits(each, documents) for point, each in points.items()}
    return values | {"ratios": {point: ratio(each, baseline) for point, each in points.items()}}


# parts of the test documents


def of_rows(nats: dict[str, Nats], rows: Sequence[int]) -> dict[str, Nats]:
    return {mode: [[seed[row] for row in rows] for seed in each] for mode, each in nats.items()}


def part_of(nats: dict[str, Nats], documents: Documents, rows: Sequence[int]) -> dict[str, Any]:
    """Some documents: how many, their bytes, bits per byte by mode, and ratios to the baseline."""
    own, part = [documents[row] for row in rows], of_rows(nats, rows)
    about = {"documents": len(own), "bytes": int(sizes_of(own).sum())}
    return about | {mode: bits(each, own) for mode, each in part.items()} | {"ratios": ratios(part)}


def unseen_results(retro: Runs, baseline: Runs, documents: Documents) -> dict[str, Any]:
    """Of all unseen libraries, and of each: by mode, and with a share of their other files in the memory."""
    nats = by_mode(retro, "unseen") | {f"memory {share}": each for share, each in by_mode(retro, "memory").items()}
    nats["baseline"] = [run["unseen"]["off"] for run in baseline]
    packages = [each["package"] for each in documents]
    found = {"all": part_of(nats, documents, range(len(documents)))}
    return found | {name: part_of(nats, documents, rows_where(packages, name)) for name in sorted(set(packages))}


def rows_where(values: Sequence[Any], wanted: Any) -> list[int]:
    return [row for row, value in enumerate(values) if value == wanted]


def by_library(nats: dict[str, Nats], documents: Documents) -> dict[str, Any]:
    """Each library's test documents, with and without neighbours; the largest library first."""
    packages = [each["package"] for each in documents]
    few = {mode: nats[mode] for mode in ("on", "baseline")}
    found = {name: part_of(few, documents, rows_where(packages, name)) for name in set(packages)}
    return dict(sorted(found.items(), key=lambda item: (-item[1]["bytes"], item[0])))


def by_copied(nats: dict[str, Nats], documents: Documents, shares: Sequence[float]) -> dict[str, Any]:
    """Test documents by the share of their 13-grams that stand in the documents of the database.

    A file that mostly is copied together from others is no near-duplicate of any (.8 of the 13-grams of both), and
    stays in the test: here it is listed apart.
    """
    few = {mode: nats[mode] for mode in ("on", "off", "shuffled", "oracle", "baseline")}
    found = {}
    for name, (low, high) in COPIED.items():
        if rows := [row for row, share in enumerate(shares) if low <= share < high]:
            found[name] = part_of(few, documents, rows)
    return found


def grouped(retro: Runs, baseline: Runs) -> dict[str, Any]:
    """Groups of chunks: their number, tokens and bytes, bits per byte by mode, and ratios to the baseline."""
    found = {}
    for name, about in retro[0]["groups"].items():
        nats = by_mode([run["groups"][name] for run in retro], "nats")
        nats["baseline"] = [run["groups"][name]["nats"]["off"] for run in baseline]
        if any(np.ndim(seed) == 0 for seeds in nats.values() for seed in seeds):  # early runs noted the sum only
            nats = {mode: [float(np.sum(seed)) for seed in seeds] for mode, seeds in nats.items()}
        found[name] = {part: about[part] for part in ("chunks", "tokens", "bytes")}
        if about["tokens"]:
            found[name] |= {mode: bits(seeds, [about]) for mode, seeds in nats.items()} | {"ratios": ratios(nats)}
    return found


# controls


def controls(runs: dict[str, dict[int, dict[str, Any]]], documents: Documents) -> dict[str, Any]:
    """Of every model but the two that are compared: bits per byte by mode, and ratios to the baseline."""
    found = {}
    for model in [name for name in MODELS if name in runs and name not in COMPARED]:
        seeds = sorted(set(runs[model]) & set(runs["baseline"]))
        if seeds:
            nats = by_mode([runs[model][seed] for seed in seeds], "nats")
            nats["baseline"] = [runs["baseline"][seed]["nats"]["off"] for seed in seeds]
            found[model] = {"seeds": seeds} | part_of(nats, documents, range(len(documents)))
    return found


def knnlm(folder: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """What experiments/sources_knnlm.py found, for the seeds that are there."""
    files = {seed: folder / f"knnlm-{seed}.json" for seed in seeds}
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in files.values() if file.exists()]
    if not runs:
        return {}
    names = ("seed", "weight", "temperature", "seconds", "valid", "test")
    own, other = ([run["nats"][kind] for run in runs] for kind in ("knnlm", "model"))
    return {"runs": [{name: run[name] for name in names} for run in runs], "ratio": ratio(own, other)}


def costs(runs: dict[str, dict[int, dict[str, Any]]]) -> dict[str, Any]:
    """Of every model what it has and takes; `training_flops` and `minutes` are one number a seed."""
    found = {}
    for model in [name for name in MODELS if name in runs]:
        each = [runs[model][seed] for seed in sorted(runs[model])]
        found[model] = cost(each[0]["settings"], model)
        found[model]["training_flops"] = [run["tokens"] * found[model]["flops_a_token"]["training"] for run in each]
        found[model] |= {"minutes": [run["seconds"] / 60 for run in each], "device": each[0]["device"]}
    return found


# to be read


def report(found: dict[str, Any]) -> list[str]:
    """The main ratios, a line each."""
    lines = {"on": found["ratios"]["on"], "oracle": found["ratios"]["oracle"]}
    lines |= {f"{name} in the database": each["ratios"]["on"] for name, each in found["copied"].items()}
    lines |= {f"unseen, {mode}": each for mode, each in found["unseen"]["all"]["ratios"].items() if "memory" in mode}
    for model, each in found["controls"].items():
        lines[model] = each["ratios"]["on" if MODELS[model].retrieves else "off"]
    if found["knnlm"]:
        lines["kNN-LM"] = found["knnlm"]["ratio"]
    return [f"{name:<24}{in_per_cent(each)}" for name, each in lines.items()]


def in_per_cent(found: dict[str, Any]) -> str:
    """A ratio as text: the change in per cent, its interval, and the least and most of the seeds."""
    mean, low, high = found["per_cent"]
    seeds = [100 * (value - 1) for value in found["seeds"]]
    return f"{mean:+6.1f} % of the baseline ({low:+.1f} … {high:+.1f}; seeds {min(seeds):+.1f} … {max(seeds):+.1f})"
