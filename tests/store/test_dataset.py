"""Examples against a construction from the documents' tokens, and against retro-pytorch where it is right."""

import importlib.util
import multiprocessing
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from retro_nb.reference import documents_to_chunks_
from retro_nb.store.dataset import RETRODataset, knn_to_retrieved_chunks
from retro_nb.text.document import Document
from retro_nb.text.tokens import get_tokenizer

CLS, SEP, PAD = 101, 102, 0
per_example = settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])


def random_documents(rng, lengths) -> list[list[int]]:
    return [[CLS, *rng.integers(200, 300, length).tolist(), SEP] for length in lengths]


def rows_of_document(tokens, m, pad=PAD) -> list[list[int]]:
    """Chunks of m + 1 ids, the last one shared with the next chunk: written from the definition."""
    rows = []
    for start in range(0, max(len(tokens) - 1, 1), m):
        row = tokens[start : start + m + 1]
        rows.append(row + [pad] * (m + 1 - len(row)))
    return rows


class Corpus:
    """Arrays of a corpus on disk, and what they were made from."""

    pad = PAD

    def __init__(self, folder, lengths, m=4, l=3, k=2, seed=0, raw=False):
        rng = np.random.default_rng(seed)
        self.m, self.l, self.k = m, l, k
        self.documents = random_documents(rng, lengths)
        self.rows = [rows_of_document(tokens, m) for tokens in self.documents]
        counts = [len(rows) for rows in self.rows]
        self.chunks = np.array([row for rows in self.rows for row in rows], np.int32)
        self.doc_ids = np.repeat(np.cumsum(rng.integers(1, 4, len(counts))), counts).astype(np.int32)
        self.place = [(d, u) for d, count in enumerate(counts) for u in range(count)]  # of each chunk
        firsts = np.cumsum([0, *counts[:-1]])
        self.seqs = np.concatenate([np.arange(f, f + c, l) for f, c in zip(firsts, counts, strict=True)])
        self.knns = rng.integers(-1, len(self.chunks), (len(self.chunks), k)).astype(np.int32)
        arrays = dict(chunks=self.chunks, doc_ids=self.doc_ids, seqs=self.seqs.astype(np.int32), knns=self.knns)
        for name, array in arrays.items():
            (folder / name).write_bytes(array.tobytes()) if raw else np.save(folder / f"{name}.npy", array)
        ending = "" if raw else ".npy"
        self.arguments = dict(
            num_chunks=len(self.chunks),
            chunk_size=m,
            seq_len=m * l,
            num_sequences=len(self.seqs),
            num_neighbors=k,
            chunk_memmap_path=folder / f"chunks{ending}",
            chunk_nn_memmap_path=folder / f"knns{ending}",
            seq_memmap_path=folder / f"seqs{ending}",
        )
        self.doc_ids_path = folder / f"doc_ids{ending}"

    def dataset(self, **changes) -> RETRODataset:
        return RETRODataset(**{**self.arguments, "doc_ids_memmap_path": self.doc_ids_path, **changes})

    def chunk_tokens(self, document, number) -> list[int]:
        """The m tokens of a chunk of a document, padded; all padding where it has none."""
        tokens = self.documents[document][number * self.m : (number + 1) * self.m]
        if number >= len(self.rows[document]):
            tokens = []
        return tokens + [self.pad] * (self.m - len(tokens))

    def example(self, ind) -> tuple[list[int], list]:
        """Sequence and neighbours from the documents' tokens, one by one."""
        document, first = self.place[self.seqs[ind]]
        n = self.m * self.l
        seq = self.documents[document][first * self.m : first * self.m + n + 1]
        retrieved = []
        for u in range(first, first + self.l):
            of_chunk = []
            for j in range(self.k):
                hit = -1
                if u < len(self.rows[document]):
                    hit = self.knns[self.seqs[ind] + u - first, j]
                if hit < 0:
                    of_chunk.append([self.pad] * 2 * self.m)
                else:
                    d, v = self.place[hit]
                    of_chunk.append(self.chunk_tokens(d, v) + self.chunk_tokens(d, v + 1))
            retrieved.append(of_chunk)
        return seq + [self.pad] * (n + 1 - len(seq)), retrieved


class Store(Corpus):
    """A corpus that was chunked with another tokenizer."""

    def __init__(self, folder, texts, tokenizer, m=4, l=3, k=2):
        made = get_tokenizer(tokenizer)
        self.m, self.l, self.k, self.pad = m, l, k, made.ids.pad
        self.documents = [[made.ids.sos, *made.encode([text])[0], made.ids.eos] for text in texts]
        self.rows = [rows_of_document(tokens, m, self.pad) for tokens in self.documents]
        self.place = [(d, u) for d, rows in enumerate(self.rows) for u in range(len(rows))]
        arrays = dict(chunk="chunks.npy", seq="seqs.npy", chunk_nn="knns.npy")
        self.arguments = {f"{name}_memmap_path": folder / file for name, file in arrays.items()}
        self.doc_ids_path = folder / "doc_ids.npy"
        stats = documents_to_chunks_(
            [Document(text, "a", "a") for text in texts],
            chunks_memmap_path=folder / "chunks.npy",
            seqs_memmap_path=folder / "seqs.npy",
            doc_ids_memmap_path=self.doc_ids_path,
            chunk_size=m,
            seq_len=m * l,
            tokenizer=tokenizer,
            progress=False,
        )
        self.seqs = np.load(folder / "seqs.npy")
        self.knns = np.random.default_rng(0).integers(-1, stats["chunks"], (stats["chunks"], k)).astype(np.int32)
        np.save(folder / "knns.npy", self.knns)
        sizes = dict(num_chunks=stats["chunks"], chunk_size=m, seq_len=m * l, num_neighbors=k)
        self.arguments |= sizes | {"num_sequences": stats["seqs"]}


lengths = st.lists(st.integers(0, 30), min_size=1, max_size=4)


@per_example
@given(lengths=lengths, m=st.integers(1, 5), l=st.integers(1, 4), k=st.integers(1, 3), seed=st.integers(0, 99))
@pytest.mark.parametrize("told_by", ["document ids", "[SEP]"])
def test_every_example_is_made_of_its_documents_tokens(tmp_path, told_by, lengths, m, l, k, seed):
    """Documents of any length, those that fill their last chunk or leave [SEP] as its extra token included."""
    corpus = Corpus(tmp_path, lengths, m, l, k, seed)
    dataset = corpus.dataset() if told_by == "document ids" else RETRODataset(**corpus.arguments)
    assert len(dataset) == len(corpus.seqs)
    owners = corpus.doc_ids[corpus.seqs]
    for ind in range(len(dataset)):
        seq, retrieved = dataset[ind]
        expected_seq, expected_retrieved = corpus.example(ind)
        assert seq.tolist() == expected_seq and retrieved.tolist() == expected_retrieved
        assert seq.dtype == retrieved.dtype == torch.int64
    inds = np.random.default_rng(seed).permutation(2 * len(dataset)) - len(dataset)  # each twice, in any order
    for ind, (seq, retrieved) in zip(inds.tolist(), dataset.__getitems__(inds.tolist()), strict=True):
        assert torch.equal(seq, dataset[ind][0]) and torch.equal(retrieved, dataset[ind][1])
    if told_by == "document ids":
        assert (dataset.sequence_documents == owners).all()


@per_example
@given(lengths=lengths, m=st.integers(1, 5), seed=st.integers(0, 99))
def test_a_sequence_never_holds_a_token_after_its_documents_end(tmp_path, lengths, m, seed):
    for seq, retrieved in Corpus(tmp_path, lengths, m, seed=seed).dataset():
        for tokens in [seq, *retrieved.reshape(-1, 2 * m)]:
            ends = (tokens == SEP).nonzero()
            assert len(ends) <= 1 and (not len(ends) or not tokens[ends[0, 0] + 1 :].any())
            assert not (tokens[1:] == CLS).any()


@per_example
@given(lengths=lengths, m=st.integers(1, 5), seed=st.integers(0, 99))
def test_sep_tells_where_a_document_ends_as_its_number_does(tmp_path, lengths, m, seed):
    corpus = Corpus(tmp_path, lengths, m, seed=seed)
    told = knn_to_retrieved_chunks(corpus.knns, corpus.chunks, doc_ids=corpus.doc_ids)
    assert (knn_to_retrieved_chunks(corpus.knns, corpus.chunks) == told).all()


SPEECHES = ["the people of every state", "a", "it's 1862 and the union", "ab " * 20]


@pytest.mark.parametrize("kind", ["bpe", "gpt2", "llama3", "llama2"])
def test_a_store_says_itself_what_closes_documents_and_what_pads(tmp_path, tokenizers, kind):
    corpus = Store(tmp_path, SPEECHES, tokenizers[kind])
    dataset = corpus.dataset()
    assert (dataset.pad_id, dataset.eos_id) == (corpus.pad, corpus.documents[0][-1])
    for ind, (seq, retrieved) in enumerate(dataset):
        expected_seq, expected_retrieved = corpus.example(ind)
        assert seq.tolist() == expected_seq and retrieved.tolist() == expected_retrieved
    if kind != "gpt2":
        told = RETRODataset(**corpus.arguments)
        assert all(torch.equal(told[ind][1], dataset[ind][1]) for ind in range(len(dataset)))
        assert (told.doc_ids == dataset.doc_ids).all()


def test_one_id_that_opens_and_closes_cannot_tell_documents_apart(tmp_path, tokenizers):
    corpus = Store(tmp_path, SPEECHES, tokenizers["gpt2"])
    with pytest.raises(ValueError, match=r"token 2 opens documents and closes them, .*: pass doc_ids"):
        RETRODataset(**corpus.arguments)
    assert corpus.dataset(eos_id=7, pad_id=5).pad_id == 5


@pytest.fixture
def corpus(tmp_path):
    return Corpus(tmp_path, [20, 3, 9, 14])


def test_neighbours_without_their_continuations(corpus):
    whole, halves = corpus.dataset(), corpus.dataset(add_continuations=False)
    for (seq, retrieved), (same, half) in zip(whole, halves, strict=True):
        assert half.shape == (3, 2, 4) and (half == retrieved[..., :4]).all() and (seq == same).all()


def test_another_padding_id(corpus):
    knns = np.array([[-1, len(corpus.chunks) - 1]])
    retrieved = knn_to_retrieved_chunks(knns, corpus.chunks, pad_id=7, doc_ids=corpus.doc_ids)
    assert (retrieved[0, 0] == 7).all() and (retrieved[0, 1, 4:] == 7).all()


def test_any_shape_of_neighbours(corpus):
    flat = knn_to_retrieved_chunks(corpus.knns, corpus.chunks, doc_ids=corpus.doc_ids)
    deep = knn_to_retrieved_chunks(corpus.knns[None, :, None], corpus.chunks, doc_ids=corpus.doc_ids)
    assert (deep[0, :, 0] == flat).all()


def test_python_ways_to_index(corpus):
    dataset = corpus.dataset()
    assert (dataset[-1][0] == dataset[len(dataset) - 1][0]).all()
    assert (dataset[np.int64(1)][1] == dataset[1][1]).all()
    for outside in (len(dataset), -len(dataset) - 1):
        with pytest.raises(IndexError, match=f"sequence {outside} of {len(dataset)}"):
            dataset[outside]
        with pytest.raises(IndexError, match=f"sequence {outside} of {len(dataset)}"):
            dataset.__getitems__([0, outside])
    assert dataset.__getitems__([]) == []


def test_arrays_are_only_read(corpus, tmp_path):
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    dataset = corpus.dataset()
    for seq, retrieved in dataset:
        seq += 1  # what is handed out is the caller's
        retrieved += 1
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()} == before
    assert dataset[0][0].tolist() == corpus.example(0)[0]
    assert all(not array.flags.writeable for array in dataset._open().values())
    for path in tmp_path.iterdir():
        path.chmod(0o444)
    assert corpus.dataset()[0][0].tolist() == corpus.example(0)[0]


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
def test_dataloader_workers(corpus):
    dataset = corpus.dataset()
    dataset[0]  # open in this process already
    loader = DataLoader(dataset, batch_size=2, num_workers=2, multiprocessing_context="fork")
    seqs, retrieved = (torch.cat(parts) for parts in zip(*loader, strict=True))
    expected = [corpus.example(ind) for ind in range(len(dataset))]
    assert seqs.tolist() == [seq for seq, _ in expected] and retrieved.tolist() == [found for _, found in expected]


def test_a_dataset_is_sent_to_spawned_workers_without_its_arrays(corpus):
    dataset = corpus.dataset()
    dataset[0]
    assert dataset._arrays
    sent = pickle.loads(pickle.dumps(dataset))
    assert not sent._arrays and (sent[1][1] == dataset[1][1]).all()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"seq_len": 13}, ValueError, "seq_len 13 is not a multiple of chunk_size 4: take 12"),
        ({"chunk_size": 6}, ValueError, r"chunks\.npy has shape .*, wanted .*7\)"),
        ({"num_neighbors": 3}, ValueError, r"knns\.npy has shape .*2\), wanted .*3\)"),
        ({"num_sequences": 99}, ValueError, r"seqs\.npy has shape"),
        ({"num_chunks": 99}, ValueError, "has shape .*build it again"),
        ({"chunk_memmap_path": "gone.npy"}, FileNotFoundError, r"no array at gone\.npy"),
    ],
)
def test_arrays_that_do_not_fit(corpus, changes, error, message):
    with pytest.raises(error, match=message):
        corpus.dataset(**changes)


@pytest.mark.parametrize("outside", [-2, 10_000])
def test_ids_of_another_corpus(corpus, outside):
    knns = corpus.knns.copy()
    knns[0, 0] = outside
    np.save(corpus.arguments["chunk_nn_memmap_path"], knns)
    with pytest.raises(IndexError, match=r"neighbour ids .*of another corpus\?"):
        corpus.dataset()[0]
    np.save(corpus.arguments["seq_memmap_path"], np.full(len(corpus.seqs), outside, np.int32))
    with pytest.raises(IndexError, match=f"sequence 1 begins at chunk {outside} of .*another corpus"):
        corpus.dataset()[1]


# the reference


@pytest.fixture(scope="module")
def peer():
    if importlib.util.find_spec("retro_pytorch") is None:
        pytest.skip("retro-pytorch is not installed")
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("autofaiss") is None:
            patch.setitem(sys.modules, "autofaiss", types.SimpleNamespace(build_index=None))
        import retro_pytorch.data

        yield retro_pytorch.data


@pytest.mark.parametrize("told_by", ["document ids", "[SEP]"])
@settings(per_example, max_examples=25)
@given(lengths=lengths, m=st.integers(2, 5), l=st.integers(1, 4), k=st.integers(1, 3), seed=st.integers(0, 99))
def test_raw_memory_maps_give_the_references_examples(tmp_path, peer, told_by, lengths, m, l, k, seed):
    """Where it is right: on rows of the document itself (after its end it goes on with the next one's
    neighbours), and where [SEP] is no chunk's extra token (it would lose it, and so chunks otherwise)."""
    lengths = [length for length in lengths if (length + 1) % m] or [m]
    corpus = Corpus(tmp_path, lengths, m, l, k, seed, raw=True)
    mine = corpus.dataset() if told_by == "document ids" else RETRODataset(**corpus.arguments)
    ours = [mine[ind] for ind in range(len(mine))]
    theirs = peer.RETRODataset(**corpus.arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "memmap", with_room_at_the_end)
        for ind, (seq, retrieved) in enumerate(ours):
            document, first = corpus.place[corpus.seqs[ind]]
            own = min(l, len(corpus.rows[document]) - first)
            their_seq, their_retrieved = theirs[ind]
            assert (seq == their_seq).all()
            assert (retrieved[:own] == their_retrieved[:own]).all()


def with_room_at_the_end(path, dtype, shape, mode="r"):
    """For numpy.memmap: a copy in memory, as the reference lets the files grow that it reads."""
    array, raw = np.zeros(shape, dtype), np.fromfile(path, dtype)[: np.prod(shape)]
    array.reshape(-1)[: len(raw)] = raw
    return array


# other neighbours


def test_drawn_neighbours_are_some_of_a_chunks_own_others_each_time(tmp_path):
    corpus = Corpus(tmp_path, [30, 9, 50], k=5, seed=3)
    data = RETRODataset(**corpus.arguments)
    drawing = data.with_neighbours(corpus.knns, draw=2, seed=4)
    seen = [set() for _ in range(len(data))]
    for _ in range(40):
        for number in range(len(data)):
            (seq, near), (same, drawn) = data[number], drawing[number]
            assert torch.equal(seq, same) and drawn.shape == (corpus.l, 2, near.shape[2])
            for own, some in zip(near.tolist(), drawn.tolist(), strict=True):
                assert all(some.count(text) <= own.count(text) for text in some)
            seen[number].add(drawn[0].numpy().tobytes())
    assert max(map(len, seen)) > 5, "the draws do not change"
    again = [[data.with_neighbours(corpus.knns, draw=2, seed=4)[n][1] for n in range(2)] for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(*again, strict=True))


@pytest.mark.parametrize("draw", [0, 6])
def test_no_more_can_be_drawn_than_there_are(tmp_path, draw):
    corpus = Corpus(tmp_path, [30], k=5)
    with pytest.raises(ValueError, match=f"draw {draw} of 5 neighbours: pass 1 to 5"):
        RETRODataset(**corpus.arguments).with_neighbours(corpus.knns, draw=draw)


def test_neighbours_of_another_corpus_are_refused(tmp_path):
    corpus = Corpus(tmp_path, [30])
    with pytest.raises(ValueError, match="one row for each"):
        RETRODataset(**corpus.arguments).with_neighbours(corpus.knns[1:])
