"""TrainingWrapper: one corpus, one folder; training on it, and samples that say what they have read."""

import json
import stat
import warnings

import faiss
import numpy as np
import pytest
import torch
from tiny_language_models import language_model, move
from torch.testing import assert_close

from retro_nb import RETRO, almanac, left_pad, retrofit, top_k, top_p
from retro_nb.common.arrays import open_array
from retro_nb.store import embedding
from retro_nb.store.splits import split_by_document
from retro_nb.text import opening
from retro_nb.text.document import Document
from retro_nb.text.tokens import decode, get_tokenizer, tokenize, train_tokenizer
from retro_nb.training import wrapper
from retro_nb.training.log import History
from retro_nb.training.wrapper import TrainingWrapper

faiss.omp_set_num_threads(1)

M, N, K = 8, 32, 2
WORDS = "law peace war trade union state people power treaty silver gold navy army land tax vote".split()
LENGTHS = {"first": 60, "second": 33, "third": 5, "fourth": 50, "fifth": 41}


def text(seed: int, words: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, words))


def make_retro(**changes) -> RETRO:
    small = dict(num_tokens=30522, max_seq_len=N, chunk_size=M, enc_dim=16, enc_depth=1, dec_dim=16, dec_depth=2)
    torch.manual_seed(0)
    return RETRO(**{**small, "dec_cross_attn_layers": (1, 2), "heads": 2, "dim_head": 8, **changes})


@pytest.fixture(scope="module", autouse=True)
def single_precision():
    """In bfloat16 a chunk's vector depends a little on the batch that it is in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedding, "best_dtype", lambda device: torch.float32)
        embedding._load_bert.cache_clear()
        yield
    embedding._load_bert.cache_clear()


@pytest.fixture(autouse=True)
def own_work_folder_and_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "WORK", tmp_path / "work")
    torch.manual_seed(0)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "texts" / "more").mkdir(parents=True)
    for seed, (name, words) in enumerate(LENGTHS.items()):
        (tmp_path / "texts" / f"{'more/' * (seed > 2)}{name}.txt").write_text(text(seed, words))
    return tmp_path / "texts"


@pytest.fixture
def wrap(tiny_bert):
    """TrainingWrapper with all that is not under test filled in."""

    def make(documents_path, **changes) -> TrainingWrapper:
        defaults = dict(knn=K, chunk_size=M, bert=tiny_bert, progress=False)
        retro = changes.pop("retro", None) or make_retro()
        return TrainingWrapper(retro=retro, documents_path=documents_path, **{**defaults, **changes})

    return make


@pytest.fixture(scope="module")
def wrapped(tmp_path_factory, tiny_bert) -> TrainingWrapper:
    """One wrapper for the tests that only ask it."""
    documents = [Document(text(seed, words), name, "s") for seed, (name, words) in enumerate(LENGTHS.items())]
    work = tmp_path_factory.mktemp("wrapped")
    options = dict(knn=K, chunk_size=M, bert=tiny_bert, progress=False, work_dir=work)
    return TrainingWrapper(retro=make_retro(), documents_path=documents, **options)


def files(folder) -> dict[str, int]:
    return {
        str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"
    }


# the corpus and its folder


def test_two_corpora_never_share_a_folder_and_one_is_built_once(folder, wrap, tmp_path):
    first = wrap(folder)
    before = files(tmp_path / "work")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = wrap(str(folder))
        others = [
            wrap(folder, glob="more/*.txt"),
            wrap(folder / "more"),
            wrap(almanac(towns=2)),
            wrap(almanac(towns=3)),
        ]
    assert again.work_dir == first.work_dir and again.stats == first.stats
    assert len({first.work_dir, *(other.work_dir for other in others)}) == 5
    assert before.items() <= files(tmp_path / "work").items()
    assert [other.stats["docs"] for other in others] == [2, 2, 4, 6]
    assert (again.ds[0][1] == first.ds[0][1]).all()


def test_a_jsonl_file_and_a_folder_of_the_same_texts(folder, wrap, tmp_path):
    lines = [{"text": path.read_text(), "title": path.stem} for path in sorted(folder.rglob("*.txt"))]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    one, two = wrap(tmp_path / "texts.jsonl"), wrap(folder)
    assert [about["title"] for about in one.retriever.documents] == [line["title"] for line in lines]
    for (seq, found), (other_seq, other_found) in zip(one.ds, two.ds, strict=True):
        assert torch.equal(seq, other_seq) and torch.equal(found, other_found)


@pytest.mark.filterwarnings("ignore:building")
def test_an_iterable_without_a_fingerprint_needs_a_folder(wrap, tmp_path):
    documents = [Document(text(0, 30), "one", "s"), Document(text(1, 30), "two", "s")]
    with pytest.raises(ValueError, match=r"a list has no fingerprint .*: pass work_dir"):
        wrap(documents)
    assert wrap(documents, work_dir=tmp_path / "mine").stats["docs"] == 2
    with pytest.warns(UserWarning, match=r"building chunks\.npy again"):
        assert wrap(documents[:1], work_dir=tmp_path / "mine").stats["docs"] == 1


@pytest.mark.parametrize(
    ("path", "error"),
    [("nowhere", FileNotFoundError), ("nowhere.jsonl", FileNotFoundError), ("empty", FileNotFoundError)],
)
def test_documents_that_are_not_there(wrap, tmp_path, path, error):
    (tmp_path / "empty").mkdir()
    with pytest.raises(error, match=path):
        wrap(tmp_path / path)
    assert not (tmp_path / "work").exists()


def test_files_go_where_they_are_told(folder, wrap, tmp_path):
    out = tmp_path / "out"
    made = wrap(
        folder,
        chunks_memmap_path=out / "train.chunks.dat",
        seqs_memmap_path=str(out / "train.seq.dat"),
        doc_ids_memmap_path=out / "train.doc_ids.dat",
        processed_stats_json_path=out / "stats.json",
        faiss_index_filename="my.index",
    )
    assert json.loads((out / "stats.json").read_text()) == made.stats
    assert {"train.chunks.dat", "train.chunks.knn.dat", "train.seq.dat", "train.doc_ids.dat", "my.index"} <= {
        path.name for path in out.iterdir()
    }
    assert not (tmp_path / "work").exists()
    assert made.stats["docs"] == 5 and made.stats["k"] == K and made.stats["recall"] == 1
    assert made.stats["chunks"] == made.ds.num_chunks and made.stats["seqs"] == len(made.ds)


def test_a_finished_folder_may_be_read_only(folder, wrap):
    made = wrap(folder)
    paths = [made.work_dir, *made.work_dir.iterdir()]
    modes = [path.stat().st_mode for path in paths]
    for path in reversed(paths):
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    try:
        again = wrap(folder)
        assert again.stats == made.stats
        assert again.generate(max_new_tokens=M).shape == (1, M + 1)
    finally:
        for path, mode in zip(paths, modes, strict=True):
            path.chmod(mode)


def test_reprocess_builds_everything_again(folder, wrap, monkeypatch):
    made = wrap(folder)
    arrays = ("chunks.npy", "seqs.npy", "doc_ids.npy", "chunks.embedded.npy", "knn.index", "chunks.knn.npy")
    before = {name: (made.work_dir / name).stat().st_mtime_ns for name in arrays}
    contents = {name: (made.work_dir / name).read_bytes() for name in arrays}
    monkeypatch.setenv("REPROCESS", "1")
    with pytest.warns(UserWarning, match="REPROCESS"):
        wrap(folder)
    assert all((made.work_dir / name).stat().st_mtime_ns > before[name] for name in arrays)
    assert {name: (made.work_dir / name).read_bytes() for name in arrays} == contents


@pytest.mark.filterwarnings("ignore:building")
def test_a_changed_corpus_or_setting_is_built_again(folder, wrap):
    made = wrap(folder)
    (folder / "sixth.txt").write_text(text(6, 20))
    assert wrap(folder).stats["docs"] == 6
    assert wrap(folder, knn=3).ds[0][1].shape == (N // M, 3, 2 * M)
    with pytest.warns(UserWarning, match="max_chunks 12, .*stopped before 'more/fifth'"):
        assert wrap(folder, max_chunks=12).stats["docs"] < made.stats["docs"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"chunk_size": 16}, ValueError, "chunk_size 16, but the model was made for 8"),
        (
            {"retro": make_retro(num_tokens=1000)},
            ValueError,
            r"knows 1000 tokens and pads with 0, the tokenizer gives 30522 .*num_tokens=30522, pad_id=0",
        ),
        ({"retro": make_retro(pad_id=5)}, ValueError, r"pads with 5, the tokenizer .* pads with 0: .*pad_id=0"),
        ({"tokenizer": 300, "retro": make_retro(num_tokens=299)}, ValueError, "knows 299 .* gives 300"),
        ({"tokenizer": 300, "retro": make_retro(pad_id=5)}, ValueError, "pads with 5, the tokenizer gives 300"),
        ({"tokenizer": "nowhere"}, FileNotFoundError, "no tokenizer 'nowhere'"),
        ({"retro": torch.nn.Linear(2, 2)}, TypeError, "(?s)RETRO|ChunkedLM"),
        ({"knn": 0}, ValueError, "knn is 0: it must be at least 1"),
        ({"indx": "Flat"}, TypeError, "indx"),
    ],
)
def test_what_does_not_go_together(folder, wrap, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        wrap(folder, **changes)
    assert "indx" in changes or not (tmp_path / "work").exists(), "met before any work"


# other tokenizers


def small_retro(tokenizer) -> RETRO:
    return make_retro(num_tokens=tokenizer.size, pad_id=tokenizer.ids.pad)


@pytest.mark.parametrize("kind", ["bpe", "gpt2", "llama2"])
def test_a_model_of_another_tokenizer_is_trained_and_writes(wrap, folder, tokenizers, kind):
    """Into a folder, which is all that the wrapper is told; prompts, passages and neighbours are its text."""
    tokenizer = get_tokenizer(tokenizers[kind])
    made = wrap(folder, tokenizer=tokenizers[kind], retro=small_retro(tokenizer))
    assert made.tokenizer is tokenizer and made.stats["special_ids"] == tokenizer.ids._asdict()
    texts = {path.stem: path.read_text() for path in folder.rglob("*.txt")}
    tokens = sum(len(tokenizer.backend.encode(text, add_special_tokens=False).ids) + 2 for text in texts.values())
    assert made.stats["tokens"] == tokens
    history = made.fit(steps=6, batch_size=4, lr=0.01, warmup_steps=1, valid_share=0.3, progress=False)
    assert history.losses[-1] < history.losses[0] < 2 * np.log(tokenizer.size)
    generation = made.generate_text("law and", exclude=["second"], temperature=0)
    opening = [tokenizer.ids.sos, *tokenizer.backend.encode("law and", add_special_tokens=False).ids]
    assert list(generation.tokens[: len(opening)]) == opening and generation.text.startswith("law and")
    assert generation.text == decode(generation.tokens, tokenizer=tokenizers[kind])
    read = [near for passage in generation.passages for near in passage.neighbours]
    assert len(read) == K * ((len(generation.tokens) - 1) // M) > 0 and not any(near.document == 4 for near in read)
    assert all(near.text in texts[near.title.split("/")[-1]] for near in read)


@pytest.mark.parametrize("kind", ["bpe", "gpt2"])
def test_writing_starts_and_ends_with_the_tokenizers_own_ids(wrap, folder, tokenizers, kind):
    tokenizer = get_tokenizer(tokenizers[kind])
    made = wrap(folder, tokenizer=tokenizers[kind], retro=small_retro(tokenizer))
    with torch.no_grad():
        made.retro.to_logits.weight.zero_()
        made.retro.to_logits.bias[tokenizer.ids.eos] = 9
    assert made.generate(temperature=0).tolist() == [[tokenizer.ids.sos, tokenizer.ids.eos]]


def test_a_tokenizer_is_trained_on_the_corpus_once(wrap, folder, tmp_path):
    """Again when the corpus or the size has changed, and then what is made of it, too."""
    texts = [path.read_text() for path in sorted(folder.rglob("*.txt"))]
    made = wrap(folder, tokenizer=300, retro=make_retro(num_tokens=320))
    train_tokenizer(texts, tmp_path / "alone", size=300, progress=False)
    names = ("tokenizer.json", "tokenizer_config.json")
    for name in names:
        assert (made.work_dir / "tokenizer" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    assert made.tokenizer.fingerprint == get_tokenizer(tmp_path / "alone").fingerprint
    before = files(tmp_path / "work")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = wrap(folder, tokenizer=300, retro=make_retro(num_tokens=300))
    assert files(tmp_path / "work") == before and again.stats == made.stats
    assert again.generate_text("law", max_new_tokens=2).text.startswith("law")
    (folder / "sixth.txt").write_text("zebra " * 40)
    with pytest.warns(UserWarning) as told:
        other = wrap(folder, tokenizer=300, retro=make_retro(num_tokens=300))
    said = [str(each.message) for each in told]
    assert "building tokenizer.json again: corpus was" in said[0] and "building chunks.npy again: corpus" in said[1]
    assert other.tokenizer.fingerprint != made.tokenizer.fingerprint == again.tokenizer.fingerprint
    with pytest.warns(UserWarning, match=r"building tokenizer\.json again: size was 300 and is 280"):
        assert wrap(folder, tokenizer=280, retro=make_retro(num_tokens=300)).tokenizer.size == 280


def test_documents_that_can_be_read_only_once_are_refused_before_they_are(wrap, tmp_path):
    documents = (Document(text(seed, 30), "a", "s") for seed in range(3))
    with pytest.raises(ValueError, match="a generator can be read only once: pass a list, or a tokenizer's folder"):
        wrap(documents, tokenizer=300, retro=make_retro(num_tokens=300), work_dir=tmp_path / "mine")
    assert len(list(documents)) == 3 and not (tmp_path / "mine").exists()


def test_a_vocabulary_too_small_for_all_bytes(wrap, folder):
    with pytest.raises(ValueError, match="a vocabulary of 200 has no room for all bytes: pass 259 or more"):
        wrap(folder, tokenizer=200)


# training


def test_the_wrapper_is_the_models_module(wrapped):
    assert [id(p) for p in wrapped.parameters()] == [id(p) for p in wrapped.retro.parameters()]
    optimizer = wrapped.get_optimizer(lr=0.5, wd=0.25)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in wrapped.retro.parameters())
    assert optimizer.defaults["lr"] == 0.5 and optimizer.param_groups[0]["weight_decay"] == 0.25
    seq, retrieved = next(iter(wrapped.get_dataloader(batch_size=3)))
    assert seq.shape == (3, N + 1) and retrieved.shape == (3, N // M, K, 2 * M)
    for mode in (True, False):
        wrapped.train(mode)
        assert wrapped.retro.training is mode
    assert torch.equal(wrapped(seq[:, :-1], retrieved), wrapped.retro(seq[:, :-1], retrieved))
    assert torch.equal(wrapped(seq, retrieved, return_loss=True), wrapped.retro(seq, retrieved, return_loss=True))


@pytest.mark.parametrize("valid_share", [0, 0.3])
def test_fit_trains_on_the_corpus(wrap, folder, valid_share):
    made = wrap(folder)
    before = [p.clone() for p in made.retro.parameters()]
    history = made.fit(steps=6, batch_size=4, lr=0.01, warmup_steps=1, valid_share=valid_share, progress=False)
    assert history.losses[-1] < history.losses[0]
    assert any(not torch.equal(p, q) for p, q in zip(before, made.parameters(), strict=True))
    assert ("valid_loss" in history[-1]) == bool(valid_share)


def test_fit_holds_out_whole_documents(wrap, folder, monkeypatch):
    made, seen = wrap(folder), []

    def recorded(retro, train, valid, **options):
        seen.extend([train, valid])
        return wrapper.History()

    monkeypatch.setattr(wrapper, "fit", recorded)
    made.fit(valid_share=0.4, seed=3, steps=1)
    train, valid = ({int(made.ds.sequence_documents[i]) for i in part.indices} for part in seen)
    assert len(valid) == 2 and not train & valid and train | valid == set(range(5))


def test_kept_out_documents_are_validated_on_and_never_read(wrap, folder, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        wrapper, "fit", lambda retro, train, valid, **_: seen.update(train=train, valid=valid) or History()
    )
    whole, made = wrap(folder), wrap(folder, keep_out=[0, 3])  # side by side in one folder
    assert whole.kept_out == [] and made.kept_out == [0, 3]
    doc_ids, knns = made.ds.doc_ids, np.array(made.ds.knns)
    assert knns.shape == np.array(whole.ds.knns).shape and not np.isin(doc_ids[knns[knns >= 0]], [0, 3]).any()
    assert np.isin(whole.ds.doc_ids[np.array(whole.ds.knns)], [0, 3]).any()
    made.fit(steps=1)
    documents = made.ds.sequence_documents
    assert set(documents[seen["valid"].indices]) == {0, 3} and not {0, 3} & set(documents[seen["train"].indices])
    chunk = torch.from_numpy(np.array(open_array(made.work_dir / "chunks.npy")[doc_ids == 0][:1, :-1], np.int64))
    _, ids = made.retriever.nearest(chunk, exclude=[1])
    assert not np.isin(doc_ids[ids], [0, 1, 3]).any()
    fetched = made.fetch_knn_chunks_fn(chunk)
    assert torch.equal(fetched, made.retriever.tokens(made.retriever.nearest(chunk)[1]))
    made.fit(steps=1, valid_share=0)
    assert seen["valid"] is None and len(seen["train"]) == len(made.ds)


def test_a_share_is_kept_out(wrap, folder):
    share = wrap(folder, keep_out=0.4)
    assert len(share.kept_out) == 2 and share.kept_out == wrap(folder, keep_out=0.4).kept_out
    _, valid = split_by_document(share.ds, 0.4)
    assert set(share.ds.sequence_documents[valid.indices]) == set(share.kept_out)


def test_one_document_cannot_be_split(wrap, tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "only.txt").write_text(text(0, 40))
    made = wrap(tmp_path / "one")
    assert made.stats["missing"] == K * made.stats["chunks"]
    with pytest.raises(ValueError, match=r"1 document\(s\) cannot be split by document"):
        made.fit(steps=1, progress=False)
    assert len(made.fit(steps=2, valid_share=0, progress=False)) == 2
    generation = made.generate_text("war", max_new_tokens=2 * M, temperature=0, exclude=["only"])
    assert len(generation.passages) == 3 and not any(passage.neighbours for passage in generation.passages)


# sampling


def test_neighbours_are_fetched_as_in_the_reference(wrapped):
    chunks = torch.randint(200, 3000, (4, M))
    retrieved = wrapped.fetch_knn_chunks_fn(chunks)
    assert retrieved.shape == (4, K, 2 * M) and retrieved.dtype == torch.int64
    assert torch.equal(retrieved, wrapped.retriever.tokens(wrapped.retriever.nearest(chunks)[1]))
    assert not wrapped.fetch_knn_chunks_fn(chunks, exclude=range(wrapped.stats["docs"])).any()


def test_chunks_are_looked_for_as_they_were_embedded(folder, wrap):
    made = wrap(folder, use_cls_repr=True)
    chunks = torch.from_numpy(made.retriever.chunks[:, :-1].astype(np.int64))
    assert made.retriever.nearest(chunks)[0][:, 0] == pytest.approx(0, abs=1e-4)
    assert torch.equal(made.fetch_knn_chunks_fn(chunks)[:, 0, :M], chunks)


@pytest.mark.parametrize("start", [None, 1, M - 1, M, M + 1, N - 1])
def test_generate_from_any_prompt(wrapped, start):
    prompt = None if start is None else torch.randint(200, 3000, (3, start))
    out = wrapped.generate(prompt, filter_fn=top_p, filter_thres=0.5)
    assert out.shape[1] <= N and len(out) == (1 if prompt is None else 3)
    assert torch.equal(out[:, :start], prompt) if start else out[0, 0] == 101


def test_samples_are_reproducible_and_temperature_0_is_greedy(wrapped):
    def sample(seed, **options):
        prompt = torch.tensor([[101, 2162, 2003]])
        return wrapped.generate(prompt, generator=torch.Generator().manual_seed(seed), **options).tolist()

    assert sample(1, filter_fn=top_k) == sample(1, filter_fn=top_k) != sample(2, filter_fn=top_k)
    assert sample(1, temperature=0) == sample(2, temperature=0.0) == sample(3, filter_thres=1)


def test_what_the_model_reads_is_what_a_forward_pass_would_be_given(wrapped):
    """Greedy samples against the whole sequence, with the neighbours of every complete chunk."""
    row = wrapped.generate(torch.tensor([[101, 2162]]), temperature=0)
    inputs = row[:, :-1]
    l = inputs.shape[1] // M
    retrieved = wrapped.fetch_knn_chunks_fn(inputs[0, : l * M].reshape(l, M))[None]
    with torch.no_grad():
        logits = wrapped.retro.eval()(inputs, retrieved)
    greedy = logits.argmax(dim=-1)[0, 1:]
    assert torch.equal(greedy, row[0, 2:])


def test_given_neighbours_are_used_and_not_looked_for(wrapped):
    prompt, found = torch.randint(200, 3000, (2, 2 * M + 3)), []
    given = torch.randint(200, 3000, (2, 2, K, 2 * M))
    options = dict(temperature=0, max_new_tokens=M, on_retrieved=lambda u, distances, ids: found.append((u, ids.shape)))
    out = wrapped.generate(prompt, given, **options)
    assert found == [(2, (2, K))]
    assert not torch.equal(given, torch.zeros_like(given)) and out.shape == (2, 3 * M + 3)


def test_excluded_documents_are_never_read(wrapped):
    prompt, found = torch.randint(200, 3000, (2, 2 * M)), []
    wrapped.generate(prompt, exclude=["first", 3], on_retrieved=lambda u, distances, ids: found.append(ids))
    documents = open_array(wrapped.work_dir / "doc_ids.npy")[np.stack(found)]
    assert len(found) == 3 and set(documents.flat) <= {1, 2, 4}
    with pytest.raises(KeyError, match=r"no document 'firts' among 5; there are e\.g\. .*first"):
        wrapped.generate(max_new_tokens=1, exclude=["firts"])  # though no chunk is completed
    with pytest.raises(TypeError, match="pass a list of documents"):
        wrapped.generate_text("war", exclude="first")


def test_a_prompt_that_is_too_long(wrapped):
    with pytest.raises(ValueError, match=f"{N + 1} tokens, the model takes {N}"):
        wrapped.generate(torch.full((1, N + 1), 2162))


# a short prompt


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, tiny_bert, tokenizers) -> TrainingWrapper:
    """A language model that reads, and whose tokenizer has no padding: it is the id after its last."""
    options = dict(start=1, every=1, chunk_size=M, enc_dim=16, enc_depth=1, heads=2, dim_head=8, max_seq_len=N)
    retro = retrofit(language_model("gpt2"), tokenizer=tokenizers["gpt2"], **options).eval()
    move(retro.reader)
    documents = [Document(text(seed, words), name, "s") for seed, (name, words) in enumerate(LENGTHS.items())]
    work = tmp_path_factory.mktemp("fitted")
    return TrainingWrapper(
        retro=retro, chunk_size=M, documents_path=documents, knn=K, bert=tiny_bert, progress=False, work_dir=work
    )


@pytest.mark.parametrize("words", [0, 2, 4])
def test_a_prompt_that_ends_a_chunk_is_preceded_by_padding(fitted, words):
    """Which is in the tokens, not in the text; and the last chunk of the prompt has looked for neighbours."""
    prompt, tokenizer = " ".join((WORDS * 2)[:words]), fitted.tokenizer
    opening = [tokenizer.ids.sos, *tokenizer.backend.encode(prompt, add_special_tokens=False).ids]
    padding, texts = -len(opening) % M, []
    options = dict(temperature=0, max_new_tokens=3)
    generation = fitted.generate_text(prompt, end_chunk=True, on_text=texts.append, **options)
    told = padding + len(opening)
    assert padding and told % M == 0 and len(generation.tokens) == told + 3
    assert list(generation.tokens[:told]) == [tokenizer.ids.pad] * padding + opening
    assert generation.text == prompt + tokenizer.decode(generation.tokens[told:]) == texts[-1]
    assert [text.startswith(prompt) for text in texts] == [True] * 3
    assert "".join(passage.text for passage in generation.passages) == generation.text
    assert [len(passage.neighbours) for passage in generation.passages] == [K] * (told // M) + [0]
    plain = fitted.generate_text(prompt, **options)
    assert list(plain.tokens[: len(opening)]) == opening


def test_the_first_token_that_is_written_reads_what_was_retrieved_for_the_prompt(fitted):
    """Its logits are those of the padded prompt with its neighbours, found or given; else of the prompt alone."""
    model, tokenizer = fitted.retro, fitted.tokenizer
    plain = tokenize("law", tokenizer=tokenizer)[:, :-1]
    padded = left_pad(plain, M, tokenizer.ids.pad)
    found = fitted.fetch_knn_chunks_fn(padded)[None]
    others = (found + 1) % tokenizer.ids.pad
    assert plain.shape[1] < M and found.shape == (1, 1, K, 2 * M) and (found != tokenizer.ids.pad).any()

    def written(**options):
        logits = []
        fitted.generate_text("law", filter_fn=lambda x, thres: logits.append(x) or x, max_new_tokens=1, **options)
        return logits[0]

    with torch.no_grad():
        expected, changed, alone = (model(*each)[:, -1] for each in ((padded, found), (padded, others), (plain, None)))
    assert_close(written(end_chunk=True), expected, atol=1e-5, rtol=0)
    assert_close(written(end_chunk=True, retrieved=others), changed, atol=1e-5, rtol=0)
    assert_close(written(), alone, atol=1e-5, rtol=0)
    assert min((expected - other).abs().max() for other in (changed, alone)) > 0.1


def test_padding_before_a_prompt_is_refused_where_it_would_be_read(wrapped):
    with pytest.raises(ValueError, match="padding before the prompt, which a RETRO would read: use a RETROfit"):
        wrapped.generate_text("war", end_chunk=True)


# text


def test_generated_text_says_what_was_read(wrapped, monkeypatch):
    read, nearest = [], wrapped.retriever.nearest

    def recorded(chunks, exclude=()):
        distances, ids = nearest(chunks, exclude)
        read.append((chunks, distances, ids))
        return distances, ids

    monkeypatch.setattr(wrapped.retriever, "nearest", recorded)
    prompt = "the treaty of peace and the law of the land"
    generation = wrapped.generate_text(prompt, exclude=["second"], temperature=0)
    tokens = torch.tensor(generation.tokens)
    text = decode(tokens, tokenizer=wrapped.tokenizer)
    assert generation.text == str(generation) == text and text.startswith(prompt)
    assert len(read) == (len(tokens) - 1) // M  # of no chunk twice, nor of a last one that no token follows
    assert len(generation.passages) == -(-len(tokens) // M)
    for u, passage in enumerate(generation.passages):
        assert passage.text == decode(tokens[u * M : (u + 1) * M], tokenizer=wrapped.tokenizer)
        if u >= len(read):
            assert passage.neighbours == ()
            continue
        chunk, distances, ids = read[u]
        assert torch.equal(chunk[0], tokens[u * M : (u + 1) * M])
        assert [neighbour.chunk for neighbour in passage.neighbours] == ids[0].tolist()
        assert [neighbour.distance for neighbour in passage.neighbours] == pytest.approx(distances[0].tolist())
        assert all(neighbour.title in set(LENGTHS) - {"second"} for neighbour in passage.neighbours)


@pytest.mark.parametrize("words", [0, M - 1, M, 2 * M - 1])
def test_prompts_of_any_length(wrapped, words):
    """[CLS] and m − 1 words are a whole chunk; nothing at all is [CLS] alone."""
    prompt = " ".join((WORDS * 2)[:words])
    generation = wrapped.generate_text(prompt, max_new_tokens=2, temperature=0)
    assert list(generation.tokens[: words + 1]) == tokenize(prompt, tokenizer=wrapped.tokenizer)[0, :-1].tolist()
    assert len(generation.tokens) == words + 3
    complete = [bool(passage.neighbours) for passage in generation.passages]
    assert complete == [(u + 1) * M <= words + 2 for u in range(len(complete))]
    unread = wrapped.generate_text(prompt, max_new_tokens=0)
    assert unread.text == prompt and not any(passage.neighbours for passage in unread.passages)


def test_text_streams(wrapped):
    texts = []
    generation = wrapped.generate_text("law and", max_new_tokens=12, temperature=0, on_text=texts.append)
    assert len(texts) == 12 and texts[-1] == generation.text
    assert all(text.startswith("law and") for text in texts)
    assert texts[0] == decode(generation.tokens[:4], tokenizer=wrapped.tokenizer)


def test_text_is_reproducible(wrapped):
    def write(seed):
        return wrapped.generate_text("gold", generator=torch.Generator().manual_seed(seed), filter_fn=top_p).text

    assert write(1) == write(1) != write(2)
