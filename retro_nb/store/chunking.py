"""From documents to chunks on disk (notebook 01).

A document is `start tokens end` (BERT: [CLS], [SEP]), cut into chunks of m tokens. Each chunk is stored with one
extra token, the first of the next chunk, so that a sequence of l chunks has the l·m + 1 tokens that training needs
for input and labels. A row of the chunk array therefore holds m + 1 ids, padded at the document's end.

    tokens   t0 t1 t2 t3 t4 t5 t6        m = 3
    chunk 0  t0 t1 t2 | t3
    chunk 1  t3 t4 t5 | t6               t6 is stored already: it does not start another chunk
"""

import hashlib
import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import lru_cache
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, Int64, Integer
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tqdm.auto import tqdm

from retro_nb.common.arrays import ArrayWriter, PathLike, explain_write_errors, writing
from retro_nb.common.manifest import MANIFEST, cached, read_manifest
from retro_nb.store.files import Files, companion
from retro_nb.store.settings import StoreSettings
from retro_nb.text.document import Document
from retro_nb.text.tokens import BERTS_IDS, PAD_ID, SpecialIds, TextTokenizer, get_tokenizer

# A document is tokenised in pieces, so that one huge document needs no more memory than many small ones. Cuts fall
# where the tokenizer starts a new word anyway, so that no token changes. BERT starts one before white space, ASCII
# punctuation and Chinese characters; most others at least before a space between two words, as tested on SAMPLE.
PIECE_CHARACTERS = 50_000
PIECES_AT_ONCE = 16
BERTS_BOUNDARY = re.compile(r"[ \t\n\r!-/:-@\[-`{-~\u3400-\u4dbf\u4e00-\u9fff]")
SPACE_BETWEEN_WORDS = re.compile(r"(?<=[^\W_]) (?=[^\W_])")
MOST_CHUNKS = 2**31 - 1  # per store: sequences and neighbours are stored as int32
SAMPLE = "one two 3 four 56 7 é ж 中 x"


# one document


class Tokens(NamedTuple):
    """A stretch of a document's tokens: the ids, and the character span [start, end) of each."""

    ids: Int32[np.ndarray, " n"]
    spans: Int64[np.ndarray, "n 2"]


class Chunks(NamedTuple):
    """Chunks of a document: m + 1 ids each, and the character span [start, end) of the first m."""

    rows: Int32[np.ndarray, "c m_plus_1"]
    spans: Int64[np.ndarray, "c 2"]


@lru_cache(maxsize=8)
def _boundary(tokenizer: TextTokenizer) -> re.Pattern | None:
    """Pattern of the positions where a text may be cut.

    None if the tokenizer splits words neither like BERT's nor at every space, or an added token may span a boundary.
    """
    backend = tokenizer.backend
    boundary = BERTS_BOUNDARY if isinstance(backend.pre_tokenizer, BertPreTokenizer) else SPACE_BETWEEN_WORDS
    if boundary is SPACE_BETWEEN_WORDS:
        parts = re.split(f"(?={boundary.pattern})", SAMPLE)
        if _words(backend, SAMPLE) != [word for part in parts for word in _words(backend, part)]:
            return None
    for added in backend.get_added_tokens_decoder().values():  # they may span a boundary
        reaches = added.single_word or added.lstrip or added.rstrip or boundary.search(added.content)
        if reaches and not added.special:  # special tokens are not matched in a text
            return None
    return boundary


def _words(backend: Tokenizer, text: str) -> list[str]:
    """Split a text into words as the tokenizer does before it forms tokens."""
    normal = backend.normalizer.normalize_str(text) if backend.normalizer else text
    return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(normal)] if backend.pre_tokenizer else [normal]


def _pieces(text: str, word_boundary: re.Pattern | None) -> Iterator[tuple[int, str]]:
    """Cut a text into (offset, piece), at the first word boundary after every PIECE_CHARACTERS characters."""
    start = 0
    while start < len(text):
        boundary = word_boundary and word_boundary.search(text, start + PIECE_CHARACTERS)
        stop = boundary.start() if boundary else len(text)
        yield start, text[start:stop]
        start = stop


def document_tokens(text: str, *, tokenizer: PathLike | TextTokenizer | None = None) -> Iterator[Tokens]:
    """Yield the tokens of one document (start, text, end), about 800,000 characters at a time.

    A document without tokens yields nothing. A tokenizer that does not split at spaces (e.g. Llama 2's) gets the
    whole document at once.
    """
    tokenizer = get_tokenizer(tokenizer)
    ids_of, pieces, begun = tokenizer.ids, _pieces(text, _boundary(tokenizer)), False
    while batch := list(islice(pieces, PIECES_AT_ONCE)):
        # A lone surrogate (half a character) has no UTF-8 encoding: it is read as "?".
        whole = [piece.encode("utf-8", "replace").decode() for _, piece in batch]
        encodings = tokenizer.backend.encode_batch(whole, add_special_tokens=False)
        ids = np.concatenate([np.asarray(e.ids, dtype=np.int32) for e in encodings])
        if not len(ids):
            continue
        spans = np.concatenate(
            [
                np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2) + offset
                for encoding, (offset, _) in zip(encodings, batch, strict=True)
            ]
        )
        if not begun:
            begun = True
            yield Tokens(np.array([ids_of.sos], np.int32), np.array([[spans[0, 0]] * 2], np.int64))
        yield Tokens(ids, spans)
    if begun:
        yield Tokens(np.array([ids_of.eos], np.int32), np.array([[spans[-1, 1]] * 2], np.int64))


def tokens_to_chunks(tokens: Iterable[Tokens], chunk_size: int, pad_id: int = PAD_ID) -> Iterator[Chunks]:
    """Cut a document's tokens into chunks as they arrive.

    L tokens give ⌈(L − 1) / m⌉ chunks, at least one: the document's last token is only ever a label, so if the
    previous chunk already stores it as its extra token, it does not start another chunk.

    Args:
        tokens: the document's tokens, in stretches of any length.
        chunk_size: m.
        pad_id: fills the last chunk.
    """
    m, first = chunk_size, True
    ids: np.ndarray = np.empty(0, np.int32)
    spans: np.ndarray = np.empty((0, 2), np.int64)
    for stretch in tokens:
        ids, spans = np.concatenate([ids, stretch.ids]), np.concatenate([spans, stretch.spans])
        whole = max(len(ids) - 1, 0) // m  # chunks whose next token is known
        if whole:
            rows = np.lib.stride_tricks.sliding_window_view(ids, m + 1)[: whole * m : m]
            starts, ends = spans[: whole * m : m, 0], spans[m - 1 : whole * m : m, 1]
            yield Chunks(rows, np.stack([starts, ends], axis=1))
            ids, spans, first = ids[whole * m :], spans[whole * m :], False
    if len(ids) > 1 or (first and len(ids)):
        own = spans[:m]
        row = np.pad(ids, (0, m + 1 - len(ids)), constant_values=pad_id)
        yield Chunks(row[None], np.array([[own[0, 0], own[-1, 1]]], np.int64))


def _bytes_between(text: str, edges: list[int]) -> Int32[np.ndarray, " c"]:
    """UTF-8 bytes of the text between consecutive edges."""
    sizes = [len(text[start:stop].encode("utf-8", "replace")) for start, stop in pairwise(edges)]
    return np.array(sizes, dtype=np.int32)


class ChunkedDocument(NamedTuple):
    """One document as a store keeps it: its metadata and its chunks.

    about     title, source, number of characters, spans of the facts, and a digest of the text, by which
              `retro_nb.store.updating` recognises unchanged documents
    replaced  undecodable pieces, as in `Document`
    rows      m + 1 ids each; none if the text has no token
    spans     the character span [start, end) of each chunk in the text
    bytes     bytes of the text from each chunk to the next
    """

    about: dict
    replaced: int
    rows: Integer[np.ndarray, "c m_plus_1"]
    spans: Int64[np.ndarray, "c 2"]
    bytes: Int32[np.ndarray, " c"]

    def count_of(self, token: int | None) -> int:
        """Number of its tokens with this id; 0 for None."""
        return 0 if token is None else int(np.count_nonzero(self.rows[:, :-1] == token))

    def tokens(self, pad_id: int) -> int:
        """Number of tokens in the document, start and end included."""
        if not len(self.rows):
            return 0
        last = int(self.rows[-1, -1] != pad_id)  # the document's last token, if it is only a label
        return int(np.count_nonzero(self.rows[:, :-1] != pad_id)) + last


def text_digest(text: str) -> str:
    """Digest that identifies a text."""
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).hexdigest()


def describe_document(document: Document) -> dict:
    """Metadata that a store keeps of a document."""
    return {
        "title": document.title,
        "source": document.source,
        "characters": len(document.text),
        "digest": text_digest(document.text),
        "facts": document.facts,
    }


def chunk_document(document: Document, chunk_size: int, tokenizer: TextTokenizer) -> ChunkedDocument:
    """Cut one document into chunks of m tokens."""
    stretches = tokens_to_chunks(document_tokens(document.text, tokenizer=tokenizer), chunk_size, tokenizer.ids.pad)
    parts = [Chunks(rows.astype(tokenizer.dtype), spans) for rows, spans in stretches]
    rows = np.concatenate([part.rows for part in parts] or [np.empty((0, chunk_size + 1), tokenizer.dtype)])
    spans = np.concatenate([part.spans for part in parts] or [np.empty((0, 2), np.int64)])
    sizes = _bytes_between(document.text, [0, *spans[1:, 0].tolist(), len(document.text)][-len(spans) - 1 :])
    return ChunkedDocument(describe_document(document), document.replaced, rows, spans, sizes)


# a corpus

MOST_UNKNOWN = 0.01  # share of unknown tokens that needs no warning
COMPANIONS = ("spans.npy", "bytes.npy", "documents.jsonl", "tokenizer.json")


class _ChunkFiles:
    """Writer of a chunked corpus's files, one document at a time."""

    def __init__(self, files: Files, settings: StoreSettings) -> None:
        self.tokenizer, self.pad_id = settings.cutter, settings.cutter.ids.pad
        self.chunks_per_seq = settings.seq_len // settings.chunk_size
        self.chunks = ArrayWriter(files.chunks, self.tokenizer.dtype, (settings.chunk_size + 1,))
        self.spans = ArrayWriter(companion(files.chunks, "spans.npy"), np.int64, (2,))
        self.bytes = ArrayWriter(companion(files.chunks, "bytes.npy"), np.int32)
        self.doc_ids = ArrayWriter(files.doc_ids, np.int32)
        self.seqs = ArrayWriter(files.seqs, np.int32)
        self._writers = (self.chunks, self.spans, self.bytes, self.doc_ids, self.seqs)
        self.documents_path = companion(files.chunks, "documents.jsonl")
        self.tokenizer_path = companion(files.chunks, "tokenizer.json")
        self.documents = 0

    def __enter__(self) -> "_ChunkFiles":
        with ExitStack() as stack:
            for writer in self._writers:
                stack.enter_context(writer)
            # A file name that is not UTF-8 gives a title with lone surrogates: \\udcxx, which JSON reads back.
            titles = writing(self.documents_path, "w", encoding="utf-8", errors="backslashreplace")
            self._titles = stack.enter_context(titles)
            rules = stack.enter_context(writing(self.tokenizer_path, "w", encoding="utf-8"))
            rules.write(self.tokenizer.backend.to_str())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> bool | None:
        if error[0] is not None:
            return self._stack.__exit__(*error)
        with self._stack:  # flush all before the first is moved into place: a full disk changes none
            for writer in self._writers:
                writer.flush()
            with explain_write_errors(self.documents_path):
                self._titles.flush()
        return None

    def append(self, document: ChunkedDocument) -> None:
        """Write one document with its chunks."""
        first, count = self.chunks.rows, len(document.rows)
        if first + count > MOST_CHUNKS:
            raise ValueError(
                f"a store numbers its chunks in 32 bits, up to {MOST_CHUNKS}: {document.about['title']!r} has no room; "
                f"pass max_chunks={MOST_CHUNKS}, or divide the corpus into several stores"
            )
        self.chunks.append(document.rows)
        self.spans.append(document.spans)
        self.bytes.append(document.bytes)
        self.doc_ids.append(np.full(count, self.documents))
        self.seqs.append(np.arange(first, first + count, self.chunks_per_seq))
        about = document.about | {"chunks": [first, first + count]}
        with explain_write_errors(self.documents_path):
            self._titles.write(json.dumps(about, ensure_ascii=False) + "\n")
        self.documents += 1


def write_chunks(
    documents: Iterable[Document],
    files: Files,
    settings: StoreSettings,
    *,
    cut: Callable[[], Iterable[ChunkedDocument]] | None = None,
    force_reprocess: bool = False,
    progress: bool = True,
) -> dict:
    """Chunk a corpus to disk, one document at a time; memory does not grow with the corpus.

    The main files hold the chunks (rows of m + 1 ids, uint16 if the vocabulary fits, else int32), the first chunk of
    each sequence (int32) and the document of each chunk (int32). These files are written next to the chunks:

        *.spans.npy        character span of each chunk in its document (int64 pairs)
        *.bytes.npy        bytes of the text from each chunk to the next (int32); a document's add up to its text's
        *.documents.jsonl  metadata of each document (`read_documents`)
        *.tokenizer.json   the tokenizer, so that the ids can be decoded wherever the arrays go (`store_tokenizer`)

    A sequence is l = n/m consecutive chunks of one document. Files built with the same settings are reused.

    Args:
        documents: a corpus of `retro_nb.text`, or any iterable of `Document`.
        files: where to write.
        settings: the store's; it is cut by `settings.cutter`.
        cut: yields the cut documents in order, if the caller cuts them; called only if the files must be built.
        force_reprocess: rebuild in any case.
        progress: show a progress bar.

    Returns:
        `chunks`, `docs`, `seqs`, `tokens` (start and end included), `vocabulary` (v) and `special_ids` of the
        tokenizer, `empty_docs` (documents without a token, which are skipped), `replaced_characters` (undecodable
        bytes) and `complete` (false if a maximum stopped it). Warnings name the first empty document and the first
        with undecodable bytes.

    Raises:
        ValueError: no document has a token, or the first one exceeds a maximum.
        OSError: a file cannot be written; the message names it and the reason, and existing files stay as they were.
    """
    tokenizer, remarks = settings.cutter, []

    def cut_here() -> Iterator[ChunkedDocument]:
        for document in tqdm(documents, desc="chunking", unit=" documents", disable=not progress):
            yield chunk_document(document, settings.chunk_size, tokenizer)

    def build() -> dict:
        with _ChunkFiles(files, settings) as opened:
            stats, noticed = _write_all(opened, (cut or cut_here)(), documents, settings)
        remarks.extend(noticed)
        return {**stats, "vocabulary": tokenizer.size, "special_ids": tokenizer.ids._asdict()}

    described, others = chunk_settings(documents, settings), [companion(files.chunks, kind) for kind in COMPANIONS]
    force = force_reprocess or described["corpus"] is None  # a bare iterable cannot say whether it has changed
    stats = cached(files.chunks, described, build, files=(files.seqs, files.doc_ids, *others), force_reprocess=force)
    for remark in remarks:  # warned here, so that stacklevel names the line that calls our caller
        warnings.warn(remark, stacklevel=3)
    return stats


def chunk_settings(documents: Iterable[Document], settings: StoreSettings) -> dict:
    """Everything that the chunks of a corpus depend on, as recorded in the manifest."""
    fingerprint = getattr(documents, "fingerprint", None)
    corpus = {"corpus": fingerprint() if fingerprint else None, "tokenizer": settings.cutter.fingerprint}
    return corpus | settings.of_chunks()


def _write_all(
    files: _ChunkFiles, chunked: Iterable[ChunkedDocument], documents: Iterable[Document], settings: StoreSettings
) -> tuple[dict, list[str]]:
    """Write all documents; return the statistics and the warnings for the caller."""
    tokens, replaced, complete, empty, undecodable, remarks = 0, 0, True, [], [], []
    lost: dict[str, int] = {}  # unknown tokens of each document that has some
    for document in chunked:
        source = document.about["source"]
        if not len(document.rows):
            empty.append(source)
        else:
            seqs_left = (settings.max_seqs or math.inf) - files.seqs.rows
            limit = min(settings.max_chunks or math.inf, files.chunks.rows + seqs_left * files.chunks_per_seq)
            if files.chunks.rows + len(document.rows) > limit:
                complete = False
                remarks.append(_stopped(document.about["title"], files, settings))
                break
            files.append(document)
            tokens += document.tokens(files.pad_id)
            if unknown := document.count_of(files.tokenizer.unknown):
                lost[source] = unknown
        replaced += document.replaced
        if document.replaced:
            undecodable.append(source)
    if not files.documents:
        where, first = getattr(documents, "folder", type(documents).__name__), f", first {empty[0]}" if empty else ""
        raise ValueError(f"no text to chunk in {where}: {len(empty)} documents, none with a token{first}")
    if empty:
        remarks.append(f"documents without a token, left out: {len(empty)}, first {empty[0]}")
    if sum(lost.values()) > MOST_UNKNOWN * tokens:
        unknown, worst = sum(lost.values()), max(lost, key=lambda source: lost[source])
        remarks.append(
            f"{unknown} of {tokens} tokens ({unknown / tokens:.0%}) are unknown to the tokenizer, most of them in "
            f"{worst}: what they say is lost. Pass a tokenizer that knows these letters, or a number, as in "
            f"tokenizer=8000, to train one on this corpus"
        )
    if undecodable:
        remarks.append(
            f"{replaced} undecodable bytes became U+FFFD in {len(undecodable)} documents, first in {undecodable[0]}: "
            f"save them as UTF-8, or pass text_folder(…, encoding=None), which looks for each file's encoding"
        )
    counts = {"chunks": files.chunks.rows, "docs": files.documents, "seqs": files.seqs.rows, "tokens": tokens}
    return counts | {"empty_docs": len(empty), "replaced_characters": replaced, "complete": complete}, remarks


def _stopped(title: str, files: _ChunkFiles, settings: StoreSettings) -> str:
    limits = f"max_chunks {settings.max_chunks}, max_seqs {settings.max_seqs}"
    if not files.documents:
        raise ValueError(f"{limits}: the first document, {title!r}, has more; raise the limit")
    return (
        f"{limits}: stopped before {title!r}, which does not fit; {files.documents} documents with "
        f"{files.chunks.rows} chunks are in. Raise the limit, or leave it out, for the whole corpus"
    )


def read_documents(chunks_memmap_path: PathLike) -> list[dict]:
    """Metadata of a chunk array's documents, in order: title, source, chunks, characters, digest of the text, facts."""
    path = companion(chunks_memmap_path, "documents.jsonl")
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: it is written with the chunks; chunk the corpus again")
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def special_ids(chunks_memmap_path: PathLike) -> SpecialIds:
    """Special ids of a chunk array, from its manifest; BERT's for an array without one, such as the reference's.

    Raises:
        ValueError: a tokenizer is saved with the array, but the manifest does not record its special ids.
    """
    path = Path(chunks_memmap_path)
    recorded = read_manifest(path.parent).get(path.name, {}).get("stats", {}).get("special_ids")
    if recorded:
        return SpecialIds(**recorded)
    if companion(path, "tokenizer.json").exists():
        where = path.parent / MANIFEST
        raise ValueError(f"{where} does not say which ids in {path.name} are special: copy it too, or chunk again")
    return BERTS_IDS


def store_fingerprint(chunks_memmap_path: PathLike) -> str | None:
    """Fingerprint of the tokenizer of a chunk array; None for an array without a manifest."""
    path = Path(chunks_memmap_path)
    return read_manifest(path.parent).get(path.name, {}).get("settings", {}).get("tokenizer")


def store_tokenizer(chunks_memmap_path: PathLike, otherwise: PathLike | None = None) -> TextTokenizer:
    """Tokenizer saved with a chunk array; `get_tokenizer(otherwise)` for an array without one."""
    file = companion(chunks_memmap_path, "tokenizer.json")
    if not file.exists():
        return get_tokenizer(otherwise)
    return _read_tokenizer(file, file.stat().st_mtime_ns, special_ids(chunks_memmap_path))


@lru_cache(maxsize=4)
def _read_tokenizer(file: Path, changed: int, ids: SpecialIds) -> TextTokenizer:
    return TextTokenizer(Tokenizer.from_file(str(file)), ids)
