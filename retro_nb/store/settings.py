"""The settings of a store, checked when they are made."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from retro_nb.common.arrays import PathLike
from retro_nb.store.splits import DocumentName
from retro_nb.text.tokens import PAD_ID, TextTokenizer, get_tokenizer

OF_CHUNKS = ("chunk_size", "seq_len", "max_chunks", "max_seqs")  # what the chunks depend on, without the tokenizer
OF_INDEX = ("index", "max_index_memory_usage", "current_memory_available")  # what chooses the index


def check_sizes(chunk_size: int, seq_len: int, max_chunks: int | None = None, max_seqs: int | None = None) -> None:
    """Raise ValueError for sizes that no store can have."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size {chunk_size} must be 1 or more; the paper's is 64")
    if seq_len < chunk_size or seq_len % chunk_size:
        nearest = max(chunk_size, round(seq_len / chunk_size) * chunk_size)
        raise ValueError(f"seq_len {seq_len} is not a multiple of chunk_size {chunk_size}: take {nearest}, say")
    for name, limit in (("max_chunks", max_chunks), ("max_seqs", max_seqs)):
        if limit is not None and limit < 1:
            raise ValueError(f"{name} {limit} leaves nothing: pass 1 or more, or None for no limit")


def check_similarity(max_similarity: float | int | None) -> None:
    """Reject a limit that no cosine can have."""
    if max_similarity is not None and not -1 < max_similarity <= 1:
        raise ValueError(f"max_similarity {max_similarity} is a cosine: give something above −1 and up to 1, e.g. 0.95")


@dataclass(frozen=True)
class StoreSettings:
    """Settings of a store.

    Args:
        chunk_size, seq_len: m and n, in tokens: a model's chunk_size and max_seq_len; n is a multiple of m.
        knn: k, neighbours of a chunk.
        tokenizer: cuts the texts: a Hugging Face tokenizer, by folder or name; a number, for a byte-level BPE of that
            size, trained on the corpus; None for the BERT's. For a RETROfit, the model's.
        bert: the BERT that embeds the chunks, see `tokens.bert_folder`.
        use_cls_repr: the vector of a chunk is that of [CLS], not the mean over its tokens.
        index: a FAISS index-factory string; None for the choice of `choose_index`.
        max_index_memory_usage, current_memory_available: bytes, or "100m": upper limits of the index's size, at the
            cost of exactness.
        max_similarity: leaves out neighbours with a cosine above this (near-duplicates).
        keep_out: documents that are never retrieved: their titles, numbers or identities (`splits.identity`), or a
            share that `splits.hold_out` draws. The store notes which documents these were: when the corpus changes, a
            share keeps the same documents out, and numbers that mean others now are refused.
        max_chunks, max_seqs: stop before the first document that would exceed either.

    Raises:
        ValueError: a setting is out of range.
        TypeError: `keep_out` is neither a share nor a list.
    """

    chunk_size: int = 64
    seq_len: int = 2048
    knn: int = 2
    tokenizer: int | PathLike | TextTokenizer | None = None
    bert: PathLike | None = None
    use_cls_repr: bool = False
    index: str | None = None
    max_index_memory_usage: str | int | None = None
    current_memory_available: str | int | None = None
    max_similarity: float | int | None = None
    keep_out: float | int | Sequence[DocumentName] = ()
    max_chunks: int | None = None
    max_seqs: int | None = None

    def __post_init__(self) -> None:
        if self.knn < 1:
            raise ValueError(f"knn is {self.knn}: it must be at least 1")
        check_sizes(self.chunk_size, self.seq_len, self.max_chunks, self.max_seqs)
        check_similarity(self.max_similarity)
        if isinstance(self.keep_out, str) or not isinstance(self.keep_out, Real | Sequence):
            raise TypeError(
                f"keep_out is {self.keep_out!r:.80}: pass a share, or a list of titles, numbers or identities"
            )

    @property
    def cutter(self) -> TextTokenizer:
        """The tokenizer that cuts the texts.

        Raises:
            ValueError: it must be trained first (`store.choose_tokenizer`).
        """
        if isinstance(self.tokenizer, int):
            raise ValueError(f"tokenizer {self.tokenizer}: one of that size must be trained first, by Store.build")
        return get_tokenizer(self.bert if self.tokenizer is None else self.tokenizer)

    @property
    def vocabulary(self) -> tuple[int, int]:
        """Number of ids and the padding id of the tokenizer, also of one that is still to be trained."""
        if isinstance(self.tokenizer, int):
            return self.tokenizer, PAD_ID
        return self.cutter.size, self.cutter.ids.pad

    def of_chunks(self) -> dict[str, Any]:
        """The settings for cutting chunks, without the tokenizer."""
        return {name: getattr(self, name) for name in OF_CHUNKS}

    def of_index(self) -> dict[str, Any]:
        """The settings for choosing the index."""
        return {name: getattr(self, name) for name in OF_INDEX}
