"""Update a store when documents are added or removed; only new texts are embedded (notebook 10).

Unchanged parts are taken from the old store: the chunks and vectors of every document with unchanged text, and the
neighbours of every chunk that neither lost one nor has a nearer new one. The result is what a build of the new corpus
from scratch gives, with two exceptions. An inverted file keeps its centroids and its search effort: it equals the same
trained index, filled again. Neighbours that exact search had to fill in stay, though a search might now find others.

The new store is built step by step in a folder within the old one, and moved into place at the end; until then the
old store stays usable. A stop costs at most the block in progress. A stopped update resumes if it leads from the same
store to the same corpus; otherwise it starts over.
"""

import hashlib
import os
import shutil
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int32, Int64
from tqdm.auto import tqdm

from retro_nb.common.arrays import (
    ArrayWriter,
    PathLike,
    ResumableRows,
    open_array,
    read_note,
    to_jsonable,
    write_json,
    write_text,
)
from retro_nb.common.launch import broadcast, launched
from retro_nb.common.manifest import (
    STAGING,
    array_key,
    cached,
    check_writable,
    finish_replacement,
    folder_lock,
    intact,
    read_manifest,
    replace_store,
)
from retro_nb.store.chunking import (
    ChunkedDocument,
    chunk_document,
    describe_document,
    read_documents,
    special_ids,
    store_tokenizer,
    text_digest,
    write_chunks,
)
from retro_nb.store.embedding import bert_fingerprint, embedding_settings, write_vectors
from retro_nb.store.files import CHUNKS, INDEX, NEIGHBOURS, VECTORS, Files, companion
from retro_nb.store.index import BLOCK, Neighbours, Vectors, build_index, innermost, read_index, write_index
from retro_nb.store.index_edits import EDITABLE, comparing_pays, edit_lists, may_be_nearer, renumber
from retro_nb.store.knn import AT_A_TIME, index_vectors, search_blocks, write_neighbours
from retro_nb.store.settings import OF_CHUNKS, StoreSettings
from retro_nb.text.document import Corpus, Document
from retro_nb.text.tokens import get_tokenizer


@dataclass(frozen=True)
class Update:
    """Counts of an update: documents kept, added and removed, chunks embedded, and chunks whose neighbours were
    searched."""

    kept: int
    added: int
    removed: int
    embedded: int
    searched: int

    def __str__(self) -> str:
        documents = f"{self.kept} documents kept, {self.added} added, {self.removed} removed"
        return f"{documents}; {self.embedded} chunks embedded, neighbours searched for {self.searched}"


def mismatch(folder: PathLike, neighbours: str = NEIGHBOURS) -> str | None:
    """Name an array of a store that is damaged, or is not what the next one was made from; None if all match.

    Args:
        folder: the store's; its manifest has a record of each array.
        neighbours: name of the array of neighbours, if the store has it.
    """
    folder = Path(folder)
    was = {name: record["settings"] for name, record in read_manifest(folder).items()}
    steps = [(VECTORS, CHUNKS, "chunks"), (INDEX, VECTORS, "embeddings")]
    steps += [(neighbours, INDEX, "index")] if neighbours in was else []
    for name, source, needed in steps:
        if not intact(folder / source) or was[name][needed] != array_key(folder / source):
            return f"{source} is not what {name} was made from"
    last = steps[-1][0]
    return None if intact(folder / last) else f"{last} is truncated or corrupt"


def reason_to_rebuild(
    documents: Any,
    folder: PathLike,
    *,
    bert: PathLike | None = None,
    use_cls_repr: bool | None = None,
    settings: dict | None = None,
) -> str | None:
    """Why a store cannot be updated to a corpus; None if it can.

    Args:
        documents: the corpus.
        folder: the store's folder.
        bert: the BERT to embed it with.
        use_cls_repr: the pooling to embed it with; None for the store's.
        settings: the settings for its chunks, from `chunk_settings`; None for the store's.
    """
    folder = Path(folder)
    finish_replacement(folder)
    was = {name: record["settings"] for name, record in read_manifest(folder).items()}
    if missing := [name for name in (CHUNKS, VECTORS, INDEX) if name not in was]:
        return f"it has no record of {missing[0]}"
    if not isinstance(documents, Corpus):
        return "the documents have no fingerprint, by which a store knows what it was made from"
    pooling = {None: was[VECTORS]["pooling"], True: "cls", False: "mean"}[use_cls_repr]
    wanted = (settings or {}) | {"bert": bert_fingerprint(bert), "pooling": pooling, "corpus": None}
    wanted["tokenizers"] = [was[CHUNKS]["tokenizer"], get_tokenizer(bert).fingerprint]
    for name, value in (was[VECTORS] | was[CHUNKS] | {"corpus": None}).items():
        if wanted.get(name, value) != value:
            return f"{name} was {value} and is {wanted[name]}"
    if reason := mismatch(folder):
        return reason
    if not all("digest" in about for about in read_documents(folder / CHUNKS)):
        return "it was built by a version that did not record the texts' digests"
    return None


# the update


def update_store(
    documents: Iterable[Document],
    work_dir: PathLike,
    *,
    bert: PathLike | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    index: str | None = None,
    max_index_memory_usage: str | int | None = None,
    current_memory_available: str | int | None = None,
) -> Update:
    """Update a built store after documents of its corpus were removed or added.

    `TrainingWrapper` and `python -m retro_nb build` do this automatically when only the corpus has changed. It needs as
    much free disk space as the store takes. A document that changed its place counts as removed and added, but is not
    embedded again. Neighbours for databases that keep documents out (`keep_out`) are dropped, and searched again at
    their next use (by `Store.build` or `Store.update`). A stopped update resumes at the next call.

    Args:
        documents: the corpus as it is now.
        work_dir: the store's folder.
        bert: the BERT that embedded the store; it also embeds new texts.
        device: where to embed; see `bert_embed`.
        progress: show progress bars.
        index, max_index_memory_usage, current_memory_available: as at the build. An inverted file of the same kind is
            edited; if the kind changes as the corpus grows, it is trained and searched again.

    Returns:
        What was done; `str()` of it is a sentence.

    Raises:
        ValueError: there is no whole store, it was made with other settings, or its manifest is of a newer format.
    """
    folder, staging = Path(work_dir), Path(work_dir) / STAGING
    read_manifest(folder)  # refuses a newer format before a lock is made
    with _alone(folder):
        if reason := broadcast(reason_to_rebuild(documents, folder, bert=bert)):
            raise ValueError(f"the store in {folder} cannot be updated: {reason}. Build it again with Store.build")
        assert isinstance(documents, Corpus)  # others were refused above
        old = _Old(folder)
        if old.settings[CHUNKS]["corpus"] == to_jsonable(documents.fingerprint()):
            return Update(len(old.documents), added=0, removed=0, embedded=0, searched=0)
        if launched()[0] == 0:
            _begin(old, documents, staging)
        broadcast()  # the others wait
        new = _chunk(old, documents, staging, progress)
        _embed(old, new, bert, device, progress)
        settings = StoreSettings(
            index=index,
            max_index_memory_usage=max_index_memory_usage,
            current_memory_available=current_memory_available,
        )
        _index(old, new, settings, progress)
        searched = _search(old, new, progress) if NEIGHBOURS in old.arrays else 0
        broadcast()  # wait until all processes have seen that everything is built
        if launched()[0] == 0:
            replace_store(folder, old.searches())
        broadcast()  # let the others wait for the replacement
    kept = len(new.kept)
    return Update(kept, new.documents - kept, len(old.documents) - kept, len(new.fresh), searched)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a lock, so that other launches that update the same store wait."""
    if launched()[0] > 0 or not os.access(folder, os.W_OK):  # a read-only store cannot change
        yield
        return
    with folder_lock(folder, f".{STAGING}.lock"):
        yield


def _begin(old: "_Old", documents: Corpus, staging: Path) -> None:
    """Remove the remains of an update from another store or to another corpus.

    Raises:
        ValueError: a newer version left them.
    """
    check_writable(old.folder)
    if staging.is_symlink():  # it came with the store: `update_store` makes no links
        staging.unlink()
    read_manifest(staging)
    files = [old.arrays[name]["files"] for name in (CHUNKS, VECTORS, INDEX, NEIGHBOURS) if name in old.arrays]
    note, about = staging / "begun.json", to_jsonable({"from": files, "to": documents.fingerprint()})
    if read_note(note) != about or any(path.is_symlink() for path in staging.rglob("*")):
        if staging.exists():
            shutil.rmtree(staging)
        write_json(note, about)


# documents and chunks


class _Old:
    """A store before its update."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.arrays = folder, read_manifest(folder)
        self.settings = {name: record["settings"] for name, record in self.arrays.items()}
        self.chunks, self.vectors = open_array(folder / CHUNKS), open_array(folder / VECTORS)
        self.spans, self.bytes = (open_array(companion(folder / CHUNKS, f"{kind}.npy")) for kind in ("spans", "bytes"))
        self.documents = read_documents(folder / CHUNKS)
        self.by_digest: dict[str, list[int]] = defaultdict(list)
        for number, about in enumerate(self.documents):
            self.by_digest[about["digest"]].append(number)

    def chunked(self, document: int, about: dict, replaced: int) -> ChunkedDocument:
        """The chunks of a document, with its new metadata."""
        rows = slice(*self.documents[document]["chunks"])
        own = (np.array(array[rows]) for array in (self.chunks, self.spans, self.bytes))
        return ChunkedDocument(about, replaced, *own)

    def searches(self) -> list[str]:
        """Names of the neighbour arrays found with its index, including those of databases that keep documents out."""
        index = array_key(self.folder / INDEX)
        return [name for name, settings in self.settings.items() if settings.get("index") == index]


@dataclass(frozen=True)
class _New:
    """The updated store: its chunks, and the old chunks they correspond to.

    kept     (new, old) numbers of the documents that are the same and in the same order
    origin   per chunk, an old chunk with the same text, from which it takes its vector; −1 for a new text
    was      per chunk of a kept document, its old number; −1 for other chunks, whose neighbours are searched
    """

    folder: Path
    documents: int
    kept: list[tuple[int, int]]
    origin: Int64[np.ndarray, " c"]
    was: Int64[np.ndarray, " c"]

    @property
    def fresh(self) -> Int64[np.ndarray, " n"]:
        """The chunks to embed."""
        return np.flatnonzero(self.origin < 0)


def _chunk(old: _Old, documents: Corpus, staging: Path, progress: bool) -> _New:
    """Write the chunks of the corpus; copy those of texts that the old store has."""
    settings, tokenizer = old.settings[CHUNKS], store_tokenizer(old.folder / CHUNKS)

    def cut() -> Iterator[ChunkedDocument]:
        for document in tqdm(documents, desc="reading", unit=" documents", disable=not progress):
            if known := old.by_digest.get(text_digest(document.text)):
                yield old.chunked(known[0], describe_document(document), document.replaced)
            else:
                yield chunk_document(document, settings["chunk_size"], tokenizer)

    sizes = StoreSettings(**{name: settings[name] for name in OF_CHUNKS}, tokenizer=tokenizer)
    write_chunks(documents, Files.of(staging), sizes, cut=cut)
    found = read_documents(staging / CHUNKS)
    kept = _kept(old.by_digest, [about["digest"] for about in found])
    origin, was = (np.full(found[-1]["chunks"][1], -1, np.int64) for _ in range(2))
    for about in found:
        if known := old.by_digest.get(about["digest"]):
            origin[slice(*about["chunks"])] = np.arange(*old.documents[known[0]]["chunks"])
    for now, before in kept:
        rows = slice(*found[now]["chunks"])
        origin[rows] = was[rows] = np.arange(*old.documents[before]["chunks"])
    return _New(staging, len(found), kept, origin, was)


def _kept(old: dict[str, list[int]], digests: Sequence[str]) -> list[tuple[int, int]]:
    """Longest list of (new, old) pairs of documents with the same text, with both numbers ascending.

    With duplicate texts a longer list may exist: each document is paired with one duplicate only, the first that
    extends the longest list so far. A document that changed its place is not paired: distance ties go to the lower
    chunk id, so its new place may change neighbours.
    """
    pairs: list[tuple[int, int]] = []  # candidates
    before: list[int | None] = []  # each one's predecessor in the longest list that it ends
    ends: list[int] = []  # per length, the list that ends lowest: its last old number
    last: list[int] = []  # … and its last pair
    for new, digest in enumerate(digests):
        if not (numbers := old.get(digest)):
            continue
        beyond = bisect_right(numbers, ends[-1]) if ends else 0
        was = numbers[beyond if beyond < len(numbers) else 0]
        length = bisect_left(ends, was)
        ends[length : length + 1], last[length : length + 1] = [was], [len(pairs)]
        pairs.append((new, was))
        before.append(last[length - 1] if length else None)
    chain, number = [], last[-1] if last else None
    while number is not None:
        chain.append(pairs[number])
        number = before[number]
    return chain[::-1]


# vectors and index


def _embed(old: _Old, new: _New, bert: PathLike | None, device: torch.device | str | None, progress: bool) -> None:
    """Write the vectors of all chunks: copy those of old texts, embed new texts."""
    whole, fresh = new.folder / CHUNKS, new.fresh
    chunks, cls = open_array(whole), old.settings[VECTORS]["pooling"] == "cls"
    tokenizer, part = store_tokenizer(whole), new.folder / "fresh" / CHUNKS

    def pick() -> dict:
        with ArrayWriter(part, chunks.dtype, chunks.shape[1:]) as file:
            for rows in np.array_split(fresh, -(-len(fresh) // BLOCK)):
                file.append(chunks[rows])
        write_text(companion(part, "tokenizer.json"), tokenizer.backend.to_str())
        return {"special_ids": special_ids(whole)._asdict()}

    embedded = old.vectors[:0]
    if len(fresh):
        settings = {"chunks": array_key(whole), "tokenizer": tokenizer.fingerprint}
        cached(part, settings, pick, files=(companion(part, "tokenizer.json"),))
        path, options = companion(part, "embedded.npy"), StoreSettings(bert=bert, use_cls_repr=cls)
        write_vectors(part, path, options, device=device, progress=progress)
        embedded = open_array(path)

    def join() -> dict:
        with ArrayWriter(new.folder / VECTORS, np.float32, old.vectors.shape[1:]) as file:
            for start in range(0, len(chunks), BLOCK):
                origin = new.origin[start : start + BLOCK]
                rows = np.empty((len(origin), old.vectors.shape[1]), np.float32)
                rows[origin >= 0] = old.vectors[origin[origin >= 0]]
                first = np.searchsorted(fresh, start)
                rows[origin < 0] = embedded[first : first + np.count_nonzero(origin < 0)]
                file.append(rows)
        return old.arrays[VECTORS]["stats"] | {"rows": len(chunks)}

    cached(new.folder / VECTORS, embedding_settings(whole, len(chunks), bert, cls), join)


def _index(old: _Old, new: _New, settings: StoreSettings, progress: bool) -> None:
    """Write the index of all vectors; an inverted file of the same kind keeps its centroids and effort."""

    def write(vectors: Vectors, spec: str) -> None:
        index = read_index(old.folder / INDEX) if spec == old.settings[INDEX]["index"] else None
        if index is not None and type(innermost(index)) in EDITABLE:
            edit_lists(index, new.was, vectors)
        else:
            index = build_index(vectors, spec, progress=progress)
        write_index(index, new.folder / INDEX)

    index_vectors(Files.of(new.folder), settings, write=write)


# neighbours


def _search(old: _Old, new: _New, progress: bool) -> int:
    """Write the neighbours of all chunks; return the number of chunks that had to be searched."""
    searched, settings = new.folder / "searched.npy", old.settings[NEIGHBOURS]

    def fill(rows: ResumableRows, find: Callable[..., Neighbours]) -> None:
        found, todo = _taken_over(old, new)
        which = rows.settings["settings"] | {"rows": hashlib.sha256(todo.tobytes()).hexdigest()}
        part = ResumableRows(searched, (len(todo), settings["k"]), np.int32, which)
        search_blocks(part, find, AT_A_TIME, progress, todo)
        part.finish()
        found[todo] = open_array(searched)
        for block in rows.blocks(BLOCK):
            rows.write(block, found[block])

    options = StoreSettings(knn=settings["k"], max_similarity=settings["max_similarity"])
    write_neighbours(Files.of(new.folder), options, fill=fill)
    return len(open_array(searched))


def _taken_over(old: _Old, new: _New) -> tuple[Int32[np.ndarray, "c k"], Int64[np.ndarray, " n"]]:
    """Previous neighbours under their new numbers, and the chunks whose neighbours have to be searched."""
    found, lost = renumber(open_array(old.folder / NEIGHBOURS), new.was)
    added, todo = np.flatnonzero(new.was < 0), (new.was < 0) | lost
    same_kind = old.settings[INDEX]["index"] == read_manifest(new.folder)[INDEX]["settings"]["index"]
    if same_kind and comparing_pays(read_index(new.folder / INDEX, mapped=True), len(added)):
        vectors = open_array(new.folder / VECTORS)
        todo[~todo] = may_be_nearer(vectors, found, np.flatnonzero(~todo), added)
    else:
        todo[:] = True
    return found, np.flatnonzero(todo)
