"""Near-duplicate documents: those that share most of their 13-grams of tokens (paper, §2.1).

The paper drops training documents if their 13-grams have a Jaccard similarity of .8 or more with those of an
evaluation document, and estimates the similarity by MinHash. Here the similarity is exact, except where two 13-grams
have the same 64-bit hash.

Two sets with a Jaccard similarity of at least t share a member among the first |A| − ⌈t·|A|⌉ + 1 of each, in any common
order of the members (the prefix filter of set similarity joins; Chaudhuri et al. 2006). With the rarest members first,
few documents share a member of their prefixes, and only those are compared.
"""

import math
import time
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Integer, UInt64

GRAM = 13  # tokens
JACCARD = 0.8
FACTORS = np.array([0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB], np.uint64)  # odd, so invertible

Grams = UInt64[np.ndarray, " _"]  # distinct hashes in ascending order


class Pair(NamedTuple):
    """Two documents by their numbers, `first` < `second`, and the Jaccard similarity of their 13-grams."""

    first: int
    second: int
    jaccard: float


def grams_of(tokens: Integer[np.ndarray, " n"], gram: int = GRAM) -> Grams:
    """The distinct runs of `gram` tokens, as 64-bit hashes in ascending order; none in a shorter text."""
    count = len(tokens) - gram + 1
    if count < 1:
        return np.empty(0, np.uint64)
    tokens, hashes = _mixed(tokens.astype(np.uint64) + FACTORS[0]), np.zeros(count, np.uint64)
    for i in range(gram):
        hashes = hashes * FACTORS[1] + tokens[i : i + count]  # modulo 2^64
    return np.unique(_mixed(hashes))


def _mixed(values: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """Scramble the values one-to-one, so that similar ones end up far apart (the finaliser of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * FACTORS[1]
    values = (values ^ (values >> np.uint64(27))) * FACTORS[2]
    return values ^ (values >> np.uint64(31))


def jaccard(first: Grams, second: Grams) -> float:
    """|A ∩ B| / |A ∪ B|; 0 if both are empty."""
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / max(1, len(first) + len(second) - shared)


def near_duplicates(
    documents: Sequence[Integer[np.ndarray, " _"]],
    among: Collection[int] | None = None,
    *,
    gram: int = GRAM,
    at_least: float = JACCARD,
) -> list[Pair]:
    """All pairs of documents with a Jaccard similarity of `at_least` or more, in ascending order of their numbers.

    Args:
        documents: the tokens of each document. One with fewer than `gram` tokens has no pair.
        among: document numbers; return only pairs that include one of them, all pairs by default.
        gram: tokens in a run.
        at_least: the similarity, above 0 and up to 1.

    Raises:
        ValueError: `gram` is below 1, or `at_least` is not above 0 and up to 1.
    """
    if gram < 1 or not 0 < at_least <= 1:
        raise ValueError(f"runs of {gram} tokens, similarity {at_least}: pass 1 or more, and above 0 up to 1")
    grams, found = [grams_of(tokens, gram) for tokens in documents], []
    wanted = np.full(len(grams), among is None)
    wanted[list(among or ())] = True
    for number, others in _candidates(grams, at_least):
        others = others if wanted[number] else others[wanted[others]]
        for other in others.tolist():
            similarity = jaccard(grams[number], grams[other])
            if similarity >= at_least:
                found.append(Pair(other, number, similarity))
    return sorted(found)


def repeating(documents: Sequence[Integer[np.ndarray, " _"]], seconds: float | int = math.inf) -> tuple[list[int], int]:
    """Near-duplicates of an earlier document, and the number of documents checked within the time.

    Faster than `near_duplicates` if many documents are alike, because one pair per document is enough. The first
    document is always checked.
    """
    end = time.monotonic() + seconds
    found: list[int] = []
    grams = [grams_of(tokens) for tokens in documents]
    for number, others in _candidates(grams, JACCARD):
        if time.monotonic() > end:
            return found, max(1, number)
        if any(jaccard(grams[number], grams[other]) >= JACCARD for other in others.tolist()):
            found.append(number)
    return found, len(documents)


def _candidates(grams: Sequence[Grams], at_least: float) -> Iterator[tuple[int, Int[np.ndarray, " _"]]]:
    """(document, earlier documents that may be as similar), by the prefix filter and by the sizes."""
    sizes = np.array([len(each) for each in grams], np.int64)
    prefixes = _prefixes(grams, at_least)
    members = np.concatenate([*prefixes, np.empty(0, np.uint64)])
    owners = np.repeat(np.arange(len(grams)), [len(each) for each in prefixes])
    order = np.argsort(members, kind="stable")  # so that a member's owners are in ascending order
    members, owners = members[order], owners[order]
    for number, prefix in enumerate(prefixes):
        firsts, stops = (np.searchsorted(members, prefix, side) for side in ("left", "right"))
        shared = [owners[i:j] for i, j in zip(firsts.tolist(), stops.tolist(), strict=True) if j - i > 1]
        if shared:
            others = np.unique(np.concatenate(shared))
            others = others[others < number]
            smaller, larger = np.minimum(sizes[others], sizes[number]), np.maximum(sizes[others], sizes[number])
            yield number, others[smaller >= at_least * larger - 1e-9]


def _prefixes(grams: Sequence[Grams], at_least: float) -> list[Grams]:
    """The rarest runs of each document, enough that every document as similar shares one of them."""
    values, counts = np.unique(np.concatenate([*grams, np.empty(0, np.uint64)]), return_counts=True)
    prefixes = []
    for each in grams:
        size = len(each) - math.ceil(at_least * len(each) - 1e-9) + 1 if len(each) else 0
        rarity = counts[np.searchsorted(values, each)]
        rarest = np.argsort(rarity, kind="stable")[:size]  # ties by hash
        prefixes.append(each[rarest][rarity[rarest] > 1])
    return prefixes
