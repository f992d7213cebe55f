"""The store as an object: what it builds is what its parts build, it opens without its corpus, and it follows it."""

import itertools
import re
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from retro_nb import RETRO, Store, StoreSettings, TrainingWrapper
from retro_nb.common.manifest import read_manifest
from retro_nb.reference import documents_to_chunks_
from retro_nb.store import chunking, embedding, knn
from retro_nb.store.files import Files
from retro_nb.store.index import exact_search
from retro_nb.store.knn import own_ranges
from retro_nb.text.document import Document
from retro_nb.text.files import text_folder, write_texts
from retro_nb.text.tokens import get_tokenizer

TEXTS = {f"{number}": f"The town number {number} has a tower and a river. " * (3 + number) for number in range(6)}
SIZES = {"chunk_size": 16, "seq_len": 32}


@pytest.fixture
def corpus(tmp_path):
    write_texts(TEXTS, tmp_path / "texts")
    return text_folder(tmp_path / "texts")


@pytest.fixture
def settings(tiny_bert):
    return StoreSettings(**SIZES, knn=3, bert=str(tiny_bert))


@pytest.fixture
def store(corpus, settings, tmp_path):
    return Store.build(corpus, tmp_path / "store", settings, progress=False)


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.np*")}


def test_its_arrays_are_what_the_steps_make(store, corpus, tiny_bert, tmp_path):
    paths = {f"{name}_memmap_path": tmp_path / "alone" / f"{name}.npy" for name in ("chunks", "seqs", "doc_ids")}
    made = documents_to_chunks_(corpus, **paths, **SIZES, tokenizer=str(tiny_bert), progress=False)
    for name, array in (("chunks", store.chunks), ("doc_ids", store.doc_ids)):
        assert np.array_equal(np.load(paths[f"{name}_memmap_path"]), array)
    assert {name: store.stats[name] for name in made} == made
    assert [about["title"] for about in store.documents] == [document.title for document in corpus]
    # brute force, over the vectors of other documents
    vectors, doc_ids = np.array(store.vectors), np.array(store.doc_ids)
    own = own_ranges(doc_ids, range(len(doc_ids)))
    _, nearest = exact_search(vectors, vectors, 3, own=own)
    distances = ((vectors[:, None] - vectors[store.neighbours]) ** 2).sum(-1)
    assert np.allclose(distances, ((vectors[:, None] - vectors[nearest]) ** 2).sum(-1), atol=1e-4)
    assert store.index.ntotal == len(vectors)


def test_it_opens_without_its_corpus_and_is_the_same(store, settings):
    opened = Store.open(store.folder, bert=settings.bert)
    assert opened.stats == store.stats and opened.files == store.files and repr(opened) == repr(store)
    assert np.array_equal(opened.neighbours, store.neighbours)
    for mine, its in zip(opened.dataset()[0], store.dataset()[0], strict=True):
        assert torch.equal(mine, its)
    asked = torch.from_numpy(np.array(store.chunks[:4, :-1], np.int64))
    for mine, its in zip(opened.retriever().nearest(asked), store.retriever().nearest(asked), strict=True):
        assert np.array_equal(mine, its)
    for name in ("chunk_size", "seq_len", "knn", "use_cls_repr", "max_similarity", "max_chunks", "max_seqs"):
        assert getattr(opened.settings, name) == getattr(settings, name)


def test_what_is_built_is_not_built_again(store, corpus, settings):
    before = times(store.folder)
    Store.build(corpus, store.folder, settings, progress=False)
    assert times(store.folder) == before
    with pytest.warns(UserWarning, match="k was 3 and is 2"):
        fewer = Store.build(corpus, store.folder, StoreSettings(**SIZES, knn=2, bert=settings.bert), progress=False)
    after = times(store.folder)
    assert {name for name in after if after[name] != before[name]} == {"chunks.knn.npy"} and fewer.stats["k"] == 2


def test_a_dataset_with_fewer_neighbours_has_the_nearest(store):
    seq, retrieved = store.dataset(k=2)[0]
    whole_seq, all_retrieved = store.dataset()[0]
    assert torch.equal(seq, whole_seq) and torch.equal(retrieved, all_retrieved[:, :2])
    with pytest.raises(ValueError, match=r"k 4: .* has 3 neighbours"):
        store.dataset(4)


def test_documents_that_are_kept_out_are_nobodys_neighbour(corpus, settings, tmp_path):
    kept = StoreSettings(**SIZES, knn=2, bert=settings.bert, keep_out=[1, 4])
    store = Store.build(corpus, tmp_path / "kept", kept, progress=False)
    found = np.array(store.neighbours)
    assert not np.isin(np.array(store.doc_ids)[found[found >= 0]], [1, 4]).any()
    assert store.kept_out == [1, 4] == store.retriever().keep_out
    opened = Store.open(store.folder, bert=settings.bert, keep_out=[4, 1])
    assert np.array_equal(opened.neighbours, found)
    with pytest.raises(FileNotFoundError, match=r"leave out the documents \[\].*pass the keep_out"):
        Store.open(store.folder, bert=settings.bert)


def of(store):
    """Titles of the documents that are kept out, after a check that nothing retrieves them."""
    found, doc_ids = np.array(store.neighbours), np.array(store.doc_ids)
    assert not np.isin(doc_ids[found[found >= 0]], store.kept_out).any()
    return [store.documents[number]["title"] for number in store.kept_out]


@pytest.fixture
def embedded(monkeypatch):
    """Numbers of chunks that the BERT was given, in order."""
    counts, vectors = [], embedding._vectors
    monkeypatch.setattr(
        embedding, "_vectors", lambda model, ids, *args: counts.append(len(ids)) or vectors(model, ids, *args)
    )
    return counts


@pytest.mark.filterwarnings("ignore:building", "ignore:the corpus has changed")
@pytest.mark.parametrize("noted", [True, False], ids=["noted", "of an earlier version"])
def test_a_share_stays_with_its_documents_when_the_corpus_changes(settings, tmp_path, embedded, noted):
    folder, texts = tmp_path / "texts", dict(TEXTS)
    share = replace(settings, keep_out=0.34)

    def build(texts):
        shutil.rmtree(folder, ignore_errors=True)
        write_texts(texts, folder)
        embedded.clear()
        return Store.build(text_folder(folder), tmp_path / "store", share, progress=False)

    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "chunks.kept_out.json.4711.tmp").touch()  # left by a kill
    store = build(texts)
    first, second = of(store)
    assert not list(store.folder.glob("*.tmp"))
    if not noted:
        store.files.kept_out.unlink()
    texts = {f"-{number}": f"Another text, number {number}, comes before all. " for number in range(3)} | texts
    store = build(texts)
    assert of(store) == [first, second] and sum(embedded) == sum(
        about["chunks"][1] - about["chunks"][0] for about in store.documents if about["title"].startswith("-")
    ), "only the new ones are embedded"
    assert of(Store.open(store.folder, bert=settings.bert, keep_out=0.34)) == [first, second]
    # a text that is edited, or has another name, is still the same to whoever was trained without it; one may go
    texts[first] += "And a gate. "
    texts["renamed"] = texts.pop(second)
    assert of(build(texts)) == [first, "renamed"]
    without = {name: text for name, text in texts.items() if name != first}
    assert of(build(without)) == ["renamed"]
    assert of(build(texts)) == [first, "renamed"], "it has come back"
    with pytest.raises(
        ValueError, match=rf"none of the .* that the share 0\.34 .*delete .*{store.files.kept_out.name}"
    ):
        build({"a": "nothing of all this", "b": "nor is this"})


@pytest.mark.filterwarnings("ignore:building", "ignore:the corpus has changed")
def test_numbers_that_stand_for_other_documents_are_refused(corpus, settings, tmp_path):
    kept = replace(settings, keep_out=[1, 4])
    assert of(Store.build(corpus, tmp_path / "store", kept, progress=False)) == ["1", "4"]
    (tmp_path / "texts" / "-.txt").write_text("A text that comes before all. ")
    corpus = text_folder(tmp_path / "texts")
    with pytest.raises(ValueError, match=r"keep_out \[1, 4\]: document 1 was '1' .* now it is '0'.*titles"):
        Store.build(corpus, tmp_path / "store", kept, progress=False)
    store = Store.build(corpus, tmp_path / "store", replace(settings, keep_out=["1", "4"]), progress=False)
    assert of(store) == ["1", "4"] and store.kept_out == [2, 5]


@pytest.mark.parametrize(
    ("keep_out", "error", "message"),
    [
        ("12", TypeError, "keep_out is '12': pass a share, or a list"),
        ([{"title": "1"}], KeyError, "an identity has a title and a digest"),
        (1, ValueError, "the share 1 .* is not between 0 and 1"),
        (list(TEXTS), ValueError, "names all 6 documents"),
    ],
)
def test_what_names_no_documents_to_keep_out_is_refused(corpus, settings, tmp_path, keep_out, error, message):
    with pytest.raises(error, match=message):
        Store.build(corpus, tmp_path / "store", replace(settings, keep_out=keep_out), progress=False)


@pytest.mark.filterwarnings("ignore:building")
def test_a_store_that_keeps_documents_out_follows_its_corpus(corpus, settings, tmp_path, embedded):
    store = Store.build(corpus, tmp_path / "store", replace(settings, keep_out=["1", "4"]), progress=False)
    embedded.clear()
    (tmp_path / "texts" / "-.txt").write_text("A text that comes before all. ")
    corpus = text_folder(tmp_path / "texts")
    done = store.update(corpus, progress=False)
    assert (
        (done.kept, done.added, done.embedded) == (6, 1, sum(embedded))
        and sum(embedded) == 1
        and done.searched == store.stats["chunks"]
    )
    fresh = Store.build(corpus, tmp_path / "fresh", replace(settings, keep_out=["1", "4"]), progress=False)
    assert of(store) == of(fresh) == ["1", "4"] and np.array_equal(store.neighbours, fresh.neighbours)
    assert store.stats["chunks"] == fresh.stats["chunks"] and len(store.dataset()) == len(fresh.dataset())


def test_an_index_that_cannot_leave_documents_out_is_refused_before_work(corpus, settings, tmp_path, embedded):
    with pytest.raises(ValueError, match="IVF8,LSQ2x8"):
        Store.build(corpus, tmp_path / "store", replace(settings, index="IVF8,LSQ2x8"), progress=False)
    assert not (tmp_path / "store").exists() and not embedded


def test_a_tokenizer_is_not_written_through_a_link(corpus, settings, tmp_path):
    for name in ("home", "store"):
        (tmp_path / name).mkdir()
    (tmp_path / "home" / "tokenizer.json").write_text("precious")
    (tmp_path / "store" / "tokenizer").symlink_to(tmp_path / "home")
    with pytest.raises(ValueError, match=r"tokenizer is a symbolic link to .*home"):
        Store.build(corpus, tmp_path / "store", replace(settings, tokenizer=300), progress=False)
    assert [path.read_text() for path in (tmp_path / "home").iterdir()] == ["precious"]


STAGES = {
    "chunks.npy": (chunking, "chunk_document", "starts again from its beginning"),
    "chunks.embedded.npy": (embedding, "_vectors", r"(8|16) of \d+ rows are kept"),
    "knn.index": (knn, "build_index", "starts again from its beginning"),
    "chunks.knn.npy": (knn, "neighbours", r"8 of \d+ rows are kept"),
}


@pytest.mark.parametrize("name", STAGES)
def test_ctrl_c_at_any_stage_says_in_one_line_what_is_kept(corpus, settings, tmp_path, monkeypatch, name):
    place, function, kept = STAGES[name]
    monkeypatch.setattr(embedding, "ON_CPU", embedding.Sizes(4, 8, ahead=0))
    blocks = knn.search_blocks
    monkeypatch.setattr(knn, "search_blocks", lambda rows, find, size, progress: blocks(rows, find, 8, progress))
    whole = Store.build(corpus, tmp_path / "whole", settings, progress=False)
    calls, original = itertools.count(1), getattr(place, function)

    def interrupted(*args, **options):
        if next(calls) == (1 if function == "build_index" else 6 if function == "_vectors" else 2):
            signal.raise_signal(signal.SIGINT)
        return original(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as stopped:
        patch.setattr(place, function, interrupted)
        Store.build(corpus, tmp_path / "store", settings, progress=False)
    message = rf"stopped while building {tmp_path}/store/{name}: .*{kept}.*the same call goes on"
    assert re.fullmatch(message, str(stopped.value))
    assert stopped.value._render_traceback_() == [str(stopped.value)], "and no more in a notebook"
    store = Store.build(corpus, tmp_path / "store", settings, progress=False)
    assert np.array_equal(store.neighbours, whole.neighbours) and np.array_equal(store.vectors, whole.vectors)


def test_a_note_of_other_content_is_named(corpus, settings, tmp_path):
    store = Store.build(corpus, tmp_path / "store", replace(settings, keep_out=0.34), progress=False)
    for content in ("{", "[]", '{"0.34": [1]}', '{"0.34": 1}'):
        store.files.kept_out.write_text(content)
        with pytest.raises(ValueError, match=r"chunks\.kept_out\.json"):
            Store.open(store.folder, bert=settings.bert, keep_out=0.34)


def test_recall_leaves_out_what_the_database_leaves_out(corpus, settings, tmp_path):
    """A single list is read as a whole: nothing is missed."""
    listed = replace(settings, keep_out=[1, 4], index="IVF1,Flat")
    assert Store.build(corpus, tmp_path / "listed", listed, progress=False).stats["recall"] == 1


def test_the_berts_tokenizer_cuts_unless_another_is_named(tokenizers):
    bert = tokenizers["llama3"]
    for named, expected in ((None, "llama3"), (tokenizers["gpt2"], "gpt2")):
        cutter = StoreSettings(bert=bert, tokenizer=named).cutter
        assert cutter.fingerprint == get_tokenizer(tokenizers[expected]).fingerprint


def test_it_follows_its_corpus(store, settings, tmp_path):
    write_texts(TEXTS | {"new": "A harbour, a lighthouse, and boats. " * 5}, tmp_path / "texts")
    (tmp_path / "texts" / "0.txt").unlink()
    changed = text_folder(tmp_path / "texts")
    done = store.update(changed, progress=False)
    assert (done.kept, done.added, done.removed) == (5, 1, 1)
    anew = Store.build(changed, tmp_path / "anew", settings, progress=False)
    assert np.array_equal(store.chunks, anew.chunks) and np.array_equal(store.neighbours, anew.neighbours)
    same = ("docs", "chunks", "seqs", "tokens", "k")
    assert {name: store.stats[name] for name in same} == {name: anew.stats[name] for name in same}
    assert store.index.ntotal == len(anew.chunks)


def test_what_cannot_be_opened_is_named(store, tmp_path, corpus):
    with pytest.raises(FileNotFoundError, match="holds no whole store"):
        Store.open(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"embedded by another BERT .*pass bert"):
        Store.open(store.folder)
    with pytest.raises(ValueError, match="knn is 0"):
        StoreSettings(knn=0)
    with pytest.raises(ValueError, match="can be read only once"):
        Store.build(iter([Document("a", "a", "a")]), tmp_path / "once", StoreSettings(tokenizer=300), progress=False)


def test_a_wrapper_over_a_store_is_the_wrapper_that_builds_it(store, corpus, settings, tmp_path):
    retro = RETRO(
        max_seq_len=32, enc_dim=16, enc_depth=1, dec_dim=16, dec_depth=1, dec_cross_attn_layers=(1,), heads=2,
        dim_head=8, chunk_size=16,
    )  # fmt: skip
    before = times(store.folder)
    over = TrainingWrapper.over(retro, store)
    built = TrainingWrapper(
        retro=retro, documents_path=corpus, knn=3, chunk_size=16, bert=settings.bert, work_dir=store.folder,
        progress=False,
    )  # fmt: skip
    assert times(store.folder) == before and over.stats == built.stats and over.work_dir == built.work_dir
    assert torch.equal(over.ds[0][1], built.ds[0][1])
    torch.manual_seed(0)
    texts = [each.generate_text("The town", temperature=0.0, max_new_tokens=4).text for each in (over, built)]
    assert texts[0] == texts[1]
    other = RETRO(
        max_seq_len=48, enc_dim=16, enc_depth=1, dec_dim=16, dec_depth=1, dec_cross_attn_layers=(1,), heads=2,
        dim_head=8, chunk_size=16,
    )  # fmt: skip
    with pytest.raises(ValueError, match="reads 48 tokens, the store's sequences have 32"):
        TrainingWrapper.over(other, store)


def test_a_store_that_a_wrapper_of_long_ago_left_opens(store):
    """Nothing but arrays and the manifest is needed: no file of settings is looked for."""
    names = {"chunks.npy", "chunks.embedded.npy", "knn.index", "chunks.knn.npy"}
    assert names <= read_manifest(store.folder).keys()
    assert not list(store.folder.glob("*.yaml")) and not (store.folder / "settings.json").exists()


def test_neighbours_of_other_vectors_are_not_opened(corpus, settings, tmp_path):
    """A build without kept-out documents leaves the neighbours of an earlier one with them where they lie."""
    Store.build(corpus, tmp_path / "store", replace(settings, keep_out=[1]), progress=False)
    with pytest.warns(UserWarning, match="pooling was mean and is cls"):
        Store.build(corpus, tmp_path / "store", replace(settings, use_cls_repr=True), progress=False)
    Store.open(tmp_path / "store", bert=settings.bert)
    with pytest.raises(ValueError, match=r"knn\.index is not what chunks\.knn-\w+\.npy was made from"):
        Store.open(tmp_path / "store", bert=settings.bert, keep_out=[1])


def test_a_build_that_stopped_after_its_chunks_is_not_opened(store, settings, tmp_path):
    write_texts({name: text.replace("river", "harbour") for name, text in TEXTS.items()}, tmp_path / "others")
    names = {f"{name}_memmap_path": store.folder / f"{name}.npy" for name in ("chunks", "seqs", "doc_ids")}
    with pytest.warns(UserWarning, match="corpus was"):
        documents_to_chunks_(
            text_folder(tmp_path / "others"), **names, **SIZES, tokenizer=settings.bert, progress=False
        )
    with pytest.raises(ValueError, match=r"chunks\.npy is not what chunks\.embedded\.npy was made from"):
        Store.open(store.folder, bert=settings.bert)


def test_a_store_without_its_own_tokenizer_is_not_read_with_another(corpus, settings, tmp_path):
    store = Store.build(corpus, tmp_path / "own", replace(settings, tokenizer=300), progress=False)
    assert Store.open(store.folder, bert=settings.bert).tokenizer.fingerprint == store.tokenizer.fingerprint
    (store.folder / "chunks.tokenizer.json").unlink()
    with pytest.raises(ValueError, match="has lost its tokenizer"):
        Store.open(store.folder, bert=settings.bert)


def test_files_of_other_names_are_not_updated_in_place(corpus, settings, tmp_path):
    files = replace(Files.of(tmp_path / "store"), seqs=tmp_path / "store" / "s.npy", index_name="my.index")
    store = Store.build(corpus, tmp_path / "store", settings, files=files, progress=False)
    assert store.index.ntotal == len(store.chunks) and (tmp_path / "store" / "my.index").exists()
    with pytest.raises(ValueError, match="has files of other names"):
        store.update(corpus)
    assert len(store.dataset()) == store.stats["seqs"]


@pytest.mark.parametrize("changes", [{"seq_len": 40}, {"chunk_size": 0}, {"max_chunks": 0}, {"max_similarity": 3}])
def test_settings_are_refused_before_anything_is_read(settings, changes):
    with pytest.raises(ValueError):
        replace(settings, **changes)


@pytest.mark.parametrize("k", [0, -1, True])
def test_a_number_of_neighbours_is_a_number(store, k):
    for ask in (store.dataset, store.retriever):
        with pytest.raises(ValueError, match="pass a whole number of neighbours"):
            ask(k)


def test_a_corpus_is_named_as_everywhere(corpus, store, settings, tmp_path):
    named = Store.build(str(tmp_path / "texts"), tmp_path / "named", settings, progress=False)
    assert np.array_equal(named.chunks, store.chunks)
