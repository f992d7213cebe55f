"""kNN-LM (Khandelwal et al. 2020, arXiv 1911.00172) on a trained baseline: another way to use the same training text.

Its memory has, for every token of the training documents, the state that the output layer reads before it, and the
token. A token's forecast is that of the model, mixed with that of the K nearest states, by squared distance:

    p(y) = λ · Σ over neighbours with token y of softmax(−d / T)  +  (1 − λ) · p_model(y)

Neighbours are exact. No memory is kept: the states of a batch of training sequences are compared with those of all
queries, and forgotten. Queries are a random sample of the tokens. λ and T are chosen on the validation documents.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from sources_search import lowest, merged, nothing_found
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from retro_nb import RETRO, RETRODataset
from retro_nb.store.splits import of_documents

K = 128
SAMPLED = 20_000  # tokens of the validation documents, and of the test documents
BATCH = 32  # sequences
BLOCK = 8192  # queries that are compared at a time
WEIGHTS = np.linspace(0, 0.9, 46)  # λ
TEMPERATURES = np.geomspace(0.3, 1000, 24)


class States(NamedTuple):
    """Of t tokens of text: the state before each, the token, the model's loss, and the document."""

    states: Float[Tensor, "t d"]
    tokens: Int[Tensor, " t"]
    nats: Float[Tensor, " t"]
    documents: Int[Tensor, " t"]


def measure(retro: RETRO, data: RETRODataset, parts: dict[str, list[int]], seed: int) -> dict[str, Any]:
    """Choose λ and T on a sample of the documents in `parts["valid"]`, and measure them on one of `parts["test"]`.

    Returns:
        weight, temperature, seconds
        valid, test     how many tokens were sampled, and the mean loss in nats: model, knnlm
        nats, tokens    of the test documents, in their order: nats of model and knnlm, and how many tokens of each
    """
    started = time.perf_counter()
    chosen, test = (sample(retro, data, parts[part], seed) for part in ("valid", "test"))
    queries = torch.cat([chosen.states, test.states])
    distances, tokens = neighbours(retro, data, parts["train"], queries)
    count = len(chosen.tokens)
    weight, temperature = choose(chosen, distances[:count], tokens[:count])
    losses = {}
    for name, own, rows in (("valid", chosen, slice(count)), ("test", test, slice(count, None))):
        forecast = mixture(own, distances[rows], tokens[rows], temperature, torch.tensor([weight]))[:, 0]
        losses[name] = {"model": own.nats.cpu().double().numpy(), "knnlm": forecast.cpu().double().numpy()}
    found = {
        name: {"tokens": len(each["model"])} | {kind: float(nats.mean()) for kind, nats in each.items()}
        for name, each in losses.items()
    }
    places = np.searchsorted(parts["test"], test.documents.cpu().numpy())
    sums = {kind: np.bincount(places, nats, len(parts["test"])).tolist() for kind, nats in losses["test"].items()}
    found |= {"nats": sums, "tokens": np.bincount(places, minlength=len(parts["test"])).tolist()}
    return found | {"weight": weight, "temperature": temperature, "seconds": time.perf_counter() - started}


def sample(retro: RETRO, data: RETRODataset, documents: Sequence[int], seed: int) -> States:
    """The states before about `SAMPLED` random tokens of these documents' text."""
    share = min(1.0, SAMPLED / max(1, int(np.isin(data.doc_ids, documents).sum()) * data.chunk_size))
    generator, parts = torch.Generator().manual_seed(seed), []
    for each in states_of(retro, data, documents):
        drawn = torch.rand(len(each.tokens), generator=generator) < share
        drawn = drawn.to(each.tokens.device) & (each.tokens != data.eos_id)
        parts.append([values[drawn] for values in each])
    return States(*map(torch.cat, zip(*parts, strict=True)))


@torch.no_grad()
def states_of(retro: RETRO, data: RETRODataset, documents: Sequence[int]) -> Iterator[States]:
    """The states before all tokens of these documents, some sequences at a time."""
    sequences, read = of_documents(data, documents), []
    owners = torch.from_numpy(data.sequence_documents[sequences.indices].astype(np.int64))
    hook = retro.to_logits.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    try:
        for number, (seq, _) in enumerate(DataLoader(sequences, BATCH)):
            seq = seq.to(retro.to_logits.weight.device)
            logits, labels = retro(seq[:, :-1]), seq[:, 1:]
            nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2).float(), labels, reduction="none")
            own = owners[number * BATCH : (number + 1) * BATCH, None].to(seq.device).expand_as(labels)
            text = labels != data.pad_id
            yield States(*(each[text] for each in (read.pop().float(), labels, nats, own)))
    finally:
        hook.remove()


def neighbours(
    retro: RETRO, data: RETRODataset, documents: Sequence[int], queries: Float[Tensor, "q d"]
) -> tuple[Float[Tensor, "q k"], Int[Tensor, "q k"]]:
    """Squared distances of the K nearest states in these documents, and the tokens that follow them."""
    blocks = queries.split(BLOCK)
    best = [nothing_found(len(block), K, queries.device) for block in blocks]
    for memory in tqdm(states_of(retro, data, documents), desc="remembering", unit=" batches", mininterval=5):
        norms = memory.states.square().sum(dim=1)
        for i, block in enumerate(blocks):
            scores = torch.addmm(norms, block, memory.states.T, alpha=-2)
            best[i] = merged(best[i], lowest(scores, memory.tokens, K), K)
    scores, tokens = map(torch.cat, zip(*best, strict=True))
    return scores + queries.square().sum(dim=1, keepdim=True), tokens


def choose(chosen: States, distances: Float[Tensor, "q k"], tokens: Int[Tensor, "q k"]) -> tuple[float, float]:
    """The λ and T with the lowest mean loss."""
    means = torch.stack(
        [
            mixture(chosen, distances, tokens, temperature, torch.from_numpy(WEIGHTS)).mean(dim=0)
            for temperature in TEMPERATURES
        ]
    )
    row, column = divmod(int(means.argmin()), len(WEIGHTS))
    return float(WEIGHTS[column]), float(TEMPERATURES[row])


def mixture(
    own: States,
    distances: Float[Tensor, "q k"],
    tokens: Int[Tensor, "q k"],
    temperature: float,
    weights: Float[Tensor, " w"],
) -> Float[Tensor, "q w"]:
    """The loss of each token, in nats, for each λ."""
    shares = torch.softmax(-distances.double() / temperature, dim=1)
    remembered = (shares * (tokens == own.tokens[:, None])).sum(dim=1, keepdim=True)
    weights = weights.to(remembered)
    return -torch.log(weights * remembered + (1 - weights) * torch.exp(-own.nats.double())[:, None])
