"""Documents from tables: parquet files in bounded memory, datasets of Hugging Face, local and streamed; their parts."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_nb.text import tables
from retro_nb.text.document import Corpus, Document
from retro_nb.text.tables import hf_dataset, parquet, saved_to_disk

ROWS = {
    "text": ["one", "двa\n\n", None, "", "五" * 300],
    "title": ["One", None, "Three", 4, "Five"],
    "body": ["a", "b", "c", "d", "e"],
    "number": [1, 2, 3, 4, 5],
}
ROWS["title"] = [None if title is None else str(title) for title in ROWS["title"]]


def documents(file: str, texts=ROWS["text"], titles=ROWS["title"], first=0, untitled="row") -> list[Document]:
    """What the rows should become."""
    return [
        Document(text or "", f"{untitled} {n}" if title is None else title, f"{file}:{n}")
        for n, (text, title) in enumerate(zip(texts, titles, strict=True), start=first)
    ]


def divided(whole: Corpus, count: int) -> list[Document]:
    """The documents of its parts, each of which has been pickled."""
    made = [pickle.loads(pickle.dumps(part)) for part in whole.split(count)]
    assert len(made) <= count and all(isinstance(part, Corpus) for part in made)
    assert all(len(list(part)) == len(part) > 0 for part in made)
    return [document for part in made for document in part]


@pytest.fixture
def table(tmp_path) -> Path:
    path = tmp_path / "some.parquet"
    pq.write_table(pa.table(ROWS), path, row_group_size=2)
    return path


# parquet


def test_rows_become_documents(table):
    corpus = parquet(table)
    assert isinstance(corpus, Corpus) and len(corpus) == 5
    assert list(corpus) == list(corpus) == documents("some.parquet")
    assert list(parquet(table, "body", "number")) == documents("some.parquet", ROWS["body"], list("12345"))
    assert list(parquet(str(table), "title", "title"))[3] == Document("4", "4", "some.parquet:3")


def test_no_title_column_is_needed_unless_it_is_named(tmp_path):
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "a.parquet")
    assert [document.title for document in parquet(tmp_path / "a.parquet")] == ["row 0", "row 1"]
    pq.write_table(pa.table({"text": ["c"]}), tmp_path / "b.parquet")
    titles = [document.title for document in parquet(tmp_path)]
    assert titles == ["a row 0", "a row 1", "b row 0"], "no two documents have one title"
    with pytest.raises(ValueError, match=r"a\.parquet has no column 'name', but text: pass title_field="):
        parquet(tmp_path / "a.parquet", title_field="name")


TYPES = [pa.string(), pa.large_string(), pa.binary(), pa.large_binary(), pa.dictionary(pa.int32(), pa.string())]


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_strings_of_every_kind_are_read(tmp_path, kind):
    columns = {name: pa.array(ROWS[name]).cast(kind) for name in ("text", "title")}
    pq.write_table(pa.table(columns), tmp_path / "some.parquet", row_group_size=2)  # each with its own dictionary
    assert list(parquet(tmp_path)) == documents("some.parquet", untitled="some row")


def test_bytes_that_are_not_utf8_are_counted(tmp_path):
    data = [b"caf\xe9", "the author's own \ufffd".encode(), b"\xef\xbb\xbfmark"]
    column = pa.array(data).cast(pa.binary())
    unchecked = pa.Array.from_buffers(pa.string(), len(data), column.buffers())  # as other writers may leave them
    pq.write_table(pa.table({"text": unchecked, "title": unchecked}), tmp_path / "some.parquet")
    found = [(document.text, document.replaced) for document in parquet(tmp_path)]
    assert found == [("caf\ufffd", 1), ("the author's own \ufffd", 0), ("mark", 0)]
    assert next(iter(parquet(tmp_path))).title == "caf\ufffd"


def test_a_folder_of_files_in_order_of_their_paths(tmp_path):
    for name, texts in {"b": ["3"], "a": ["0", "1"], "deep/c": ["4", "5"], "empty": []}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), tmp_path / f"{name}.parquet")
    (tmp_path / "README.md").write_text("not a table")
    found = [(document.source, document.text) for document in parquet(tmp_path)]
    sources = ["a.parquet:0", "a.parquet:1", "b.parquet:0", "deep/c.parquet:0", "deep/c.parquet:1"]
    assert found == list(zip(sources, "01345", strict=True))
    assert len(parquet(tmp_path)) == 5 and divided(parquet(tmp_path), 3) == list(parquet(tmp_path))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text_field": "texts"}, "has no column 'texts', but text, title, body, number: pass text_field=…"),
        ({"title_field": "name"}, "has no column 'name', but text, title, body, number: pass title_field=…"),
        ({"text_field": "number"}, "column 'number' holds int64, no text: pass text_field=…"),
    ],
)
def test_columns_are_checked_at_the_door(table, fields, message):
    with pytest.raises(ValueError, match=re.escape(f"{table}") + ".*" + re.escape(message)):
        parquet(table, **fields)


def test_what_is_no_table_is_met_at_the_door(tmp_path):
    for path in (tmp_path / "nowhere.parquet", tmp_path):
        with pytest.raises(FileNotFoundError, match=r"is no \.parquet file and no folder of them"):
            parquet(path)
    (tmp_path / "text.parquet").write_text("some text, long enough to have a footer")
    with pytest.raises(ValueError, match=r"text\.parquet is no parquet file"):
        parquet(tmp_path)


def test_nothing_gives_nothing(tmp_path):
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "none.parquet")
    corpus = parquet(tmp_path)
    assert len(corpus) == 0 and list(corpus) == corpus.split(3) == []


def most_allocated(corpus: parquet) -> int:
    """The most bytes that arrow holds while a corpus is read."""
    before = pa.total_allocated_bytes()
    return max(pa.total_allocated_bytes() - before for _ in corpus)


@pytest.mark.parametrize("compression", ["none", "snappy"])
def test_memory_is_bounded_by_a_batch_not_by_the_file(tmp_path, compression):
    """Row groups of 8 and of 32 MB: reading either holds a few batches; a row group at once is the control."""
    most = []
    for rows in (1_000, 4_000):
        path = tmp_path / f"{rows}.parquet"
        texts = [os.urandom(4000).hex() for _ in range(rows)]
        table = pa.table({"text": texts})
        pages = {"use_dictionary": False, "write_batch_size": 32}  # of 1 MB, which is looked at every 32 rows
        pq.write_table(table, path, row_group_size=rows, compression=compression, **pages)
        assert pq.ParquetFile(path).num_row_groups == 1
        del table
        most.append(most_allocated(parquet(path)))
        assert most_allocated(parquet(path).split(3)[2]) <= most[-1] + tables.BATCH_BYTES
    assert most[1] < 3 * tables.BATCH_BYTES < rows * 8000 / 2
    assert most[1] < most[0] + tables.BATCH_BYTES
    with pq.ParquetWriter(path, pa.schema({"text": pa.string()}), compression=compression, **pages) as writer:
        for _ in range(8):  # the same bytes in eight row groups
            writer.write_table(pa.table({"text": texts[:500]}))
    assert pq.ParquetFile(path).num_row_groups == 8 and most_allocated(parquet(path)) < most[0] + tables.BATCH_BYTES
    before = pa.total_allocated_bytes()
    held = pq.read_table(path)
    assert pa.total_allocated_bytes() - before > rows * 8000 and held


def test_few_long_texts_make_a_batch(tmp_path, monkeypatch):
    texts = [str(n) * 1000 for n in range(50)]
    path = tmp_path / "long.parquet"
    pq.write_table(pa.table({"text": texts}), path, use_dictionary=False, compression="none")
    monkeypatch.setattr(tables, "BATCH_BYTES", 10_000)
    sizes, documents_of = [], parquet._documents

    def spy(self, name, row, batch):
        sizes.append((row, len(batch)))
        return documents_of(self, name, row, batch)

    monkeypatch.setattr(parquet, "_documents", spy)
    assert [document.text for document in parquet(path)] == texts
    assert all(1 <= rows <= 6 for _, rows in sizes) and sum(rows for _, rows in sizes) == 50


@given(
    st.lists(st.lists(st.integers(0, 40), max_size=12), min_size=1, max_size=4),
    st.integers(1, 6),
    st.integers(1, 9),
    st.integers(1, 3),
    st.integers(1, 5),
)
@settings(max_examples=60, deadline=None)
def test_a_table_is_its_parts(tmp_path_factory, files, group, count, again, batch):
    folder, whole = tmp_path_factory.mktemp("tables"), []
    for number, sizes in enumerate(files):
        texts = [f"{number} {row} " + "x" * size for row, size in enumerate(sizes)]
        titles = [None if size % 3 else f"t{size}" for size in sizes]
        columns = {"text": pa.array(texts, pa.string()), "title": pa.array(titles, pa.string())}
        pq.write_table(pa.table(columns), folder / f"{number}.parquet", row_group_size=group)
        whole += documents(f"{number}.parquet", texts, titles, untitled=f"{number} row")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tables, "BATCH_ROWS", batch)
        corpus = parquet(folder)
        assert list(corpus) == divided(corpus, count) == whole and len(corpus) == len(whole)
        assert [document for part in corpus.split(count) for document in divided(part, again)] == whole


def test_parts_of_a_table_have_like_sizes(tmp_path):
    """Long texts first, then ten times as many short ones: the same bytes, so the middle lies between them."""
    texts = [os.urandom(500).hex() for _ in range(100)] + [os.urandom(50).hex() for _ in range(1000)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "some.parquet", row_group_size=100, use_dictionary=False)
    for count in (2, 3, 4, 8):
        sizes = [sum(len(document.text) for document in part) for part in parquet(tmp_path).split(count)]
        assert len(sizes) == count and max(sizes) < 1.1 * sum(sizes) / count
    one, other = parquet(tmp_path).split(2)
    assert len(one) < 200 < 900 < len(other)


def test_a_fingerprint_knows_files_fields_and_rows(table, tmp_path):
    os.utime(table, ns=(10**18, 10**18))
    before = parquet(table).fingerprint()
    assert json.loads(json.dumps(before)) == before == parquet(table).fingerprint()
    assert parquet(tmp_path).fingerprint() == before  # the only file of its folder
    (part,) = parquet(table).split(1)
    assert part.fingerprint() == before
    prints = [before, parquet(table, "body").fingerprint(), parquet(table, title_field="body").fingerprint()]
    prints += [part.fingerprint() for part in parquet(table).split(2)]
    os.utime(table, ns=(10**18, 10**18 + 1))
    prints.append(parquet(table).fingerprint())
    assert len({json.dumps(each) for each in prints}) == len(prints) == 6


# datasets


@pytest.fixture
def rows() -> datasets.Dataset:
    return datasets.Dataset.from_dict(ROWS)


def test_a_dataset_its_saved_folder_and_its_splits(rows, tmp_path):
    rows.save_to_disk(tmp_path / "saved")
    several = datasets.DatasetDict({"train": rows.select([0]), "test": rows})
    several.save_to_disk(tmp_path / "several")
    assert saved_to_disk(tmp_path / "saved") and saved_to_disk(tmp_path / "several") and not saved_to_disk(tmp_path)
    assert list(hf_dataset(rows)) == documents("dataset")
    assert list(hf_dataset(tmp_path / "saved")) == documents("saved")
    assert list(hf_dataset(str(tmp_path / "several"), split="test")) == documents("several")
    assert list(hf_dataset(several, split="test")) == documents("dataset")
    assert [document.text for document in hf_dataset(several)] == ["one"]
    assert list(hf_dataset(rows, text_field="body", title_field="number")) == documents(
        "dataset", ROWS["body"], list("12345")
    )
    assert isinstance(hf_dataset(rows), Corpus) and len(hf_dataset(rows)) == 5
    with pytest.raises(ValueError, match="several has no split 'valid', but train, test: pass split="):
        hf_dataset(tmp_path / "several", split="valid")


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_local_files_that_load_dataset_reads(rows, tmp_path, suffix):
    rows = rows.select([0, 1, 4])  # a csv file cannot tell null from nothing
    folder = tmp_path / "files"
    folder.mkdir()
    path = folder / f"some.{suffix}"
    {"jsonl": rows.to_json, "csv": rows.to_csv, "parquet": rows.to_parquet}[suffix](path)
    for where in (path, str(folder)):
        found = list(hf_dataset(where, cache_dir=str(tmp_path / "cache")))
        assert [document.text for document in found] == ["one", "двa\n\n", "五" * 300]
        assert [document.source for document in found] == [f"{Path(where).name}:{n}" for n in range(3)]


def test_thousands_of_rows_in_order():
    numbers = [str(n) for n in range(2500)]
    many = datasets.Dataset.from_dict({"text": numbers})
    for corpus in (hf_dataset(many), hf_dataset(many.to_iterable_dataset())):
        found = list(corpus)
        assert [document.text for document in found] == numbers
        assert [document.source for document in found] == [f"dataset:{number}" for number in numbers]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 100])
def test_a_dataset_is_its_parts(rows, tmp_path, count):
    rows.save_to_disk(tmp_path / "saved")
    for whole in (hf_dataset(rows), hf_dataset(rows.shuffle(seed=1)), hf_dataset(tmp_path / "saved")):
        assert divided(whole, count) == list(whole)
        assert [document for part in whole.split(2) for document in divided(part, count)] == list(whole)
        prints = {json.dumps(part.fingerprint()) for part in whole.split(count)} | {json.dumps(whole.fingerprint())}
        assert len(prints) == min(count, 5) + 1
    with pytest.raises(ValueError, match="count 0 is less than 1"):
        whole.split(0)


def test_columns_of_a_dataset_are_checked(rows):
    for dataset in (rows, rows.to_iterable_dataset()):  # the columns of which are known
        with pytest.raises(ValueError, match="dataset has no column 'texts', but text, title, body, number"):
            hf_dataset(dataset, text_field="texts")
    unknown = datasets.IterableDataset.from_generator(lambda: iter([{"body": "a"}, {"body": "b"}]))
    assert unknown.column_names is None and [d.text for d in hf_dataset(unknown, text_field="body")] == ["a", "b"]
    with pytest.raises(
        ValueError, match=r"dataset, row 0: no text under 'text', but the fields \['body'\]: pass text_f"
    ):
        list(hf_dataset(unknown))
    with pytest.raises(ValueError, match=r"dataset, row 0: no text under 'number', but 1 \(int\)"):
        list(hf_dataset(rows, text_field="number"))
    with pytest.raises(ValueError, match="revision: a Dataset is loaded already, leave them out"):
        hf_dataset(rows, revision="main")


def test_a_stream_is_read_again_and_lacks_what_it_cannot_have(rows):
    corpus = hf_dataset(rows.to_iterable_dataset())
    assert list(corpus) == list(corpus) == documents("dataset")
    assert not hasattr(corpus, "split") and not hasattr(corpus, "fingerprint")
    with pytest.raises(TypeError):
        len(corpus)
    assert list(pickle.loads(pickle.dumps(corpus))) == list(corpus)


@pytest.mark.slow
def test_a_fingerprint_is_the_contents_in_every_process(rows, tmp_path):
    rows.save_to_disk(tmp_path / "saved")
    program = f"from retro_nb import hf_dataset; print(hf_dataset({str(tmp_path / 'saved')!r}).fingerprint())"
    program += f"; import datasets; print(hf_dataset(datasets.Dataset.from_dict({ROWS!r})).fingerprint())"
    outputs = {
        subprocess.check_output([sys.executable, "-c", program], env=os.environ | {"PYTHONHASHSEED": seed}, text=True)
        for seed in "12"
    }
    assert outputs == {f"{hf_dataset(tmp_path / 'saved').fingerprint()}\n{hf_dataset(rows).fingerprint()}\n"}
    before = hf_dataset(tmp_path / "saved").fingerprint()
    (tmp_path / "saved").rename(tmp_path / "moved")
    assert hf_dataset(tmp_path / "moved").fingerprint() == before == json.loads(json.dumps(before))
    other = datasets.Dataset.from_dict(ROWS | {"text": [*ROWS["text"][:4], "六"]})
    other.save_to_disk(tmp_path / "saved")
    prints = [before, hf_dataset(tmp_path / "saved").fingerprint(), hf_dataset(rows, "train", "body").fingerprint()]
    assert len({json.dumps(each) for each in prints}) == 3


# the hub


def test_a_hub_dataset_is_streamed_and_known_by_its_name(rows, monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return rows.to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    corpus = hf_dataset("user/some", split="test", name="small", revision="abc", token="secret")
    options = {"split": "test", "name": "small", "revision": "abc", "token": "secret", "streaming": True}
    assert asked == [(("user/some",), options)]
    assert list(corpus) == documents("user/some") and not hasattr(corpus, "split")
    assert corpus.fingerprint() == {
        "corpus": "hf_dataset",
        "dataset": "user/some",
        "split": "test",
        "options": {"name": "small", "revision": "abc"},
        "fields": ["text", "title"],
    }
    prints = [hf_dataset("user/some", **k).fingerprint() for k in ({}, {"split": "test"}, {"revision": "def"})]
    assert len({json.dumps(each) for each in prints}) == 3


def test_without_a_network_it_says_what_to_do():
    with pytest.raises(ConnectionError, match=r"'somebody/nothing' is no folder.*set HF_HUB_OFFLINE=0 and have a"):
        hf_dataset("somebody/nothing")


def test_datasets_is_imported_only_by_whom_it_serves(table):
    program = f"import sys, retro_nb; list(retro_nb.parquet({str(table)!r})); print('datasets' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "False"


@pytest.mark.parametrize("compression", ["snappy", "zstd", "none"])
def test_a_damaged_table_names_its_file_and_its_row(tmp_path, compression):
    path = tmp_path / "my.parquet"
    table = pa.table({"text": [f"text number {number}" for number in range(3000)]})
    pq.write_table(table, path, compression=compression, row_group_size=500, write_page_checksum=True)
    whole = path.read_bytes()
    assert len(list(parquet(path))) == 3000
    for place in np.random.default_rng(0).integers(4, len(whole) * 9 // 10, 40).tolist():
        damaged = bytearray(whole)
        damaged[place] ^= 16
        path.write_bytes(damaged)
        try:
            texts = [document.text for document in parquet(path)]
        except ValueError as error:
            assert re.search(r"my\.parquet(, after row \d+: damaged| is no parquet file)", str(error))
        else:
            assert texts == table["text"].to_pylist(), "a byte that does not matter"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"my\.parquet is no parquet file"):
        parquet(path)


def test_a_folder_of_tables_leaves_out_what_nobody_means(table, tmp_path):
    for name in ("in/A.PARQUET", "in/.ipynb_checkpoints/A-checkpoint.parquet", "in/__MACOSX/A.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(table, tmp_path / name)
    with pytest.warns(UserWarning, match=r"1 hidden .*1 left by an archiver"):
        assert len(parquet(tmp_path / "in")) == len(parquet(table))


def test_a_damaged_dataset_is_named(rows, tmp_path):
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "train" / "state.json").write_text("{")
    with pytest.raises(ValueError, match=r"saved cannot be read as a dataset \(JSONDecodeError"):
        hf_dataset(tmp_path / "saved")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes")
def test_a_pipe_is_no_table(tmp_path):
    os.mkfifo(tmp_path / "a.parquet")
    with pytest.raises(FileNotFoundError, match=r"a\.parquet is no \.parquet file"):
        parquet(tmp_path / "a.parquet")
