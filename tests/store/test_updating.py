"""An updated store is the one that building its corpus from nothing gives; and a stop, anywhere, costs nothing."""

import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_nb.common import manifest
from retro_nb.common.arrays import ResumableRows, file_record, open_array, write_json
from retro_nb.common.launch import launched
from retro_nb.common.manifest import array_key, intact, read_manifest, replace_store
from retro_nb.model.retro import RETRO
from retro_nb.reference import chunks_to_precalculated_knn_, documents_to_chunks_
from retro_nb.store import embedding, knn, updating
from retro_nb.store import index as index_module
from retro_nb.store.chunking import read_documents
from retro_nb.store.embedding import Sizes
from retro_nb.store.index import innermost, merge_on_disk, read_index
from retro_nb.store.index_edits import list_entries
from retro_nb.store.knn import choose_spec, neighbours
from retro_nb.store.updating import Update, _kept, update_store
from retro_nb.text.document import Document
from retro_nb.text.files import text_folder
from retro_nb.text.tokens import bert_folder, get_tokenizer
from retro_nb.training.wrapper import TrainingWrapper

faiss.omp_set_num_threads(1)

M, N, K, WIDTH = 4, 8, 2, 32
ARRAYS = ("chunks.npy", "chunks.embedded.npy", "knn.index", "chunks.knn.npy")
WORDS = "law peace war trade union state".split()
TABLE = torch.from_numpy(np.random.default_rng(0).integers(-2, 3, (101, WIDTH)))
VECTORS = embedding._vectors


def sums_of_words(model, ids, mask, cls, eps=0):
    """A vector of small whole numbers for each row, whose distances float32 has exactly: ties abound, and are ties."""
    sums = (TABLE[ids % len(TABLE)] * (ids != 0)[..., None]).sum(dim=1)
    return (sums + 3 * TABLE[ids[:, 1] % len(TABLE)] if cls else sums).float()


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    """A folder with a random BERT of width 32 that knows a few words: its tokenizer is read in no time."""
    from transformers import BertConfig, BertModel

    folder, source = tmp_path_factory.mktemp("bert"), Path(bert_folder())
    rules = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    words = [*list(rules["model"]["vocab"])[:104], *WORDS, "navy"]  # the special ones come first
    rules["model"]["vocab"] = {word: number for number, word in enumerate(words)}
    (folder / "tokenizer.json").write_text(json.dumps(rules), encoding="utf-8")
    shutil.copy(source / "tokenizer_config.json", folder)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True, scope="module")
def quick():
    """A pass is fast, and what is in it changes no vector."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedding, "ON_CPU", Sizes(5, 16, ahead=0))
        patch.setattr(embedding, "_vectors", sums_of_words)
        yield


@pytest.fixture
def embedded(monkeypatch) -> list[int]:
    """How many chunks each pass embeds."""
    passes = []

    def counted(model, ids, *args):
        passes.append(len(ids))
        return sums_of_words(model, ids, *args)

    monkeypatch.setattr(embedding, "_vectors", counted)
    return passes


def text(seed: int, words: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, words))


class Corpus(list):
    """Documents that can say what they are, by tuples as well."""

    def __init__(self, *texts):
        super().__init__(Document(text, f"title {i}", f"{i}.txt") for i, text in enumerate(texts))

    def fingerprint(self):
        return {"texts": tuple((each.title, each.text) for each in self)}


def build(documents, work, bert, *, tokenizer=None, max_chunks=None, max_seqs=None, k=K, **options) -> None:
    """What TrainingWrapper does: every step, unless what it makes is there."""
    stats = documents_to_chunks_(
        documents,
        chunks_memmap_path=work / "chunks.npy",
        seqs_memmap_path=work / "seqs.npy",
        doc_ids_memmap_path=work / "doc_ids.npy",
        chunk_size=M,
        seq_len=N,
        max_chunks=max_chunks,
        max_seqs=max_seqs,
        tokenizer=tokenizer or bert,
        progress=False,
    )
    chunks_to_precalculated_knn_(
        num_nearest_neighbors=k,
        num_chunks=stats["chunks"],
        chunk_size=M,
        chunk_memmap_path=work / "chunks.npy",
        doc_ids_memmap_path=work / "doc_ids.npy",
        bert=bert,
        progress=False,
        **options,
    )


def update(documents, work, bert, **options) -> Update:
    return update_store(documents, work, bert=bert, device="cpu", progress=False, **options)


def recorded(work) -> dict:
    """All that a store is, but the seconds it took: its files are as the manifest says, and there are no others."""
    arrays = read_manifest(work)
    files = [name for record in arrays.values() for name in record["files"]]
    beside = {"manifest.json", ".lock", ".update.lock", "chunks.kept_out.json"}
    assert sorted(files) == sorted({path.name for path in work.iterdir()} - beside)
    for name, record in arrays.items():
        assert intact(work / name), name
        record["stats"].pop("seconds", None)
    return arrays


def same_as_a_rebuild(work, documents, bert, **options) -> None:
    """Byte for byte; and the next build finds nothing to do."""
    fresh = work.with_name(work.name + " rebuilt")
    build(documents, fresh, bert, **options)
    arrays = recorded(work)
    assert set(arrays) == set(ARRAYS)
    assert arrays == recorded(fresh)
    before = times(work)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="building")
        build(documents, work, bert, **options)
    assert times(work) == before
    shutil.rmtree(fresh)


def times(work) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file() and path.suffix != ".lock"}


TEXTS = [text(seed, words) for seed, words in enumerate((9, 17, 3, 12, 30, 1))]


@pytest.fixture(scope="module")
def base(tmp_path_factory, bert, quick):
    """A store of six documents."""
    work = tmp_path_factory.mktemp("base") / "work"
    build(Corpus(*TEXTS), work, bert)
    return work


@pytest.fixture
def work(base, tmp_path):
    """A copy of it to play with."""
    return Path(shutil.copytree(base, tmp_path / "work"))


# equal to a rebuild

POOL = st.sampled_from([*TEXTS, "", "law law law law law law law law", text(9, 40)])
NAMES = st.sampled_from("abcdefg")
EDITS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), NAMES, POOL),  # a new file or another text; of a file that was there, or in two
        st.tuples(st.just("remove"), NAMES, st.none()),
        st.tuples(st.just("rename"), NAMES, NAMES),
    ),
    min_size=1,
    max_size=4,
)


def edited(files: dict[str, str], edits) -> dict[str, str]:
    files = dict(files)
    for kind, name, what in edits:
        if kind == "write":
            files[name] = what
        elif kind == "remove":
            files.pop(name, None)
        elif name in files:
            files[what] = files.pop(name)
    return files


def write_files(folder: Path, files: dict[str, str]):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        (folder / f"{name}.txt").write_text(content)
        os.utime(folder / f"{name}.txt", ns=(0, int(hashlib.md5(content.encode()).hexdigest()[:10], 16)))
    return text_folder(folder)


@pytest.mark.filterwarnings("ignore:documents without a token")
@settings(deadline=None, max_examples=10)
@given(
    files=st.dictionaries(NAMES, POOL, min_size=2),
    rounds=st.lists(EDITS, min_size=1, max_size=3),
    k=st.sampled_from([1, 2, 30]),
    max_similarity=st.sampled_from([None, 0.9]),
)
def test_any_edits_of_a_folder(tmp_path_factory, bert, files, rounds, k, max_similarity):
    root, options = tmp_path_factory.mktemp("edits"), {"k": k, "max_similarity": max_similarity}
    files["z"] = TEXTS[0]
    build(write_files(root / "texts", files), root / "work", bert, **options)
    for edits in rounds:
        before, files = files, edited(files, edits)
        documents = write_files(root / "texts", files)
        done = update(documents, root / "work", bert)
        now = {Path(about["source"]).stem: about["chunks"] for about in read_documents(root / "work" / "chunks.npy")}
        new = [chunks for name, chunks in now.items() if files[name] not in before.values()]
        assert done.embedded == sum(stop - first for first, stop in new)
        texts = [[files[name] for name in sorted(files) if files[name]] for files in (before, files)]
        assert done.kept + done.removed == len(texts[0]) and done.kept + done.added == len(texts[1])
        same_as_a_rebuild(root / "work", documents, bert, **options)
    shutil.rmtree(root)


CHANGED = Corpus(TEXTS[1], text(7, 25), *TEXTS[:1], TEXTS[4], text(8, 5), TEXTS[4])


@pytest.mark.filterwarnings("ignore:max_chunks:UserWarning", "ignore:max_seqs:UserWarning")
@pytest.mark.parametrize(
    "options",
    [
        {"use_cls_repr": True},
        {"max_chunks": 17},
        {"max_seqs": 6},
        {"k": 100},
        {"max_similarity": 0.8, "k": 5},
        {"index": "HNSW8"},
        {"index": "SQ8"},
        {"index": "PCA8,Flat"},
        {"tokenizer": "bpe"},
        {"tokenizer": "gpt2"},
        {"tokenizer": "llama2"},
    ],
    ids=str,
)
def test_any_settings(tmp_path, bert, tokenizers, options):
    work = tmp_path / "work"
    if "tokenizer" in options:
        options = options | {"tokenizer": tokenizers[options["tokenizer"]]}
    build(Corpus(*TEXTS), work, bert, **options)
    index = {"index": options["index"]} if "index" in options else {}
    done = update(CHANGED, work, bert, **index)
    if not {"max_chunks", "max_seqs"} & options.keys():
        assert (done.kept, done.added, done.removed) == (2, 4, 4)
    if index:
        assert done.searched == len(open_array(work / "chunks.npy")), "its neighbours are its own"
    same_as_a_rebuild(work, CHANGED, bert, **options)


@pytest.mark.parametrize(
    "texts",
    [TEXTS[3:4], ["union", *TEXTS], [*TEXTS, "law"], TEXTS[:-1], [*TEXTS, *TEXTS], TEXTS[::-1], ["law", text(8, 40)]],
    ids=["one left", "one before", "one after", "the last gone", "twice", "backwards", "none kept"],
)
def test_more_and_fewer_documents(work, bert, texts):
    update(Corpus(*texts), work, bert)
    same_as_a_rebuild(work, Corpus(*texts), bert)


def test_what_came_may_go_again(base, work, bert, embedded):
    update(CHANGED, work, bert)
    update(Corpus(*TEXTS), work, bert)
    assert recorded(work) == recorded(base)


def test_nothing_has_changed(work, bert, embedded):
    before = times(work)
    assert update(Corpus(*TEXTS), work, bert) == Update(6, 0, 0, 0, 0)
    assert times(work) == before and not embedded and not (work / "update").exists()


def test_what_stays_keeps_its_own_vectors(tmp_path, bert, monkeypatch):
    """Of two copies of a text, too, though rounding may tell them apart."""
    count = itertools.count()
    monkeypatch.setattr(embedding, "_vectors", lambda *args: sums_of_words(*args) + 0.001 * next(count))
    texts = [text(1, 90), text(2, 3), text(1, 90), text(3, 5)]
    build(Corpus(*texts), tmp_path / "work", bert)
    before, docs = (np.array(open_array(tmp_path / "work" / name)) for name in ("chunks.embedded.npy", "doc_ids.npy"))
    assert (before[docs == 0] != before[docs == 2]).all()
    assert update(Corpus(*texts[1:], texts[0]), tmp_path / "work", bert).kept == 3
    after = open_array(tmp_path / "work" / "chunks.embedded.npy")
    assert (after == before[np.concatenate([np.flatnonzero(docs > 0), np.flatnonzero(docs == 0)])]).all()


def test_titles_alone_have_changed(work, bert, embedded):
    documents = Corpus(*TEXTS)
    documents[2] = Document(TEXTS[2], "another title", "elsewhere", facts=((0, 2),))
    assert update(documents, work, bert) == Update(6, 0, 0, 0, 0) and not embedded
    same_as_a_rebuild(work, documents, bert)
    assert read_documents(work / "chunks.npy")[2]["title"] == "another title"


def test_what_an_update_did_in_a_sentence(work, bert):
    done = update(CHANGED, work, bert)
    assert str(done).startswith("2 documents kept, 4 added, 4 removed; 9 chunks embedded, neighbours searched for ")


@pytest.mark.filterwarnings("ignore:documents without a token")
def test_no_documents_are_left(base, work, bert):
    with pytest.raises(ValueError, match="no text to chunk in Corpus: 2 documents, none with a token"):
        update(Corpus("", " "), work, bert)
    update(CHANGED, work, bert)
    same_as_a_rebuild(work, CHANGED, bert)


# brute force


def distances_of(work) -> np.ndarray:
    """Squared distances of all chunks in float64, infinite within a document."""
    vectors = open_array(work / "chunks.embedded.npy").astype(np.float64)
    distances = ((vectors[:, None] - vectors[None]) ** 2).sum(axis=-1)
    documents = open_array(work / "doc_ids.npy")
    return np.where(documents[:, None] == documents, np.inf, distances)


def test_only_what_may_have_changed_is_searched(tmp_path, bert, monkeypatch):
    """A chunk that is new, has lost a neighbour, or is as near to a new one as to its last. Brute force counts them."""
    texts = [text(seed, 24) for seed in range(20)]
    work, after = tmp_path / "work", [*texts[:7], *texts[8:], text(99, 24)]
    build(Corpus(*texts), work, bert)
    found, docs = open_array(work / "chunks.knn.npy").copy(), open_array(work / "doc_ids.npy").copy()
    asked, search = [], knn.neighbours
    monkeypatch.setattr(
        knn, "neighbours", lambda *args, rows, **options: asked.extend(rows) or search(*args, rows=rows, **options)
    )
    done = update(Corpus(*after), work, bert)
    now, distances = open_array(work / "doc_ids.npy"), distances_of(work)
    new = np.flatnonzero(now == 19)
    lost = (docs[found] == 7).any(axis=1)[docs != 7]
    stayed = np.take_along_axis(distances, open_array(work / "chunks.knn.npy"), axis=1)
    last = np.sort(distances[:, now != 19], axis=1)[:, K - 1]
    needed = {*new, *np.flatnonzero(lost), *np.flatnonzero(distances[:, new].min(axis=1) <= last)}
    assert sorted(asked) == sorted(needed) and done.searched == len(asked)
    assert len(new) < len(asked) < len(now) / 2, "the test would show nothing"
    assert (stayed == np.sort(distances, axis=1)[:, :K]).all()


def test_with_a_real_bert_neighbours_are_the_nearest_that_there_are(tmp_path, bert, monkeypatch):
    monkeypatch.setattr(embedding, "_vectors", VECTORS)
    monkeypatch.setattr(embedding, "best_dtype", lambda device: torch.float32)
    embedding._load_bert.cache_clear()
    work, texts = tmp_path / "work", [text(seed, 24) for seed in range(12)]
    build(Corpus(*[text.replace("law", "navy") for text in texts[:3]], *texts[3:]), work, bert, k=3)
    after = Corpus(*texts[3:8], text(50, 24), *texts[8:], text(51, 30), texts[5])
    assert update(after, work, bert).kept == 9
    build(after, tmp_path / "fresh", bert, k=3)
    ours, fresh = (open_array(folder / "chunks.embedded.npy") for folder in (work, tmp_path / "fresh"))
    np.testing.assert_allclose(ours, fresh, atol=1e-6, rtol=0)
    distances, found = distances_of(work), open_array(work / "chunks.knn.npy")
    read = get_tokenizer(bert).decode(open_array(work / "chunks.npy")[found.flat].flat)
    assert found.min() >= 0 and "law" in read and "navy" not in read
    near = np.take_along_axis(distances, found, axis=1)
    np.testing.assert_allclose(near, np.sort(distances, axis=1)[:, :3], rtol=1e-4, atol=1e-5)
    embedding._load_bert.cache_clear()


# which documents stay


def ascending(pairs) -> bool:
    return all(a < c and b < d for (a, b), (c, d) in itertools.pairwise(pairs))


def longest_common(old, new) -> int:
    """Length of the longest common subsequence, by the table."""
    table = np.zeros((len(old) + 1, len(new) + 1), int)
    for i, a in enumerate(old):
        for j, b in enumerate(new):
            table[i + 1, j + 1] = table[i, j] + 1 if a == b else max(table[i, j + 1], table[i + 1, j])
    return int(table[-1, -1])


def kept(old, new) -> list[tuple[int, int]]:
    numbers = {}
    for number, each in enumerate(old):
        numbers.setdefault(each, []).append(number)
    pairs = _kept(numbers, new)
    assert ascending(pairs) and all(new[a] == old[b] for a, b in pairs)
    return pairs


@given(st.permutations("abcdefghij"), st.permutations("abcdefghijklm"), st.integers(0, 10), st.integers(0, 13))
def test_the_longest_ascending_list_is_kept(old, new, n_old, n_new):
    assert len(kept(old[:n_old], new[:n_new])) == longest_common(old[:n_old], new[:n_new])


@given(st.text("abc", max_size=12), st.text("abcd", max_size=12))
def test_of_texts_that_several_have_no_worse_than_of_those_once(old, new):
    found = len(kept(old, new))
    assert min(1, longest_common(old, new)) <= found <= longest_common(old, new)


@given(st.text("abcde", max_size=12), st.data())
def test_where_documents_come_or_go_at_the_end_all_others_stay(old, data):
    last = data.draw(st.integers(0, len(old)))
    assert kept(old, old) == [(i, i) for i in range(len(old))]
    assert len(kept(old, old[:last] + "fgh")) == last


# an inverted file


def lists_of(index) -> list[tuple[list[int], bytes]]:
    inner = innermost(index)
    entries = (list_entries(inner.invlists, number, inner.code_size) for number in range(inner.nlist))
    return [(ids.tolist(), codes.tobytes()) for ids, codes in entries]


IVF_TEXTS = [text(seed, 24) for seed in range(100, 130)]


@pytest.mark.parametrize("spec", ["IVF4,Flat", "IVF4,SQ8"])
@pytest.mark.parametrize("come", [[text(7, 8)], [text(seed, 24) for seed in range(30)]], ids=["one new", "many new"])
def test_an_inverted_file_is_kept_and_edited(tmp_path, bert, monkeypatch, spec, come):
    """What filling the old index with the new vectors gives: its lists, and its neighbours."""
    monkeypatch.setattr(index_module, "RECALL_TARGET", 0.5)  # so that some lists are not looked into
    work, after = tmp_path / "work", [*IVF_TEXTS[:9], *IVF_TEXTS[10:], *come]
    build(Corpus(*IVF_TEXTS), work, bert, index=spec, k=3)
    index = read_index(work / "knn.index")
    effort = index.nprobe
    done = update(Corpus(*after), work, bert, index=spec)
    vectors, doc_ids = open_array(work / "chunks.embedded.npy"), open_array(work / "doc_ids.npy")
    index.reset()
    index.add(np.ascontiguousarray(vectors))
    ours = read_index(work / "knn.index")
    assert lists_of(ours) == lists_of(index) and ours.nprobe == effort < 4
    assert (open_array(work / "chunks.knn.npy") == neighbours(index, vectors, doc_ids, 3)).all()
    assert (done.searched < len(vectors)) == (spec == "IVF4,Flat" and len(come) == 1), "many are not compared"
    before = times(work)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="building")
        build(Corpus(*after), work, bert, index=spec, k=3)
    assert times(work) == before


def test_lists_that_lie_apart_are_edited_and_lie_in_the_index(tmp_path, bert):
    """As those of a store that a cluster built (`retro_nb.store.cluster`)."""
    work, after = tmp_path / "work", Corpus(*IVF_TEXTS[3:], text(7, 20))
    build(Corpus(*IVF_TEXTS), work, bert, index="IVF4,Flat")
    index, shard = read_index(work / "knn.index"), tmp_path / "shard"
    index_module.write_index(index, shard)
    index.reset()
    merge_on_disk(index, [shard], open_array(work / "chunks.embedded.npy"), work / "knn.index")
    arrays = read_manifest(work)
    files = {name: file_record(work / name) for name in ("knn.index", "knn.index.lists")}
    arrays["knn.index"]["files"] = files
    manifest._write_manifest(work, arrays)
    arrays["chunks.knn.npy"]["settings"]["index"] = array_key(work / "knn.index")
    manifest._write_manifest(work, arrays)
    assert update(after, work, bert, index="IVF4,Flat").kept == 27
    assert not (work / "knn.index.lists").exists() and set(recorded(work)) == set(ARRAYS)
    filled, vectors = read_index(shard), open_array(work / "chunks.embedded.npy")
    filled.reset()
    filled.add(np.ascontiguousarray(vectors))
    assert lists_of(read_index(work / "knn.index")) == lists_of(filled)
    built = neighbours(read_index(work / "knn.index"), vectors, open_array(work / "doc_ids.npy"), K)
    assert (open_array(work / "chunks.knn.npy") == built).all()


@pytest.mark.parametrize("kinds", [("Flat", "SQ8"), ("SQ8", "Flat")], ids=" to ".join)
def test_another_kind_of_index_is_built_and_searched_anew(tmp_path, bert, kinds):
    """Neighbours that a coarser index found are not taken over."""
    work = tmp_path / "work"
    build(Corpus(*TEXTS), work, bert, index=kinds[0])
    after = Corpus(*TEXTS, text(8, 1))
    done = update(after, work, bert, index=kinds[1])
    assert done.searched == len(open_array(work / "chunks.npy"))
    same_as_a_rebuild(work, after, bert, index=kinds[1])


# what cannot be updated


def spoil(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)


def forget_digests(work, bert) -> None:
    """Documents as an earlier version wrote them."""
    path, arrays = work / "chunks.documents.jsonl", read_manifest(work)
    documents = read_documents(work / "chunks.npy")
    for about in documents:
        del about["digest"]
    path.write_text("".join(json.dumps(about) + "\n" for about in documents))
    arrays["chunks.npy"]["files"][path.name] = file_record(path)
    manifest._write_manifest(work, arrays)


def chunk_alone(work, bert) -> None:
    """A build that was stopped after its first step."""
    paths = {"chunks_memmap_path": "chunks.npy", "seqs_memmap_path": "seqs.npy", "doc_ids_memmap_path": "doc_ids.npy"}
    files = {kind: work / name for kind, name in paths.items()}
    documents_to_chunks_(Corpus("law"), **files, chunk_size=M, seq_len=N, tokenizer=bert, progress=False)


def another_bert(work, bert) -> None:
    arrays = read_manifest(work)
    arrays["chunks.embedded.npy"]["settings"]["bert"] = "0123"
    manifest._write_manifest(work, arrays)


def another_tokenizer_of_bert(work, bert) -> None:
    arrays = read_manifest(work)
    arrays["chunks.embedded.npy"]["settings"]["tokenizers"][1] = "0123"
    manifest._write_manifest(work, arrays)


def damaged(name: str):
    said = "is not what .* was made from|is truncated or corrupt"
    return pytest.param(lambda work, bert: spoil(work / name), said, id=name)


REFUSED = [
    *map(damaged, ["chunks.npy", "chunks.spans.npy", "chunks.bytes.npy", "chunks.documents.jsonl", "seqs.npy"]),
    *map(damaged, ["chunks.tokenizer.json", "doc_ids.npy", "chunks.embedded.npy", "knn.index", "chunks.knn.npy"]),
    pytest.param(lambda work, bert: spoil(work / "manifest.json"), "it has no record of chunks.npy", id="manifest"),
    pytest.param(lambda work, bert: (work / "knn.index").unlink(), "knn.index is not what", id="no index"),
    pytest.param(forget_digests, "built by a version that did not record the texts' digests", id="old version"),
    pytest.param(chunk_alone, "chunks.npy is not what chunks.embedded.npy was made from", id="half a build"),
    pytest.param(another_bert, "bert was 0123 and is ", id="another BERT"),
    pytest.param(another_tokenizer_of_bert, "tokenizers was .*0123.* and is", id="another tokenizer of BERT"),
]


@pytest.mark.filterwarnings("ignore:building")
@pytest.mark.parametrize(("harm", "message"), REFUSED)
def test_a_store_that_cannot_be_updated_says_why_and_is_built_anew(work, bert, wrap, harm, message):
    harm(work, bert)
    before = {path.name: path.read_bytes() for path in work.iterdir()}
    with pytest.raises(ValueError, match=f"cannot be updated: .*({message}).*Build it again with Store.build"):
        update(CHANGED, work, bert)
    before.setdefault(".update.lock", b"")
    assert {path.name: path.read_bytes() for path in work.iterdir()} == before
    wrap(CHANGED, work)
    same_as_a_rebuild(work, CHANGED, bert)


def test_documents_without_a_fingerprint_and_folders_without_a_store(work, tmp_path, bert):
    with pytest.raises(ValueError, match="documents have no fingerprint"):
        update([Document("law", "a", "s")], work, bert)
    with pytest.raises(ValueError, match=r"the store in .*nowhere cannot be updated: it has no record of chunks\.npy"):
        update(CHANGED, tmp_path / "nowhere", bert)
    assert not (tmp_path / "nowhere").exists()


# TrainingWrapper


@pytest.fixture
def wrap(bert):
    torch.manual_seed(0)
    sizes = dict(enc_dim=8, enc_depth=1, dec_dim=8, dec_depth=1, dec_cross_attn_layers=(1,), heads=1, dim_head=8)
    retro = RETRO(num_tokens=get_tokenizer(bert).size, max_seq_len=N, chunk_size=M, **sizes)

    def make(documents, work, **options) -> TrainingWrapper:
        sizes = {"chunk_size": M, "knn": K, "bert": bert, "progress": False}
        return TrainingWrapper(retro=retro, documents_path=documents, work_dir=work, **sizes | options)

    return make


def silent(make, *args, **options):
    """Nothing may be said, of building above all."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return make(*args, **options)


def test_the_wrapper_lets_its_store_follow_and_says_so(work, wrap, bert, embedded):
    silent(wrap, Corpus(*TEXTS), work)
    with pytest.warns(UserWarning) as told:
        made = wrap(CHANGED, work)
    (said,) = [str(each.message) for each in told]
    assert said.startswith("the corpus has changed: 2 documents kept, 4 added, 4 removed; 9 chunks embedded")
    assert sum(embedded) == 9 and Path(told[0].filename) != Path(updating.__file__)
    same_as_a_rebuild(work, CHANGED, bert)
    again = silent(wrap, CHANGED, work)
    assert again.stats == made.stats and made.stats["docs"] == 6
    assert [about["title"] for about in made.retriever.documents] == [each.title for each in CHANGED]
    assert made.generate(max_new_tokens=M + 1).shape[1] == M + 2


@pytest.mark.filterwarnings("ignore:building", "ignore:max_chunks")
@pytest.mark.parametrize(
    ("options", "embeds"),
    [({"knn": 3}, 9), ({"max_similarity": 0.9}, 9), ({"use_cls_repr": True}, 33), ({"max_chunks": 20}, 15)],
)
def test_corpus_and_a_setting_have_changed(work, wrap, bert, embedded, options, embeds):
    with pytest.warns(UserWarning, match="the corpus has changed" if embeds == 9 else "building"):
        made = wrap(CHANGED, work, **options)
    assert sum(embedded) == embeds, "all of them, where more than the corpus has changed"
    assert silent(wrap, CHANGED, work, **options).stats == made.stats
    sizes = {"k" if name == "knn" else name: value for name, value in options.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warnings, "warn", lambda *_, **__: None)
        same_as_a_rebuild(work, CHANGED, bert, **sizes)


@pytest.mark.filterwarnings("ignore:the corpus has changed", "ignore:building")
def test_databases_that_keep_documents_out_are_searched_again(work, wrap, bert, tmp_path):
    made = wrap(Corpus(*TEXTS), work, keep_out=[0, 4])
    aside = [path.name for path in work.glob("chunks.knn-*.npy")]
    assert len(aside) == 1
    made = wrap(CHANGED, work, keep_out=[1])
    assert not (work / aside[0]).exists() and aside[0] not in read_manifest(work)
    fresh = wrap(CHANGED, tmp_path / "fresh", keep_out=[1])
    assert len(made.ds) == len(fresh.ds)
    for ours, theirs in zip(made.ds, fresh.ds, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    doc_ids = open_array(work / "doc_ids.npy")
    (path,) = work.glob("chunks.knn-*.npy")
    assert 1 not in doc_ids[open_array(path)] and 1 in doc_ids[open_array(work / "chunks.knn.npy")]
    assert silent(wrap, CHANGED, work, keep_out=[1]).stats == made.stats


def test_other_arrays_in_the_folder_stay(work, bert):
    np.save(work / "mine.npy", np.arange(3))
    manifest.cached(work / "own.npy", {"a": 1}, lambda: np.save(work / "own.npy", np.arange(2)) or {})
    update(CHANGED, work, bert)
    assert np.load(work / "mine.npy").tolist() == [0, 1, 2] and intact(work / "own.npy")


@pytest.mark.filterwarnings("ignore:building")
def test_a_folder_of_files_is_followed(tmp_path, wrap, monkeypatch):
    files = {f"{i}": each for i, each in enumerate(TEXTS)}
    write_files(tmp_path / "texts", files)
    wrap(str(tmp_path / "texts"), tmp_path / "work")
    write_files(tmp_path / "texts", files | {"1a": text(3, 20)})
    with pytest.warns(UserWarning, match="the corpus has changed: 6 documents kept, 1 added, 0 removed"):
        wrap(str(tmp_path / "texts"), tmp_path / "work")
    monkeypatch.setenv("REPROCESS", "1")
    write_files(tmp_path / "texts", files)
    with pytest.warns(UserWarning, match=r"building chunks\.npy again: asked for"):
        wrap(str(tmp_path / "texts"), tmp_path / "work")


# stopped anywhere


STOPS = {
    "chunks": (updating, "write_chunks"),
    "embedding": (updating, "write_vectors"),
    "vectors": (updating, "_index"),
    "index": (updating, "_search"),
    "searching": (ResumableRows, "finish"),
    "neighbours": (updating, "replace_store"),
}


def stopped(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.filterwarnings("ignore:building")
@pytest.mark.parametrize("where", STOPS)
def test_until_the_end_the_old_store_serves(base, work, wrap, bert, monkeypatch, where):
    """And an update to yet another corpus is not misled by what is left; nor is one of another store."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*STOPS[where], stopped)
        update(CHANGED, work, bert)
    assert (work / "update").exists()
    for name in ARRAYS:
        assert intact(work / name) and read_manifest(work)[name] == read_manifest(base)[name]
    old = silent(wrap, Corpus(*TEXTS), work)
    assert len(old.ds) and old.retriever.documents[2]["title"] == "title 2"
    if where == "embedding":
        build(Corpus(*TEXTS[:2], *map(text, range(40, 44), [12] * 4)), work, bert, force_reprocess=True)
        same = CHANGED
    else:
        same = Corpus(*TEXTS[2:], text(60, 9), text(61, 9))
    update(same, work, bert)
    same_as_a_rebuild(work, same, bert)


def same_while_moving(work, bert, moment: int) -> bool:
    """Update, and stop at the given moment of the replacement; whether that was before its end."""
    moments, wrapped = itertools.count(), {}

    def stopping(of, name):
        def call(*args, **options):
            if next(moments) == moment:
                raise KeyboardInterrupt
            return wrapped[name](*args, **options)

        wrapped[name] = getattr(of, name)
        return call

    with pytest.MonkeyPatch.context() as patch:

        def replace(folder, gone):
            patch.setattr(os, "replace", stopping(os, "replace"))
            patch.setattr(Path, "unlink", stopping(Path, "unlink"))
            patch.setattr(shutil, "rmtree", stopping(shutil, "rmtree"))
            replace_store(folder, gone)

        patch.setattr(updating, "replace_store", replace)
        try:
            update(CHANGED, work, bert)
            return False
        except KeyboardInterrupt:
            return True


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the corpus has changed", "ignore:building")
def test_a_stop_between_any_two_moves(base, tmp_path, bert, wrap):
    """Whatever comes next, an update, a build of the new corpus or of the old one, finishes the replacement first."""
    expected = tmp_path / "expected"
    shutil.copytree(base, expected)
    wrap(Corpus(*TEXTS), expected, keep_out=[2])
    with_aside = Path(shutil.copytree(expected, tmp_path / "aside"))
    update(CHANGED, expected, bert)
    after = recorded(expected)
    for moment in itertools.count():
        work = Path(shutil.copytree(with_aside, tmp_path / f"stopped {moment}"))
        if not same_while_moving(work, bert, moment):
            break
        if moment % 3 == 0:
            update(CHANGED, work, bert)
        elif moment % 3 == 1:
            silent(wrap, CHANGED, work) if (work / "update" / "ready.json").exists() else wrap(CHANGED, work)
        else:
            wrap(Corpus(*TEXTS), work)
            assert recorded(work) == recorded(base)
            update(CHANGED, work, bert)
        shutil.rmtree(work / "update", ignore_errors=True)  # stopped while it was cleared away, and nothing to do since
        assert recorded(work) == after, f"stopped at moment {moment}"
    assert moment > 15


def test_no_store_is_replaced_by_nothing(work):
    before = times(work)
    with pytest.raises(FileNotFoundError, match=r"no store in .*update is ready to take the place"):
        replace_store(work, ["chunks.npy"])
    assert times(work) == before


# killed, crowded


def update_until_killed(folder, documents, bert, point):
    """Update, and be killed at the given one of the moments at which the disk or the model is used."""
    moments = itertools.count()

    def moment():
        if next(moments) == point:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(event, args):
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") and str(args[0]).startswith(str(folder)):
            moment()

    def write_index(index, path, write=updating.write_index):
        write(index, path)
        moment()

    as_above()
    updating.write_index = write_index
    sys.addaudithook(watch)
    update(documents, folder, bert)


def as_above():
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    embedding._vectors, embedding.ON_CPU, updating.AT_A_TIME = sums_of_words, Sizes(5, 16, ahead=0), 16


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the corpus has changed", "ignore:building")
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
def test_an_update_killed_at_any_point_is_finished_as_if_nothing_had_been(base, tmp_path, bert, wrap, run_apart):
    expected, before = Path(shutil.copytree(base, tmp_path / "expected")), recorded(base)
    update(CHANGED, expected, bert)
    after, unfinished = recorded(expected), 0
    for turn, point in enumerate(itertools.count(step=31)):
        work = Path(shutil.copytree(base, tmp_path / f"killed {point}"))
        (code,) = run_apart(update_until_killed, work, CHANGED, bert, point)
        if not (work / "update" / "ready.json").exists() and (work / "update" / "begun.json").exists():
            unfinished += 1
            assert {name: record["files"] for name, record in read_manifest(work).items()} == {
                name: record["files"] for name, record in before.items()
            } and all(intact(work / name) for name in ARRAYS), "the old store serves"
        if turn % 2:
            wrap(CHANGED, work)
        else:
            update(CHANGED, work, bert)
        for path in work.glob("*.tmp"):
            path.unlink()  # of a manifest, say: the next build of that file would
        shutil.rmtree(work / "update", ignore_errors=True)
        assert recorded(work) == after, f"killed at moment {point}"
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert unfinished > 5 and point > 150


def update_along(folder, documents, bert):
    as_above()
    update(documents, folder, bert)


def test_two_processes_updating_one_store_give_one_result(work, bert, run_apart):
    assert run_apart(update_along, work, CHANGED, bert, processes=3) == [0, 0, 0]
    same_as_a_rebuild(work, CHANGED, bert)


def child(folder: Path, bert: Path):
    """Two updates in processes that are launched together; what each did, and how many chunks it embedded."""
    as_above()
    passes, said = [], []

    def counted(model, ids, *args):
        passes.append(len(ids))
        return sums_of_words(model, ids, *args)

    if launched()[0] == 1:  # it is late
        knn.choose_spec = lambda *args, **options: time.sleep(1) or choose_spec(*args, **options)
    embedding._vectors = counted
    for documents in (CHANGED, CHANGED, Corpus(*TEXTS[:5]), Corpus(*TEXTS[3:5])):
        said.append([str(update(documents, folder, bert)), sum(passes)])
        assert read_documents(folder / "chunks.npy")[0]["title"] == documents[0].title
    write_json(folder.parent / f"process {launched()[0]}.json", said)


@pytest.mark.slow
def test_processes_that_are_launched_together_share_an_update(work, tmp_path, bert):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [__file__, str(work), str(bert)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "building" not in done.stderr, done.stderr
    first, second = (json.loads((tmp_path / f"process {rank}.json").read_text()) for rank in range(2))
    assert [each for each, _ in first] == [each for each, _ in second]
    assert first[0][0].startswith("2 documents kept, 4 added, 4 removed; 9 chunks embedded")
    assert first[1][0].endswith("0 chunks embedded, neighbours searched for 0")
    assert first[-1][1] + second[-1][1] == 9 + sum(-(-(len(each.split()) + 1) // M) for each in (TEXTS[2], TEXTS[3]))
    same_as_a_rebuild(work, Corpus(*TEXTS[3:5]), bert)


if __name__ == "__main__":  # a process that is launched together with others
    child(Path(sys.argv[1]), Path(sys.argv[2]))
