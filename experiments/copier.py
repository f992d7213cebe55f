"""How much could be gained by copying from the neighbours of the speeches? A copier without any training.

    python experiments/copier.py            after experiments/evidence.py speeches; ten minutes on two CPU cores

The copier looks up the last three tokens, or two, or one, among the k neighbours that a chunk reads, and predicts what
followed them there. Its forecast is mixed into that of the included model without retrieval. The weights are chosen
on the very texts that are measured, so the gain is flattered: no honest copier of this kind gains more.

It writes experiments/results/speeches-copier.json.
"""

from collections.abc import Sequence

import numpy as np
from evidence import RESULTS, Experiment, read_recipe

from retro_nb import RETRO, knn_to_retrieved_chunks
from retro_nb.common.arrays import write_json
from retro_nb.planning.prediction import ORDER, Copier

WEIGHTS = np.linspace(0, 0.9, 46)


def forecasts(texts: Sequence[Sequence[int]], before: list[int], chunk: list[int]) -> list[tuple[int, float]]:
    """For each token of a chunk how many tokens before it were found, and how likely that makes it."""
    copier, tokens = Copier(), before + chunk
    for text in texts:
        copier.read(text)
    return [copier.forecast(tokens, i) for i in range(len(before), len(tokens))]


def gain(nats: np.ndarray, found: np.ndarray, copied: np.ndarray) -> float:
    """The share of the loss that is saved with the best weight for each length that was found."""
    mixed = np.exp(-nats)
    for n in range(1, ORDER):
        model, copier = mixed[found == n], copied[found == n]
        losses = [-np.log((1 - w) * model + w * copier).sum() for w in WEIGHTS]
        w = WEIGHTS[int(np.argmin(losses))]
        mixed[found == n] = (1 - w) * model + w * copier
    return float(1 + np.log(mixed).sum() / nats.sum())


def main() -> None:
    experiment = Experiment("speeches", read_recipe("speeches", {}))
    losses = experiment.losses(RETRO.from_pretrained("speeches"), "off")
    chunks, doc_ids = np.load(experiment.store / "chunks.npy", mmap_mode="r"), experiment.doc_ids
    gains = {}
    for k in (1, 2, 4, 8, 16):
        nats, made = [], []
        for row in experiment.rows[1:]:
            if doc_ids[row] == doc_ids[row - 1]:
                near = knn_to_retrieved_chunks(experiment.knns[row - 1, :k], chunks, doc_ids=doc_ids)
                texts = [[token for token in text if token] for text in near.tolist()]
                counted = ~np.isnan(losses[row])
                predicted = forecasts(texts, chunks[row - 1, -ORDER:-1].tolist(), chunks[row, :-1].tolist())
                nats.append(losses[row][counted].astype(np.float64))
                made += [each for each, wanted in zip(predicted, counted, strict=True) if wanted]
        found, copied = np.array(made).T
        gains[str(k)] = gain(np.concatenate(nats), found, copied)
        print(f"{k} neighbours: {gains[str(k)]:.2%} of the loss", flush=True)
    write_json(RESULTS / "speeches-copier.json", {"command": "python experiments/copier.py", "gains": gains})


if __name__ == "__main__":
    main()
