"""Live retrieval: the corpus finds itself, leaves out what it is told to, and names what it found."""

import os
import signal
import subprocess
import sys
import warnings
from contextlib import suppress

import faiss
import numpy as np
import pytest
import torch

from retro_nb.common.arrays import open_array
from retro_nb.reference import chunks_to_precalculated_knn_, documents_to_chunks_, knn_chunks_from_seq_chunks
from retro_nb.store import embedding
from retro_nb.store.chunking import document_tokens
from retro_nb.store.files import Files
from retro_nb.store.retrieval import Retriever
from retro_nb.store.settings import StoreSettings
from retro_nb.store.store import Store
from retro_nb.text.document import Document
from retro_nb.text.tokens import decode, get_tokenizer

faiss.omp_set_num_threads(1)

M, K = 8, 3
WORDS = "law peace war trade union state people power treaty silver gold navy army land tax vote".split()


def speech(seed: int, words: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, words))


DOCUMENTS = [
    Document(speech(0, 60), "1790 Washington", "https://one"),
    Document(speech(1, 33), "1862 Lincoln", "https://two"),
    Document(speech(2, 5), "twice", "https://three"),
    Document(speech(3, 50), "twice", "https://four"),
]


@pytest.fixture(scope="module", autouse=True)
def single_precision():
    """In bfloat16 a chunk's vector depends a little on the batch that it is in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedding, "best_dtype", lambda device: torch.float32)
        embedding._load_bert.cache_clear()
        yield
    embedding._load_bert.cache_clear()


@pytest.fixture(scope="module")
def database(tmp_path_factory, tiny_bert) -> dict:
    """The arguments of `knn_chunks_from_seq_chunks`."""
    return build(tmp_path_factory.mktemp("corpus"), tiny_bert, tiny_bert)


def build(folder, tiny_bert, tokenizer) -> dict:
    chunks, doc_ids = folder / "chunks.npy", folder / "doc_ids.npy"
    sizes = dict(chunk_size=M, progress=False)
    stats = documents_to_chunks_(
        DOCUMENTS,
        chunks_memmap_path=chunks,
        seqs_memmap_path=folder / "seqs.npy",
        doc_ids_memmap_path=doc_ids,
        seq_len=2 * M,
        tokenizer=tokenizer,
        **sizes,
    )
    _, index = chunks_to_precalculated_knn_(
        num_nearest_neighbors=K,
        num_chunks=stats["chunks"],
        chunk_memmap_path=chunks,
        doc_ids_memmap_path=doc_ids,
        bert=tiny_bert,
        **sizes,
    )
    return dict(
        knn=K,
        faiss_index=index,
        num_chunks=stats["chunks"],
        chunk_size=M,
        chunks_memmap_path=chunks,
        doc_ids_memmap_path=doc_ids,
        bert=tiny_bert,
    )


def retriever_of(database: dict) -> Retriever:
    settings = StoreSettings(chunk_size=M, bert=database["bert"])
    files = Files.of(database["chunks_memmap_path"].parent)
    return Retriever(files, settings, database["faiss_index"], database["knn"])


@pytest.fixture(scope="module")
def retriever(database) -> Retriever:
    return retriever_of(database)


@pytest.fixture(scope="module")
def chunks(database) -> torch.Tensor:
    rows = open_array(database["chunks_memmap_path"])
    return torch.from_numpy(rows[:, :-1].astype(np.int64))


def document_of(chunk: int) -> tuple[int, int]:
    """Document and number within it, counted from the texts."""
    for number, document in enumerate(DOCUMENTS):
        length = 2 + len(document.text.split())  # every word is one token
        count = -(-(length - 1) // M)
        if chunk < count:
            return number, chunk
        chunk -= count
    raise AssertionError("no such chunk")


def test_every_chunk_finds_itself(retriever, chunks):
    distances, ids = retriever.nearest(chunks)
    assert distances[:, 0] == pytest.approx(0, abs=1e-6)
    vectors = retriever.index.reconstruct_n(0, len(chunks))
    for own, hit in enumerate(ids[:, 0]):  # or one with the very same words
        assert hit == own or np.allclose(vectors[own], vectors[hit], atol=1e-5)
    assert (distances[:, 1:] >= distances[:, :-1]).all()


def test_neighbours_are_read_as_tokens(database, retriever, chunks):
    retrieved = knn_chunks_from_seq_chunks(chunks[:5], **database)
    _, ids = retriever.nearest(chunks[:5])
    assert retrieved.shape == (5, K, 2 * M) and retrieved.dtype == torch.int64
    assert (retrieved == retriever.tokens(ids)).all()
    for row, hits in zip(retrieved, ids, strict=True):
        for tokens, hit in zip(row, hits, strict=True):
            document, u = document_of(hit)
            own = np.concatenate([part.ids for part in document_tokens(DOCUMENTS[document].text)])
            wanted = own[u * M : (u + 2) * M].tolist()
            if len(own) - 1 <= (u + 1) * M:  # [SEP] alone is no continuation
                wanted = own[u * M : (u + 1) * M].tolist()
            assert tokens.tolist() == wanted + [0] * (2 * M - len(wanted))


def test_without_document_ids_sep_ends_a_document(database, chunks):
    assert torch.equal(
        knn_chunks_from_seq_chunks(chunks, **database),
        knn_chunks_from_seq_chunks(chunks, **{**database, "doc_ids_memmap_path": None}),
    )


def test_missing_neighbours_are_padding(database, chunks):
    everything = [(0, len(chunks) - 1)]
    retrieved = knn_chunks_from_seq_chunks(chunks[:2], exclude=everything, **database)
    assert retrieved.shape == (2, K, 2 * M) and not retrieved[:, 1:].any() and retrieved[:, 0].any(dim=-1).all()


def test_documents_are_left_out_by_number_and_title(retriever, chunks):
    first = np.array([document_of(chunk)[0] for chunk in range(len(chunks))])
    for exclude, numbers in [
        (["1862 Lincoln"], [1]),
        ([0], [0]),
        ([np.int64(0), "1862 Lincoln"], [0, 1]),
        (["twice"], [2, 3]),  # all that are called so
        ((2,), [2]),
        ([], []),
    ]:
        _, ids = retriever.nearest(chunks, exclude)
        assert ids.min() >= 0 and not np.isin(first[ids], numbers).any()
        assert set(first[ids].flat) == set(range(4)) - set(numbers)


def test_a_title_of_several_documents_is_said_to_be_one(retriever, chunks):
    with pytest.warns(UserWarning, match=r"2 documents have the title 'twice', first \[2, 3\]"):
        retriever.nearest(chunks, ["twice"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        retriever.nearest(chunks, [2, retriever.documents[3]])


@pytest.mark.parametrize(
    ("unknown", "message"),
    [
        ("1862 Lincon", "no document '1862 Lincon' among 4; there are e.g. .*1862 Lincoln"),
        ("xyz", "there are e.g. .*1790 Washington"),
        (4, "no document 4 among 4"),
        (-1, "no document -1"),
        (True, "no document True"),
    ],
)
def test_unknown_documents(retriever, unknown, message):
    with pytest.raises(KeyError, match=message):
        retriever.document_ranges(unknown)


def test_a_title_alone_is_not_a_list_of_titles(retriever, chunks):
    with pytest.raises(TypeError, match=r"pass a list of documents, \['1862 Lincoln'\]"):
        retriever.nearest(chunks[:1], "1862 Lincoln")


def test_a_neighbour_says_where_it_is_from(retriever):
    for chunk in range(len(retriever.chunks)):
        neighbour = retriever.neighbour(chunk, 0.25)
        document, u = document_of(chunk)
        words = ["", *DOCUMENTS[document].text.split()]  # [CLS] has no text
        assert neighbour.text == " ".join(words[u * M : (u + 1) * M]).strip()
        assert neighbour.continuation == " ".join(words[(u + 1) * M : (u + 2) * M])
        assert (neighbour.chunk, neighbour.document, neighbour.distance) == (chunk, document, 0.25)
        assert (neighbour.title, neighbour.source) == (DOCUMENTS[document].title, DOCUMENTS[document].source)
    assert str(neighbour).startswith("[twice, d²=0.25] ")
    with pytest.raises(IndexError, match="of another corpus"):
        retriever.neighbour(len(retriever.chunks))


@pytest.mark.parametrize("length", [1, M - 1, M, M + 1, 3 * M, 3 * M + 2])
def test_passages_of_a_text(retriever, chunks, length):
    tokens = chunks.flatten()[:length]
    passages = retriever.passages(tokens, exclude=[0])
    assert [passage.text for passage in passages] == [
        decode(tokens[start : start + M], tokenizer=retriever.tokenizer) for start in range(0, length, M)
    ]
    for u, passage in enumerate(passages):
        if (u + 1) * M > length:
            assert passage.neighbours == ()
            continue
        distances, ids = retriever.nearest(chunks[u : u + 1], exclude=[0])
        assert [neighbour.chunk for neighbour in passage.neighbours] == ids[0].tolist()
        assert [neighbour.distance for neighbour in passage.neighbours] == pytest.approx(
            distances[0].tolist(), abs=1e-4
        )
        assert all(neighbour.document != 0 for neighbour in passage.neighbours)


def test_passages_leave_out_what_was_not_found(retriever, chunks):
    (passage,) = retriever.annotate(chunks[0], {0: (np.array([0.5, np.inf]), np.array([4, -1]))})
    assert [neighbour.chunk for neighbour in passage.neighbours] == [4]


@pytest.mark.parametrize("kind", ["bpe", "gpt2", "llama2"])
def test_a_store_of_another_tokenizer_is_asked_and_read_with_it(tmp_path, tiny_bert, tokenizers, kind):
    """Moved elsewhere, and not told which tokenizer: chunks find themselves, N and F are the document's text."""
    (tmp_path / "here").mkdir()
    database = build(tmp_path / "here", tiny_bert, tokenizers[kind])
    (tmp_path / "here").rename(tmp_path / "there")
    database |= {f"{name}_memmap_path": tmp_path / "there" / f"{name}.npy" for name in ("chunks", "doc_ids")}
    retriever, made = retriever_of(database), get_tokenizer(tokenizers[kind])
    rows, doc_ids = (np.load(database[f"{name}_memmap_path"]) for name in ("chunks", "doc_ids"))
    chunks = torch.from_numpy(rows[:, :-1].astype(np.int64))
    distances, ids = retriever.nearest(chunks)
    assert distances[:, 0] == pytest.approx(0, abs=1e-6)
    texts = [made.decode(row) for row in chunks]
    assert [texts[i] for i in ids[:, 0]] == texts
    read = retriever.tokens(ids)
    assert torch.equal(knn_chunks_from_seq_chunks(chunks, **database), read)
    for row, hits in zip(read.tolist(), ids.tolist(), strict=True):
        for tokens, i in zip(row, hits, strict=True):
            follows = i + 1 < len(rows) and doc_ids[i + 1] == doc_ids[i]
            assert tokens == chunks[i].tolist() + (chunks[i + 1].tolist() if follows else [made.ids.pad] * M)
    for document, about in enumerate(DOCUMENTS):
        own = np.flatnonzero(doc_ids == document)
        told = [retriever.neighbour(int(i)) for i in own]
        assert [each.continuation for each in told] == [*(each.text for each in told[1:]), ""]
        assert kind == "llama2" or "".join(each.text for each in told) == about.text  # it drops a chunk's first space


def test_without_document_ids_the_stores_own_end_tells(tmp_path, tiny_bert, tokenizers):
    """Unless it opens documents as well."""
    for kind in ("bpe", "gpt2"):
        (tmp_path / kind).mkdir()
        database = build(tmp_path / kind, tiny_bert, tokenizers[kind])
        chunks = torch.from_numpy(np.load(database["chunks_memmap_path"])[:, :-1].astype(np.int64))
        without = {**database, "doc_ids_memmap_path": None}
        if kind == "bpe":
            found = knn_chunks_from_seq_chunks(chunks, **without)
            assert torch.equal(found, knn_chunks_from_seq_chunks(chunks, **database))
        else:
            with pytest.raises(ValueError, match=r"token 2 opens documents and closes them, .*: pass doc_ids"):
                knn_chunks_from_seq_chunks(chunks, **without)


def test_the_index_was_made_by_another_bert(database, chunks):
    small = faiss.IndexFlatL2(16)
    small.add(np.zeros((3, 16), np.float32))
    with pytest.raises(ValueError, match="queries of width 32 for an index of width 16: another BERT"):
        knn_chunks_from_seq_chunks(chunks[:1], **{**database, "faiss_index": small})


FORKED = """
import os, signal, sys
from retro_nb import Store
store = Store.open(sys.argv[1], bert=sys.argv[2])
retriever, chunks = store.retriever(), store.dataset()[0][0][:-1].reshape(-1, store.settings.chunk_size)
def look(): return retriever.nearest(chunks.repeat(64, 1))[1].tolist()
found = look()
child = os.fork()
if not child:
    os._exit(0 if look() == found else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows does not fork")
def test_a_forked_process_retrieves_too(tmp_path, tiny_bert):
    documents = [Document(f"The town {number} has a tower. " * 40, f"{number}", "") for number in range(4)]
    sizes = StoreSettings(chunk_size=16, seq_len=32, bert=tiny_bert)
    Store.build(documents, tmp_path / "store", sizes, progress=False)
    command = [sys.executable, "-c", FORKED, str(tmp_path / "store"), str(tiny_bert)]
    environment, piped = os.environ | {"OMP_NUM_THREADS": "4"}, subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=piped, start_new_session=True) as process:
        try:
            assert process.communicate(timeout=60)[0].strip() == b"0"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
