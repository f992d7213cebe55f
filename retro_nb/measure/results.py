"""What experiments/evidence.py has found, for the notebooks that show it (07 and 08)."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from retro_nb.common.arrays import ROOT

RESULTS = ROOT / "experiments" / "results"


def results(corpus: str) -> dict[str, Any]:
    """The measurements on a corpus, one number a seed, with the command and the settings that made them.

    Raises:
        FileNotFoundError: there are none of this corpus.
    """
    return json.loads(_path(f"{corpus}.json").read_text(encoding="utf-8"))


def chunk_results(corpus: str) -> dict[str, Shaped[np.ndarray, "..."]]:
    """The same chunk by chunk, for the e chunks of the documents that were held out, in their order.

    Returns:
        rows        (e,) their numbers in the corpus's chunk array
        knns        (e, 10) the chunks nearest to each in the database, −1 for none
        cosine      (e,) similarity to the first of them
        overlap     (e,) r(C), see `leakage.overlaps`
        bytes       (e,) of the original text
        nats_on, nats_off, nats_shuffled, nats_baseline   (seeds, e) loss, summed over each chunk's tokens

    Raises:
        FileNotFoundError: there are none of this corpus.
    """
    with np.load(_path(f"{corpus}-chunks.npz")) as arrays:
        return dict(arrays)


def _path(name: str) -> Path:
    path = RESULTS / name
    if not path.is_file():
        there = ", ".join(sorted(file.name for file in RESULTS.glob("*"))) or "nothing"
        raise FileNotFoundError(f"{name} is not in {RESULTS}, which holds {there}: experiments/evidence.py writes it")
    return path
