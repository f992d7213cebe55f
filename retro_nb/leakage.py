"""How much of a chunk its neighbours already say word for word, and what is left without it (notebook 08).

A model that retrieves may merely copy. So the paper (§2.6) measures, for each evaluated chunk, the longest run of
tokens that it shares with its nearest neighbours, and asks how good the model is on the chunks that share little.
"""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
from jaxtyping import Float, Float64, Int, Int64, Integer
from tqdm.auto import tqdm

from retro_nb.dataset import knn_to_retrieved_chunks
from retro_nb.evaluation import Score, bits_per_byte, interval
from retro_nb.tokens import BERTS_IDS, SpecialIds

ALPHAS = (1 / 8, 2 / 8, 3 / 8, 4 / 8, 5 / 8, 6 / 8, 7 / 8, 1)  # limits of r: 8, 16, … of 64 tokens


@dataclass(slots=True, eq=False)
class State:
    """All runs that end at the same places of the texts. Each is an ending of the longest of them."""

    length: int = 0  # tokens in the longest
    shorter: "State | None" = None  # where its longest ending is that ends at further places too
    next: dict[int, "State"] = field(default_factory=dict)  # where one token more leads


class SuffixAutomaton:
    """Every run of tokens in some texts, to be followed token by token from `root`, the empty run.

    In "to be or not to be" the runs "be" and "to be" end at the same places, after words 2 and 6: they share a
    state. "to" ends after 1 and 5 and has its own. "or", "be or" and "to be or" share one again. So all 18
    different runs need 7 states, the root among them. n tokens never need more than 2n, nor many more steps.
    """

    def __init__(self) -> None:
        self.root = State()

    def add(self, text: Iterable[int]) -> None:
        """Take in all runs of a text. None goes from one text on into another."""
        state = self.root
        for token in text:
            state = self._extend(state, token)

    def _extend(self, whole: State, token: int) -> State:
        """Take in the runs that end with `token`, after the part of a text that is the longest run of `whole`."""
        if token in whole.next:  # an earlier text had them all
            return self._split(whole, token)
        new, state = State(whole.length + 1), whole
        while state is not None and token not in state.next:  # shorter and shorter endings, all new before `token`
            state.next[token] = new
            state = state.shorter
        new.shorter = self.root if state is None else self._split(state, token)
        return new

    def _split(self, state: State, token: int) -> State:
        """Where `token` leads from `state`. Longer runs that lead there too now end at fewer places: they part."""
        shared = state.next[token]
        if shared.length == state.length + 1:
            return shared
        apart = State(state.length + 1, shared.shorter, dict(shared.next))
        shared.shorter = apart
        while state is not None and state.next.get(token) is shared:
            state.next[token] = apart
            state = state.shorter
        return apart

    def longest_endings(self, tokens: Iterable[int]) -> list[int]:
        """For each of m tokens the length of the longest run that ends with it and is in the texts.

        `next` makes the run one token longer, `shorter` at least one shorter: together they are followed 2m times.
        """
        state, length, endings = self.root, 0, []
        for token in tokens:
            while token not in state.next and state is not self.root:  # drop tokens in front until it goes on
                state = state.shorter
                length = state.length
            if token in state.next:
                state, length = state.next[token], length + 1
            endings.append(length)
        return endings


def shared_runs(
    chunk: Integer[np.ndarray, " m"],
    texts: Sequence[Integer[np.ndarray, " _"]] | Integer[np.ndarray, "k r"],
    special: SpecialIds = BERTS_IDS,
) -> Int64[np.ndarray, " m"]:
    """For each token of the chunk the length of the longest run around it that is in one of the texts as well.

    The maximum is the paper's s (§2.6). Padding, [CLS] and [SEP] are in no run; nor are the
    `special` ids of another tokenizer. Time and memory grow with m + Σ r.
    """
    wanted = set(chunk.tolist()) - set(special)
    runs = SuffixAutomaton()
    for text in texts:  # a token that the chunk does not have is in no shared run: texts are cut there
        for shared, piece in groupby(text.tolist(), wanted.__contains__):
            if shared:
                runs.add(piece)
    return np.array(_longest_around(runs.longest_endings(chunk.tolist())), np.int64)


def _longest_around(endings: list[int]) -> list[int]:
    """From the longest run that ends with each token to the longest that contains it, from right to left.

    `last` holds the last tokens of the runs that may reach further left, the longest run first. A run that ends
    further left than another never begins further right, so the first in `last` are also the first to be over.
    """
    around, last = [0] * len(endings), deque()
    for i in reversed(range(len(endings))):
        while last and endings[last[-1]] <= endings[i]:
            last.pop()  # neither longer than the run that ends here nor reaching further left
        last.append(i)
        while last and last[0] - endings[last[0]] >= i:
            last.popleft()  # begins after i
        around[i] = endings[last[0]] if last else 0
    return around


def overlaps(
    chunks: Integer[np.ndarray, "c m_plus_1"],
    rows: Int[np.ndarray, " e"],
    neighbours: Int[np.ndarray, "e k"],
    doc_ids: Int[np.ndarray, " c"],
    *,
    special: SpecialIds = BERTS_IDS,
    progress: bool = True,
) -> Float64[np.ndarray, " e"]:
    """r(C) of the e chunks `rows`: the longest run shared with a neighbour, as a share of the chunk (§2.6).

    `neighbours` are chunk ids, 10 in the paper, −1 for none; each is compared as the model reads it, N and F. The
    paper divides by m. Here a chunk has the length of its text, without padding, [CLS] and [SEP]: the few tokens
    that close a document can be copied whole, too. A chunk without text has r = 0. `special` are the ids of another
    tokenizer than BERT's (`chunking.special_ids`).

    Raises:
        ValueError: the sizes do not belong together.
        IndexError: a row or a neighbour is outside the chunk array.
    """
    if len(rows) != len(neighbours) or len(chunks) != len(doc_ids):
        sizes = f"{len(rows)} rows, {len(neighbours)} of neighbours; {len(chunks)} chunks, {len(doc_ids)} doc_ids"
        raise ValueError(f"{sizes}: pass neighbours for each row, a document for each chunk")
    if rows.size and not 0 <= rows.min() <= rows.max() < len(chunks):
        raise IndexError(f"rows {rows.min()} … {rows.max()} of {len(chunks)} chunks: of another corpus?")
    found = np.zeros(len(rows))
    for i, row in enumerate(tqdm(rows, desc="comparing", unit=" chunks", disable=not progress)):
        texts = knn_to_retrieved_chunks(neighbours[i], chunks, pad_id=special.pad, doc_ids=doc_ids)
        chunk = chunks[row, :-1]
        length = np.isin(chunk, special, invert=True).sum()
        found[i] = shared_runs(chunk, texts, special).max(initial=0) / max(length, 1)
    return found


def leakage_curve(
    overlap: Float[np.ndarray, " e"],
    nats: dict[str, Float64[np.ndarray, " e"]],
    sizes: Int[np.ndarray, " e"],
    alphas: Sequence[float | int] = ALPHAS,
) -> list[dict]:
    """bpb(α) = Σ ℓ(C) / Σ N(C) over the chunks with r(C) ≤ α: bits per byte where little is shared (§2.6).

    Args:
        overlap: r(C), see `overlaps`.
        nats: each model's loss, summed over each chunk's tokens; its bits are ℓ(C).
        sizes: N(C), the bytes of each chunk in the original text.
        alphas: limits α; 1 keeps every chunk.

    Returns:
        For each α `alpha`, the shares of `chunks` and of `bytes` kept, and `bits_per_byte` by model: None where no
        byte is kept.

    Raises:
        ValueError: the sizes do not belong together, there are no bytes at all, or a share is not in 0 … 1.
    """
    counts = {"overlap": len(overlap), "sizes": len(sizes), **{name: len(losses) for name, losses in nats.items()}}
    if len(set(counts.values())) > 1:
        raise ValueError(f"values for unequal numbers of chunks, {counts}: pass one for each evaluated chunk")
    if sizes.sum() <= 0:
        raise ValueError(f"{len(sizes)} chunks of {sizes.sum()} bytes: pass chunks with text in them")
    for name, shares in ("overlap", overlap), ("alphas", alphas):
        if outside := [float(share) for share in shares if not 0 <= share <= 1]:
            raise ValueError(f"{name} has {outside[0]}: pass shares from 0 to 1")
    curve = []
    for alpha in map(float, alphas):
        kept = overlap <= alpha
        size = sizes[kept].sum()
        bits = {name: float(bits_per_byte(each[kept].sum(), size)) if size else None for name, each in nats.items()}
        share = {"chunks": float(kept.mean()), "bytes": float(size / sizes.sum())}
        curve.append({"alpha": alpha, **share, "bits_per_byte": bits})
    return curve


def gain_curve(
    overlap: Float[np.ndarray, " e"],
    worse: Float64[np.ndarray, " e"],
    better: Float64[np.ndarray, " e"],
    sizes: Int[np.ndarray, " e"],
    documents: Int[np.ndarray, " e"],
    alphas: Sequence[float | int] = ALPHAS,
) -> list[tuple[float, float, float]]:
    """Bits per byte that a better model saves on the chunks with r(C) ≤ α: (value, low, high) for each α.

    The value lies from low to high with a confidence of 95 %. It is a bootstrap over the documents that have such
    chunks (see `evaluation.interval`), because the chunks of one document are no independent witnesses.

    Args:
        overlap, sizes, alphas: as for `leakage_curve`.
        worse, better: two models' losses in nats, summed over each chunk's tokens.
        documents: each chunk's document.

    Returns:
        Three times NaN for an α that keeps no byte.
    """
    gains = []
    for alpha in alphas:
        kept = overlap <= alpha
        if not sizes[kept].sum():
            gains.append((math.nan,) * 3)
            continue
        own = np.unique(documents[kept], return_inverse=True)[1]
        lengths = np.bincount(own, sizes[kept]).astype(np.int64)
        first, second = (Score(np.bincount(own, nats[kept]), 0 * lengths, lengths) for nats in (worse, better))
        gains.append((first.bits_per_byte - second.bits_per_byte, *interval(first, second)))
    return gains
