"""The store of an experiment: all that evidence.py and retrofit.py need of the texts, BERT and FAISS, as arrays.

chunks.npy, seqs.npy, doc_ids.npy, chunks.bytes.npy     the corpus, as `documents_to_chunks_` writes it
knns.npy                        the `FOUND` nearest chunks of each in the database
cosine.npy, share-….npy         for the chunks that are measured: similarity of the first neighbour, and what
                                smaller databases would find
facts.npy or overlap.npy        tokens that tell a fact of the almanac, or r(C) of the measured chunks
about.json                      settings, titles, which documents are measured; written last
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retro_nb import Store, StoreSettings, almanac, docstrings, speeches
from retro_nb.common.arrays import open_array, write_json
from retro_nb.measure.evaluation import fact_tokens
from retro_nb.measure.leakage import overlaps
from retro_nb.store.chunking import special_ids, store_tokenizer
from retro_nb.store.index import NO_NEIGHBOUR, exact_search
from retro_nb.store.splits import hold_out
from retro_nb.text.document import Document
from retro_nb.text.translations import book_of, translations

CORPORA: dict[str, Callable] = {
    "almanac": almanac, "unaligned": almanac, "speeches": speeches, "docstrings": docstrings,
    "translations": translations,
}  # fmt: skip
FOUND = 16  # neighbours that are looked up
SHARED = 10  # neighbours with which a chunk is compared word for word (paper, section 2.6)
SHARES = {"1/16": 1 / 16, "1/8": 1 / 8, "1/4": 1 / 4, "1/2": 1 / 2}  # of the database's documents
SEEDS = (0, 1, 2)


def tells_facts(name: str) -> bool:
    """Whether the corpus is an almanac: documents 2t and 2t + 1 tell the facts of town t."""
    return CORPORA[name] is almanac


def chapters_of(corpus: Iterable[Document], books: Sequence[int], version: str | None = None) -> list[int]:
    """The numbers of the chapters of some books, in one translation or in all."""
    sources = [document.source for document in corpus]
    return [
        number
        for number, source in enumerate(sources)
        if book_of(source) in books and version in (None, source.split("/")[0])
    ]


def build_store(name: str, recipe: dict[str, Any], folder: Path) -> None:
    """Chunks and neighbours of a corpus, and about.json, which is written last."""
    corpus = CORPORA[name](**recipe["corpus"])
    keep_out: Any = recipe["keep_out"]
    if name == "translations":
        keep_out = chapters_of(corpus, keep_out["books"], keep_out["version"])
    elif tells_facts(name):  # document 2t of a town that is left out stays in the database: there it can be found
        keep_out = (2 * hold_out(np.arange(corpus.towns), keep_out) + 1).tolist()
    tokenizer = recipe.get("tokenizer")  # None is BERT's, a number a BPE of this corpus
    settings = StoreSettings(seq_len=recipe["model"]["max_seq_len"], knn=FOUND, tokenizer=tokenizer, keep_out=keep_out)
    store = Store.build(corpus, folder, settings)
    np.save(folder / "knns.npy", store.neighbours)
    save_measured(folder, store.kept_out, store.vectors)
    describe(name, recipe, corpus, folder, store.kept_out)


def save_measured(folder: Path, measured: list[int], vectors: np.ndarray) -> None:
    """For the chunks that are measured: similarity of the first neighbour, and what smaller databases would find."""
    doc_ids, knns = open_array(folder / "doc_ids.npy"), open_array(folder / "knns.npy")
    rows = np.flatnonzero(np.isin(doc_ids, measured))
    first = vectors[knns[rows, 0]]
    lengths = np.linalg.norm(vectors[rows], axis=1) * np.linalg.norm(first, axis=1)
    np.save(folder / "cosine.npy", (vectors[rows] * first).sum(axis=1) / lengths)
    database = np.setdiff1d(np.unique(doc_ids), measured)
    for seed in SEEDS:
        for share in SHARES.values():
            chosen = np.flatnonzero(np.isin(doc_ids, hold_out(database, share, seed)))
            _, found = exact_search(vectors[chosen], vectors[rows], FOUND)
            found = np.where(found >= 0, chosen[found], NO_NEIGHBOUR)
            np.save(folder / f"share-{share}-{seed}.npy", found.astype(np.int32))


def describe(name: str, recipe: dict[str, Any], corpus: Any, folder: Path, measured: list[int]) -> None:
    """What the chunks are: whose, which of their tokens tell facts, what they share with their neighbours."""
    doc_ids = open_array(folder / "doc_ids.npy")
    about = {"built": built_with(recipe), "measured": measured, "titles": [document.title for document in corpus]}
    about["untrained"] = measured
    if name == "translations":  # nor in another translation, in which they are in the database
        about["untrained"] = chapters_of(corpus, recipe["keep_out"]["books"])
    if tells_facts(name):
        np.save(folder / "facts.npy", fact_tokens(corpus, doc_ids, 64, store_tokenizer(folder / "chunks.npy")))
        about["entropy"] = corpus.fact_entropy
        about["untrained"] = sorted([*measured, *(number - 1 for number in measured)])  # nor the twin that is there
    else:
        rows = np.flatnonzero(np.isin(doc_ids, measured))
        chunks, near = open_array(folder / "chunks.npy"), open_array(folder / "knns.npy")[rows, :SHARED]
        special = special_ids(folder / "chunks.npy")
        np.save(folder / "overlap.npy", overlaps(chunks, rows, near, doc_ids, special=special, progress=False))
    write_json(folder / "about.json", about)


def built_with(recipe: dict[str, Any]) -> dict[str, Any]:
    """The settings on which a store depends."""
    built = {"corpus": recipe["corpus"], "keep_out": recipe["keep_out"], "n": recipe["model"]["max_seq_len"]}
    return built | ({"tokenizer": recipe["tokenizer"]} if "tokenizer" in recipe else {})
