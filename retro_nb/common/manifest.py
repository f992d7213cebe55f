"""A folder's `manifest.json`: what was built, with which settings.

A changed setting rebuilds what depends on it, with a warning; unchanged settings cost nothing; damaged files are
detected. A manifest may come from another person: through it, nothing outside its folder is read, written or deleted
(`arrays.inside`). A newer format is refused.
"""

import glob
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

from filelock import FileLock, Timeout

from retro_nb.common.arrays import PathLike, file_record, inside, read_json, remedy, to_jsonable, write_json
from retro_nb.common.digests import digest
from retro_nb.common.launch import Interrupted, broadcast, launched

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
STAGING = "update"  # a folder in the store's folder: the new store
READY = "ready.json"  # in STAGING once that is complete: the arrays to delete


def reprocess_requested() -> bool:
    """Whether the environment has REPROCESS=1: build everything again, regardless of the manifest."""
    return os.environ.get("REPROCESS", "").lower() in ("1", "t", "true")


def check_writable(folder: PathLike) -> None:
    """Fail on a read-only folder at once rather than after an hour of work.

    Raises:
        PermissionError: the folder cannot be written; the message suggests a remedy.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PermissionError(
            error.errno,
            f"the work folder {folder} has to be built but cannot be written ({error.strerror}): pass another "
            f"work_dir, with the same settings; {remedy(folder, error.errno)}",
        ) from error


def read_manifest(folder: PathLike) -> dict:
    """A folder's manifest: the record of each array; empty if it is missing or damaged.

    Raises:
        ValueError: the manifest has a newer format than this version knows.
    """
    return _read(Path(folder))[0]


def _read(folder: Path) -> tuple[dict, str | None]:
    """A folder's manifest, and a description of the damage if it exists but is damaged."""
    try:
        manifest = read_json(inside(folder, MANIFEST))
    except FileNotFoundError:
        return {}, None
    except (OSError, ValueError) as error:
        return {}, str(error)
    known = manifest.get("format") if isinstance(manifest, dict) else None
    if isinstance(known, int) and known > MANIFEST_FORMAT:
        raise ValueError(
            f"{folder / MANIFEST} is of format {known}, and this version of retro_nb knows formats up to "
            f"{MANIFEST_FORMAT}: update retro_nb, or choose another folder. Nothing was changed in this one"
        )
    try:
        arrays = manifest["arrays"]
        if known != MANIFEST_FORMAT or manifest["sha256"] != digest(arrays, 64):
            return {}, "its checksum is another"
        _check_records(folder, arrays)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return {}, repr(error) if isinstance(error, KeyError) else str(error)
    return arrays, None


def _check_records(folder: Path, arrays: dict[str, dict]) -> None:
    """Raise an error unless each array has settings, statistics and records of files in the folder."""
    for array, record in arrays.items():
        for name in (array, *record["files"]):
            inside(folder, name)
        if not all(isinstance(record[part], dict) for part in ("settings", "stats", "files")):
            raise TypeError(f"the record of {array} is no record")
        if not all(isinstance(about["bytes"], int) for about in record["files"].values()):
            raise TypeError(f"the files of {array} have no sizes")


def _write_manifest(folder: Path, arrays: dict) -> None:
    arrays = dict(sorted(arrays.items()))  # the same bytes for any order of building
    write_json(folder / MANIFEST, {"format": MANIFEST_FORMAT, "arrays": arrays, "sha256": digest(arrays, 64)})


def array_key(path: PathLike) -> str:
    """Digest of an array's content, and of its settings too if the content is too large to read.

    The settings also count if a part of the array is in a file named after it (an index's lists).
    """
    path = Path(path)
    content, record = file_record(path), read_manifest(path.parent).get(path.name, {})
    whole = "sha256" in content and not any(name.startswith(f"{path.name}.") for name in record.get("files", ()))
    return digest([content, None if whole else record.get("settings")])


def intact(path: PathLike) -> bool:
    """Whether an array and all its files match their records."""
    path = Path(path)
    record = read_manifest(path.parent).get(path.name)
    files = {inside(path.parent, name): about for name, about in record["files"].items()} if record else {}
    return bool(files) and all(file.is_file() and file_record(file) == about for file, about in files.items())


def folder_lock(folder: Path, name: str = ".lock") -> FileLock:
    """A lock of a folder. A link in its place is removed: locking, by an older filelock, empties what it leads to."""
    if (folder / name).is_symlink():
        (folder / name).unlink()
    return FileLock(folder / name)


@contextmanager
def _locked(folder: Path, done: Callable[[], bool]) -> Iterator[bool]:
    """Hold a folder's lock, since two notebooks may want one array at once; yield whether it is held.

    Yield False once `done` reports that another process has done the work. By then that process may hold the lock for
    the next array and wait for this process to do its share.
    """
    lock = folder_lock(folder)
    while not lock.is_locked:
        try:
            lock.acquire(timeout=0.5)
        except Timeout:
            if done():
                yield False
                return
    try:
        yield True
    finally:
        lock.release()


# a store replaced by another


def replace_store(folder: PathLike, gone: Sequence[str] = ()) -> None:
    """Replace the folder's store by the one in its STAGING, and delete the arrays named in `gone` with their files.

    Other arrays in the folder's manifest stay as they are.

    Raises:
        FileNotFoundError: STAGING has no store.
    """
    staging = Path(folder) / STAGING
    read_manifest(folder)  # refuses a newer format before anything is written
    if not read_manifest(staging):
        raise FileNotFoundError(f"no store in {staging} is ready to take the place of that in {folder}")
    write_json(staging / READY, {"gone": list(gone)})
    finish_replacement(folder)


def finish_replacement(folder: PathLike) -> None:
    """Resume a `replace_store` that was stopped while it moved files, if there was one.

    A damaged replacement is left alone, with a warning.

    Raises:
        ValueError: a manifest has a newer format than this version knows.
    """
    folder = Path(folder)
    if _replacement(folder) is None:
        return
    check_writable(folder)
    with _locked(folder, lambda: _replacement(folder) is None) as held:
        if not held or (replacement := _replacement(folder)) is None:
            return
        (staged, gone), arrays, staging = replacement, read_manifest(folder), folder / STAGING
        replaced = {file for name in (*gone, *staged) if name in arrays for file in arrays[name]["files"]}
        moves = {file for record in staged.values() for file in record["files"]}
        _tidy((inside(folder, name) for name in {*gone, *staged, *moves} | replaced), unfinished=True)
        for name in moves:
            if inside(staging, name).exists():  # else it was moved before the stop
                os.replace(inside(staging, name), inside(folder, name))
        for name in replaced - moves:
            inside(folder, name).unlink(missing_ok=True)
        _write_manifest(folder, {name: record for name, record in arrays.items() if name not in gone} | staged)
        (staging / READY).unlink()
        shutil.rmtree(staging, ignore_errors=True)


def _replacement(folder: Path) -> tuple[dict, list[str]] | None:
    """The manifest of the store in a folder's STAGING, and the arrays to delete; None without an intact one."""
    if not os.path.lexists(folder / STAGING / READY):
        return None
    staged: dict = {}
    try:
        gone = read_json(inside(inside(folder, STAGING), READY))["gone"]
        gone = [inside(folder, name).name for name in gone]
    except (OSError, ValueError, KeyError, TypeError) as error:
        damage: str | None = f"{READY}: {error}"
    else:
        staged, damage = _read(folder / STAGING)
    try:
        for name in (file for record in staged.values() for file in record["files"]):
            inside(folder, name)
    except ValueError as error:
        staged, damage = {}, str(error)
    if staged:
        return staged, gone
    warnings.warn(
        f"the update in {folder / STAGING} is damaged and left out ({damage or f'no {MANIFEST}'}): delete that folder",
        stacklevel=4,
    )
    return None


# what is built once


def _why_stale(path: Path, settings: dict, outputs: dict[str, Path]) -> str | None:
    """The reason to rebuild an array and its files; None if they can be used as they are."""
    arrays, damage = _read(path.parent)
    if path.name not in arrays:
        return f"{MANIFEST} is corrupt ({damage})" if damage else f"{MANIFEST} has no record of it"
    was, files = arrays[path.name]["settings"], arrays[path.name]["files"]
    for name in [*settings, *was]:
        if was.get(name) != settings.get(name):
            return f"{name} was {was.get(name)!s:.80} and is {settings.get(name)!s:.80}"
    others = {name: inside(path.parent, name) for name in files if name not in outputs}
    for name, file in (outputs | others).items():
        if not file.is_file() or name not in files:
            return f"{name} is gone" if name in files else f"{MANIFEST} has no record of {name}"
        if file.stat().st_size != files[name]["bytes"] or file_record(file) != files[name]:
            return f"{name} is truncated or corrupt"
    return None


def _left_behind(files: Iterable[Path], *, unfinished: bool) -> list[Path]:
    """Files that killed builds left in the same folder; with `unfinished`, also the blocks to resume from."""
    endings = ("*.tmp", "partial", "progress") if unfinished else ("*.tmp",)
    return [left for file in files for end in endings for left in file.parent.glob(f"{glob.escape(file.name)}.{end}")]


def _left_beside_whole(files: Sequence[Path]) -> list[Path]:
    """Like `_left_behind`, for whole files. Blocks of a build with other settings stay, with their note."""
    notes = [file for file in files if not file.with_name(f"{file.name}.partial").exists()]
    return [*_left_behind(files, unfinished=False), *(each for each in map(_note, notes) if each.exists())]


def _note(file: Path) -> Path:
    return file.with_name(f"{file.name}.progress")


def _tidy(files: Iterable[Path], *, unfinished: bool) -> None:
    for file in _left_behind(files, unfinished=unfinished):
        file.unlink(missing_ok=True)


def _tidy_whole(path: Path, settings: dict, outputs: dict[str, Path]) -> None:
    """Delete the leftovers of a whole array if its builder was killed just before its own clean-up."""
    files = [*outputs.values(), path.parent / MANIFEST]
    if not _left_beside_whole(files):
        return
    with suppress(OSError, Timeout):  # the folder is read-only; or another process builds and will tidy
        with folder_lock(path.parent).acquire(timeout=0):
            if _why_stale(path, settings, outputs) is None:
                for left in _left_beside_whole(files):
                    left.unlink(missing_ok=True)


def cached(
    path: PathLike,
    settings: dict,
    build: Callable[[], dict],
    *,
    files: tuple[PathLike, ...] = (),
    force_reprocess: bool = False,
    shared: bool = False,
) -> dict:
    """Build an array unless it exists already, whole and built with these settings.

    Args:
        path: the array; its folder holds the manifest.
        settings: everything the content depends on (`to_jsonable` shows its JSON form).
        build: writes `path` and `files`, and returns statistics.
        files: other files that `build` writes.
        force_reprocess: build in any case and from the beginning, as does REPROCESS=1 in the environment.
        shared: if several processes were launched together, all of them run `build`, each for its part (see
            `ResumableRows`). Otherwise one builds and the others wait for it.

    All processes of a launch must call this if it is shared or forced.

    Returns:
        The statistics of this build, or of the one that made the files.

    Raises:
        PermissionError: the array has to be built and the folder is read-only.
        Interrupted: Ctrl-C stopped `build`; the message says what is kept.
        ValueError: the folder's manifest has a newer format than this version knows.
    """
    read_manifest(Path(path).parent)  # in every process, so that none waits for one that failed here
    force = force_reprocess or reprocess_requested()
    asked = Path(path), to_jsonable(settings), files, force
    rank, processes = launched()
    if processes == 1 or not (shared or force):
        return _build_if_stale(*asked, build)
    begun, stats = [], None

    def begin() -> dict:
        if shared:
            begun.append(broadcast(True))
        return build()

    if rank == 0:  # decides for all, and holds the lock
        stats = _build_if_stale(*asked, begin)
    if shared and not begun and broadcast(False):
        build()
    return broadcast(stats)


def _build_if_stale(
    path: Path, settings: dict, files: tuple[PathLike, ...], force: bool, build: Callable[[], dict]
) -> dict:
    folder = path.parent
    finish_replacement(folder)
    outputs = {_recorded_name(file, folder): Path(file) for file in (path, *files)}
    if not force and _why_stale(path, settings, outputs) is None:
        _tidy_whole(path, settings, outputs)
        return read_manifest(folder)[path.name]["stats"]
    check_writable(folder)
    with _locked(folder, lambda: not force and _why_stale(path, settings, outputs) is None) as held:
        if not held:
            return read_manifest(folder)[path.name]["stats"]
        reason = "asked for (REPROCESS=1, force_reprocess)" if force else _why_stale(path, settings, outputs)
        if reason is None:
            return read_manifest(folder)[path.name]["stats"]
        arrays = read_manifest(folder)
        if path.exists() or path.name in arrays:
            warnings.warn(f"building {path.name} again: {reason}", stacklevel=4)
        damaged = not force and arrays.get(path.name, {}).get("settings") == settings
        _tidy((*outputs.values(), folder / MANIFEST), unfinished=force or damaged)
        if damaged:  # drop the record now: an unfinished build is then one of the mended array
            _write_manifest(folder, {name: record for name, record in arrays.items() if name != path.name})
        with _explain_interrupt(path):
            stats = to_jsonable(build())
        record = {"settings": settings, "stats": stats, "files": {n: file_record(f) for n, f in outputs.items()}}
        _write_manifest(folder, read_manifest(folder) | {path.name: record})
        _tidy(outputs.values(), unfinished=True)
    return stats


@contextmanager
def _explain_interrupt(path: Path) -> Iterator[None]:
    """Around a build: let Ctrl-C say what is kept of it."""
    try:
        yield
    except KeyboardInterrupt:
        notes = sorted(path.parent.glob("*.progress"), key=lambda note: note != _note(path))  # or of a part of it
        if notes:
            rows = notes[0].read_bytes().partition(b"\n")[2].partition(b"\n")[0]
            kept = f"{rows.count(b'1')} of {len(rows)} rows are kept, as is what was finished before"
        else:
            kept = "it starts again from its beginning, what was finished before is kept"
        raise Interrupted(f"stopped while building {path}: {kept}; the same call goes on") from None


def _recorded_name(file: PathLike, folder: Path) -> str:
    """A file's name in the manifest. For a file in another folder it is no path: only its builder finds it."""
    name = os.path.relpath(file, folder)
    return quote(name, safe="") if os.path.dirname(name) else name
