"""Live retrieval: neighbours of chunks during generation, and their sources (notebook 06).

The build found neighbours for every chunk of the corpus (`retro_nb.store.knn`). This module finds them for a chunk
that the model has just generated, with the same embedding and the same index.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import faiss
import numpy as np
import torch
from einops import rearrange
from jaxtyping import Int, Int64
from torch import Tensor

from retro_nb.common.arrays import PathLike, open_array
from retro_nb.store.chunking import read_documents, store_tokenizer
from retro_nb.store.dataset import knn_to_retrieved_chunks
from retro_nb.store.embedding import embed_chunks
from retro_nb.store.files import Files
from retro_nb.store.index import NO_NEIGHBOUR, Distances, Neighbours, Ranges, search
from retro_nb.store.knn import document_ranges
from retro_nb.store.settings import StoreSettings
from retro_nb.store.splits import DocumentName, find_documents
from retro_nb.text.tokens import TextTokenizer


def nearest_chunks(
    seq_chunks: Int[Tensor, "b m"],
    *,
    knn: int,
    faiss_index: faiss.Index,
    exclude: Ranges = (),
    tokenizer: TextTokenizer | None = None,
    use_cls_repr: bool = False,
    bert: PathLike | None = None,
    device: torch.device | str | None = None,
) -> tuple[Distances, Neighbours]:
    """Squared L2 distances and ids of the nearest chunks outside the ranges `exclude`; −1 stands for no chunk."""
    ids = seq_chunks.cpu()
    vectors = embed_chunks(ids, tokenizer=tokenizer, use_cls_repr=use_cls_repr, bert=bert, device=device)
    return search(faiss_index, vectors.numpy(), knn, exclude=exclude)


@dataclass(frozen=True)
class Neighbour:
    """A retrieved chunk: its id and document, its squared L2 distance, its text N and its continuation F."""

    chunk: int
    document: int
    title: str
    source: str
    distance: float
    text: str
    continuation: str

    def __str__(self) -> str:
        return f"[{self.title}, d²={self.distance:.2f}] {self.text}"


@dataclass(frozen=True)
class Passage:
    """A chunk of a text and the neighbours retrieved for it, which the next chunk reads."""

    text: str
    neighbours: tuple[Neighbour, ...]


@dataclass(frozen=True)
class Generation:
    """A generated text, the prompt included: its tokens, and its chunks with the neighbours retrieved for each."""

    text: str
    tokens: tuple[int, ...]
    passages: tuple[Passage, ...]

    def __str__(self) -> str:
        return self.text


class Retriever:
    """Search a built corpus: find the nearest chunks, and read their text and metadata.

    Args:
        files, settings: the store's.
        index: the index of its chunks.
        knn: k.
        keep_out: numbers of documents that are never retrieved.
    """

    def __init__(
        self, files: Files, settings: StoreSettings, index: faiss.Index, knn: int, keep_out: Sequence[int] = ()
    ) -> None:
        self.index, self.knn, self.chunk_size = index, knn, settings.chunk_size
        self.use_cls_repr, self.bert = settings.use_cls_repr, settings.bert
        self.tokenizer = store_tokenizer(files.chunks, settings.bert)
        self.chunks, self.doc_ids = open_array(files.chunks), open_array(files.doc_ids)
        self.documents, self.keep_out = read_documents(files.chunks), list(keep_out)

    def nearest(
        self, seq_chunks: Int[Tensor, "b m"], exclude: Sequence[DocumentName] = ()
    ) -> tuple[Distances, Neighbours]:
        """Squared L2 distances and ids of the nearest chunks, without those of the documents in `exclude`."""
        return nearest_chunks(
            seq_chunks,
            knn=self.knn,
            faiss_index=self.index,
            exclude=self.excluded(exclude),
            tokenizer=self.tokenizer,
            use_cls_repr=self.use_cls_repr,
            bert=self.bert,
        )

    def fetch(self, seq_chunks: Int[Tensor, "b m"], exclude: Sequence[DocumentName] = ()) -> Int64[Tensor, "b k r"]:
        """Tokens N and F of the nearest chunks, on the device of `seq_chunks`; padding where fewer than k are found."""
        return self.tokens(self.nearest(seq_chunks, exclude)[1]).to(seq_chunks.device)

    def tokens(self, ids: Int[np.ndarray, "b k"]) -> Int64[Tensor, "b k r"]:
        """Tokens of N and F of retrieved chunks, as the model reads them; padding where an id is −1."""
        pad = self.tokenizer.ids.pad
        return torch.from_numpy(knn_to_retrieved_chunks(ids, self.chunks, pad_id=pad, doc_ids=self.doc_ids))

    def excluded(self, documents: Sequence[DocumentName]) -> list[tuple[int, int]]:
        """Ranges [first, stop) of the chunk ids of these documents, and of those always kept out."""
        if isinstance(documents, str):
            raise TypeError(f"exclude is the string {documents!r}: pass a list of documents, [{documents!r}]")
        named = [chunks for document in documents for chunks in self.document_ranges(document)]
        return document_ranges(self.doc_ids, self.keep_out) + named

    def document_ranges(self, document: DocumentName) -> list[tuple[int, int]]:
        """Ranges [first, stop) of the chunk ids of the documents that `splits.find_documents` finds.

        Raises:
            KeyError: there is no such document; the message names the closest titles.
        """
        return [tuple(self.documents[number]["chunks"]) for number in find_documents([document], self.documents)]

    def neighbour(self, chunk: int, distance: float = float("nan")) -> Neighbour:
        """Describe a chunk of the corpus: its document, its text, its continuation."""
        both = self.tokens(np.array([[chunk]]))[0, 0]
        text, continuation = (self.tokenizer.decode(half) for half in both.split(self.chunk_size))
        document = int(self.doc_ids[chunk])
        about = self.documents[document]
        return Neighbour(chunk, document, about["title"], about["source"], distance, text, continuation)

    def passages(self, tokens: Int[Tensor, " n"], exclude: Sequence[DocumentName] = ()) -> tuple[Passage, ...]:
        """Split a text into chunks, and find the neighbours of each complete chunk."""
        l = len(tokens) // self.chunk_size
        if not l:
            return self.annotate(tokens, {})
        found = self.nearest(rearrange(tokens[: l * self.chunk_size], "(l m) -> l m", l=l), exclude)
        return self.annotate(tokens, dict(enumerate(zip(*found, strict=True))))

    def annotate(self, tokens: Int[Tensor, " n"], found: Mapping[int, tuple]) -> tuple[Passage, ...]:
        """Split a text into chunks, with neighbours from `found`: (distances, ids) by chunk number."""
        passages = []
        for u, part in enumerate(tokens.split(self.chunk_size)):
            hits = zip(*found.get(u, ((), ())), strict=True)
            near = (self.neighbour(int(i), float(d)) for d, i in hits if i != NO_NEIGHBOUR)
            passages.append(Passage(self.tokenizer.decode(part), tuple(near)))
        return tuple(passages)
