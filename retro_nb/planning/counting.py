"""Read and count the documents of a corpus for a survey, without keeping them.

Documents are cut into tokens and chunks as in a build. To count duplicates, an 8-byte hash of each document and each
chunk is kept: 16 MB for a million of each. To find near-duplicates, the tokens of the first documents are kept, up to
`COMPARED` tokens: 40 MB.
"""

import hashlib
import time
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from math import ceil

import numpy as np
import torch
from jaxtyping import Int32
from tqdm.auto import tqdm

from retro_nb.common.arrays import PathLike
from retro_nb.planning.costs import Size
from retro_nb.store.chunking import PIECE_CHARACTERS, PIECES_AT_ONCE, Tokens, document_tokens, tokens_to_chunks
from retro_nb.store.embedding import frames_for_bert
from retro_nb.text.document import Document
from retro_nb.text.tokens import TextTokenizer, get_tokenizer

SAMPLE = 512  # chunks kept for the measurement, up to twice this number
SLICE = 2**20  # characters encoded at a time
COMPARED = 10_000_000  # tokens of documents kept to find near-duplicates


class Beginning:
    """The first characters of a corpus. Iterating sets `is_all` to whether that is everything."""

    def __init__(self, corpus: Iterable[Document], characters: int) -> None:
        self.corpus, self.characters, self.is_all = corpus, characters, True

    def __iter__(self) -> Iterator[Document]:
        left = self.characters
        for document in self.corpus:
            yield replace(document, text=document.text[:left])
            left -= len(document.text)
            self.is_all = left >= 0
            if not self.is_all:
                break


class Reading:
    """Counts of the documents read, with hashes and a sample of them."""

    def __init__(self, tokenizer: TextTokenizer, chunk_size: int, chunks_per_seq: int) -> None:
        self.tokenizer, self.chunk_size, self.chunks_per_seq = tokenizer, chunk_size, chunks_per_seq
        self.unknown = tokenizer.unknown
        self.counts: Counter[str] = Counter()
        self.lengths: Counter[int] = Counter()
        self.texts, self.hashes = array("Q"), array("Q")  # an 8-byte hash per document, per chunk
        self.rows: list[np.ndarray] = []  # every step-th chunk
        self.kept: list[np.ndarray] = []  # the tokens of the first documents
        self.room = COMPARED  # for this number of further tokens
        self.step, self.complete = 1, True
        self.longest_title = self.first_replaced = ""
        self.longest_bytes = self.titles = self.same_document = 0

    def read(self, documents: Iterable[Document], seconds: float | int, progress: bool = False) -> float:
        """Read all documents, or until the time is up and a chunk was found; return the seconds taken."""
        start = time.perf_counter()
        self.deadline = start + seconds
        for document in tqdm(documents, desc="surveying", unit=" documents", disable=not progress):
            if time.perf_counter() > self.deadline and self.counts["chunks"]:
                self.complete = False
                break
            self._add(document)
        return time.perf_counter() - start

    def _add(self, document: Document) -> None:
        counts, text, hashed, size = self.counts, document.text, hashlib.blake2b(digest_size=8), 0
        for start in range(0, len(text), SLICE):
            part = text[start : start + SLICE]
            data = part.encode("utf-8", "replace")
            hashed.update(data)
            size += len(data)
            counts["spaces"] += part.count(" ") + part.count("\n")
        if text:
            self.texts.frombytes(hashed.digest())
        if len(text) > counts["longest"]:
            counts["longest"], self.longest_title, self.longest_bytes = len(text), document.title, size
        self.lengths[len(text).bit_length()] += 1
        counts.update(documents=1, characters=len(text), bytes=size)
        if document.replaced:
            counts.update(replaced_characters=document.replaced, replaced_documents=1)
            self.first_replaced = self.first_replaced or document.source
        before = counts["chunks"]
        for rows, _ in tokens_to_chunks(self._tokens(text), self.chunk_size, self.tokenizer.ids.pad):
            self._add_chunks(rows[:, :-1])
        if new := counts["chunks"] - before:
            counts["seqs"] += ceil(new / self.chunks_per_seq)
            self.same_document += new**2
            self.titles += len((document.title + document.source).encode("utf-8", "replace")) + 130  # names and numbers
        else:
            counts["empty_documents"] += 1

    def _tokens(self, text: str) -> Iterator[Tokens]:
        """A document's tokens; only the first ones if reading takes too long."""
        own = [np.empty(0, np.int32)]
        for tokens in document_tokens(text, tokenizer=self.tokenizer):
            self.room -= len(tokens.ids)
            if self.room >= 0:
                own.append(tokens.ids.astype(np.int32, copy=False))
            self.counts["tokens"] += len(tokens.ids)
            if self.unknown is not None:
                self.counts["unknown_tokens"] += int(np.count_nonzero(tokens.ids == self.unknown))
            yield tokens
            reached = int(tokens.spans[-1, 1])
            long = len(tokens.ids) > 1 and len(text) - reached > PIECES_AT_ONCE * PIECE_CHARACTERS  # and more to come
            if long and time.perf_counter() > self.deadline:
                self.complete = False
                self.counts["tokenised"] += reached
                return
        self.counts["tokenised"] += len(text)
        if self.room >= 0:
            self.kept.append(np.concatenate(own))

    def _add_chunks(self, rows: Int32[np.ndarray, "c m"]) -> None:
        words = np.count_nonzero(rows != self.tokenizer.ids.pad, axis=1)
        padded = int(np.count_nonzero(2 * words < self.chunk_size))
        for number, row in enumerate(rows, start=self.counts["chunks"]):
            self.hashes.frombytes(hashlib.blake2b(row.tobytes(), digest_size=8).digest())
            if number % self.step == 0:
                self.rows.append(row.copy())
        if len(self.rows) > 2 * SAMPLE:
            self.rows, self.step = self.rows[::2], 2 * self.step
        self.counts.update(chunks=len(rows), padded_chunks=padded, padding=rows.size - int(words.sum()))

    def whole(self, length: int | None) -> Size:
        """Extrapolate from what was read to the whole corpus of `length` documents; without a length, what was read."""
        counts, times = self.counts, 1.0
        if length is not None and not self.complete:
            times = max(1.0, length / counts["documents"])
        cut = times * counts["characters"] / counts["tokenised"]  # part of a document may not be tokenised
        chunks = round(cut * counts["chunks"])
        return Size(
            documents=round(times * (counts["documents"] - counts["empty_documents"])),
            bytes=round(times * counts["bytes"]),
            tokens=round(cut * counts["tokens"]),
            chunks=chunks,
            seqs=round(cut * counts["seqs"]),
            pairs=max(0, chunks**2 - round(cut**2 / times * self.same_document)),
            longest=self.longest_bytes,
            titles=round(times * self.titles),
        )

    def unsuited_to(self, bert: PathLike | None) -> bool:
        """Whether a BERT reads these texts letter by letter, or not at all, judged from a few chunks."""
        reader, some = get_tokenizer(bert), np.stack(self.rows[:: max(1, len(self.rows) // 32)])
        ids = frames_for_bert(torch.from_numpy(some), self.tokenizer, bert=bert).numpy()
        texts = [self.tokenizer.decode(row) for row in some]
        tokens, characters = int((~np.isin(ids, reader.ids)).sum()), sum(map(len, texts))
        spaces = sum(text.count(" ") + text.count("\n") for text in texts)
        unknown = 0 if reader.unknown is None else int((ids == reader.unknown).sum())
        return is_unsuited(characters, spaces, tokens, unknown)


def is_unsuited(characters: int, spaces: int, tokens: int, unknown: int) -> bool:
    """Hint whether a tokenizer hardly knows a language. Without spaces between words, each character may be a word."""
    least = 1.8 if spaces > characters / 20 else 0.9
    return characters < least * tokens or unknown > tokens / 100


def repeated(hashes: array) -> int:
    """Number of hashes equal to an earlier one. Sorts them in place to save memory."""
    values = np.frombuffer(hashes, np.uint64)
    values.sort()
    return int(np.count_nonzero(values[1:] == values[:-1]))
