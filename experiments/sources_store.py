"""The corpus and the store of experiments/sources.py.

`pack` needs the texts: it cuts them into tokens, splits them, and writes a folder that can be copied to a GPU:

    tokens.xz           the tokens of all documents, one after another, uint16
    documents.xz        for each a line of JSON: title, source, digest, package, part, how many tokens and bytes it has
    tokenizer/          a byte-level BPE of the training documents
    about.json          the corpus's fingerprint and licences, the settings, what was dropped; written last

`build_store` needs that folder, a GPU and the weights of the BERT. It leaves `neighbours.npz` in the packed folder:
with that, the store can be built on another machine without BERT and without a search. With the retriever "bm25" it
leaves `neighbours-bm25.npz`. The store has

    chunks.npy, seqs.npy, doc_ids.npy, chunks.bytes.npy, …     as `documents_to_chunks_` writes them
    knns.npy, knns-bm25.npy     the nearest chunks of each in the database, which is all training documents

A document's part is train, valid, test or unseen: of a library that is not trained on.
"""

import hashlib
import json
import lzma
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Int, Int32, Integer
from sources_search import best_matches, is_special, nearest
from torch import Tensor
from tqdm.auto import tqdm

from retro_nb import get_tokenizer, knn_to_retrieved_chunks, train_tokenizer
from retro_nb.common.arrays import open_array, write_json, writing
from retro_nb.common.devices import best_device
from retro_nb.common.digests import digest
from retro_nb.store.chunking import (
    ChunkedDocument,
    Tokens,
    document_tokens,
    special_ids,
    text_digest,
    tokens_to_chunks,
    write_chunks,
)
from retro_nb.store.embedding import write_vectors
from retro_nb.store.files import Files
from retro_nb.store.index import NO_NEIGHBOUR
from retro_nb.store.settings import StoreSettings
from retro_nb.text.document import Document
from retro_nb.text.duplicates import Pair, grams_of, near_duplicates
from retro_nb.text.sources import code
from retro_nb.text.tokens import SpecialIds, TextTokenizer

M = 64  # tokens in a chunk
FOUND = 16  # neighbours that are looked up
KEPT = 4  # of them where no more are read: so neighbours.npz stays small
SHARED = 10  # neighbours with which a chunk is compared word for word (paper, section 2.6)
SHARES = {"1/16": 1 / 16, "1/8": 1 / 8, "1/4": 1 / 4, "1/2": 1 / 2}  # of the database's documents
RETRIEVERS = {"minilm": ("neighbours", "knns"), "bm25": ("neighbours-bm25", "knns-bm25")}  # files: packed, in the store
MEMORY = {"1/4": 1 / 4, "1/2": 1 / 2, "1": 1.0}  # of the other files of the libraries that were not trained on
XZ = [{"id": lzma.FILTER_LZMA2, "preset": 9, "lc": 0, "lp": 1, "pb": 1}]  # of 16-bit numbers


# from texts to a folder that can be copied


def pack(recipe: dict[str, Any], folder: Path) -> None:
    """Cut, split and compress the corpus; see above. Takes minutes on one core."""
    corpus = code(**recipe["corpus"])
    documents = list(corpus)
    parts = split(documents, recipe)
    training = (document.text for document, part in zip(documents, parts, strict=True) if part == "train")
    train_tokenizer(training, folder / "tokenizer", size=recipe["tokenizer"], progress=False)
    tokens = _tokenized(documents, get_tokenizer(folder / "tokenizer"))
    held_out = [number for number, part in enumerate(parts) if part != "train"]
    pairs = near_duplicates(tokens, held_out)
    dropped = dropped_of(pairs, parts)
    kept = [number for number in range(len(documents)) if number not in dropped]
    written = {"sha256": _write_tokens(folder / "tokens.xz", [tokens[number] for number in kept])}
    lines = [json.dumps(_about(documents[number], parts[number], len(tokens[number]))) for number in kept]
    with writing(folder / "documents.xz") as file:
        file.write(lzma.compress("\n".join(lines).encode()))
    titles = [documents[number].title for number in sorted(dropped)]
    counts = {part: count_of(part, [parts[number] for number in kept], [tokens[number] for number in kept])
              for part in ("train", "valid", "test", "unseen")}  # fmt: skip
    about = {"built": built_with(recipe), "parts": counts, "near_duplicates": len(pairs), "dropped": titles} | written
    about |= {"corpus": corpus.fingerprint(), "licences": corpus.licences(), "skipped": corpus.skipped}
    write_json(folder / "about.json", about)


def built_with(recipe: dict[str, Any]) -> dict[str, Any]:
    """The settings on which the packed corpus depends."""
    return {name: recipe[name] for name in ("corpus", "split", "tokenizer")}


def split(documents: Sequence[Document], recipe: dict[str, Any]) -> list[str]:
    """The part of each document. It depends on the document alone, and so hardly changes with the corpus."""
    unseen, shares = recipe["split"]["unseen"], recipe["split"]
    parts = ["unseen" if package_of(document.title) in unseen else "train" for document in documents]
    free = [number for number, part in enumerate(parts) if part == "train"]
    order = sorted(free, key=lambda number: rank(documents[number].source, text_digest(documents[number].text)))
    test, valid = (max(1, round(shares[name] * len(free))) for name in ("test", "valid"))
    for number in order[:test]:
        parts[number] = "test"
    for number in order[test : test + valid]:
        parts[number] = "valid"
    return parts


def rank(source: str, text: str) -> str:
    """A document's place in a random order, by its path and the digest of its text."""
    return digest(["split", source, text])


def package_of(title: str) -> str:
    return title.partition(".")[0]


def dropped_of(pairs: Sequence[Pair], parts: Sequence[str]) -> set[int]:
    """Of each pair the document that is trained on; of two that are held out the second."""
    return {first if parts[first] == "train" else second for first, second, _ in pairs}


def count_of(part: str, parts: Sequence[str], tokens: Sequence[np.ndarray]) -> dict[str, int]:
    own = [each for each, its_part in zip(tokens, parts, strict=True) if its_part == part]
    return {"documents": len(own), "tokens": sum(map(len, own))}


def _tokenized(documents: Sequence[Document], tokenizer: TextTokenizer) -> list[Integer[np.ndarray, " _"]]:
    """The tokens of each document, with start and end. Their bytes must be those of the text."""
    sizes, made = bytes_of_tokens(tokenizer), []
    for document in documents:
        ids = np.concatenate([stretch.ids for stretch in document_tokens(document.text, tokenizer=tokenizer)])
        if sizes[ids].sum() != len(document.text.encode("utf-8", "replace")):
            raise ValueError(f"{document.source}: its tokens are not its text; use a byte-level tokenizer")
        made.append(ids.astype(np.uint16))
    return made


def bytes_of_tokens(tokenizer: TextTokenizer) -> Int[np.ndarray, " v"]:
    """How many bytes of text each token of a byte-level BPE stands for; 0 for the special ones."""
    sizes = np.array([len(tokenizer.token(id)) for id in range(tokenizer.size)])  # a character stands for a byte
    sizes[list(tokenizer.ids)] = 0
    return sizes


def _write_tokens(path: Path, tokens: Sequence[Integer[np.ndarray, " _"]]) -> str:
    """Compress the tokens of all documents; the SHA-256 of what was compressed."""
    data = np.concatenate(tokens).astype("<u2").tobytes()
    with writing(path) as file:
        file.write(lzma.compress(data, format=lzma.FORMAT_XZ, filters=XZ))
    return hashlib.sha256(data).hexdigest()


def _about(document: Document, part: str, tokens: int) -> dict[str, Any]:
    text = document.text
    about = {"title": document.title, "source": document.source, "digest": text_digest(text)}
    about |= {"package": package_of(document.title), "part": part, "characters": len(text)}
    return about | {"bytes": len(text.encode("utf-8", "replace")), "tokens": tokens}


# from there to a store


def read_documents(packed: Path) -> list[dict[str, Any]]:
    """What `pack` tells of each document."""
    return [json.loads(line) for line in lzma.decompress((packed / "documents.xz").read_bytes()).splitlines()]


class Packed:
    """The documents of a packed corpus, as `write_chunks` takes them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.about = folder, json.loads((folder / "about.json").read_text(encoding="utf-8"))
        self.tokenizer = get_tokenizer(folder / "tokenizer")
        self.documents = read_documents(folder)

    def __iter__(self) -> Iterator[ChunkedDocument]:
        sizes, pad_id = bytes_of_tokens(self.tokenizer), self.tokenizer.ids.pad
        documents = tqdm(self.documents, desc="unpacking", unit=" documents", mininterval=5)
        for tokens, about in zip(self.tokens(), documents, strict=True):
            yield chunked(tokens.astype(np.int32), about, sizes, pad_id)

    def tokens(self) -> Iterator[Integer[np.ndarray, " _"]]:
        """Those of each document.

        Raises:
            ValueError: the file is damaged, or another one.
        """
        data = lzma.decompress((self.folder / "tokens.xz").read_bytes())
        if hashlib.sha256(data).hexdigest() != self.about["sha256"]:
            raise ValueError(f"{self.folder / 'tokens.xz'} is not what about.json tells of: pack the corpus again")
        edges = np.cumsum([about["tokens"] for about in self.documents])[:-1]
        yield from np.split(np.frombuffer(data, "<u2"), edges)

    def fingerprint(self) -> dict[str, Any]:
        """The tokens' digest."""
        return {"corpus": "packed code", "sha256": self.about["sha256"]}


def chunked(
    ids: Int32[np.ndarray, " n"], about: dict[str, Any], sizes: Int[np.ndarray, " v"], pad_id: int
) -> ChunkedDocument:
    """A document as a store keeps it; the spans of its chunks are in bytes, where a store of texts has characters."""
    ends = np.cumsum(sizes[ids])
    spans = np.stack([ends - sizes[ids], ends], axis=1).astype(np.int64)
    chunks = list(tokens_to_chunks([Tokens(ids, spans)], M, pad_id))
    rows = np.concatenate([each.rows for each in chunks]).astype(np.uint16)
    spans = np.concatenate([each.spans for each in chunks])
    edges = np.append(spans[:, 0], about["bytes"])
    return ChunkedDocument(about, 0, rows, spans, np.diff(edges).astype(np.int32))


def build_store(packed: Path, folder: Path, seq_len: int, bert: str | None, retriever: str = "minilm") -> None:
    """Chunks and neighbours; see above."""
    corpus = Packed(packed)
    files, settings = Files.of(folder), StoreSettings(chunk_size=M, seq_len=seq_len, tokenizer=corpus.tokenizer)
    write_chunks(corpus, files, settings, cut=lambda: corpus)
    doc_ids, file = np.array(open_array(files.doc_ids)), packed / f"{RETRIEVERS[retriever][0]}.npz"
    if not file.exists():
        if retriever == "bm25":
            search = _by_bm25(files.chunks, doc_ids, corpus.tokenizer)
        else:
            search = _by_minilm(files, doc_ids, bert)
        found = find_neighbours(corpus, doc_ids, search)
        if retriever == "minilm":
            found |= {"overlap": overlap_of(files.chunks, found, doc_ids, best_device())}
        with writing(file) as opened:
            np.savez_compressed(opened, sha256=corpus.about["sha256"], **found)
    with np.load(file) as found:
        if str(found["sha256"]) != corpus.about["sha256"]:
            raise ValueError(f"{file} is of another corpus: remove it, and build again")
        knns = np.full((len(doc_ids), FOUND), NO_NEIGHBOUR, np.int32)
        trained = rows_of(corpus, doc_ids, "train")
        knns[trained, : found["trained"].shape[1]], knns[found["rows"]] = found["trained"], found["knns"]
    with writing(folder / f"{RETRIEVERS[retriever][1]}.npy") as opened:
        np.save(opened, knns)


Search = Callable[[Int[np.ndarray, " e"], Int[np.ndarray, " _"], int], Int[np.ndarray, "e k"]]


def _by_minilm(files: Files, doc_ids: Int[np.ndarray, " c"], bert: str | None) -> Search:
    """Search by squared distance of the vectors that a BERT gives the chunks."""
    write_vectors(files.chunks, files.vectors, StoreSettings(bert=bert), progress=False)
    vectors = open_array(files.vectors)
    return lambda queries, among, k: nearest(vectors, queries, among, doc_ids, k, best_device())[1]


def _by_bm25(chunks_path: Path, doc_ids: Int[np.ndarray, " c"], tokenizer: TextTokenizer) -> Search:
    words = open_array(chunks_path)[:, :-1], tokenizer.size, tokenizer.ids
    return lambda queries, among, k: best_matches(*words, queries, among, doc_ids, k, best_device())[1]


def copied(packed: Path) -> list[float]:
    """Of each test document the share of its 13-grams that stand in a document of the database, anywhere."""
    corpus = Packed(packed)
    parts, tokens = [about["part"] for about in corpus.documents], list(corpus.tokens())
    measured, database = ([each for each, its_part in zip(tokens, parts, strict=True) if its_part == part] for part in
                          ("test", "train"))  # fmt: skip
    own = [grams_of(each) for each in measured]
    wanted = np.unique(np.concatenate(own))
    seen = np.zeros(len(wanted), bool)
    for each in database:
        grams = grams_of(each)
        places = np.searchsorted(wanted, grams).clip(max=len(wanted) - 1)
        seen[places[wanted[places] == grams]] = True
    return [float(seen[np.searchsorted(wanted, each)].mean()) for each in own]


def rows_of(corpus: Packed, doc_ids: Int[np.ndarray, " c"], *parts: str) -> Int[np.ndarray, " _"]:
    """The chunks of the documents of these parts."""
    chosen = np.array([about["part"] in parts for about in corpus.documents])
    return np.flatnonzero(chosen[doc_ids])


# neighbours


def find_neighbours(corpus: Packed, doc_ids: Int[np.ndarray, " c"], search: Search) -> dict[str, np.ndarray]:
    """What stands in neighbours.npz: nearest chunks in the database, in shares of it, and in larger ones.

    Returns:
        trained     (_, KEPT) of the chunks that are trained on
        rows, knns  (e,), (e, FOUND) of the others
        share-…     (_, KEPT) of the chunks of the test documents, in a share of the database's documents
        memory-…    (_, KEPT) of the chunks of unseen libraries, their other files, or a share, being in the database
    """
    database, held_out = rows_of(corpus, doc_ids, "train"), rows_of(corpus, doc_ids, "valid", "test", "unseen")
    test, unseen = rows_of(corpus, doc_ids, "test"), rows_of(corpus, doc_ids, "unseen")
    found = {"trained": search(database, database, KEPT), "rows": held_out, "knns": search(held_out, database, FOUND)}
    for name, share in SHARES.items():
        found[f"share-{name}"] = search(test, share_of(corpus, doc_ids, "train", share), KEPT)
    for name, share in MEMORY.items():
        memory = share_of(corpus, doc_ids, "unseen", share)
        found[f"memory-{name}"] = search(unseen, np.union1d(database, memory), KEPT)
    return {name: each.astype(np.int32) for name, each in found.items()}


def share_of(corpus: Packed, doc_ids: Int[np.ndarray, " c"], part: str, share: float) -> Int[np.ndarray, " _"]:
    """The chunks of a random share of a part's documents; a larger share has all of a smaller one."""
    chosen = [number for number, about in enumerate(corpus.documents) if about["part"] == part]
    chosen.sort(key=lambda number: rank(corpus.documents[number]["source"], corpus.documents[number]["digest"]))
    return np.flatnonzero(np.isin(doc_ids, chosen[: max(1, round(share * len(chosen)))]))


# what neighbours say word for word


def overlap_of(
    chunks_path: Path, found: dict[str, np.ndarray], doc_ids: Int[np.ndarray, " c"], device: torch.device
) -> Int[np.ndarray, " e"]:
    """Tokens in the longest run that each held-out chunk shares with its ten nearest, N and F."""
    chunks, special, lengths = open_array(chunks_path), special_ids(chunks_path), []
    for start in range(0, len(found["rows"]), 1024):
        rows = found["rows"][start : start + 1024]
        texts = knn_to_retrieved_chunks(
            found["knns"][start : start + 1024, :SHARED], chunks, pad_id=special.pad, doc_ids=doc_ids
        )
        own = torch.from_numpy(chunks[rows, :-1].astype(np.int64)).to(device)
        lengths.append(longest_runs(own, torch.from_numpy(texts).to(device), special).cpu().numpy())
    return np.concatenate(lengths)


def longest_runs(chunks: Int[Tensor, "b m"], texts: Int[Tensor, "b k r"], special: SpecialIds) -> Int[Tensor, " b"]:
    """The longest run of tokens that a chunk shares with one of its texts; special tokens are in none.

    The run that ends at token i of the chunk and j of a text is one longer than that at i − 1 and j − 1.
    """
    ending = texts.new_zeros((*texts.shape[:2], texts.shape[2] + 1), dtype=torch.int16)
    longest = ending.new_zeros(len(chunks))
    for token in chunks.T:
        same = texts == rearrange(torch.where(is_special(token, special), -1, token), "b -> b 1 1")
        ending[..., 1:] = (ending[..., :-1] + 1) * same
        longest = torch.maximum(longest, ending.flatten(1).amax(dim=1))
    return longest
