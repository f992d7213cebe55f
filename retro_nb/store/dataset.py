"""Chunks and neighbours become training examples (notebooks 04 and 05).

An example is a sequence of n + 1 tokens (the first n are the input, the last n the labels) and, for each of its
l chunks, k neighbours of r = 2m tokens: the retrieved chunk N and its continuation F. Sequences stay within one
document, and so does F. Padding fills the sequence after the document's end, F after the document's last chunk,
and neighbours that were not found.
"""

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Int, Int64, Integer
from torch import Tensor
from torch.utils.data import Dataset

from retro_nb.common.arrays import PathLike, open_array
from retro_nb.store.chunking import special_ids, store_fingerprint
from retro_nb.store.index import NO_NEIGHBOUR
from retro_nb.store.settings import check_sizes
from retro_nb.text.tokens import EOS_ID, PAD_ID, SpecialIds


def knn_to_retrieved_chunks(
    knns: Int[np.ndarray, "*rows k"],
    chunks_memmap: Integer[np.ndarray, "c m_plus_1"],
    *,
    add_continuations: bool = True,
    num_chunks: int | None = None,
    pad_id: int | float = PAD_ID,
    eos_id: int = EOS_ID,
    doc_ids: Int[np.ndarray, " c"] | None = None,
) -> Int64[np.ndarray, "*rows k r"]:
    """Tokens of neighbours: each retrieved chunk N and, optionally, its continuation F.

    Args:
        knns: chunk ids; −1 where there is no neighbour.
        chunks_memmap: the chunk array.
        add_continuations: append F, the chunk after N, for r = 2m tokens; else r = m.
        num_chunks: number of chunks in use; the whole array if left out.
        pad_id: fills a missing neighbour, and F where N is its document's last chunk.
        eos_id: marks document ends if `doc_ids` is left out, as in the reference: a row that holds it, even as
            the extra token, is the document's last.
        doc_ids: the document of each chunk: F is taken only from N's own document.

    Raises:
        IndexError: an id is outside the chunk array, so the neighbours belong to another one.
    """
    count = len(chunks_memmap) if num_chunks is None else num_chunks
    if knns.size and not NO_NEIGHBOUR <= knns.min() <= knns.max() < count:
        raise IndexError(f"neighbour ids {knns.min()} … {knns.max()} for {count} chunks: of another corpus?")
    if not add_continuations:
        return _tokens(chunks_memmap, np.maximum(knns, 0), knns < 0, pad_id)
    both, absent = np.empty((*knns.shape, 2), np.int64), np.empty((*knns.shape, 2), bool)  # N and F
    found, following = both[..., 0], both[..., 1]
    np.maximum(knns, 0, out=found)
    np.minimum(found + 1, count - 1, out=following)
    if doc_ids is None:
        last = (chunks_memmap[found] == eos_id).any(axis=-1)
    else:
        last = doc_ids.take(found) != doc_ids.take(following)
    absent[..., 0] = knns < 0
    absent[..., 1] = absent[..., 0] | last | (found == following)  # the very last chunk has no successor
    tokens = _tokens(chunks_memmap, both, absent, pad_id)
    return tokens.reshape(*knns.shape, 2 * tokens.shape[-1])


def _tokens(
    chunks: Integer[np.ndarray, "c m_plus_1"],
    ids: Int[np.ndarray, "*any"],
    absent: Bool[np.ndarray, "*any"],
    pad_id: int | float,
) -> Int64[np.ndarray, "*any m"]:
    """The m tokens of each chunk, without the extra token; padding for absent chunks."""
    rows = np.asarray(chunks).take(ids, axis=0)  # `take` copies whole rows, indexing single numbers
    tokens = rows[..., :-1].astype(np.int64)
    if absent.any():
        tokens[absent] = pad_id
    return tokens


def closing_id(ids: SpecialIds) -> int:
    """Id that marks the end of a document where document numbers are missing.

    Raises:
        ValueError: the same id also opens documents.
    """
    if ids.eos == ids.sos:
        raise ValueError(f"token {ids.eos} opens documents and closes them, so their numbers are needed: pass doc_ids")
    return ids.eos


class RETRODataset(Dataset):
    """Training examples from the arrays of a build, read from disk on demand.

    Each process opens the arrays read-only when it reads its first example, so that a dataset can be sent to
    DataLoader workers and its files can be on read-only media.

    Args:
        num_chunks, chunk_size, seq_len, num_sequences, num_neighbors: the sizes m, n, k and counts.
        chunk_memmap_path, chunk_nn_memmap_path, seq_memmap_path: chunks, neighbours, sequence starts; as
            written by this package, or raw memory maps as the reference writes them.
        doc_ids_memmap_path: the document of each chunk. Without it, a chunk that holds `eos_id` ends a
            document, as in the reference.
        eos_id, pad_id: the ids of document ends and of padding; if left out, those in the chunk array's manifest,
            or [SEP] and [PAD] without one.
        add_continuations: neighbours with their continuation, r = 2m; else r = m.

    Raises:
        ValueError: n is not a multiple of m, an array's shape does not match these numbers, or
            `doc_ids_memmap_path` is left out although the same id opens and closes documents.
        FileNotFoundError: an array is missing.
    """

    def __init__(
        self,
        *,
        num_chunks: int,
        chunk_size: int,
        seq_len: int,
        num_sequences: int,
        num_neighbors: int,
        chunk_memmap_path: PathLike,
        chunk_nn_memmap_path: PathLike,
        seq_memmap_path: PathLike,
        doc_ids_memmap_path: PathLike | None = None,
        eos_id: int | None = None,
        pad_id: int | float | None = None,
        add_continuations: bool = True,
    ) -> None:
        super().__init__()
        check_sizes(chunk_size, seq_len)
        self.num_chunks, self.chunk_size, self.num_sequences = num_chunks, chunk_size, num_sequences
        self.seq_num_chunks, self.num_neighbors = seq_len // chunk_size, num_neighbors
        ids, self.tokenizer_fingerprint = special_ids(chunk_memmap_path), store_fingerprint(chunk_memmap_path)
        if eos_id is None:
            eos_id = closing_id(ids) if doc_ids_memmap_path is None else ids.eos
        self.eos_id, self.pad_id = eos_id, ids.pad if pad_id is None else int(pad_id)
        self.add_continuations = add_continuations
        self._paths = {
            "chunks": (Path(chunk_memmap_path), (num_chunks, chunk_size + 1)),
            "knns": (Path(chunk_nn_memmap_path), (num_chunks, num_neighbors)),
            "seqs": (Path(seq_memmap_path), (num_sequences,)),
        }
        if doc_ids_memmap_path is not None:
            self._paths["doc_ids"] = (Path(doc_ids_memmap_path), (num_chunks,))
        self.given: np.ndarray | None = None  # neighbours that replace those on disk
        self.draw: int | None = None  # number of them to draw at random, by `rng`
        self.rng = np.random.default_rng()
        self._arrays: dict[str, np.ndarray] = {}
        self._open()  # so that a missing or wrong array fails here
        self.close()

    def _open(self) -> dict[str, np.ndarray]:
        if not self._arrays:
            paths = {name: about for name, about in self._paths.items() if name != "knns" or self.given is None}
            opened = {name: open_array(path, shape=shape) for name, (path, shape) in paths.items()}
            self._arrays = {name: np.asarray(array) for name, array in opened.items()}  # a plain array is faster
            if self.given is not None:
                self._arrays["knns"] = self.given
            if "doc_ids" not in self._arrays:
                ends = (self._arrays["chunks"] == self.eos_id).any(axis=1)
                self._arrays["doc_ids"] = np.concatenate([[0], np.cumsum(ends)[:-1]]).astype(np.int32)
        return self._arrays

    def with_neighbours(self, knns: Int[np.ndarray, "c k"], draw: int | None = None, seed: int = 0) -> "RETRODataset":
        """The same sequences with other neighbours: fewer, shuffled, or of another database.

        With `draw`, each read of a chunk draws that many of its neighbours at random. A model trained on such draws
        cannot memorise a chunk by its set of neighbours, which matters for a small corpus. A resumed run starts the
        draws again from `seed`.

        Raises:
            ValueError: `knns` does not have one row per chunk, or `draw` is less than 1 or more than it has.
        """
        if len(knns) != self.num_chunks:
            raise ValueError(f"neighbours of {len(knns)} chunks for a corpus of {self.num_chunks}: one row for each")
        if draw is not None and not 1 <= draw <= knns.shape[1]:
            raise ValueError(f"draw {draw} of {knns.shape[1]} neighbours: pass 1 to {knns.shape[1]}")
        other = copy.copy(self)
        other.given, other.draw, other.num_neighbors = knns, draw, draw or knns.shape[1]
        other.rng = np.random.default_rng(seed)
        other.close()
        return other

    @property
    def knns(self) -> Int[np.ndarray, "c k"]:
        """The neighbours of every chunk, read-only."""
        return self._open()["knns"]

    def close(self) -> None:
        """Release the files; the next example opens them again."""
        self._arrays = {}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_arrays": {}}

    def __len__(self) -> int:
        return self.num_sequences

    @property
    def doc_ids(self) -> Int[np.ndarray, " c"]:
        """The document of every chunk, read-only."""
        return self._open()["doc_ids"]

    @property
    def sequence_documents(self) -> Int[np.ndarray, " sequences"]:
        """The document of each sequence."""
        arrays = self._open()
        return np.asarray(arrays["doc_ids"][arrays["seqs"]])

    def __getitem__(self, ind: int | np.integer) -> tuple[Int64[Tensor, " n_plus_1"], Int64[Tensor, "l k r"]]:
        """Example `ind`: the sequence's n + 1 tokens, and the k neighbours of each of its l chunks."""
        return self.__getitems__([ind])[0]

    def __getitems__(
        self, inds: Sequence[int | np.integer]
    ) -> list[tuple[Int64[Tensor, " n_plus_1"], Int64[Tensor, "l k r"]]]:
        """Read several examples together, as a DataLoader does for a batch; this takes a fifth of the time."""
        arrays, firsts = self._open(), self.first_chunks(inds)
        rows = firsts[:, None] + np.arange(self.seq_num_chunks)
        inside = np.minimum(rows, self.num_chunks - 1)
        document = arrays["doc_ids"].take(inside)
        other = (document != document[:, :1]) | (rows > inside)  # past the end of the sequence's document
        chunks, knns = arrays["chunks"].take(inside, axis=0), arrays["knns"][inside]
        if other.any():
            chunks[other], knns[other] = self.pad_id, NO_NEIGHBOUR
        if self.draw is not None:
            order = self.rng.random(knns.shape).argsort(axis=-1)[..., : self.draw]
            knns = np.take_along_axis(knns, order, axis=-1)
        # A row's last token is the next row's first: the sequence is its first token, then all rows without theirs.
        b, n = len(chunks), self.seq_num_chunks * self.chunk_size
        tokens = np.empty((b, 1 + n), np.int64)
        tokens[:, 0], tokens[:, 1:] = chunks[:, 0, 0], chunks[..., 1:].reshape(b, n)
        retrieved = knn_to_retrieved_chunks(
            knns,
            arrays["chunks"],
            add_continuations=self.add_continuations,
            pad_id=self.pad_id,
            doc_ids=arrays["doc_ids"],
        )
        return list(zip(map(torch.from_numpy, tokens), map(torch.from_numpy, retrieved), strict=True))

    def first_chunks(self, inds: Sequence[int | np.integer]) -> Int64[np.ndarray, " b"]:
        """First chunk of each of these sequences."""
        for ind in inds:
            if not -len(self) <= ind < len(self):
                raise IndexError(f"sequence {ind} of {len(self)}")
        firsts = self._open()["seqs"][np.asarray(inds, np.int64)].astype(np.int64)
        for ind, first in zip(inds, firsts.tolist(), strict=True):
            if not 0 <= first < self.num_chunks:
                raise IndexError(f"sequence {ind} begins at chunk {first} of {self.num_chunks}: of another corpus?")
        return firsts
