"""Compare what `retro_nb.planning.prediction` says of a corpus with what trained models have gained on it.

    python experiments/prediction.py          after experiments/sources.py build, on one core; minutes

The corpora are those of experiments/evidence.py and experiments/sources.py; of the speeches and the docstrings a
store is built. Measured is RETRO's loss against the baseline's, by experiments/results. The source code's test files
are also compared in the groups of experiments/results/code.json: by the share of their 13-grams that stand in the
database, and chunk by chunk, by the longest run that is shared with a neighbour.

It writes experiments/results/prediction.json; `points` there is what notebook 10 draws.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from evidence import RESULTS
from sources import RUNS
from sources_results import COPIED
from sources_store import Packed, copied, rows_of

from retro_nb import Store, StoreSettings, docstrings, speeches
from retro_nb.common.arrays import ROOT, write_json
from retro_nb.planning.prediction import Prediction, predict_arrays
from retro_nb.store.chunking import special_ids
from retro_nb.store.index import NO_NEIGHBOUR
from retro_nb.store.splits import hold_out


def saved(found: dict[str, Any]) -> float:
    """The share of the baseline's loss that RETRO saved, mean over the seeds."""
    return 1 - float(np.mean(found["on"]) / np.mean(found["baseline"]))


def about(prediction: Prediction, found: dict[str, Any]) -> dict[str, Any]:
    facts = {"predicted": prediction.gain, "interval": prediction.interval, "measured": saved(found)}
    return facts | {"documents": len(prediction.documents), "tokens": prediction.tokens}


def of_code() -> dict[str, Any]:
    """Of the test files: all together, by how much of them is copied, and by the run that a chunk shares."""
    found = json.loads((RESULTS / "code.json").read_text(encoding="utf-8"))
    packed, store = Packed(RUNS / "packed"), RUNS / "store"
    chunks, doc_ids = (np.load(store / f"{name}.npy") for name in ("chunks", "doc_ids"))
    knns = np.load(store / "knns.npy")[:, : found["settings"]["knn"]]
    used = np.sort(rows_of(packed, doc_ids, "train", "test"))  # the others are in no database
    rows = np.full(len(doc_ids), NO_NEIGHBOUR)
    rows[used] = np.arange(len(used))
    test, near = np.unique(doc_ids[rows_of(packed, doc_ids, "test")]), knns[used]
    near = np.where(near >= 0, rows[near], NO_NEIGHBOUR)
    prediction = predict_arrays(chunks[used], doc_ids[used], near, test, special_ids(store / "chunks.npy"))
    print(prediction, flush=True)
    shares, groups = np.array(copied(RUNS / "packed")), {}
    for name, (low, high) in COPIED.items():
        own = (shares >= low) & (shares < high)
        gain = 1 - prediction.with_pages[own].sum() / prediction.without[own].sum()
        groups[name] = {"predicted": float(gain), "measured": saved(found["copied"][name])}
    runs = {
        run: {"predicted": gain, "share": share, "measured": saved(found["groups"][run])}
        for run, (gain, share) in prediction.by_overlap.items()
    }
    return about(prediction, found) | {"copied": groups, "by_overlap": runs}


def of_corpus(name: str, corpus: Any) -> dict[str, Any]:
    """Of the documents that experiments/evidence.py held out of a corpus.

    Raises:
        SystemExit: the results are of another version of the corpus.
    """
    found, titles = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")), [each.title for each in corpus]
    left_out = hold_out(np.arange(len(titles)), 0.1)
    if [titles[number] for number in left_out] != found["documents"]["titles"]:
        raise SystemExit(f"{name}.json is of other documents than those installed: run experiments/evidence.py {name}")
    settings = StoreSettings(seq_len=512, knn=found["settings"]["knn"], keep_out=left_out.tolist())
    store = Store.build(corpus, ROOT / "runs" / "prediction" / name, settings)
    special = special_ids(store.files.chunks)
    prediction = predict_arrays(store.chunks, store.doc_ids, store.neighbours, left_out, special)
    print(f"{name}: {prediction}", flush=True)
    return about(prediction, found)


def points(found: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Predicted and measured, by what they are about."""
    parts = {"source code": found["code"], "speeches": found["speeches"], "docstrings": found["docstrings"]}
    parts |= {f"code, {run} shared": about for run, about in found["code"]["by_overlap"].items()}
    return {name: (about["predicted"], about["measured"]) for name, about in parts.items()}


def main() -> None:
    found = {"command": "python experiments/prediction.py", "code": of_code()}
    for name, corpus in {"speeches": speeches(), "docstrings": docstrings()}.items():
        found[name] = of_corpus(name, corpus)
    found["points"] = points(found)
    write_json(Path(RESULTS) / "prediction.json", found)


if __name__ == "__main__":
    main()
