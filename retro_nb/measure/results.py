"""Results of experiments/evidence.py, for the notebooks that show them (07 and 08)."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from retro_nb.common.arrays import SOURCE

RESULTS = SOURCE / "experiments" / "results"


def results(corpus: str) -> dict[str, Any]:
    """Measurements on a corpus, one number per seed, with the command and settings that produced them.

    Raises:
        FileNotFoundError: there are none for this corpus.
    """
    return json.loads(_path(f"{corpus}.json").read_text(encoding="utf-8"))


def chunk_results(corpus: str) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Measurements on each of the e chunks of the held-out documents, in order.

    Returns:
        rows        (e,) chunk numbers in the corpus's chunk array
        knns        (e, 10) nearest chunks in the database, −1 for none
        cosine      (e,) similarity to the nearest
        overlap     (e,) r(C), see `leakage.overlaps`
        bytes       (e,) bytes of the original text
        nats_on, nats_off, nats_shuffled, nats_baseline   (seeds, e) loss, summed over each chunk's tokens

    Raises:
        FileNotFoundError: there are none for this corpus.
    """
    with np.load(_path(f"{corpus}-chunks.npz")) as arrays:
        return dict(arrays)


def _path(name: str) -> Path:
    path = RESULTS / name
    if not path.is_file():
        found = ", ".join(sorted(file.name for file in RESULTS.glob("*"))) or "nothing"
        raise FileNotFoundError(f"{name} is not in {RESULTS}, which holds {found}: experiments/evidence.py writes it")
    return path
