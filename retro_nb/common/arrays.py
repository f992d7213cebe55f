"""Arrays on disk: written atomically, opened read-only.

Every file is written under a temporary name and moved into place once it is complete and on the disk. So a reader
never sees half a file, and a failed write or a crash of the machine leaves the previous file intact.
"""

import errno
import hashlib
import io
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path, PureWindowsPath
from typing import IO, Any

import numpy as np

from retro_nb.common.launch import broadcast, launched

PathLike = str | os.PathLike


_CLONE = Path(__file__).resolve().parents[2]
# What comes with the project is read here: the clone, or a cache folder when the package is installed on its own.
SOURCE = _CLONE if (_CLONE / "pyproject.toml").exists() else Path.home() / ".cache" / "retro_nb"
ROOT = Path(os.environ.get("RETRO_NB_HOME") or SOURCE)  # what is built and run is written here
WORK = ROOT / "data" / "work"
# Of a larger file, only evenly spaced blocks of this total size are read: a terabyte at every start would take hours.
CHECKSUM_LIMIT = 2**30
CHECKSUM_BLOCK = 2**22
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


# names and records of files


def inside(folder: PathLike, name: Any) -> Path:
    """The path of a file in `folder` that a JSON file names. Every file name read from JSON passes through here.

    Raises:
        ValueError: the name cannot be an entry of the folder itself (it has a separator or a drive, or is ".."), or
            the entry is a symbolic link to a file elsewhere.
    """
    plain_name = isinstance(name, str) and name not in ("", ".", "..") and "\0" not in name
    if not plain_name or name != Path(name).name or name != PureWindowsPath(name).name:
        raise ValueError(f"{name!r:.80} is not the name of a file in {folder}")
    path = Path(folder) / name
    if path.is_symlink() and os.path.dirname(os.path.realpath(path)) != os.path.realpath(folder):
        raise ValueError(f"{path} is a symbolic link to {os.path.realpath(path)}, which is not in {folder}")
    return path


def file_record(path: PathLike, *, whole: bool = False) -> dict:
    """Size in bytes and SHA-256 of a file; above CHECKSUM_LIMIT of evenly spaced blocks only, unless `whole`."""
    size = Path(path).stat().st_size
    blocks = -(-size // CHECKSUM_BLOCK)
    most = blocks if whole else CHECKSUM_LIMIT // CHECKSUM_BLOCK
    checksum = hashlib.sha256()
    with open(path, "rb") as file:
        for block in range(blocks) if blocks <= most else np.linspace(0, blocks - 1, most).astype(np.int64):
            file.seek(int(block) * CHECKSUM_BLOCK)
            checksum.update(file.read(CHECKSUM_BLOCK))
    return {"bytes": size, "sha256" if blocks <= most else "sample_sha256": checksum.hexdigest()}


def read_json(path: PathLike) -> Any:
    """Read a JSON file.

    Raises:
        OSError: the file does not exist or cannot be read.
        ValueError: the file is not JSON, or is nested too deeply.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(errno.ENOENT, "there is no such file", str(path))
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is truncated or corrupt ({error})") from error


def read_note(path: PathLike) -> Any:
    """Content of a JSON file that only spares work; None if it is missing or damaged."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None


# writing


@contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Around a write to `path`: turn a bare "No space left on device" into an error with file, free space and remedy.

    An error that has them already is passed on.
    """
    try:
        yield
    except OSError as error:
        if hasattr(error, "explained"):
            raise
        explained = OSError(
            error.errno or errno.EIO,
            f"could not write {path}: {error.strerror or error}. What was there before is untouched; "
            f"{remedy(path, error.errno)}, and run again: finished work is kept",
        )
        explained.explained = True  # type: ignore[attr-defined]
        raise explained from error


def remedy(path: Path, number: int | None) -> str:
    """What to do about a path that could not be written, by the number of the error."""
    if number in READ_ONLY:
        return where_to_write(path)
    folder = next((each for each in path.absolute().parents if each.is_dir()), Path())
    return f"{shutil.disk_usage(folder).free / 1e6:,.0f} MB are free: free some space, or choose another folder"


def where_to_write(path: PathLike) -> str:
    """What to do about a path that may not be written."""
    inside_root = Path(path).absolute().is_relative_to(ROOT.absolute())
    own = ": the environment variable RETRO_NB_HOME names one for data/work and runs" if inside_root else ""
    return f"choose a folder that you may write{own}"


def settle(path: PathLike) -> None:
    """Wait until a file, or a folder's list of files, is on the disk, where it survives a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot do this for a folder.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not os.path.isdir(path):
            raise
    finally:
        os.close(descriptor)


def move_settled(source: PathLike, target: PathLike) -> None:
    """Move a settled file over `target`, so that a crash of the machine leaves either the old or the new file whole."""
    os.replace(source, target)
    settle(Path(target).parent)


@contextmanager
def replacing(path: PathLike) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; move it over `path` if the block succeeds, else delete it.

    The file is on the disk before it is moved. Its name has the process id, so that no two processes write into one
    file.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # writing would follow a link that came with the folder
    try:
        yield temporary
        with explain_write_errors(path):
            settle(temporary)
            move_settled(temporary, path)
    finally:
        with suppress(OSError):  # it was moved, or the disk has become read-only
            temporary.unlink()


@contextmanager
def writing(path: PathLike, mode: str = "wb", **options: Any) -> Iterator[IO]:
    """Like `replacing`, with the temporary file open. A full disk in the block is one that this file has met.

    A block that writes other files too explains its own errors (`explain_write_errors`).
    """
    path = Path(path)
    with replacing(path) as temporary:
        with explain_write_errors(path):
            file = open(temporary, mode, **options)
        try:
            with _explain_full_disk(path):
                yield file
                file.flush()
        finally:
            with suppress(OSError):  # closing tries again to write what a full disk did not take
                file.close()


@contextmanager
def _explain_full_disk(path: Path) -> Iterator[None]:
    """Like `explain_write_errors`, where the block also does other things than writing to `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL_DISK:
            with explain_write_errors(path):
                raise
        raise


def to_jsonable(value: Any) -> Any:
    """`value` after a round trip through JSON: tuples become lists, NumPy numbers Python's, paths strings."""
    return json.loads(json.dumps(value, default=lambda x: x.item() if isinstance(x, np.generic) else os.fspath(x)))


def write_text(path: PathLike, text: str) -> None:
    """Write a text in UTF-8, atomically."""
    # A file name that is not UTF-8 holds lone surrogates: they become \\udcxx, which JSON reads back.
    with writing(path, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)


def write_json(path: PathLike, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """The header of a `.npy` file: of the same length for any number of rows, because NumPy pads it."""
    file = io.BytesIO()
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()


class ArrayWriter:
    """Append rows to a `.npy` file of unknown length.

    Use it as a context manager: the file appears under its name only when the block ends without an error.
    The header holds the number of rows, so it is written again at the end.
    """

    def __init__(self, path: PathLike, dtype: Any, row_shape: tuple[int, ...] = ()) -> None:
        self.path, self.dtype, self.row_shape = Path(path), np.dtype(dtype), row_shape
        self.row_bytes = self.dtype.itemsize * int(np.prod(row_shape, dtype=np.int64))
        self.rows = 0

    def __enter__(self) -> "ArrayWriter":
        self._writing = writing(self.path)
        self._file = self._writing.__enter__()
        self._file.write(_header(self.dtype, (0, *self.row_shape)))
        return self

    def append(self, rows: np.ndarray) -> None:
        """Append rows of shape (any, *row_shape)."""
        with explain_write_errors(self.path):
            self._file.write(np.ascontiguousarray(rows, dtype=self.dtype).tobytes())
        self.rows += len(rows)

    def flush(self) -> None:
        """Write everything, the number of rows included, so that only the move is left."""
        with explain_write_errors(self.path):
            self._file.seek(0)
            self._file.write(_header(self.dtype, (self.rows, *self.row_shape)))
            self._file.seek(0, os.SEEK_END)
            self._file.flush()

    def __exit__(self, *error: Any) -> bool | None:
        if error[0] is not None:
            return self._writing.__exit__(*error)
        with ExitStack() as stack:
            stack.push(self._writing)
            self.flush()
        return None


class ResumableRows:
    """The rows of a `.npy` file computed block by block, by one process or several; a kill loses at most one block.

    Finished blocks are in `<path>.partial`. The note `<path>.progress` starts with a line of the blocks' settings;
    other settings start afresh. Then it has a 1 for each finished row and a 0 for each missing one. Once all rows are
    finished, a last line has the file's record (`file_record`): after a kill, the file under `path` counts as these
    rows only if it matches that record. Writes are plain, because a full disk kills a process that writes through a
    memory map.

    Args:
        path, shape, dtype, settings: the file, its content, and everything the content depends on.
        shared: all processes of a launch build the file together. Each creates this object, gets a share of the
            blocks, and waits in `finish` for the others. Each must see the others' writes at once, as the processes
            of one host do.
    """

    def __init__(
        self, path: PathLike, shape: tuple[int, ...], dtype: Any, settings: dict, *, shared: bool = False
    ) -> None:
        self.path, self.shape, self.dtype = Path(path), tuple(shape), np.dtype(dtype)
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.progress = self.path.with_name(self.path.name + ".progress")
        self.settings = to_jsonable({"shape": self.shape, "dtype": self.dtype.str, "settings": settings})
        self.about = (json.dumps(self.settings) + "\n").encode()
        self.header = _header(self.dtype, self.shape)
        self.rank, self.processes = launched() if shared else (0, 1)
        self._looked = self.processes > 1  # `blocks` begins a shared file before dividing it

    def _offset(self, row: int) -> int:
        return len(self.header) + row * self.dtype.itemsize * int(np.prod(self.shape[1:], dtype=np.int64))

    def _marks(self) -> np.ndarray | None:
        """Whether each row is finished; None if the files are missing or belong to other rows."""
        if self.partial.is_symlink() or self.progress.is_symlink():  # `ResumableRows` makes none
            return None
        try:
            note = self.progress.read_bytes()
            rows, _, record = note.removeprefix(self.about).partition(b"\n")
            marks = np.frombuffer(rows, np.uint8) == ord("1")
            if not note.startswith(self.about) or len(marks) != self.shape[0]:
                return None
            if marks.all() and not self.partial.exists():  # killed after the move
                return marks if record == _record_line(self.path) else None
            last = int(marks.nonzero()[0].max(initial=-1))
            return marks if self.partial.stat().st_size >= self._offset(last + 1) else None
        except OSError:
            return None

    @property
    def done(self) -> int:
        """Number of finished rows."""
        marks = self._marks()
        return 0 if marks is None else int(marks.sum())

    def _begin(self) -> None:
        self.progress.unlink(missing_ok=True)  # it may describe other rows, which these will overwrite
        self.partial.unlink(missing_ok=True)
        with explain_write_errors(self.partial), open(self.partial, "xb") as file:
            file.write(self.header)
        self._note(b"0" * self.shape[0])

    def _note(self, rows: bytes) -> None:
        with writing(self.progress) as file:
            file.write(self.about + rows)

    def blocks(self, block: int) -> Iterator[slice]:
        """Slices of at most `block` unfinished rows; for a shared file, this process's share of them."""
        marks = self._marks()
        if marks is None:
            marks = np.zeros(self.shape[0], bool)
            if self.processes > 1 and self.rank == 0:
                self._begin()
        starts = range(0, self.shape[0], block)
        missing = [slice(i, min(i + block, self.shape[0])) for i in starts if not marks[i : i + block].all()]
        if self.processes > 1:
            missing = broadcast(missing)[self.rank :: self.processes]  # all divide the same list
        return iter(missing)

    def write(self, rows: slice, values: np.ndarray) -> None:
        """Store one block, in any order, and mark its rows."""
        if not self._looked and self._marks() is None:
            self._begin()
        self._looked = True  # the note has a mark per row: read it only once
        with explain_write_errors(self.partial), open(self.partial, "r+b") as file:
            file.seek(self._offset(rows.start))
            file.write(np.ascontiguousarray(values, dtype=self.dtype).tobytes())
            file.flush()
            os.fsync(file.fileno())
        with explain_write_errors(self.progress), open(self.progress, "r+b") as file:
            file.seek(len(self.about) + rows.start)
            file.write(b"1" * (rows.stop - rows.start))

    def finish(self) -> None:
        """Move the finished array into place. The note stays until `cached` has recorded the array."""
        if not self.shape[0] and self.rank == 0:
            self._begin()
        while self.processes > 1 and self.progress.exists() and self.done < self.shape[0]:
            time.sleep(0.02)  # not a barrier, which may time out after ten minutes
        if self.rank == 0 and self.partial.exists():
            self._note(b"1" * self.shape[0] + b"\n" + _record_line(self.partial))
            with explain_write_errors(self.path):
                move_settled(self.partial, self.path)


def _record_line(path: Path) -> bytes:
    return json.dumps(file_record(path)).encode()


# reading


def open_array(path: PathLike, *, dtype: Any = np.int32, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """Open an array read-only, without loading it.

    Args:
        path: a `.npy` file (under any name), or a raw memory map as the reference implementation writes.
        dtype: dtype of a raw file; a `.npy` file has its own.
        shape: the number of rows wanted, and the shape of a row. Required for a raw file, checked for a `.npy` file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is truncated or corrupt, or has another shape.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, f"there is no array at {path}: build it first", str(path))
    with open(path, "rb") as file:
        has_header = file.read(6) == np.lib.format.MAGIC_PREFIX
    if not has_header:
        return _open_raw(path, np.dtype(dtype), shape)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # NumPy parses the header as Python: damage raises many kinds of error
        raise ValueError(f"{path} is truncated or corrupt ({error}): delete it and build it again") from error
    if shape is not None and (array.shape[1:] != tuple(shape[1:]) or array.shape[:1] < tuple(shape[:1])):
        raise ValueError(f"{path} has shape {array.shape}, wanted {tuple(shape)}: build it again for these settings")
    return array if shape is None else array[: shape[0]]


def _open_raw(path: Path, dtype: np.dtype, shape: tuple[int, ...] | None) -> np.ndarray:
    size = path.stat().st_size
    needed = math.inf if shape is None else dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    if shape is None or size < needed:
        raise ValueError(
            f"{path} has no .npy header and {size} bytes; as raw {dtype} of shape {shape} it would need "
            f"{needed}: it is truncated, corrupt, or something else; delete it and build it again"
        )
    return np.memmap(path, dtype=dtype, mode="r", shape=tuple(shape))
