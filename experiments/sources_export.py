"""Export the small RETRO of experiments/sources.py into the folder of the models that come with the project."""

import json
import shutil
from pathlib import Path
from typing import Any

from sources_results import bits, finished
from sources_store import read_documents

from retro_nb.common.arrays import replacing

MODEL = "box"
LARGEST = 45_000_000  # bytes of the weights
LEAST = 0.2  # of its loss that a model must save when it is given the pages that come next

CARD = """# RETRO on source code

{parameters:.1f} million parameters as float16, the first seed of `{model}` in experiments/sources.yaml: a smaller model
than `retro`, of which experiments/results/code.json tells, and which is too large to come with the project.
`python experiments/sources.py train test export --models {model}`, {minutes:.1f} minutes on one {device}.

- data: {documents:,} Python files of the libraries that are installed beside this project, {tokens:.1f} M tokens.
  They are under their libraries' own licences, which `retro_nb.code().licences()` states. What the model writes may
  repeat them.
- tokenizer: `get_tokenizer("data/checkpoints/code")`, a byte-level BPE of the same files.
- recipe: AdamW, {steps} steps of {batch_size} sequences of {n} tokens, peak learning rate {lr}, {k} neighbours.
- bits per byte on {measured} files that were not trained on and are not in the database: {on:.4f} with its neighbours,
  {off:.4f} without, {shuffled:.4f} with those of another file, {oracle:.4f} with the pages that come next. So it can
  read: the latter save {gain:.0%}.

Weights: MIT licence.
"""


def export(folder: Path, results: Path, target: Path) -> None:
    """Write weights, tokenizer and card of the first seed, if it can read and fits.

    Raises:
        SystemExit: it was not trained and tested, does not save enough when it is given the oracle's pages, or its
            weights are too large.
    """
    run = finished(results).get(MODEL, {}).get(0)
    if run is None:
        raise SystemExit(f"seed 0 of {MODEL} is not there: run train test --models {MODEL} --seeds 0 first")
    test = [each for each in read_documents(folder / "packed") if each["part"] == "test"]
    values = {mode: bits([nats], test)[0] for mode, nats in run["nats"].items()}
    gain = 1 - values["oracle"] / values["off"]
    if gain < LEAST:
        raise SystemExit(
            f"{MODEL}, seed 0, cannot read: the very pages that come next save it {gain:.1%} of its loss on the test "
            f"files, and {LEAST:.0%} are wanted. Nothing is written; train it for longer"
        )
    weights = folder / "weights" / f"{MODEL}-0"
    size = (weights / "model.safetensors").stat().st_size
    if size > LARGEST:
        raise SystemExit(f"{weights} has {size:,} bytes, more than {LARGEST:,}: make the recipe `{MODEL}` smaller")
    for each in (*weights.iterdir(), *(folder / "packed" / "tokenizer").iterdir()):
        with replacing(target / each.name) as temporary:
            shutil.copyfile(each, temporary)
    with replacing(target / "README.md") as temporary:
        temporary.write_text(card(run, values, gain, folder), encoding="utf-8")
    print(f"written: {target}", flush=True)


def card(run: dict[str, Any], values: dict[str, float], gain: float, folder: Path) -> str:
    parts = json.loads((folder / "packed" / "about.json").read_text(encoding="utf-8"))["parts"]
    recipe = run["settings"]
    facts = {name: recipe["fit"][name] for name in ("steps", "batch_size", "lr")} | values
    facts |= {"parameters": run["parameters"] / 1e6, "model": MODEL, "k": recipe["knn"], "gain": gain}
    facts |= {"minutes": run["seconds"] / 60, "device": run["device"], "n": recipe["model"]["max_seq_len"]}
    facts |= {"documents": parts["train"]["documents"], "tokens": parts["train"]["tokens"] / 1e6}
    return CARD.format(**facts, measured=parts["test"]["documents"])
