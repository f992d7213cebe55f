"""A store: everything built from one corpus, in one folder (notebooks 01 to 03).

    store = Store.build("my_texts/", "my_store", StoreSettings(seq_len=512))
    store = Store.open("my_store")              later, without the corpus

    store.dataset()                             sequences with their neighbours, to train on
    store.retriever()                           answers questions about the corpus
    store.update(corpus)                        follows a corpus that has changed
    TrainingWrapper.over(retro, store)          ties a model to it, here RETRO(max_seq_len=512, …)

The folder holds chunks, sequences, documents, vectors, index and neighbours (`Files`), the tokenizer, and a manifest
that records the inputs and settings of each. A changed setting rebuilds only what depends on it.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from jaxtyping import Float, Int, Integer

from retro_nb.common.arrays import PathLike, inside, open_array, to_jsonable
from retro_nb.common.launch import broadcast, launched
from retro_nb.common.manifest import cached, finish_replacement, read_manifest, reprocess_requested
from retro_nb.store.chunking import chunk_settings, read_documents, store_tokenizer, write_chunks
from retro_nb.store.dataset import RETRODataset
from retro_nb.store.embedding import bert_fingerprint, check_bert, embedding_dim, write_vectors
from retro_nb.store.files import Files, knn_path
from retro_nb.store.index import empty_index, read_index
from retro_nb.store.knn import document_ranges, index_vectors, knn_stats, write_neighbours
from retro_nb.store.retrieval import Retriever
from retro_nb.store.settings import OF_CHUNKS, StoreSettings
from retro_nb.store.splits import DocumentName, document_numbers, find_again, identity, note_documents
from retro_nb.store.updating import Update, mismatch, reason_to_rebuild, update_store
from retro_nb.text.document import Document
from retro_nb.text.opening import open_corpus
from retro_nb.text.tokens import TextTokenizer, get_tokenizer, train_tokenizer


def choose_tokenizer(
    settings: StoreSettings, documents: Iterable[Document], folder: PathLike, progress: bool = True
) -> TextTokenizer:
    """Load the tokenizer that the settings name, or train it, once for as long as the corpus stays the same.

    Raises:
        ValueError: a tokenizer must be trained, but the corpus can be read only once; or the store's folder for it is
            a symbolic link to another place.
    """
    read_manifest(folder)  # one of a newer format is refused before anything is trained
    if not isinstance(settings.tokenizer, int):
        return settings.cutter
    if isinstance(documents, Iterator):
        raise ValueError(f"a {type(documents).__name__} can be read only once: pass a list, or a tokenizer's folder")
    folder, size = inside(folder, "tokenizer"), settings.tokenizer
    fingerprint = getattr(documents, "fingerprint", None)
    cached(
        folder / "tokenizer.json",
        {"corpus": fingerprint() if fingerprint else None, "size": size},
        lambda: train_tokenizer((each.text for each in documents), folder, size=size, progress=progress),
        files=(folder / "tokenizer_config.json",),
        force_reprocess=fingerprint is None,
    )
    return get_tokenizer(folder)


class Store:
    """A built store; create it with `build` or `open`.

    files       paths of its arrays
    settings    what it was built with
    kept_out    numbers of the documents that are never retrieved
    exclude     their chunks, as ranges [first, stop)
    tokenizer   the tokenizer of its chunks
    stats       counts of documents, chunks, sequences and tokens; the index, its recall, seconds
    """

    def __init__(self, files: Files, settings: StoreSettings, kept_out: list[int]) -> None:
        self.files, self.settings, self.kept_out, self.tokenizer = files, settings, kept_out, settings.cutter
        self._read()

    def _read(self) -> None:
        self.exclude = document_ranges(self.doc_ids, self.kept_out)
        chunk_stats = read_manifest(self.folder)[self.files.chunks.name]["stats"]
        self.stats = {**chunk_stats, **knn_stats(self.files.chunks, self.files.index_name, self.exclude)}
        self.__dict__.pop("index", None)

    @classmethod
    def build(
        cls,
        documents: Iterable[Document] | PathLike,
        folder: PathLike,
        settings: StoreSettings | None = None,
        *,
        files: Files | None = None,
        batch_size: int | None = None,
        force_reprocess: bool = False,
        progress: bool = True,
    ) -> "Store":
        """Build the missing parts of a corpus's store: chunk, embed, index and search.

        Parts built with the same settings are reused; REPROCESS=1 in the environment rebuilds everything. If only the
        corpus has changed, only its new documents are embedded (`update`), unless `files` are passed. Processes
        launched together share the work, and each must call this.

        Args:
            documents: a corpus, or a name or path that `opening.open_corpus` knows; or any iterable of `Document`,
                which is chunked again each time, because changes in it cannot be detected.
            folder: the store's folder.
            settings: see `StoreSettings`.
            files: paths of the arrays, if they are not in `folder` under their usual names.
            batch_size: chunks that the BERT embeds at a time; the device's if left out.
            force_reprocess: embed, index and search again in any case.
            progress: show progress bars.

        Raises:
            ValueError: a setting is out of range; `index` cannot leave documents out; no document has a token, or
                all are kept out; or numbers in `keep_out` no longer stand for the documents that they stood for.
            OSError: a file cannot be written; what was there is untouched.
        """
        corpus, settings, files = open_corpus(documents), settings or StoreSettings(), files or Files.of(folder)
        check_bert(settings.bert)
        if settings.index:  # refused now, not after the embedding
            empty_index(settings.index, embedding_dim(settings.bert))
        settings = replace(settings, tokenizer=choose_tokenizer(settings, corpus, folder, progress))
        _note_kept_out(files, settings.keep_out)
        if files == Files.of(folder):
            _follow(corpus, folder, settings, progress)
        write_chunks(corpus, files, settings, progress=progress)
        chunked = read_documents(files.chunks)
        kept_out = document_numbers(settings.keep_out, chunked, files.kept_out)
        if len(kept_out) == len(chunked):
            raise ValueError(f"keep_out names all {len(chunked)} documents: leave some to be retrieved")
        if launched()[0] == 0:
            note_documents(files.kept_out, settings.keep_out, kept_out, chunked)
        options: dict[str, Any] = {"force_reprocess": force_reprocess, "progress": progress}
        write_vectors(files.chunks, files.vectors, settings, batch_size=batch_size, **options)
        index_vectors(files, settings, **options)
        write_neighbours(files, settings, kept_out, **options)
        return cls(files, settings, kept_out)

    @classmethod
    def open(
        cls, folder: PathLike, *, bert: PathLike | None = None, keep_out: float | int | Sequence[DocumentName] = ()
    ) -> "Store":
        """Open a built store without its corpus; nothing is built.

        Args:
            folder: the store's folder.
            bert: the BERT that embedded it, for queries to its `retriever`.
            keep_out: the same as when it was built.

        Raises:
            FileNotFoundError: the store is incomplete, has no neighbours that leave these documents out, or its
                manifest is damaged.
            ValueError: another BERT embedded it; an array is damaged, or is not what the next was made from, as after
                a stopped build; or its manifest is of a newer format.
        """
        folder, files = Path(folder), Files.of(folder)
        finish_replacement(folder)
        arrays = read_manifest(folder)
        if missing := [each.name for each in (files.chunks, files.vectors, files.index) if each.name not in arrays]:
            raise FileNotFoundError(f"{folder} holds no whole store: its manifest has no record of {missing[0]}")
        kept_out = document_numbers(keep_out, read_documents(files.chunks), files.kept_out)
        exclude = document_ranges(open_array(files.doc_ids), kept_out)
        found = knn_path(files.chunks, exclude).name
        if found not in arrays:
            present = sorted(name for name in arrays if name.startswith(f"{files.chunks.stem}.knn"))
            raise FileNotFoundError(
                f"{folder} has no neighbours that leave out the documents {kept_out} ({found}), but {present}: "
                f"pass the keep_out that it was built with"
            )
        chunks, vectors, index, neighbours = (
            arrays[name]["settings"] for name in (files.chunks.name, files.vectors.name, files.index.name, found)
        )
        if vectors["bert"] != bert_fingerprint(bert):
            raise ValueError(f"the store in {folder} was embedded by another BERT ({vectors['bert']}): pass bert=…")
        tokenizer = store_tokenizer(files.chunks, bert)
        if tokenizer.fingerprint != chunks["tokenizer"]:
            raise ValueError(f"the store in {folder} has lost its tokenizer ({chunks['tokenizer']}): build it again")
        if reason := mismatch(folder, found):
            raise ValueError(f"the store in {folder}: {reason}. Build it again with Store.build")
        settings = StoreSettings(
            **{name: chunks[name] for name in OF_CHUNKS}, knn=neighbours["k"], tokenizer=tokenizer, bert=bert,
            use_cls_repr=vectors["pooling"] == "cls", index=index["index"],
            max_similarity=neighbours["max_similarity"], keep_out=kept_out,
        )  # fmt: skip
        return cls(files, settings, kept_out)

    def __repr__(self) -> str:
        counts = f"{self.stats['docs']} documents, {self.stats['chunks']} chunks, {self.stats['seqs']} sequences"
        return f"{counts}, {self.stats['k']} neighbours a chunk (recall {self.stats['recall']:.3f}), in {self.folder}"

    @property
    def folder(self) -> Path:
        """The store's folder."""
        return self.files.chunks.parent

    # its arrays

    @property
    def chunks(self) -> Integer[np.ndarray, "c m_plus_1"]:
        """The tokens of every chunk, each followed by the next one's first token; read-only, like the arrays below."""
        return open_array(self.files.chunks)

    @property
    def doc_ids(self) -> Int[np.ndarray, " c"]:
        """The document of every chunk."""
        return open_array(self.files.doc_ids)

    @property
    def vectors(self) -> Float[np.ndarray, "c d"]:
        """The vector of every chunk."""
        return open_array(self.files.vectors)

    @property
    def neighbours(self) -> Int[np.ndarray, "c k"]:
        """The nearest chunks of other documents, for every chunk; −1 where there is none."""
        return open_array(knn_path(self.files.chunks, self.exclude))

    @property
    def documents(self) -> list[dict]:
        """Metadata of each document: title, source, chunks, characters, digest of the text, facts."""
        return read_documents(self.files.chunks)

    @cached_property
    def index(self) -> faiss.Index:
        """The index of the vectors."""
        return read_index(self.files.index)

    # its readers

    def dataset(self, k: int | None = None) -> RETRODataset:
        """Sequences with their neighbours.

        Args:
            k: number of neighbours per chunk; all that are stored if left out.

        Raises:
            ValueError: k is less than 1, or fewer than k are stored.
        """
        stored = self.stats["k"]
        _check_k(k)
        if k is not None and k > stored:
            raise ValueError(f"k {k}: the store in {self.folder} has {stored} neighbours of each: build it with more")
        data = RETRODataset(
            num_chunks=self.stats["chunks"], chunk_size=self.settings.chunk_size, seq_len=self.settings.seq_len,
            num_sequences=self.stats["seqs"], num_neighbors=stored, chunk_memmap_path=self.files.chunks,
            chunk_nn_memmap_path=knn_path(self.files.chunks, self.exclude), seq_memmap_path=self.files.seqs,
            doc_ids_memmap_path=self.files.doc_ids,
        )  # fmt: skip
        return data if k in (None, stored) else data.with_neighbours(np.array(data.knns[:, :k]))

    def retriever(self, k: int | None = None) -> Retriever:
        """Retriever that finds k chunks per query; if left out, the number of stored neighbours per chunk."""
        _check_k(k)
        return Retriever(self.files, self.settings, self.index, k or self.stats["k"], self.kept_out)

    def update(self, documents: Iterable[Document], *, progress: bool = True) -> Update:
        """Update the store after documents of its corpus were removed or added (see `updating.update_store`).

        Returns:
            What was done; `str()` of it is a sentence.

        Datasets, retrievers and wrappers made before hold the old arrays: make them again.

        Raises:
            ValueError: its files have other names (call `Store.build` instead), or it cannot be updated.
        """
        if self.files != Files.of(self.folder):
            raise ValueError(
                f"the store in {self.folder} has files of other names: call Store.build with the new corpus"
            )
        kept_out = [identity(self.documents[number]) for number in self.kept_out]
        options = {"bert": self.settings.bert, "progress": progress, **self.settings.of_index()}
        done = update_store(documents, self.folder, **options)
        self.kept_out = find_again(kept_out, self.documents)
        write_neighbours(self.files, self.settings, self.kept_out, progress=progress)
        self._read()
        return replace(done, searched=self.stats["chunks"]) if self.kept_out else done


def _note_kept_out(files: Files, keep_out: float | int | Sequence[DocumentName]) -> None:
    """Note the documents of a store that an earlier version built, which noted none, before its corpus changes."""
    try:
        documents = read_documents(files.chunks)
        numbers = document_numbers(keep_out, documents, files.kept_out)
        found = knn_path(files.chunks, document_ranges(open_array(files.doc_ids), numbers))
    except (OSError, ValueError, KeyError):  # there is no store yet, or it kept no such documents out
        return
    if launched()[0] == 0 and found.name in read_manifest(found.parent):
        note_documents(files.kept_out, keep_out, numbers, documents)


def _check_k(k: Any) -> None:
    if k is not None and (isinstance(k, bool) or not isinstance(k, Integral) or k < 1):
        raise ValueError(f"k {k!r}: pass a whole number of neighbours, 1 or more, or None for all that are stored")


def _follow(documents: Any, folder: PathLike, settings: StoreSettings, progress: bool) -> None:
    """Update an existing store if only its corpus has changed; else leave it to be built."""
    folder, name = Path(folder), Files.of(folder).chunks.name
    wanted = chunk_settings(documents, settings)
    embedding: dict[str, Any] = {"bert": settings.bert, "use_cls_repr": settings.use_cls_repr}

    def changed() -> bool:
        finish_replacement(folder)
        recorded = read_manifest(folder).get(name, {}).get("settings", {}).get("corpus")
        if recorded in (None, to_jsonable(wanted["corpus"])) or reprocess_requested():
            return False
        return reason_to_rebuild(documents, folder, **embedding, settings=wanted) is None

    if broadcast(changed()):
        update = update_store(documents, folder, bert=settings.bert, progress=progress, **settings.of_index())
        more = "; neighbours without the documents that are kept out are searched anew" if settings.keep_out else ""
        warnings.warn(f"the corpus has changed: {update}{more}", stacklevel=4)
