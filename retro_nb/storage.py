"""Arrays on disk: written atomically, opened read-only, remembered in a manifest.

Every file of a build is written under a temporary name and moved into place when it is whole, so a reader
never meets half a file and a failed write leaves the previous one alone. Beside the files lies
`manifest.json`. It says for each of them with which settings it was made; a changed setting rebuilds what
depends on it, an unchanged one costs nothing.
"""

import errno
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

PathLike = str | os.PathLike

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
# Larger files are checked by their size alone: hashing a terabyte at every start would take hours.
CHECKSUM_LIMIT = 2**30


def _root() -> Path:
    if home := os.environ.get("RETRO_NB_HOME"):
        return Path(home)
    checkout = Path(__file__).resolve().parent.parent
    return checkout if (checkout / "pyproject.toml").exists() else Path.home() / ".cache" / "retro_nb"


ROOT = _root()  # the checkout, or a cache folder when the package is installed on its own
WORK = ROOT / "data" / "work"


def reprocess_requested() -> bool:
    """Whether the environment says REPROCESS=1: build everything again, whatever the manifest says."""
    return os.environ.get("REPROCESS", "").lower() in ("1", "t", "true")


# writing


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Around a write to `path`: turn a bare "No space left on device" into an error with file and mend."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(
            error.errno or errno.EIO,
            f"could not write {path}: {reason}. What was there before is untouched; free some space, or "
            f"choose another folder, and run again: finished work is kept",
        ) from error


@contextmanager
def replacing(path: PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; move it over `path` if the block succeeds, delete it if not."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        with naming(path):
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: PathLike, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with replacing(path) as temporary, naming(path):
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_writable(folder: PathLike) -> None:
    """Meet a read-only folder at the door rather than after an hour of work.

    Raises:
        PermissionError: naming the folder and the mend.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PermissionError(
            error.errno,
            f"the work folder {folder} has to be built but cannot be written ({error.strerror}): build it "
            f"where you may write, with the same settings, or pass another work_dir",
        ) from error


def _write_header(file: Any, dtype: np.dtype, shape: tuple[int, ...]) -> int:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    file.seek(0)
    np.lib.format.write_array_header_1_0(file, header)
    return file.tell()


class ArrayWriter:
    """Append rows to a `.npy` file whose length is not known beforehand.

    Use it as a context manager: the file appears under its name only when the block ends without an error.
    numpy pads the header so that the first axis may grow, hence the length is filled in at the end.
    """

    def __init__(self, path: PathLike, dtype: Any, row_shape: tuple[int, ...] = ()) -> None:
        self.path, self.dtype, self.row_shape = Path(path), np.dtype(dtype), row_shape
        self.row_bytes = self.dtype.itemsize * int(np.prod(row_shape, dtype=np.int64))
        self.rows = 0

    def __enter__(self) -> "ArrayWriter":
        self._replacing = replacing(self.path)
        self._file = open(self._replacing.__enter__(), "w+b")
        self._start = _write_header(self._file, self.dtype, (0, *self.row_shape))
        return self

    def append(self, rows: np.ndarray) -> None:
        """Append rows of shape (any, *row_shape)."""
        with naming(self.path):
            self._file.write(np.ascontiguousarray(rows, dtype=self.dtype).tobytes())
        self.rows += len(rows)

    def truncate(self, rows: int) -> None:
        """Forget every row from `rows` on."""
        self._file.truncate(self._start + rows * self.row_bytes)
        self._file.seek(0, os.SEEK_END)
        self.rows = rows

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool | None:
        try:
            if error is None:
                with naming(self.path):
                    self._file.flush()
                    length = _write_header(self._file, self.dtype, (self.rows, *self.row_shape))
                    assert length == self._start, "numpy changed the length of the header"
        finally:
            self._file.close()
        return self._replacing.__exit__(kind, error, trace)


class ResumableRows:
    """The rows of a `.npy` file computed block by block, in order; a kill costs at most one block.

    Finished blocks lie in `<path>.partial`, their number in `<path>.progress.json` together with the
    settings they were computed with: other settings start afresh. Plain writes, not a memory map, because
    a full disk kills a process that writes through a map.
    """

    def __init__(self, path: PathLike, shape: tuple[int, ...], dtype: Any, settings: dict) -> None:
        self.path, self.shape, self.dtype = Path(path), tuple(shape), np.dtype(dtype)
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.progress = self.path.with_name(self.path.name + ".progress.json")
        self.settings = {"shape": list(self.shape), "dtype": self.dtype.str, "settings": settings}
        self.row_bytes = self.dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))
        self.done = self._rows_done()

    def _rows_done(self) -> int:
        try:
            state = json.loads(self.progress.read_text(encoding="utf-8"))
            rows = state.pop("rows")
            # Killed after the last move, before the bookkeeping: the file is already in its place.
            file = self.partial if self.partial.exists() or rows < self.shape[0] else self.path
            whole = file.stat().st_size >= rows * self.row_bytes
            return rows if state == self.settings and whole else 0
        except (OSError, ValueError, KeyError):
            return 0

    def blocks(self, block: int) -> Iterator[slice]:
        """The slices of at most `block` rows that are still to do."""
        for start in range(self.done, self.shape[0], block):
            yield slice(start, min(start + block, self.shape[0]))

    def write(self, rows: slice, values: np.ndarray) -> None:
        """Store one block and note it as done. Blocks come in order."""
        with naming(self.partial):
            with open(self.partial, "r+b" if self.done else "w+b") as file:
                start = _write_header(file, self.dtype, self.shape)
                file.seek(start + rows.start * self.row_bytes)
                file.write(np.ascontiguousarray(values, dtype=self.dtype).tobytes())
                file.flush()
                os.fsync(file.fileno())
        self.done = rows.stop
        write_json(self.progress, {**self.settings, "rows": self.done})

    def finish(self) -> None:
        """Move the finished array into place."""
        if self.partial.exists():
            os.replace(self.partial, self.path)
        self.progress.unlink(missing_ok=True)


# reading


def open_array(path: PathLike, *, dtype: Any = np.int32, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """Open an array read-only, without loading it.

    Args:
        path: a `.npy` file (under any name), or a raw memory map as the reference implementation writes.
        dtype: what a raw file holds; a `.npy` file says so itself.
        shape: the rows wanted and the shape of each. A raw file needs it; a `.npy` file is held to it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, corrupt, or holds something of another shape.
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
    except (ValueError, EOFError, OSError, SyntaxError) as error:
        raise ValueError(f"{path} is truncated or corrupt ({error}): delete it and build it again") from error
    if shape is not None and (array.shape[1:] != tuple(shape[1:]) or len(array) < shape[0]):
        raise ValueError(f"{path} has shape {array.shape}, wanted {tuple(shape)}: build it again for these settings")
    return array if shape is None else array[: shape[0]]


def _open_raw(path: Path, dtype: np.dtype, shape: tuple[int, ...] | None) -> np.ndarray:
    size = path.stat().st_size
    needed = None if shape is None else dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    if needed is None or size < needed:
        raise ValueError(
            f"{path} has no .npy header and {size} bytes; as raw {dtype} of shape {shape} it would need "
            f"{needed}: it is truncated, corrupt, or something else; delete it and build it again"
        )
    return np.memmap(path, dtype=dtype, mode="r", shape=tuple(shape))


# the manifest


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_record(path: PathLike) -> dict:
    """Size in bytes and, up to CHECKSUM_LIMIT, the SHA-256 of a file."""
    path = Path(path)
    size = path.stat().st_size
    if size > CHECKSUM_LIMIT:
        return {"bytes": size}
    checksum = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**22):
            checksum.update(block)
    return {"bytes": size, "sha256": checksum.hexdigest()}


def read_manifest(folder: PathLike) -> dict:
    """What a folder's manifest says of each array in it; empty where there is none or it cannot be read."""
    try:
        manifest = json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8"))
        return manifest["arrays"] if manifest["format"] == MANIFEST_FORMAT else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def array_key(path: PathLike) -> str:
    """A short identity of an array: of its settings where the manifest knows it, else of its content."""
    path = Path(path)
    record = read_manifest(path.parent).get(path.name)
    return _digest(record["settings"] if record else file_record(path))[:16]


def _why_stale(record: dict | None, settings: dict, folder: Path) -> str | None:
    """Why a recorded array cannot be used as it is: None if it can, "" if there is no record of it."""
    if record is None:
        return ""
    was = record["settings"]
    for name in [*settings, *was]:
        if was.get(name) != settings.get(name):
            return f"{name} was {was.get(name)!s:.80} and is {settings.get(name)!s:.80}"
    for name, expected in record["files"].items():
        file = folder / name
        if not file.exists():
            return f"{name} is gone"
        if file.stat().st_size != expected["bytes"] or file_record(file) != expected:
            return f"{name} is truncated or corrupt"
    return None


def cached(
    path: PathLike,
    settings: dict,
    build: Callable[[], dict],
    *,
    files: tuple[PathLike, ...] = (),
    force_reprocess: bool = False,
) -> dict:
    """Build an array unless it is there already, whole and made with these settings.

    Args:
        path: the array; its folder holds the manifest.
        settings: everything the content depends on, JSON-able.
        build: writes `path` and `files`, returns statistics.
        files: what else `build` writes.
        force_reprocess: build in any case, as does REPROCESS=1 in the environment.

    Returns:
        The statistics, of this build or of the one that made the files.

    Raises:
        PermissionError: it has to be built and the folder is read-only.
    """
    path, settings = Path(path), json.loads(json.dumps(settings))
    force = force_reprocess or reprocess_requested()

    def stale() -> str | None:
        return _why_stale(read_manifest(path.parent).get(path.name), settings, path.parent)

    if not force and stale() is None:
        return read_manifest(path.parent)[path.name]["stats"]
    check_writable(path.parent)
    with FileLock(path.parent / ".lock"):  # two notebooks may want the same array at once
        reason = "REPROCESS" if force else stale()
        if reason is None:
            return read_manifest(path.parent)[path.name]["stats"]
        if reason and path.exists():
            warnings.warn(f"building {path.name} again: {reason}", stacklevel=3)
        stats = json.loads(json.dumps(build()))
        outputs = {os.path.relpath(file, path.parent): file_record(file) for file in (path, *files)}
        arrays = read_manifest(path.parent)
        arrays[path.name] = {"settings": settings, "stats": stats, "files": outputs}
        write_json(path.parent / MANIFEST, {"format": MANIFEST_FORMAT, "arrays": arrays})
    return stats
