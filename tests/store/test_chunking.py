"""Documents become chunks: held against a reference written in plain Python from the module's docstring."""

import json
import os
import re
import shutil
import signal
import sys
import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from retro_nb.common.arrays import open_array
from retro_nb.reference import documents_to_chunks_, text_folder_to_chunks_
from retro_nb.store import chunking
from retro_nb.store.chunking import (
    Tokens,
    document_tokens,
    read_documents,
    special_ids,
    store_tokenizer,
    tokens_to_chunks,
)
from retro_nb.text.document import Document
from retro_nb.text.files import text_folder
from retro_nb.text.tokens import (
    EOS_ID,
    PAD_ID,
    SOS_ID,
    SpecialIds,
    TextTokenizer,
    bert_folder,
    decode,
    get_tokenizer,
    tokenize,
)

M, N = 8, 32  # chunk and sequence length of the tests


def of_tokens(count, title="a"):
    """A document of exactly so many tokens, [CLS] and [SEP] included."""
    return Document(" ".join(["the"] * (count - 2)), title, f"{title}.txt")


def build(folder, documents, **options):
    options = {"chunk_size": M, "seq_len": N, "progress": False, **options}
    return documents_to_chunks_(documents, **paths(folder), **options)


def paths(folder):
    kinds = {"chunks_memmap_path": "chunks.npy", "seqs_memmap_path": "seqs.npy", "doc_ids_memmap_path": "docs.npy"}
    return {kind: folder / name for kind, name in kinds.items()}


def arrays(folder):
    return [np.load(folder / name) for name in ("chunks.npy", "seqs.npy", "docs.npy", "chunks.spans.npy")]


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != ".lock"}


class Corpus(list):
    """Documents that can say what they are."""

    def fingerprint(self):
        return {"texts": [document.text for document in self]}


# the plain reference


def reference_tokens(text):
    """[CLS] … [SEP] with character spans, the whole text at once."""
    tokenizer = Tokenizer.from_file(bert_folder() + "/tokenizer.json")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    encoding = tokenizer.encode(text, add_special_tokens=False)
    ids, spans = encoding.ids, [tuple(span) for span in encoding.offsets]
    if not ids:
        return [], []
    return [101, *ids, 102], [(spans[0][0],) * 2, *spans, (spans[-1][1],) * 2]


def reference_chunks(ids, spans, m):
    """A chunk begins at every m-th token, except at the last token of all if it is a chunk's next token."""
    rows, places = [], []
    for start in range(0, len(ids), m):
        if start and start == len(ids) - 1:
            break
        row = ids[start : start + m + 1]
        rows.append(row + [0] * (m + 1 - len(row)))
        own = spans[start : start + m]
        places.append((own[0][0], own[-1][1]))
    return rows, places


def reference_corpus(texts, m, n):
    chunks, seqs, docs, spans, document = [], [], [], [], 0
    for text in texts:
        rows, places = reference_chunks(*reference_tokens(text), m)
        if rows:
            seqs += range(len(chunks), len(chunks) + len(rows), n // m)
            docs += [document] * len(rows)
            chunks, spans, document = chunks + rows, spans + places, document + 1
    return chunks, seqs, docs, spans


# tokens of a document


@pytest.mark.parametrize("literal", ["[SEP]", "[PAD]", "[CLS]", "[MASK]", "[UNK]"])
def test_special_tokens_written_out_in_a_text_are_text(tmp_path, literal):
    text = f"one {literal} two {literal}{literal} three " * 20
    ids = np.concatenate([part.ids for part in document_tokens(text)])
    assert not set(ids[1:-1]) & {0, 100, 101, 102, 103} and ids.tolist() == tokenize(text)[0].tolist()
    stats = build(tmp_path, [Document(text, "a", "a")])
    assert stats["docs"] == 1 and stats["tokens"] == len(ids) and len(np.load(tmp_path / "seqs.npy")) > 1


WHITE, JOINED = " \n\t\r\x0b\x0c\x1c\x85\u2028\u3000", "\u0301\u0e33\u200d👍🏽🇫\ufffd\0\xad"
NASTY = st.text(st.sampled_from(WHITE + JOINED + "ab A.,[]#-'’…。中文字の한กขé") | st.characters(), max_size=60)

KINDS = ["bert", "cased", "bpe", "gpt2", "llama3", "llama2", "qwen", "t5", "superwords"]
OWN_WORDS = ["hyphen", "two words", "with space", "whole word"]


@settings(deadline=None, max_examples=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=NASTY, size=st.integers(1, 9), at_once=st.integers(1, 4), kind=st.sampled_from(KINDS + OWN_WORDS))
@example(text="ab\x0ccd\x85ef\x1cgh", size=2, at_once=1, kind="bert")  # white space to Python, nothing to BERT
@example(text="x" * 40 + "👍" * 40 + "中" * 40 + "ก" * 40, size=3, at_once=2, kind="bert")  # no white space
@example(text="e\u0301" * 30 + " \u0301e" * 5, size=2, at_once=3, kind="cased")
@example(text="a b ab a b", size=1, at_once=2, kind="superwords")
@example(text="a-b A-b", size=1, at_once=2, kind="hyphen")
@example(text="a b ab", size=1, at_once=2, kind="two words")
@example(text="a b ab a", size=1, at_once=2, kind="with space")
@example(text="abab中 abab", size=1, at_once=2, kind="whole word")
def test_tokens_in_pieces_are_the_tokens_at_once(all_tokenizers, text, size, at_once, kind):
    tokenizer = get_tokenizer(all_tokenizers[kind])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunking, "PIECE_CHARACTERS", size)
        patch.setattr(chunking, "PIECES_AT_ONCE", at_once)
        parts = list(document_tokens(text, tokenizer=tokenizer))
    whole = tokenizer.backend.encode(text.encode("utf-8", "replace").decode(), add_special_tokens=False)
    if not whole.ids:
        assert not parts
        return
    assert np.concatenate([part.ids for part in parts]).tolist() == [tokenizer.ids.sos, *whole.ids, tokenizer.ids.eos]
    spans = [(whole.offsets[0][0],) * 2, *whole.offsets, (whole.offsets[-1][1],) * 2]
    assert np.concatenate([part.spans for part in parts]).tolist() == [list(span) for span in spans]


@pytest.fixture(scope="session")
def all_tokenizers(tokenizers, tmp_path_factory):
    """The fixture's, BERT's, and more that split words in other ways or have words of their own.

    cased        the default BERT's vocabulary with the rules of bert-base-cased: no lower case, accents kept
    qwen         byte-level and normalised, with a space before the text, and a word "<A>" of its own
    t5           SentencePiece's "▁" before each word
    superwords   byte-level, where spaces do not split: "a b" may be one token
    """
    folder = tmp_path_factory.mktemp("cased")
    shutil.copy(f"{bert_folder()}/tokenizer.json", folder)
    about = json.loads(Path(bert_folder(), "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps(about | {"do_lower_case": False}))
    bytes_ = get_tokenizer(tokenizers["bpe"])
    splits = {
        "qwen": pre_tokenizers.ByteLevel(add_prefix_space=True),
        "t5": pre_tokenizers.Metaspace(),
        "superwords": pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
    }
    made = {"bert": None, "cased": folder, **tokenizers}
    for name, split in splits.items():
        backend = Tokenizer(models.BPE(unk_token="?", fuse_unk=True))
        backend.pre_tokenizer = split
        if name == "qwen":
            backend.normalizer = normalizers.NFC()
            backend.add_tokens(["<A>"])
        alphabet = [] if name == "t5" else pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(special_tokens=["?"], initial_alphabet=alphabet, show_progress=False)
        backend.train_from_iterator(["a b ab a b ab a b 中 ab"] * 3, trainer)
        made[name] = TextTokenizer(backend, SpecialIds(500, 501, 502))
    own = {
        "hyphen": (get_tokenizer(), "a-b"),
        "two words": (bytes_, "a b"),
        "with space": (bytes_, AddedToken("b", rstrip=True)),
        "whole word": (get_tokenizer(), AddedToken("abab", single_word=True)),
    }
    for name, (base, word) in own.items():
        backend = Tokenizer.from_str(base.backend.to_str())
        backend.add_tokens([word])
        made[name] = TextTokenizer(backend, base.ids)
    return made


def test_long_documents_are_read_in_pieces(all_tokenizers):
    """All those are that split at spaces; words of its own that reach over a space forbid it to a tokenizer."""
    pieces = {kind: chunking._boundary(get_tokenizer(tokenizer)) for kind, tokenizer in all_tokenizers.items()}
    assert {kind for kind, boundary in pieces.items() if boundary is None} == {"llama2", "superwords", *OWN_WORDS}


@pytest.mark.parametrize(("kind", "pieces"), [("bert", 9), ("bpe", 9), ("llama2", 1)])
def test_pieces_are_as_long_as_meant_and_lose_nothing(all_tokenizers, kind, pieces):
    text, boundary = "antediluvian people, old " * 17_000, chunking._boundary(get_tokenizer(all_tokenizers[kind]))
    made = list(chunking._pieces(text, boundary))
    assert "".join(piece for _, piece in made) == text and len(made) == pieces
    assert [offset for offset, _ in made] == np.cumsum([0, *(len(piece) for _, piece in made[:-1])]).tolist()
    assert pieces == 1 or max(len(piece) for _, piece in made) < chunking.PIECE_CHARACTERS + 30


def test_half_a_character_is_read_as_a_question_mark(tmp_path):
    build(tmp_path, [Document("one \ud800 two", os.fsdecode(b"caf\xe9"), "a")])
    assert np.load(tmp_path / "chunks.npy")[0, :5].tolist() == tokenize("one ? two")[0].tolist()
    assert read_documents(tmp_path / "chunks.npy")[0]["title"] == os.fsdecode(b"caf\xe9")


# chunks


@settings(deadline=None, max_examples=200)
@given(length=st.integers(0, 40), m=st.integers(1, 9), cuts=st.lists(st.integers(0, 40), max_size=6))
def test_chunks_are_the_references_however_the_tokens_arrive(length, m, cuts):
    ids = list(range(1000, 1000 + length))
    spans = [(10 * i, 10 * i + 7) for i in range(length)]
    bounds = [0, *sorted(min(cut, length) for cut in cuts), length]
    stretches = [
        Tokens(np.array(ids[a:b], np.int32), np.array(spans[a:b], np.int64).reshape(-1, 2)) for a, b in pairwise(bounds)
    ]
    chunks = [chunk for chunk in tokens_to_chunks(stretches, m) if len(chunk.rows)]
    rows, places = reference_chunks(ids, spans, m)
    assert [row for chunk in chunks for row in chunk.rows.tolist()] == rows
    assert [tuple(span) for chunk in chunks for span in chunk.spans.tolist()] == places


@pytest.mark.parametrize(
    ("tokens", "chunks"),
    [(3, 1), (M - 1, 1), (M, 1), (M + 1, 1), (M + 2, 2), (2 * M, 2), (2 * M + 1, 2), (2 * M + 2, 3)],
)
def test_documents_of_critical_lengths(tmp_path, tokens, chunks):
    """⌈(L − 1) / m⌉ chunks; between them every token is a chunk's own or, the last one, a chunk's next."""
    stats = build(tmp_path, [of_tokens(tokens)])
    assert (stats["chunks"], stats["tokens"], stats["seqs"]) == (chunks, tokens, 1)
    rows = np.load(tmp_path / "chunks.npy")
    the = get_tokenizer().backend.token_to_id("the")
    told = [token for row in rows.tolist() for token in row[:-1]] + [rows[-1, -1]]
    assert [token for token in told if token] == [101, *[the] * (tokens - 2), 102]


def test_a_corpus_is_the_references(tmp_path, sample_corpus):
    texts = [d.text for d in sample_corpus] + ["", " \n\t", "Straße\u0301 中文 👍 " * 30, "x"]
    documents = [Document(text, f"title {i}", f"{i}.txt", ((0, 1),)) for i, text in enumerate(texts)]
    stats = build(tmp_path, documents)
    chunks, seqs, docs, spans = reference_corpus(texts, M, N)
    for array, expected in zip(arrays(tmp_path), (chunks, seqs, docs, spans), strict=True):
        assert array.tolist() == [list(x) if isinstance(x, tuple) else x for x in expected]
    assert [array.dtype for array in arrays(tmp_path)] == [np.uint16, np.int32, np.int32, np.int64]
    assert stats == {
        "chunks": len(chunks),
        "docs": 7,
        "seqs": len(seqs),
        "tokens": sum(len(reference_tokens(text)[0]) for text in texts),
        "vocabulary": 30522,
        "special_ids": {"pad": 0, "sos": 101, "eos": 102},
        "empty_docs": 2,
        "replaced_characters": 0,
        "complete": True,
    }
    about = read_documents(tmp_path / "chunks.npy")
    assert [d["title"] for d in about] == [f"title {i}" for i in (0, 1, 2, 3, 4, 7, 8)]
    assert [d["chunks"] for d in about] == [[docs.index(i), docs.index(i) + docs.count(i)] for i in range(7)]
    assert [d["characters"] for d in about] == [len(text) for text in texts if text.strip()]
    assert about[0]["facts"] == [[0, 1]] and about[0]["source"] == "0.txt"


def test_the_extra_token_is_the_next_chunks_first_and_never_another_documents(tmp_path, sample_corpus):
    build(tmp_path, sample_corpus)
    chunks, _, docs, _ = arrays(tmp_path)
    same = docs[1:] == docs[:-1]
    assert (chunks[:-1][same, -1] == chunks[1:][same, 0]).all() and same.any()
    ends = np.append(~same, True)
    assert np.isin(chunks[ends, -1], [PAD_ID, EOS_ID]).all()
    assert (chunks[np.insert(~same, 0, True), 0] == SOS_ID).all()
    assert ((chunks[:, :-1] == SOS_ID).sum(), (chunks == EOS_ID).sum()) == (len(sample_corpus), len(sample_corpus))


def test_sequences_start_every_l_chunks_of_each_document(tmp_path, sample_corpus):
    stats = build(tmp_path, sample_corpus)
    _, seqs, docs, _ = arrays(tmp_path)
    for document in range(stats["docs"]):
        own = np.flatnonzero(docs == document)
        assert seqs[np.isin(seqs, own)].tolist() == own[:: N // M].tolist()


def test_spans_are_the_characters_that_the_tokens_came_from(tmp_path, sample_corpus):
    build(tmp_path, sample_corpus)
    chunks, _, docs, spans = arrays(tmp_path)
    for row, document, (start, end) in zip(chunks, docs, spans, strict=True):
        pieces = [get_tokenizer().token(token).removeprefix("##") for token in row[:-1].tolist() if token > 102]
        assert "".join(pieces) == sample_corpus[document].text[start:end].lower().replace(" ", "")


def test_identical_documents_give_identical_chunks(tmp_path):
    build(tmp_path, [of_tokens(20, "a"), of_tokens(20, "b")])
    chunks, seqs, docs, spans = arrays(tmp_path)
    assert np.array_equal(chunks[:3], chunks[3:]) and np.array_equal(spans[:3], spans[3:])
    assert docs.tolist() == [0, 0, 0, 1, 1, 1] and seqs.tolist() == [0, 3]
    assert [d["title"] for d in read_documents(tmp_path / "chunks.npy")] == ["a", "b"]


def test_one_sequence_may_be_one_chunk(tmp_path):
    assert build(tmp_path, [of_tokens(30)], seq_len=M)["seqs"] == 4
    assert np.load(tmp_path / "seqs.npy").tolist() == [0, 1, 2, 3]


# any tokenizer

BYTE_LEVEL = ["bpe", "gpt2", "llama3"]
EVERY = ["bert", "cased", *BYTE_LEVEL, "llama2", "t5"]


@pytest.mark.slow
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(NASTY, max_size=3), kind=st.sampled_from(BYTE_LEVEL), m=st.integers(1, 9))
@pytest.mark.filterwarnings("ignore:building", "ignore:documents without a token")
def test_a_byte_level_store_gives_every_document_back(tmp_path, tokenizers, texts, kind, m):
    texts = [text.encode("utf-8", "replace").decode() for text in ["a", *texts]]
    documents, ids = [Document(text, "a", "a") for text in texts], get_tokenizer(tokenizers[kind]).ids
    build(tmp_path, documents, chunk_size=m, seq_len=3 * m, tokenizer=tokenizers[kind])
    chunks, _, docs, _ = arrays(tmp_path)
    for number, text in enumerate(filter(None, texts)):
        rows = chunks[docs == number]
        tokens = [*rows[:, :-1].flatten().tolist(), int(rows[-1, -1])]
        end = tokens.index(ids.eos, 1)
        assert tokens[0] == ids.sos and set(tokens[end + 1 :]) <= {ids.pad} and ids.pad not in tokens[:end]
        assert decode(tokens, tokenizer=tokenizers[kind]) == text
        assert sum(np.load(tmp_path / "chunks.bytes.npy")[docs == number]) == len(text.encode())


@pytest.mark.parametrize("kind", EVERY)
def test_bytes_of_chunks_add_up_to_the_texts(tmp_path, all_tokenizers, sample_corpus, kind):
    texts = ["  naïve 中文 👍🏽 e\u0301 " * 9, "a\n\n b", *(document.text for document in sample_corpus)]
    build(tmp_path, [Document(text, "a", "a") for text in texts], tokenizer=all_tokenizers[kind])
    sizes, (chunks, _, docs, spans) = np.load(tmp_path / "chunks.bytes.npy"), arrays(tmp_path)
    assert len(sizes) == len(chunks) and (sizes >= 0).all()
    for number, text in enumerate(texts):
        own = docs == number
        edges = [0, *spans[own][1:, 0], len(text)]
        assert sizes[own].tolist() == [len(text[start:stop].encode()) for start, stop in pairwise(edges)]
        assert sizes[own].sum() == len(text.encode())


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_store_knows_its_tokenizer_wherever_it_lies(tmp_path, tokenizers, sample_corpus, kind):
    made = get_tokenizer(tokenizers.get(kind))
    stats = build(tmp_path / "here", sample_corpus, tokenizer=made)
    (tmp_path / "here").rename(tmp_path / "there")
    chunks = tmp_path / "there" / "chunks.npy"
    again = store_tokenizer(chunks)
    assert again is not made and again.fingerprint == made.fingerprint and again.ids == special_ids(chunks) == made.ids
    assert again.encode(["a [SEP] <|end|>"]) == made.encode(["a [SEP] <|end|>"])
    assert (stats["vocabulary"], stats["special_ids"]) == (made.size, made.ids._asdict())
    assert store_tokenizer(chunks) is again, "read once"


def test_an_array_without_a_tokenizer_is_berts(tmp_path, tokenizers):
    """As the reference writes them."""
    np.save(tmp_path / "chunks.npy", np.zeros((1, M + 1), np.int32))
    assert special_ids(tmp_path / "chunks.npy") == (0, 101, 102)
    assert store_tokenizer(tmp_path / "chunks.npy") is get_tokenizer()
    other = get_tokenizer(tokenizers["gpt2"])
    assert store_tokenizer(tmp_path / "chunks.npy", tokenizers["gpt2"]) is other


def test_special_ids_are_not_guessed(tmp_path, tokenizers, sample_corpus):
    build(tmp_path, sample_corpus, tokenizer=tokenizers["gpt2"])
    (tmp_path / "manifest.json").unlink()
    for ask in (special_ids, store_tokenizer):
        with pytest.raises(ValueError, match=r"manifest\.json does not say which ids in chunks\.npy are special"):
            ask(tmp_path / "chunks.npy")


def test_another_tokenizer_chunks_again_and_a_damaged_one_is_written_again(tmp_path, tokenizers, sample_corpus):
    build(tmp_path / "work", Corpus(sample_corpus), tokenizer=tokenizers["bpe"])
    with pytest.warns(UserWarning, match=r"building chunks\.npy again: tokenizer was \w+ and is"):
        build(tmp_path / "work", Corpus(sample_corpus), tokenizer=tokenizers["gpt2"])  # the same rules, other ids
    build(tmp_path / "fresh", Corpus(sample_corpus), tokenizer=tokenizers["gpt2"])
    assert contents(tmp_path / "work") == contents(tmp_path / "fresh")
    (tmp_path / "work" / "chunks.tokenizer.json").write_text("{}")
    with pytest.warns(UserWarning, match=r"again: chunks\.tokenizer\.json is truncated or corrupt"):
        build(tmp_path / "work", Corpus(sample_corpus), tokenizer=tokenizers["gpt2"])
    assert contents(tmp_path / "work") == contents(tmp_path / "fresh")


def test_ids_beyond_two_bytes_are_stored_whole(tmp_path):
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(2**16 + 5)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    large = TextTokenizer(backend, SpecialIds(2**16 + 4, 1, 2))
    stats = build(tmp_path, [Document("w65535 w65536 w65539 w3", "a", "a")], tokenizer=large)
    rows = np.load(tmp_path / "chunks.npy")
    assert rows.dtype == np.int32 and rows.tolist() == [[1, 65535, 65536, 65539, 3, 2, *[65540] * (M - 5)]]
    assert stats["tokens"] == 6 and stats["vocabulary"] == 2**16 + 5
    assert decode(rows[0], tokenizer=store_tokenizer(tmp_path / "chunks.npy")) == "w65535 w65536 w65539 w3"


# bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_size": 10, "seq_len": 32}, "seq_len 32 is not a multiple of chunk_size 10: take 30"),
        ({"chunk_size": 64, "seq_len": 32}, "seq_len 32 is not a multiple of chunk_size 64: take 64"),
        ({"seq_len": 0}, "seq_len 0 is not a multiple"),
        ({"chunk_size": 0}, "chunk_size 0 must be 1 or more"),
        ({"max_chunks": 0}, "max_chunks 0 leaves nothing"),
        ({"max_seqs": -1}, "max_seqs -1 leaves nothing"),
        ({"max_chunks": 2}, "max_chunks 2, max_seqs None: the first document, 'a', has more; raise the limit"),
    ],
)
def test_sizes_that_cannot_be_are_met_at_the_door(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "new", [of_tokens(30)], **options)
    assert not list(tmp_path.rglob("*.npy")) and not list(tmp_path.rglob("*.tmp"))


def test_more_chunks_than_a_store_can_number_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(chunking, "MOST_CHUNKS", 5)
    build(tmp_path / "full", [of_tokens(3 * M + 1, "a"), of_tokens(2 * M + 1, "b")])
    with pytest.raises(ValueError, match="32 bits, up to 5: 'c' has no room; pass max_chunks=5"):
        build(tmp_path / "new", [of_tokens(3 * M + 1, "a"), of_tokens(2 * M + 1, "b"), of_tokens(3, "c")])
    assert not list((tmp_path / "new").glob("*.npy*"))


@pytest.mark.parametrize("texts", [[], [""], ["", " \n ", "\0\ufffd"]])
def test_no_text_at_all_is_an_error(tmp_path, texts):
    with pytest.raises(ValueError, match=f"no text to chunk in list: {len(texts)} documents, none with a token"):
        build(tmp_path, [Document(text, "a", "a") for text in texts])
    assert not list(tmp_path.glob("*.npy"))


def test_a_folder_without_text_and_its_first_file_are_named(tmp_path):
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text("\n", encoding="utf-8")
    message = f"no text to chunk in {re.escape(str(tmp_path))}: 2 documents, none with a token, first a.txt"
    with pytest.raises(ValueError, match=message):
        text_folder_to_chunks_(folder=tmp_path, **paths(tmp_path / "work"), chunk_size=M, seq_len=N, progress=False)


def test_a_folder_of_odd_files(tmp_path):
    texts = tmp_path / "texts with space ü"
    texts.mkdir()
    with pytest.raises(FileNotFoundError, match=r"no file in .* matches"):
        text_folder_to_chunks_(folder=texts, **paths(tmp_path / "work"), chunk_size=M, seq_len=N)
    for name, data in {
        "0 empty.txt": b"",
        "1 white.txt": b" \n\t ",
        "2 latin.txt": "Zürich café".encode("latin-1"),
        "3 mixed.txt": "Zürich".encode() + b" caf\xe9",
        "4 bom.txt": b"\xef\xbb\xbfZurich",
        "5 utf-8.txt": "Zürich café".encode(),
    }.items():
        (texts / name).write_bytes(data)
    work = tmp_path / "work [a] ü"
    with pytest.warns(UserWarning) as warned:
        stats = documents_to_chunks_(text_folder(texts), **paths(work), chunk_size=M, seq_len=N, progress=False)
    said = [str(warning.message) for warning in warned]
    assert said[0] == "documents without a token, left out: 2, first 0 empty.txt"
    assert said[1].startswith("3 undecodable bytes became U+FFFD in 2 documents, first in 2 latin.txt: ")
    assert len(said) == 2 and chunking.__file__ not in {warning.filename for warning in warned}, "the caller's line"
    assert (stats["docs"], stats["empty_docs"], stats["replaced_characters"]) == (4, 2, 3)
    rows = [row[row != 0].tolist() for row in np.load(work / "chunks.npy")]
    plain = tokenize("zurich cafe")[0].tolist()
    assert rows[3] == plain and rows[2] == tokenize("zurich")[0].tolist()
    assert decode(rows[1]) == "zurich caf" and decode(rows[0]) == "zrich caf"  # BERT drops U+FFFD
    assert [d["source"] for d in read_documents(work / "chunks.npy")] == sorted(os.listdir(texts))[2:]


@pytest.mark.parametrize(
    ("limits", "kept"),
    [
        ({"max_chunks": 9}, 2),
        ({"max_chunks": 8}, 1),
        ({"max_seqs": 3}, 2),
        ({"max_seqs": 2}, 1),
        ({"max_chunks": 4}, 1),
    ],
)
def test_a_maximum_keeps_whole_documents_and_says_so(tmp_path, limits, kept):
    documents = [of_tokens(4 * M, "a"), of_tokens(5 * M, "b"), of_tokens(6 * M, "c")]
    with pytest.warns(UserWarning, match=f"stopped before '{'abc'[kept]}', which does not fit; {kept} documents with"):
        stats = build(tmp_path / "cut", documents, **limits)
    whole = build(tmp_path / "whole", documents[:kept])
    assert stats == {**whole, "complete": False}
    for some, expected in zip(arrays(tmp_path / "cut"), arrays(tmp_path / "whole"), strict=True):
        assert np.array_equal(some, expected)


def test_a_maximum_that_is_just_reached_is_complete(tmp_path, recwarn):
    documents = [of_tokens(4 * M, "a"), of_tokens(5 * M, "b"), Document("", "c", "c")]
    stats = build(tmp_path, documents, max_chunks=9, max_seqs=3)
    assert stats["complete"] and stats["docs"] == 2
    assert [str(warning.message) for warning in recwarn] == ["documents without a token, left out: 1, first c"]


def test_a_long_document_is_cut_off_at_a_maximum_without_being_stored(tmp_path, monkeypatch):
    monkeypatch.setattr(chunking, "PIECE_CHARACTERS", 100)
    monkeypatch.setattr(chunking, "PIECES_AT_ONCE", 1)  # many stretches: some rows are written, then taken back
    with pytest.warns(UserWarning, match="stopped before 'b'"):
        stats = build(tmp_path, [of_tokens(3 * M, "a"), of_tokens(1000, "b")], max_chunks=50)
    assert stats["chunks"] == 3 and [len(array) for array in arrays(tmp_path)] == [3, 1, 3, 3]


# what is kept


def test_a_corpus_is_chunked_once_until_it_changes(tmp_path, sample_corpus, recwarn):
    first = build(tmp_path, Corpus(sample_corpus))
    before = contents(tmp_path)
    assert build(tmp_path, Corpus(sample_corpus)) == first and contents(tmp_path) == before and not recwarn.list
    with pytest.warns(UserWarning, match="building chunks.npy again: corpus was .* and is"):
        assert build(tmp_path, Corpus(sample_corpus[1:]))["docs"] == 4


@pytest.mark.parametrize(
    "options",
    [{"chunk_size": 16}, {"seq_len": 64}, {"max_chunks": 1000}, {"max_seqs": 1000}],
    ids=lambda o: next(iter(o)),
)
def test_another_setting_chunks_again_and_is_named(tmp_path, sample_corpus, options):
    build(tmp_path, Corpus(sample_corpus))
    with pytest.warns(UserWarning, match=f"building chunks.npy again: {next(iter(options))} was .* and is"):
        build(tmp_path, Corpus(sample_corpus), **options)
    build(tmp_path / "fresh", Corpus(sample_corpus), **options)
    assert (
        contents(tmp_path / "fresh").items()
        <= {name: data for name, data in contents_of_files(tmp_path).items()}.items()
    )


def contents_of_files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def test_documents_that_cannot_say_what_they_are_are_chunked_each_time(tmp_path):
    build(tmp_path, [of_tokens(20)])
    with pytest.warns(UserWarning, match="building chunks.npy again"):
        assert build(tmp_path, (document for document in [of_tokens(30)]))["tokens"] == 30


def test_another_path_for_the_sequences_is_honoured(tmp_path, sample_corpus):
    build(tmp_path, Corpus(sample_corpus))
    (tmp_path / "seqs.npy").rename(tmp_path / "old.npy")
    elsewhere = {**paths(tmp_path), "seqs_memmap_path": tmp_path / "deep" / "seqs.npy"}
    with pytest.warns(UserWarning, match="no record of"):
        documents_to_chunks_(Corpus(sample_corpus), **elsewhere, chunk_size=M, seq_len=N, progress=False)
    assert (tmp_path / "deep" / "seqs.npy").read_bytes() == (tmp_path / "old.npy").read_bytes()


def test_relative_paths_belong_to_the_working_directory(tmp_path, monkeypatch, sample_corpus):
    monkeypatch.chdir(tmp_path)
    stats = build(type(tmp_path)(), Corpus(sample_corpus))
    assert build(tmp_path, Corpus(sample_corpus)) == stats
    assert open_array("chunks.npy", shape=(stats["chunks"], M + 1)).shape == (stats["chunks"], M + 1)


def test_provenance_that_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"chunks\.documents\.jsonl is missing"):
        read_documents(tmp_path / "chunks.npy")


def chunk_on_full_disk(folder, documents, limit):
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with pytest.raises(OSError, match=rf"could not write {re.escape(str(folder))}/\S+: File too large"):
        build(folder, Corpus(documents), chunk_size=4)


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process are POSIX")
@pytest.mark.filterwarnings("ignore:building")
@pytest.mark.parametrize("limit", [0, 200, 400, 700, 2000, 4000])  # other files come to their end first
def test_a_full_disk_leaves_the_whole_set_as_it_was(tmp_path, sample_corpus, run_apart, limit, recwarn):
    first = build(tmp_path, Corpus(sample_corpus))
    before = contents(tmp_path)
    assert run_apart(chunk_on_full_disk, tmp_path, sample_corpus, limit) == [0]
    assert contents(tmp_path) == before
    assert build(tmp_path, Corpus(sample_corpus)) == first and not recwarn.list


def test_text_that_the_tokenizer_does_not_know_is_not_lost_silently(tmp_path):
    paths = {f"{name}_memmap_path": tmp_path / f"{name}.npy" for name in ("chunks", "seqs", "doc_ids")}
    unread = Document("\u0e2b\u0e2d\u0e04\u0e2d\u0e22 \u0e41\u0e21\u0e48\u0e19\u0e49\u0e33 " * 40, "tower", "tower.txt")
    plain = Document("The tower stands by the river. " * 40, "plain", "plain.txt")
    with pytest.warns(UserWarning, match=r"of \d+ tokens \(\d+%\) are unknown .* most of them in tower.txt") as told:
        made = documents_to_chunks_([plain, unread], **paths, chunk_size=16, seq_len=32, progress=False)
    unknown, tokens = map(int, re.search(r"(\d+) of (\d+) tokens", str(told[0].message)).groups())
    assert unknown == np.count_nonzero(np.load(tmp_path / "chunks.npy")[:, :-1] == 100) and tokens == made["tokens"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paths = {name: tmp_path / "plain" / path.name for name, path in paths.items()}
        documents_to_chunks_([plain], **paths, chunk_size=16, seq_len=32, progress=False)


@pytest.mark.parametrize("words, warned", [(2, True), (0, False)])
def test_unknown_tokens_are_counted_and_warned_of(tmp_path, words, warned):
    thai, english = "ห้องสมุด " * words, "a house by the sea " * 8
    documents = [Document(english, "english", "english.txt"), Document(thai + english, "thai", "thai.txt")]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        build(tmp_path, documents)
    messages = [str(each.message) for each in caught if "unknown" in str(each.message)]
    assert len(messages) == warned
    if warned:
        tokens = 2 * (8 * 5) + words + 2 * 2  # and [CLS] and [SEP] of each
        assert f"{words} of {tokens} tokens" in messages[0] and "thai.txt" in messages[0] and "=8000" in messages[0]
