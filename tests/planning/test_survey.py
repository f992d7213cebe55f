"""A survey: counts held against plain lists, bytes against the files of a build, seconds against what was measured."""

import json
import math
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retro_nb.planning import counting
from retro_nb.planning.costs import Rates, index_bytes, index_seconds, lists_of, search_seconds, steps
from retro_nb.planning.survey import survey
from retro_nb.reference import chunks_to_precalculated_knn_, documents_to_chunks_
from retro_nb.store import chunking
from retro_nb.store.index import build_index, choose_index
from retro_nb.store.settings import StoreSettings
from retro_nb.store.store import Store
from retro_nb.text.document import Document
from retro_nb.text.duplicates import repeating
from retro_nb.text.tokens import get_tokenizer

ROOT = Path(__file__).resolve().parents[2]
GREEK = "Η Ελλάδα είναι χώρα της νοτιοανατολικής Ευρώπης. "
CHINESE = "中华人民共和国是位于亚洲东部的国家，首都北京。"
ENGLISH = "the people of every state shall prosper, and Commerce with foreign nations. "


@pytest.fixture
def quick(monkeypatch, tiny_bert):
    """A survey with a tiny BERT, and a measurement that takes no time."""
    monkeypatch.setattr("retro_nb.planning.costs.VECTORS", 512)
    monkeypatch.setattr("retro_nb.planning.costs.QUERIES", 32)
    monkeypatch.setattr("retro_nb.planning.costs.LISTS", 4)
    monkeypatch.setattr("retro_nb.planning.costs.READ", 2)
    monkeypatch.setattr("retro_nb.planning.costs.EMBEDDING_SECONDS", 0.0)

    def run(corpus, seconds=20, **options):
        chosen = StoreSettings(**{"chunk_size": 8, "seq_len": 32, "bert": tiny_bert, **options})
        return survey(corpus, chosen, seconds=seconds, progress=False)

    return run


def named(texts):
    return [Document(text, f"text {number}", f"{number}.txt") for number, text in enumerate(texts)]


def lists(texts, m, n, tokenizer=None):
    """The counts, from whole lists of tokens."""
    tokenizer = get_tokenizer(tokenizer)
    found = Counter(documents=len(texts), characters=sum(map(len, texts)))
    found["bytes"] = sum(len(text.encode("utf-8", "replace")) for text in texts)
    found["longest"] = max(map(len, texts))
    found["duplicate_documents"] = len([text for text in texts if text]) - len({*texts} - {""})
    chunks = []
    for text in texts:
        (ids,) = tokenizer.encode([text.encode("utf-8", "replace").decode()])
        ids = [tokenizer.ids.sos, *ids, tokenizer.ids.eos] if ids else []
        cut = [ids[start : start + m] for start in range(0, max(len(ids) - 1, 0), m)]
        found["tokens"] += len(ids)
        found["unknown_tokens"] += ids.count(tokenizer.backend.token_to_id("[UNK]"))
        found["empty_documents"] += not ids
        found["seqs"] += math.ceil(len(cut) / (n // m))
        chunks += [tuple(chunk) for chunk in cut]
    found["chunks"], found["duplicate_chunks"] = len(chunks), len(chunks) - len(set(chunks))
    found["padding"] = sum(m - len(chunk) for chunk in chunks)
    found["padded_chunks"] = sum(len(chunk) < m / 2 for chunk in chunks)
    return found


# what was read

WORDS = st.sampled_from(["the", "state", "people", ",", "\n", "antediluvian", "中", "é", "👍", "\ud800", "ក"])
TEXTS = st.lists(st.lists(WORDS, max_size=30).map(" ".join), min_size=1, max_size=8)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=TEXTS, m=st.integers(1, 9), l=st.integers(1, 3))
def test_the_counts_are_those_of_lists(texts, m, l):
    expected = lists(texts, m, m * l)
    reading = counting.Reading(get_tokenizer(), m, l)
    reading.read(named(texts), math.inf)
    twice = {"documents": counting.repeated(reading.texts), "chunks": counting.repeated(reading.hashes)}
    got = reading.counts + Counter({f"duplicate_{kind}": count for kind, count in twice.items()})
    assert reading.complete and got["tokenised"] == got["characters"]
    assert {name: got[name] for name in expected} == dict(expected)
    if expected["chunks"]:
        whole = reading.whole(None)
        sizes = [lists([text], m, m)["chunks"] for text in texts]
        assert whole.pairs == sum(a * b for i, a in enumerate(sizes) for j, b in enumerate(sizes) if i != j)
        assert whole == reading.whole(10**6), "nothing is estimated where all was read"
        assert (whole.chunks, whole.tokens, whole.bytes) == tuple(expected[k] for k in ("chunks", "tokens", "bytes"))


def test_a_survey_says_what_was_found(quick):
    texts = [ENGLISH * 9, "", ENGLISH, ENGLISH * 2, ENGLISH, "\n \n"]
    documents = named(texts)
    documents[2:4] = [replace(documents[2], replaced=2), replace(documents[3], replaced=5)]
    found = quick(document for document in documents)
    assert {name: getattr(found, name) for name in lists(texts, 8, 32)} == dict(lists(texts, 8, 32))
    assert found.complete and found.length is None and found.longest_title == "text 0"
    assert (found.replaced_characters, found.replaced_documents, found.first_replaced) == (7, 2, "2.txt")
    assert sum(found.lengths) == 6 and found.lengths[0] == 1
    assert all(found.lengths[len(text).bit_length()] for text in texts)


def grams(text, size=13):
    """The set of a text's runs of tokens."""
    (ids,) = get_tokenizer().encode([text])
    ids = [get_tokenizer().ids.sos, *ids, get_tokenizer().ids.eos]
    return {tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)}


def like_one_before(texts):
    """How many share 13-grams with one before them, at a Jaccard similarity of .8 or more: all pairs, by sets."""
    sets = [grams(text) for text in texts]
    return sum(any(a and len(a & b) / len(a | b) >= 0.8 for b in sets[:i]) for i, a in enumerate(sets))


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), room=st.integers(0, 900))
def test_near_duplicates_are_those_of_all_pairs_of_the_first_documents(monkeypatch, seed, room):
    rng, words = np.random.default_rng(seed), [*ENGLISH.split(), *"every ship that sails from here".split()]
    texts = [" ".join(rng.choice(words, rng.integers(5, 120)))]
    for _ in range(7):  # some words of an earlier text are replaced
        text = np.array(texts[rng.integers(len(texts))].split())
        text[rng.integers(0, len(text), rng.integers(0, 4))] = rng.choice(words)
        texts.append(" ".join(text))
    monkeypatch.setattr(counting, "COMPARED", room)
    reading = counting.Reading(get_tokenizer(), 8, 4)
    reading.read(named(texts), math.inf)
    sizes = np.cumsum([lists([text], 8, 32)["tokens"] for text in texts])
    assert len(reading.kept) == (sizes <= room).sum()
    found, compared = repeating(reading.kept)
    assert compared == len(reading.kept) and len(found) == like_one_before(texts[:compared])


def test_a_survey_counts_near_duplicates_and_says_among_how_many(quick, monkeypatch):
    words = np.random.default_rng(0).permuted([ENGLISH.split() * 12] * 6, axis=1)
    texts = [" ".join(text) for text in words]
    texts += [texts[0] + " more", "less " + texts[1], texts[2]]
    found = quick(named(texts))
    assert found.near_duplicate_documents == like_one_before(texts) == 3 and found.compared_documents == 9
    assert found.duplicate_documents == 1 and "3 of all documents" in str(found)
    assert any("near_duplicates(" in each for each in found.remarks)
    monkeypatch.setattr(counting, "COMPARED", found.tokens - 1)
    assert "2 of the first 8 documents" in str(quick(named(texts)))
    monkeypatch.setattr(counting, "COMPARED", 10)
    assert "not looked for" in str(quick(named(texts)))


def test_a_document_that_was_cut_off_is_not_compared(quick, monkeypatch):
    for module in (chunking, counting):
        monkeypatch.setattr(module, "PIECE_CHARACTERS", 1000)
        monkeypatch.setattr(module, "PIECES_AT_ONCE", 1)
    assert quick(named([ENGLISH * 1000]), seconds=0).compared_documents == 0


def test_slices_of_a_text_do_not_show(monkeypatch):
    texts = ["a\ud800中👍 b" * 40, "a\ud800中👍 b" * 40, "é" * 9]
    monkeypatch.setattr(counting, "SLICE", 7)
    reading = counting.Reading(get_tokenizer(), 8, 4)
    reading.read(named(texts), math.inf)
    expected = lists(texts, 8, 32)
    assert reading.counts["bytes"] == expected["bytes"] and counting.repeated(reading.texts) == 1
    assert reading.counts["spaces"] == 80


def test_what_is_kept_does_not_grow(monkeypatch):
    monkeypatch.setattr(counting, "SAMPLE", 10)
    reading = counting.Reading(get_tokenizer(), 8, 4)
    reading.read(named([f"{ENGLISH} {i}" for i in range(300)]), math.inf)
    chunks = reading.counts["chunks"]
    assert 10 < len(reading.rows) <= 20 < chunks
    assert len(reading.texts) == 300 and len(reading.hashes) == chunks
    assert len({tuple(row) for row in reading.rows}) > 5


@pytest.mark.parametrize("kind", ["gpt2", "llama2", "bpe"])
def test_another_tokenizer_is_counted_as_it_cuts(quick, tokenizers, kind):
    texts = [ENGLISH * 3, "é中👍", ""]
    found, expected = quick(named(texts), tokenizer=tokenizers[kind]), lists(texts, 8, 32, tokenizers[kind])
    assert (found.tokens, found.chunks, found.padding) == tuple(expected[k] for k in ("tokens", "chunks", "padding"))


def test_a_tokenizer_to_be_trained(quick, monkeypatch, tmp_path, tiny_bert):
    corpus = named([f"{ENGLISH} {GREEK}"] * 4)
    characters = sum(len(document.text) for document in corpus)
    whole = quick(corpus, tokenizer=300)
    built = StoreSettings(chunk_size=8, seq_len=32, bert=tiny_bert, tokenizer=300)
    stats = Store.build(corpus, tmp_path, built, progress=False).stats
    assert whole.trained_on_all and (whole.tokens, whole.chunks) == (stats["tokens"], stats["chunks"])
    limits = {characters: True, characters - 1: False, 100: False}
    for limit, is_all in limits.items():
        monkeypatch.setattr(sys.modules["retro_nb.planning.survey"], "TRAINED_ON", limit)
        part = quick(corpus, tokenizer=300)
        assert part.trained_on_all == is_all
        assert is_all != (f"trained on the first {limit} characters" in " ".join(part.remarks))
    with pytest.raises(ValueError, match="read only once"):
        quick(iter(corpus), tokenizer=300)


# what was not read


class Alike:
    """So many documents of the same text."""

    def __init__(self, count, text):
        self.count, self.text = count, text

    def __repr__(self):
        return f"Alike({self.count})"  # and not each of them, where a test fails

    def __len__(self):
        return self.count

    def __iter__(self):
        return (Document(self.text, "a", "a") for _ in range(self.count))


def test_the_time_ends_the_reading_and_the_rest_is_estimated(quick):
    few, many = (quick(Alike(count, ENGLISH), seconds=0) for count in (1000, 2000))
    assert not few.complete and few.documents == few.chunks // lists([ENGLISH], 8, 32)["chunks"] == 1
    assert few.whole.documents == 1000 and few.whole.chunks == 1000 * few.chunks
    for name in ("documents", "bytes", "tokens", "chunks", "seqs", "titles"):
        assert getattr(many.whole, name) == 2 * getattr(few.whole, name), name
    assert few.whole.pairs == (1000 * few.chunks) ** 2 - 1000 * few.chunks**2
    chunk, embed, _, search = zip(few.steps, many.steps, strict=True)
    constant = 5 * 128 + len(get_tokenizer().backend.to_str().encode())
    for (small, large), fixed in ((chunk, constant), (embed, 128), (search, 128)):
        assert large.disk - fixed == 2 * (small.disk - fixed)
    assert "Of 1,000 documents 1 were read" in str(few) and "In all there will be about" in str(few)


def test_without_a_length_there_is_at_least_what_was_read(quick):
    found = quick(iter(Alike(1000, ENGLISH)), seconds=0)
    assert not found.complete and found.length is None and found.whole.chunks == found.chunks
    assert "has at least" in str(found)


def test_a_streamed_dataset_does_not_know_its_length(quick):
    class Streamed(Alike):
        def __len__(self):
            raise TypeError("object of type 'IterableDataset' has no len()")

    assert quick(Streamed(3, ENGLISH)).length is None


def test_empty_documents_do_not_end_the_reading(quick):
    found = quick(named(["", " ", "", ENGLISH, ENGLISH]), seconds=0)
    assert found.empty_documents == 3 and found.documents == 4 and not found.complete


def test_a_huge_document_is_cut_off_and_estimated(quick, monkeypatch):
    monkeypatch.setattr("retro_nb.store.chunking.PIECE_CHARACTERS", 1000)
    monkeypatch.setattr("retro_nb.store.chunking.PIECES_AT_ONCE", 1)
    monkeypatch.setattr(counting, "PIECE_CHARACTERS", 1000)
    monkeypatch.setattr(counting, "PIECES_AT_ONCE", 1)
    text = ENGLISH * 1000
    part, whole = quick(named([text]), seconds=0), quick(named([text]))
    assert not part.complete and whole.complete
    assert part.characters == whole.characters == len(text) and 1000 <= part.tokenised < 3000
    assert 0 < part.tokens < whole.tokens / 20
    assert part.whole.tokens == pytest.approx(whole.tokens, rel=0.05)
    assert part.whole.chunks == pytest.approx(whole.chunks, rel=0.05)
    assert part.whole.pairs == whole.whole.pairs == 0, "nothing but its own document"


# bytes and seconds


def build(corpus, folder, tiny_bert, index=None, knn=3):
    """Build a store, and give its files' sizes."""
    paths = {f"{kind}_memmap_path": folder / f"{kind}.npy" for kind in ("chunks", "seqs", "doc_ids")}
    stats = documents_to_chunks_(corpus, **paths, chunk_size=8, seq_len=32, progress=False)
    chunks_to_precalculated_knn_(
        num_nearest_neighbors=knn, num_chunks=stats["chunks"], chunk_size=8, chunk_memmap_path=folder / "chunks.npy",
        doc_ids_memmap_path=folder / "doc_ids.npy", bert=tiny_bert, index=index, progress=False,
    )  # fmt: skip
    return {path.name: path.stat().st_size for path in folder.iterdir()}


@pytest.mark.parametrize("index", [None, "IVF8,Flat"])
def test_bytes_on_disk_are_those_of_the_files(quick, sample_corpus, tmp_path, tiny_bert, index):
    found = quick(sample_corpus, knn=3, index=index)
    sizes = build(sample_corpus, tmp_path, tiny_bert, index)
    chunk, embed, indexed, search = found.steps
    assert [step.name for step in found.steps] == ["chunk", "embed", "index", "search"]
    exact = ("chunks.npy", "chunks.spans.npy", "chunks.bytes.npy", "doc_ids.npy", "seqs.npy", "chunks.tokenizer.json")
    assert chunk.disk - found.whole.titles == sum(sizes[name] for name in exact)
    assert found.whole.titles == pytest.approx(sizes["chunks.documents.jsonl"], rel=0.1)
    assert (embed.disk, indexed.disk) == (sizes["chunks.embedded.npy"], sizes["knn.index"])
    assert search.disk == sizes["chunks.knn.npy"]
    assert found.total_disk == pytest.approx(sum(sizes.values()), rel=0.02)


@pytest.mark.parametrize("spec", ["Flat", "IVF9,Flat", "IVF9,SQ8", "IVF9,PQ8", "SQ8", "HNSW16", "PCA16,IVF9,Flat"])
def test_bytes_of_an_index(spec):
    vectors = np.random.default_rng(0).normal(size=(2000, 32)).astype(np.float32)
    size = len(faiss.serialize_index(build_index(vectors, spec)))
    assert index_bytes(spec, 2000, 32) == pytest.approx(size, rel=0.05)


def test_the_model_of_an_inverted_file_is_what_was_measured():
    """The seconds of benchmarks/growth.py, from its rates of exact search and of one inverted file."""
    results = json.loads((ROOT / "benchmarks" / "results" / "growth-cpu.json").read_text(encoding="utf-8"))
    rows = {(row["chunks"], row["index"]): row for row in results["runs"]}
    flat, listed = rows[1_000_000, "Flat"], rows[100_000, "IVF1265,Flat"]
    rates = Rates(
        tokens=1.0,
        chunks=1.0,
        comparisons=1000 * 1_000_000 / flat["search_seconds_per_1000"],
        queries=math.inf,
        listed=1000 * (1265 + 64 * 100_000 / 1265) / listed["search_seconds_per_1000"],
        indexed=1e6 * flat["index_MB"] / flat["build_seconds"],
    )
    for (count, spec), row in rows.items():
        if count >= 100_000 and spec.startswith("IVF"):
            assert index_bytes(spec, count, 384) == pytest.approx(1e6 * row["index_MB"], rel=1e-3)
            assert row["build_seconds"] / 1.5 < index_seconds(spec, count, 384, rates) < 1.5 * row["build_seconds"]
            searched = search_seconds(spec, count, 384, count**2, rates) * 1000 / count
            slower = 2.2 if "PQ" in spec else 1.7
            assert row["search_seconds_per_1000"] / slower < searched < slower * row["search_seconds_per_1000"]


@pytest.mark.parametrize("lists", [1, 16, 64])
def test_a_query_reads_no_more_lists_than_there_are(lists):
    """With few lists a query is compared with every centre and every vector once."""
    rates = Rates(*(2.0 for _ in Rates._fields))
    assert search_seconds(f"IVF{lists},Flat", 1000, 8, 0, rates) == pytest.approx(1000 * (lists + 1000) / 2)


def test_seconds_follow_from_rates_and_counts(quick):
    found = quick(named([ENGLISH * 20, ENGLISH * 30]))
    chunk, embed, index, search = found.steps
    assert chunk.seconds == found.tokens / found.rates.tokens and embed.seconds == found.chunks / found.rates.chunks
    assert found.index == "Flat" and index.seconds == index.disk / found.rates.indexed
    pairs = found.whole.pairs / found.rates.comparisons
    assert search.seconds == found.chunks / found.rates.queries + pairs
    assert all(0 < rate < math.inf for rate in found.rates) and found.total_seconds > embed.seconds


def test_a_large_corpus_gets_the_index_that_the_build_takes(quick):
    corpus = Alike(100_000, ENGLISH)
    found = quick(corpus, seconds=0)
    assert found.whole.chunks > 100_000
    assert found.index == choose_index(found.whole.chunks, 32) and lists_of(found.index, 32) > 100
    small = quick(corpus, seconds=0, max_index_memory_usage="20m")
    assert small.index == choose_index(small.whole.chunks, 32, 20 * 2**20) != found.index
    assert small.steps[2].disk < 20 * 2**20 < found.steps[2].disk


def test_memory_follows_the_longest_document_and_the_index(ordinary):
    options = {"chunk_size": 8, "knn": 2, "dim": 32, "index": "Flat", "tokenizer": get_tokenizer()}
    size = ordinary.whole._replace(longest=10**9, chunks=10**8)
    few, many = steps(ordinary.whole, ordinary.rates, **options), steps(size, ordinary.rates, **options)
    chunk, _, index, search = (large.memory - small.memory for small, large in zip(few, many, strict=True))
    assert chunk > 2 * 10**9 and index > 4 * 32 * 10**8 * 1.3 and search > 4 * 32 * 10**8
    assert ordinary.peak_memory == max(step.memory for step in ordinary.steps) > 10**8


# remarks


@pytest.fixture
def ordinary(quick):
    words = np.random.default_rng(0).permuted([ENGLISH.split() * 3] * 20, axis=1)
    return quick(named([" ".join(text) for text in words]))


def test_an_ordinary_corpus_has_no_remarks(ordinary):
    assert ordinary.remarks == [] and "!" not in str(ordinary)


REMARKS = {
    "one": (["a b " * 200], "only one document: its chunks find no neighbours", "parts(corpus, max_chars="),
    "long": ([ENGLISH * 20, *(f"{n} {ENGLISH}" for n in range(9))], "'text 0' holds 68%", "parts(corpus, max_chars="),
    "double": ([ENGLISH] * 9, "89% of the documents", "max_similarity"),
    "greek": ([f"{n} {GREEK * 3}" for n in range(9)], "1.2 characters a token, 0% of the tokens unk", "tokenizer=8000"),
    "chinese": ([f"{n} {CHINESE * 3}" for n in range(9)], "the BERT, which finds the neighbours, hardly", "bert="),
    "tiny": ([f"{n} a" for n in range(30)], "tiny, 4 tokens on average: 56% of the chunks is padding", "join"),
}


@pytest.mark.parametrize(("texts", "said", "mend"), REMARKS.values(), ids=REMARKS)
def test_a_remark_says_what_is_wrong_and_what_to_do(quick, texts, said, mend):
    (remark,) = [each for each in quick(named(texts), chunk_size=9, seq_len=36).remarks if said in each]
    assert mend in remark


def test_remarks_on_files_and_machine(ordinary):
    def only(**changes):
        (remark,) = replace(ordinary, **changes).remarks
        return remark

    replaced = only(replaced_characters=1234, replaced_documents=2, first_replaced="notes/a.txt")
    assert "1,234 undecodable bytes in 2 documents, first in notes/a.txt" in replaced and "encoding=None" in replaced
    assert only(free_disk=1000).endswith("and 1.0 kB are free: pass another work_dir")
    assert "the machine has 1.0 MB: pass max_index_memory_usage=" in only(all_memory=1_000_000)


def test_near_duplicates_have_a_remark_beside_that_of_duplicates(ordinary):
    """5 of 100 documents are duplicates and thereby near-duplicates: only a sixth near-duplicate says more."""
    changes = {"documents": 100, "duplicate_documents": 5, "compared_documents": 100}
    of_duplicates = replace(ordinary, **changes, near_duplicate_documents=5).remarks
    both = replace(ordinary, **changes, near_duplicate_documents=6).remarks
    assert len(of_duplicates) == 1 and both[:1] == of_duplicates
    (of_near_duplicates,) = both[1:]
    assert "near_duplicates(" in of_near_duplicates and "6%" in of_near_duplicates


def test_a_suited_tokenizer_has_no_remark(quick, ordinary):
    """Chinese where each character is a token, and Greek in a vocabulary of its own."""
    assert not counting.is_unsuited(characters=1000, spaces=10, tokens=1000, unknown=0)
    assert counting.is_unsuited(characters=1000, spaces=150, tokens=1000, unknown=0)
    found = quick(named([f"{number} {GREEK * 3}" for number in range(9)]), tokenizer=400)
    assert [each[:8] for each in found.remarks if "language" in each] == ["the BERT"]


# the report


@pytest.mark.parametrize("texts", [[ENGLISH], *(texts for texts, *_ in REMARKS.values())])
def test_the_report_fits_a_terminal(quick, texts):
    lines = str(quick(named(texts))).splitlines()
    assert max(map(len, lines)) <= 100 and 15 <= len(lines) <= 35
    table = [line for line in lines if re.match("  (cut|embed|index|search|all) ", line)]
    assert len(table) == 5 and len({len(line) for line in table}) == 1, "aligned"


def test_huge_numbers_fit_too(ordinary):
    steps = tuple(step._replace(seconds=1e9, disk=3 * 10**15, memory=2**50) for step in ordinary.steps)
    whole = ordinary.whole._replace(chunks=10**12)
    said = str(replace(ordinary, steps=steps, whole=whole, index="IVF1048576,PQ96", longest_title="x" * 500))
    assert max(map(len, said.splitlines())) <= 100 and "11,574 days" in said and "3e+03 TB" not in said


# errors


def test_bad_input_is_met(quick):
    with pytest.raises(ValueError, match="no text to survey: 2 documents, none with a token"):
        quick(named(["", " "]))
    with pytest.raises(ValueError, match="no text to survey: 0 documents"):
        quick([])
    with pytest.raises(ValueError, match="seq_len 20 is not a multiple of chunk_size 8"):
        quick(named([ENGLISH]), seq_len=20)
    with pytest.raises(ValueError, match="'Tree' is no index"):
        quick(named([ENGLISH]), index="Tree")


def test_ctrl_c_stops_it(quick):
    def corpus():
        yield from named([ENGLISH])
        raise KeyboardInterrupt  # as Python does at Ctrl-C, unless whoever started it had it ignore that

    with pytest.raises(KeyboardInterrupt):
        quick(corpus())


def test_a_title_cannot_command_the_terminal(quick):
    corpus = [Document("The tower stands by the river. " * 30, "\x1b]0;owned\x07\x1b[2J", "a.txt")]
    report = str(quick(corpus))
    assert "owned" in report and all(each == "\n" or each.isprintable() for each in report)


@pytest.mark.parametrize("seconds", [-1, math.nan])
def test_a_time_that_is_none_is_refused(seconds):
    with pytest.raises(ValueError, match="pass 0 or more"):
        survey([Document("A text.", "a", "a.txt")], seconds=seconds)
