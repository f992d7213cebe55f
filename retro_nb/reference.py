"""The functions of RETRO-pytorch 0.3.9 under their names and with their arguments, as thin adapters.

They take the path of each array, where the package takes a store's `Files` and `StoreSettings`. Arguments that are not
needed here are accepted and have no effect; the docstrings name them. `documents_to_chunks_` is an addition, for any
corpus. The reference's classes have their own modules: `RETRODataset` in store/dataset.py, `RETRO` in model/retro.py,
`TrainingWrapper` in training/wrapper.py.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from retro_nb.common.arrays import PathLike, open_array
from retro_nb.store.chunking import special_ids, store_tokenizer, write_chunks
from retro_nb.store.dataset import closing_id, knn_to_retrieved_chunks
from retro_nb.store.embedding import embedding_dim, write_vectors
from retro_nb.store.files import INDEX, Files
from retro_nb.store.index import empty_index, read_index
from retro_nb.store.knn import AT_A_TIME, index_vectors, write_neighbours
from retro_nb.store.retrieval import nearest_chunks
from retro_nb.store.settings import StoreSettings
from retro_nb.text.document import Document
from retro_nb.text.files import TEXTS, text_folder
from retro_nb.text.tokens import TextTokenizer


def documents_to_chunks_(
    documents: Iterable[Document],
    *,
    chunks_memmap_path: PathLike,
    seqs_memmap_path: PathLike,
    doc_ids_memmap_path: PathLike,
    chunk_size: int = 64,
    seq_len: int = 2048,
    max_chunks: int | None = None,
    max_seqs: int | None = None,
    tokenizer: PathLike | TextTokenizer | None = None,
    force_reprocess: bool = False,
    progress: bool = True,
) -> dict:
    """Chunk a corpus to disk; `store.chunking.write_chunks` says what is written and returned.

    Args:
        documents: a corpus of `retro_nb.text`, or any iterable of `Document`.
        chunks_memmap_path, seqs_memmap_path, doc_ids_memmap_path: the files to write.
        chunk_size: m, tokens.
        seq_len: n, tokens; a multiple of m.
        max_chunks, max_seqs: stop before the first document that would exceed either, with a warning.
        tokenizer: a Hugging Face tokenizer by folder or name, or one from `get_tokenizer`; None for BERT's.
        force_reprocess: rebuild in any case.
        progress: show a progress bar.

    Raises:
        ValueError: n is not a multiple of m; no document has a token; the first one exceeds a maximum.
        OSError: a file cannot be written; the message names it and the reason, and existing files stay as they were.
    """
    files = Files(Path(chunks_memmap_path), Path(seqs_memmap_path), Path(doc_ids_memmap_path))
    settings = StoreSettings(
        chunk_size=chunk_size, seq_len=seq_len, max_chunks=max_chunks, max_seqs=max_seqs, tokenizer=tokenizer
    )
    return write_chunks(documents, files, settings, force_reprocess=force_reprocess, progress=progress)


def text_folder_to_chunks_(
    *,
    folder: PathLike,
    chunks_memmap_path: PathLike,
    seqs_memmap_path: PathLike,
    doc_ids_memmap_path: PathLike,
    chunk_size: int = 64,
    seq_len: int = 2048,
    glob: str | Sequence[str] = TEXTS,
    max_chunks: int | None = None,
    max_seqs: int | None = None,
    **options: Any,
) -> dict:
    """Chunk a folder of text files to disk: `documents_to_chunks_` of `text_folder(folder, glob)`."""
    return documents_to_chunks_(
        text_folder(folder, glob),
        chunks_memmap_path=chunks_memmap_path,
        seqs_memmap_path=seqs_memmap_path,
        doc_ids_memmap_path=doc_ids_memmap_path,
        chunk_size=chunk_size,
        seq_len=seq_len,
        max_chunks=max_chunks,
        max_seqs=max_seqs,
        **options,
    )


def chunks_to_embeddings_(
    *,
    num_chunks: int,
    chunks_memmap_path: PathLike,
    embeddings_memmap_path: PathLike,
    chunk_size: int = 64,
    embed_dim: int | None = None,
    batch_size: int | None = None,
    use_cls_repr: bool = False,
    pad_id: int | float | None = None,
    bert: PathLike | None = None,
    device: torch.device | str | None = None,
    force_reprocess: bool = False,
    progress: bool = True,
) -> dict:
    """Embed every chunk of a chunk array to disk; `store.embedding.write_vectors` says how and what is returned.

    Args:
        num_chunks, chunk_size: shape of the chunk array, without the extra token.
        chunks_memmap_path, embeddings_memmap_path: the file to read and the file to write.
        embed_dim: the expected width; the BERT's if left out.
        batch_size: chunks per forward pass; the device's if left out.
        use_cls_repr: [CLS] instead of the mean.
        pad_id: the expected padding id, checked against the chunk array's; None for no check.
        bert, device: see `bert_embed`.

    Raises:
        ValueError: `embed_dim` is not this BERT's width, the chunk array has another shape, or its rows are
            longer than the BERT's positions.
        FloatingPointError: a vector is not finite; the message names the chunk and its document. It is not stored.
    """
    if embed_dim not in (None, dim := embedding_dim(bert)):
        raise ValueError(f"embed_dim {embed_dim}, but this BERT gives vectors of {dim}: leave embed_dim out")
    if pad_id not in (None, padding := special_ids(chunks_memmap_path).pad):
        raise ValueError(f"pad_id {pad_id}: this array is padded with {padding}")
    return write_vectors(
        Path(chunks_memmap_path), Path(embeddings_memmap_path), StoreSettings(use_cls_repr=use_cls_repr, bert=bert),
        shape=(num_chunks, chunk_size + 1), batch_size=batch_size, device=device, force_reprocess=force_reprocess,
        progress=progress,
    )  # fmt: skip


def chunks_to_index_and_embed(
    *,
    num_chunks: int,
    chunk_size: int,
    chunk_memmap_path: PathLike,
    use_cls_repr: bool = False,
    max_rows_per_file: int = AT_A_TIME,
    chunks_to_embeddings_batch_size: int | None = None,
    embed_dim: int | None = None,
    index_file: str = INDEX,
    index: str | None = None,
    max_index_memory_usage: str | int | None = None,
    current_memory_available: str | int | None = None,
    bert: PathLike | None = None,
    force_reprocess: bool = False,
    progress: bool = True,
) -> tuple[faiss.Index, Float[np.ndarray, "c d"]]:
    """Embed a chunk array and index the vectors; both are saved next to it and reused while nothing changes.

    Args:
        num_chunks, chunk_size, chunk_memmap_path: the chunk array.
        use_cls_repr, chunks_to_embeddings_batch_size, embed_dim, bert: see `chunks_to_embeddings_`.
        max_rows_per_file: no effect: blocks have a fixed size here.
        index_file: name of the index, in the chunk array's folder.
        index: an index-factory string; None for the choice of `choose_index`.
        max_index_memory_usage, current_memory_available: bytes, or "100m": the index takes no more than
            the smaller of the two, at the cost of exactness (see `choose_index`).

    Returns:
        The index and the vectors (read-only): row i of the vectors has id i in the index.
    """
    files = _beside(chunk_memmap_path, index_file)
    if index:  # refused now, not after the embedding
        empty_index(index, embedding_dim(bert))
    options: dict[str, Any] = {"force_reprocess": force_reprocess, "progress": progress}
    chunks_to_embeddings_(
        num_chunks=num_chunks, chunks_memmap_path=files.chunks, embeddings_memmap_path=files.vectors,
        chunk_size=chunk_size, embed_dim=embed_dim, batch_size=chunks_to_embeddings_batch_size,
        use_cls_repr=use_cls_repr, bert=bert, **options,
    )  # fmt: skip
    settings = StoreSettings(
        index=index,
        max_index_memory_usage=max_index_memory_usage,
        current_memory_available=current_memory_available,
    )
    index_vectors(files, settings, **options)
    return read_index(files.index), open_array(files.vectors)


def chunks_to_precalculated_knn_(
    *,
    num_nearest_neighbors: int,
    num_chunks: int,
    chunk_size: int,
    chunk_memmap_path: PathLike,
    doc_ids_memmap_path: PathLike,
    max_rows_per_file: int = AT_A_TIME,
    num_extra_neighbors: int = 0,
    keep_out: Sequence[int] = (),
    max_similarity: float | int | None = None,
    force_reprocess: bool = False,
    index_file: str = INDEX,
    progress: bool = True,
    **index_kwargs: Any,
) -> tuple[Path, faiss.Index]:
    """Embed, index and search; write the k nearest chunks of other documents for every chunk to disk.

    `store.knn.write_neighbours` says what is written.

    Args:
        num_nearest_neighbors: k.
        num_chunks, chunk_size, chunk_memmap_path, doc_ids_memmap_path: the chunk array and its documents.
        max_rows_per_file: chunks searched and saved at a time.
        num_extra_neighbors: no effect: the reference fetches this many more and drops those of the chunk's own
            document; here the exclusion is exact.
        keep_out: numbers of documents outside the database: they get neighbours, but are never retrieved.
        max_similarity: leave out near-duplicates: chunks with a cosine above this.
        force_reprocess: rebuild in any case.
        index_file, **index_kwargs: see `chunks_to_index_and_embed`.

    Returns:
        The path of the neighbours, and the index.
    """
    if num_nearest_neighbors < 1:
        raise ValueError(f"num_nearest_neighbors {num_nearest_neighbors}: ask for 1 or more")
    settings = StoreSettings(knn=num_nearest_neighbors, max_similarity=max_similarity)
    open_array(doc_ids_memmap_path, shape=(num_chunks,))
    options: dict[str, Any] = {"force_reprocess": force_reprocess, "progress": progress}
    index, _ = chunks_to_index_and_embed(
        num_chunks=num_chunks, chunk_size=chunk_size, chunk_memmap_path=chunk_memmap_path, index_file=index_file,
        **options, **index_kwargs,
    )  # fmt: skip
    files = _beside(chunk_memmap_path, index_file, doc_ids_memmap_path)
    return write_neighbours(files, settings, keep_out, rows_at_a_time=max_rows_per_file, **options), index


def _beside(chunks: PathLike, index_file: str, doc_ids: PathLike | None = None) -> Files:
    """The files of a chunk array. The functions that take it do not read sequences, nor documents if left out."""
    default = Files.of(Path(chunks).parent)
    return Files(Path(chunks), default.seqs, default.doc_ids if doc_ids is None else Path(doc_ids), index_file)


def knn_chunks_from_seq_chunks(
    seq_chunks: Int[Tensor, "b m"],
    *,
    knn: int,
    faiss_index: faiss.Index,
    num_chunks: int,
    chunk_size: int,
    chunks_memmap_path: PathLike,
    doc_ids_memmap_path: PathLike | None = None,
    **options: Any,
) -> Int64[Tensor, "b k r"]:
    """RET(C) for newly generated chunks: embed them, search the index, read N and F of each hit.

    Args:
        seq_chunks: the chunks' tokens.
        knn: k.
        faiss_index: the index of the chunks at `chunks_memmap_path`, of shape (num_chunks, chunk_size + 1).
        doc_ids_memmap_path: the document of each chunk, so that F does not run into the next document.
        **options: `exclude`, `use_cls_repr`, `bert` and `device` of `nearest_chunks`.

    Returns:
        The neighbours' tokens, on the device of `seq_chunks`; padding where fewer than k are found.
    """
    tokenizer = store_tokenizer(chunks_memmap_path, options.get("bert"))
    ends: dict[str, Any]
    if doc_ids_memmap_path is None:
        ends = {"eos_id": closing_id(tokenizer.ids)}
    else:
        ends = {"doc_ids": open_array(doc_ids_memmap_path, shape=(num_chunks,))}
    _, ids = nearest_chunks(seq_chunks, knn=knn, faiss_index=faiss_index, tokenizer=tokenizer, **options)
    retrieved = knn_to_retrieved_chunks(
        ids,
        open_array(chunks_memmap_path, shape=(num_chunks, chunk_size + 1)),
        num_chunks=num_chunks,
        pad_id=tokenizer.ids.pad,
        **ends,
    )
    return torch.from_numpy(retrieved).to(seq_chunks.device)
