"""Documents from tables: parquet files, and datasets of the Hugging Face library `datasets`, local or from the hub.

    parquet("….parquet")      a file, or a folder of them
    hf_dataset("user/name")   streamed from the hub; also a folder made by `save_to_disk`, local files, or a dataset

Each row is a document, with its text in one column and its title in another. Rows count from 0, as in pyarrow and
datasets.
"""

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from retro_nb.common.digests import digest
from retro_nb.common.extras import extra
from retro_nb.text.document import Document, check_count, part_of
from retro_nb.text.files import MEGABYTE, choose_files, decode_text, record_document

# With a buffer, a column is read page by page; without one, a whole row group at once.
READING: dict[str, Any] = {"buffer_size": MEGABYTE, "pre_buffer": False, "page_checksum_verification": True}
BATCH_ROWS, BATCH_BYTES = 1000, 4 * MEGABYTE  # in memory at a time: 1000 rows, fewer if they are long

# "data/train-00000-of-00002.parquet", "validation.parquet", "partial-test/0000.parquet"
SPLIT = re.compile(r"(?:^|/)(?:partial-)?(train|validation|valid|val|dev|test)(?:[-_.][^/]*)?(?:\.parquet$|/)", re.I)
CHOICE = ("name", "data_dir", "data_files", "revision")  # options of `load_dataset` that select the data


def _columns(where: object, existing: Sequence[str], text_field: str, title_field: str) -> list[str]:
    """The columns to read: that of the texts, and that of the titles if it exists.

    Raises ValueError for a missing column, listing the existing ones. Only "title", the default of `title_field`, may
    be missing.
    """
    for argument, field in {"text_field": text_field, "title_field": title_field}.items():
        if field not in existing and (argument, field) != ("title_field", "title"):
            raise ValueError(f"{where} has no column {field!r}, but {', '.join(existing)}: pass {argument}=…")
    return [field for field in dict.fromkeys((text_field, title_field)) if field in existing]


def _document(
    record: dict, fields: tuple[str, str], name: str, row: int, replaced: int = 0, prefix: str = ""
) -> Document:
    """The document of one row of the table `name`; without a title it is called by its row, after `prefix`."""
    place = f"row {row}"
    return record_document(
        record, fields, source=f"{name}:{row}", untitled=prefix + place, where=f"{name}, {place}", replaced=replaced
    )


def _check_one_split(folder: Path, names: Sequence[str]) -> None:
    """Raise ValueError if the files of a folder are of several splits, as in a clone of a hub dataset."""
    splits = {found[1].lower() for name in names if (found := SPLIT.search(name))}
    if len(splits) > 1 and "train" in splits:
        raise ValueError(
            f"{folder} has files of the splits {', '.join(sorted(splits))}, which do not belong into one database: "
            f"pass one file, a folder with those of one split, or hf_dataset({str(folder)!r}, split=…)"
        )


# --- parquet files ------------------------------------------------------------------------------------------
#
# pyarrow reads them, not `datasets` (measured with 5.2): that copies a local file into its cache before it can divide
# it. Streaming, it holds a row group, often the whole file, in memory; it stops at bytes that are not UTF-8; and it
# knows neither the number of rows nor the file and row of a text.


class parquet:
    """The rows of a parquet file, or of all parquet files in a folder in order of their relative paths.

    The title is the value under `title_field`, or without one "row N", in a folder "file row N"; the source is
    "file.parquet:N". A null is an empty text. Bytes that are not UTF-8 become U+FFFD and are counted, as in
    `text_folder`.

    Files are read in batches. Memory holds a few megabytes and one page of the file, or one row if that is longer.

    Raises FileNotFoundError if the file does not exist or the folder has none, ValueError if a file is not parquet or
    a column is missing or holds no text.
    """

    def __init__(self, path: str | Path, text_field: str = "text", title_field: str = "title") -> None:
        self.path, self.text_field, self.title_field = Path(path), text_field, title_field
        self._folder = self.path if self.path.is_dir() else self.path.parent
        self._names, left_out = [self.path.name], ""
        if self.path.is_dir():
            self._names, left_out = choose_files(self.path, (".parquet",))
        if not self._names or not (self.path.is_dir() or self.path.is_file()):
            found = f" (it has {left_out})" if left_out else ""
            raise FileNotFoundError(f"{self.path} is no .parquet file and no folder of them{found}: pass either")
        if left_out:
            warnings.warn(f"{self.path}: files left out: {left_out}", stacklevel=2)
        _check_one_split(self.path, self._names)
        # For each row group of each file: (rows, bytes of the texts).
        self._groups = [self._row_groups(self._folder / name) for name in self._names]
        self._first, self._stop = 0, sum(rows for groups in self._groups for rows, _ in groups)

    def _row_groups(self, path: Path) -> list[tuple[int, int]]:
        """Check one file by its footer -> (rows, bytes of the texts) of each row group."""
        with extra("data"):  # here and below: only reading tables needs it
            import pyarrow.parquet as pq
            from pyarrow import ArrowException

        try:
            with pq.ParquetFile(path) as file:
                schema, metadata = file.schema_arrow, file.metadata
        except FileNotFoundError:
            raise
        except (ArrowException, OSError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path} is no parquet file ({reason}): pass one, or a folder without others") from None
        _columns(path, schema.names, self.text_field, self.title_field)
        kind = schema.field(self.text_field).type
        if not _holds_text(kind):
            raise ValueError(f"{path}: column {self.text_field!r} holds {kind}, no text: pass text_field=…")
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        column = [metadata.schema.column(i).path for i in range(metadata.num_columns)].index(self.text_field)
        return [(group.num_rows, group.column(column).total_uncompressed_size) for group in groups]

    def __len__(self) -> int:
        return self._stop - self._first

    def __iter__(self) -> Iterator[Document]:
        begin = 0
        for name, groups in zip(self._names, self._groups, strict=True):
            yield from self._rows(name, groups, self._first - begin, self._stop - begin)
            begin += sum(rows for rows, _ in groups)

    def _rows(self, name: str, groups: list[tuple[int, int]], first: int, stop: int) -> Iterator[Document]:
        """Documents of those rows of one file that lie in first … stop - 1."""
        with extra("data"):
            import pyarrow.parquet as pq
            from pyarrow import ArrowException

        edges = pairwise([0, *accumulate(rows for rows, _ in groups)])
        wanted = {number: begin for number, (begin, end) in enumerate(edges) if max(first, begin) < min(stop, end)}
        if not wanted:
            return
        row = min(wanted.values())
        longest = max(groups[number][1] / groups[number][0] for number in wanted)  # bytes per row of a group
        size = max(1, min(BATCH_ROWS, int(BATCH_BYTES / max(longest, 1))))
        with pq.ParquetFile(self._folder / name, **READING) as file:
            columns = _columns(name, file.schema_arrow.names, self.text_field, self.title_field)
            batches = file.iter_batches(size, row_groups=list(wanted), columns=columns, use_threads=False)
            try:
                for batch in batches:
                    skipped = max(0, first - row)
                    yield from self._documents(name, row + skipped, batch[skipped : stop - row])
                    row += len(batch)
                    if row >= stop:
                        break
            except (ArrowException, OSError) as error:
                where = f"{self._folder / name}, after row {row}"
                raise ValueError(f"{where}: damaged ({' '.join(str(error).split())}): fetch it again") from None

    def _documents(self, name: str, row: int, batch: Any) -> Iterator[Document]:
        """Documents of a record batch; its first row has number `row` in the file."""
        texts = _values(batch.column(self.text_field))
        titled = self.title_field in batch.schema.names
        titles = _values(batch.column(self.title_field)) if titled else [(None, 0)] * len(texts)
        prefix = f"{name.removesuffix('.parquet')} " if self.path.is_dir() else ""  # each file of a folder has a row 0
        for number, ((text, replaced), (title, _)) in enumerate(zip(texts, titles, strict=True), start=row):
            record = {self.title_field: title, self.text_field: text}
            yield _document(record, (self.text_field, self.title_field), name, number, replaced, prefix)

    def split(self, count: int) -> "list[parquet]":
        """Divide the rows, in order, into at most `count` corpora of similar size.

        A part that begins within a row group also decodes the rows before it in that group.
        """
        check_count(count)
        groups = np.array([(0, 0), *(group for groups in self._groups for group in groups)], dtype=float)
        rows, sizes = groups[:, 0].cumsum(), groups.sum(axis=1).cumsum()  # + rows: a row without text is work, too
        begin, end = np.interp([self._first, self._stop], rows, sizes)
        cuts = np.interp(np.linspace(begin, end, count + 1)[1:-1], sizes, rows)
        edges = sorted({self._first, *(round(cut) for cut in cuts), self._stop})
        return [part_of(self, _first=first, _stop=stop) for first, stop in pairwise(edges)]

    def fingerprint(self) -> dict:
        """The fields read, a digest of each file's path, size and modification time, and the rows if not all."""
        stats = [(name, (self._folder / name).stat()) for name in self._names]
        every = sum(rows for groups in self._groups for rows, _ in groups)
        part = {} if len(self) == every else {"rows": [self._first, self._stop]}
        return {
            "corpus": "parquet",
            "files": digest([[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]),
            "fields": [self.text_field, self.title_field],
        } | part


def _holds_text(kind: Any) -> bool:
    """Whether a column of this Arrow type holds strings, or bytes that may be strings."""
    with extra("data"):
        import pyarrow as pa

    try:
        pa.nulls(0, kind).cast(pa.large_binary())
        return True
    except pa.ArrowNotImplementedError:
        return False


def _values(column: Any) -> list[tuple[Any, int]]:
    """(value, number of U+FFFD) of an Arrow array. Strings are decoded here, as writers need not check their UTF-8."""
    with extra("data"):
        import pyarrow as pa

    if not _holds_text(column.type):
        return [(value, 0) for value in column.to_pylist()]
    found = column.cast(pa.large_binary()).to_pylist()
    return [(None, 0) if data is None else decode_text(data) for data in found]


# --- datasets of Hugging Face -------------------------------------------------------------------------------


class hf_dataset:
    """The rows of a dataset of the Hugging Face library `datasets`.

    The title is the value under `title_field`, or "row N" without one; the source is "name:N". A null is an empty
    text.

    dataset         a `Dataset` or `IterableDataset`, or a dictionary of splits; a folder made by `save_to_disk`;
                    another folder or file that `load_dataset` can read; or a name on the hub, which is streamed
                    and not stored
    split           the split of the dataset
    **load_options  options of `datasets.load_dataset`, such as `revision`, or `name`, a hub dataset's configuration

    A streamed dataset can only be read from the beginning: it has neither length nor `split`. A hub dataset is
    identified by its name and options, so a change under the same revision goes unnoticed; pass a commit as
    `revision` to be sure. An `IterableDataset` has no `fingerprint`, because its content cannot be identified.

    Raises ConnectionError if the hub cannot be reached, ValueError if a column or split is missing, and the errors of
    `datasets` if it cannot load the data.
    """

    def __init__(
        self,
        dataset: Any,
        split: str = "train",
        text_field: str = "text",
        title_field: str = "title",
        **load_options: Any,
    ) -> None:
        self.name, self.text_field, self.title_field, self._first = "dataset", text_field, title_field, 0
        depends_on: dict[str, Any] | None = None
        if isinstance(dataset, str | Path):
            self.name = Path(dataset).name if Path(dataset).exists() else str(dataset)
            options = {name: load_options[name] for name in CHOICE if name in load_options}
            depends_on = {"dataset": str(dataset), "split": split, "options": options}
            dataset = _load(dataset, split, load_options)
        elif load_options:
            raise ValueError(f"{', '.join(load_options)}: a {type(dataset).__name__} is loaded already, leave them out")
        if isinstance(dataset, dict):
            if split not in dataset:
                raise ValueError(f"{self.name} has no split {split!r}, but {', '.join(dataset)}: pass split=…")
            dataset = dataset[split]
        if hasattr(dataset, "_fingerprint"):  # of its content or its making: the same in every process
            depends_on = {"dataset": dataset._fingerprint}
        self._depends_on = depends_on
        if dataset.column_names is not None:  # None: a stream with columns known only when it is read
            columns = _columns(self.name, dataset.column_names, text_field, title_field)
            dataset = dataset.select_columns(columns)
        self._rows = dataset.with_format(None)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Document]:
        for row, record in enumerate(self._rows, start=self._first):
            yield _document(record, (self.text_field, self.title_field), self.name, row)

    # Properties, so that `hasattr` is false for what a stream lacks.

    @property
    def split(self) -> "Callable[[int], list[hf_dataset]]":
        """`split(count)`: divide the rows, in order, into at most `count` corpora with equal numbers of rows."""
        if not hasattr(self._rows, "__len__"):
            raise AttributeError(f"{self.name} is streamed, which begins at the beginning: it has no split")
        return self._split

    def _split(self, count: int) -> "list[hf_dataset]":
        check_count(count)
        edges = sorted({len(self) * i // count for i in range(count + 1)})
        return [self._part(first, stop) for first, stop in pairwise(edges)]

    def _part(self, first: int, stop: int) -> "hf_dataset":
        begin, end = self._first + first, self._first + stop
        depends_on = (self._depends_on or {}) | {"rows": [begin, end]}
        return part_of(self, _rows=self._rows.select(range(first, stop)), _first=begin, _depends_on=depends_on)

    @property
    def fingerprint(self) -> Callable[[], dict]:
        """`fingerprint()`: the dataset's fingerprint, or its name, split and options; and the fields read."""
        depends_on = self._depends_on
        if depends_on is None:
            raise AttributeError(f"{self.name} cannot say what it depends on: it has no fingerprint")
        fields = [self.text_field, self.title_field]
        return lambda: {"corpus": "hf_dataset", **depends_on, "fields": fields}


def saved_to_disk(folder: Path) -> bool:
    """Whether `save_to_disk` has made this folder, from a dataset or from several splits."""
    one, several = ("state.json", "dataset_info.json"), ("dataset_dict.json",)
    return any(all((folder / name).is_file() for name in names) for names in (one, several))


def _load(dataset: str | Path, split: str, options: dict[str, Any]) -> Any:
    """Load a name or path with `datasets`, imported only here because that takes seconds."""
    with extra("data"):
        from datasets import load_dataset, load_from_disk

    path = Path(dataset)
    try:
        if saved_to_disk(path):
            return load_from_disk(str(path), **options)
        if path.is_file():
            return load_dataset(str(path.parent), data_files=path.name, split=split, **options)
        if path.is_dir():
            return load_dataset(str(path), split=split, **options)
    except Exception as error:  # of many types, seldom with the file
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{path} cannot be read as a dataset ({reason:.300}): save it anew, or pass split") from error
    try:
        return load_dataset(str(dataset), split=split, **{"streaming": True} | options)
    except ConnectionError as error:
        raise ConnectionError(
            f"dataset {str(dataset)!r} is no folder or file, and the hub is out of reach ({error}): set "
            f"HF_HUB_OFFLINE=0 and have a network, or pass what `save_to_disk` has left where there was one"
        ) from None
