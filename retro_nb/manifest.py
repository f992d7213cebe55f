"""What was built, with which settings: a folder's `manifest.json`.

A changed setting rebuilds what depends on it and says so, an unchanged one costs nothing, and a file that was
damaged since is found out.
"""

import glob
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from retro_nb.storage import PathLike, launched, plain, tell, write_json

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
STAGING = "update"  # a folder within a store's: the store as it will be
READY = "ready.json"  # in there, once it is whole: what goes when it is moved
# Of a larger file only so many bytes, evenly spaced blocks, are read: a terabyte at every start would take hours.
CHECKSUM_LIMIT = 2**30
CHECKSUM_BLOCK = 2**22


def reprocess_requested() -> bool:
    """Whether the environment says REPROCESS=1: build everything again, whatever the manifest says."""
    return os.environ.get("REPROCESS", "").lower() in ("1", "t", "true")


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


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_record(path: PathLike) -> dict:
    """Size in bytes and SHA-256 of a file; beyond CHECKSUM_LIMIT, the SHA-256 of evenly spaced blocks of it."""
    size = Path(path).stat().st_size
    blocks, most = -(-size // CHECKSUM_BLOCK), CHECKSUM_LIMIT // CHECKSUM_BLOCK
    checksum = hashlib.sha256()
    with open(path, "rb") as file:
        for block in range(blocks) if blocks <= most else np.linspace(0, blocks - 1, most).astype(np.int64):
            file.seek(int(block) * CHECKSUM_BLOCK)
            checksum.update(file.read(CHECKSUM_BLOCK))
    return {"bytes": size, "sha256" if blocks <= most else "sample_sha256": checksum.hexdigest()}


def read_manifest(folder: PathLike) -> dict:
    """What a folder's manifest says of each array in it; empty where there is none or a damaged one."""
    try:
        manifest = json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8"))
        arrays, known = manifest["arrays"], manifest["format"] == MANIFEST_FORMAT
        return arrays if known and manifest["sha256"] == _digest(arrays) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _write_manifest(folder: Path, arrays: dict) -> None:
    arrays = dict(sorted(arrays.items()))  # the same bytes in whichever order they were built
    write_json(folder / MANIFEST, {"format": MANIFEST_FORMAT, "arrays": arrays, "sha256": _digest(arrays)})


def array_key(path: PathLike) -> str:
    """A short identity of an array: of its content; where that is too large to read, of its settings too.

    So it is with an array of which a part lies in a file named after it (an index's lists).
    """
    path = Path(path)
    content, record = file_record(path), read_manifest(path.parent).get(path.name, {})
    whole = "sha256" in content and not any(name.startswith(f"{path.name}.") for name in record.get("files", ()))
    return _digest([content, None if whole else record.get("settings")])[:16]


def intact(path: PathLike) -> bool:
    """Whether an array and all files that go with it are as they were recorded."""
    path = Path(path)
    record = read_manifest(path.parent).get(path.name)
    files = {path.parent / name: about for name, about in record["files"].items()} if record else {}
    return bool(files) and all(file.exists() and file_record(file) == about for file, about in files.items())


# a store replaced by another


def replace_store(folder: PathLike, gone: Sequence[str] = ()) -> None:
    """Move the whole store in the folder's STAGING over its own; the arrays named in `gone` go with what they had.

    What else the folder's manifest knows stays as it is.

    Raises:
        FileNotFoundError: there is none to be moved.
    """
    staging = Path(folder) / STAGING
    if not read_manifest(staging):
        raise FileNotFoundError(f"no store in {staging} is ready to take the place of that in {folder}")
    write_json(staging / READY, {"gone": list(gone)})
    finish_replacement(folder)


def finish_replacement(folder: PathLike) -> None:
    """Go on with a `replace_store` that was stopped while it moved files; nothing to do where none was."""
    folder = Path(folder)
    staging = folder / STAGING
    if not (staging / READY).exists():
        return
    check_writable(folder)
    with FileLock(folder / ".lock"):
        if not (staging / READY).exists():
            return
        staged, arrays = read_manifest(staging), read_manifest(folder)
        gone = json.loads((staging / READY).read_text(encoding="utf-8"))["gone"]
        replaced = {file for name in (*gone, *staged) if name in arrays for file in arrays[name]["files"]}
        moves = {file for record in staged.values() for file in record["files"]}
        for name in moves:
            if (staging / name).exists():  # else it was moved before the stop
                os.replace(staging / name, folder / name)
        for name in replaced - moves:
            (folder / name).unlink(missing_ok=True)
        _write_manifest(folder, {name: record for name, record in arrays.items() if name not in gone} | staged)
        (staging / READY).unlink()
        shutil.rmtree(staging, ignore_errors=True)


# what is built once


def _why_stale(path: Path, settings: dict, outputs: dict[str, Path]) -> str | None:
    """Why an array and the files that go with it cannot be used as they are; None if they can."""
    arrays = read_manifest(path.parent)
    if path.name not in arrays:
        damaged = not arrays and (path.parent / MANIFEST).exists()
        return f"{MANIFEST} is corrupt" if damaged else f"{MANIFEST} has no record of it"
    was, files = arrays[path.name]["settings"], arrays[path.name]["files"]
    for name in [*settings, *was]:
        if was.get(name) != settings.get(name):
            return f"{name} was {was.get(name)!s:.80} and is {settings.get(name)!s:.80}"
    for name, file in (outputs | {name: path.parent / name for name in files}).items():
        if not file.exists() or name not in files:
            return f"{name} is gone" if name in files else f"{MANIFEST} has no record of {name}"
        if file.stat().st_size != files[name]["bytes"] or file_record(file) != files[name]:
            return f"{name} is truncated or corrupt"
    return None


def _tidy(path: Path, *, unfinished: bool) -> None:
    """Delete what killed builds of a file left behind; with `unfinished`, the blocks to go on from as well."""
    for ending in ("*.tmp", "partial", "progress") if unfinished else ("*.tmp",):
        for file in path.parent.glob(f"{glob.escape(path.name)}.{ending}"):
            file.unlink(missing_ok=True)


def cached(
    path: PathLike,
    settings: dict,
    build: Callable[[], dict],
    *,
    files: tuple[PathLike, ...] = (),
    force_reprocess: bool = False,
    shared: bool = False,
) -> dict:
    """Build an array unless it is there already, whole and made with these settings.

    Args:
        path: the array; its folder holds the manifest.
        settings: everything the content depends on (see `plain` for what JSON makes of it).
        build: writes `path` and `files`, returns statistics.
        files: what else `build` writes.
        force_reprocess: build in any case and from the beginning, as does REPROCESS=1 in the environment.
        shared: where several processes were launched together, all of them run `build`, each for its part (see
            `ResumableRows`). Else one builds and the others wait for it.

    Processes launched together all have to call this if it is shared or forced.

    Returns:
        The statistics, of this build or of the one that made the files.

    Raises:
        PermissionError: it has to be built and the folder is read-only.
    """
    force = force_reprocess or reprocess_requested()
    asked = Path(path), plain(settings), files, force
    rank, processes = launched()
    if processes == 1 or not (shared or force):
        return _build_if_stale(*asked, build)
    begun, stats = [], None

    def begin() -> dict:
        if shared:
            begun.append(tell(True))
        return build()

    if rank == 0:  # it decides, and holds the lock for all
        stats = _build_if_stale(*asked, begin)
    if shared and not begun and tell(False):
        build()
    return tell(stats)


def _build_if_stale(
    path: Path, settings: dict, files: tuple[PathLike, ...], force: bool, build: Callable[[], dict]
) -> dict:
    folder = path.parent
    finish_replacement(folder)
    outputs = {os.path.relpath(file, folder): Path(file) for file in (path, *files)}
    if not force and _why_stale(path, settings, outputs) is None:
        return read_manifest(folder)[path.name]["stats"]
    check_writable(folder)
    with FileLock(folder / ".lock"):  # two notebooks may want the same array at once
        reason = "asked for (REPROCESS=1, force_reprocess)" if force else _why_stale(path, settings, outputs)
        if reason is None:
            return read_manifest(folder)[path.name]["stats"]
        arrays = read_manifest(folder)
        if path.exists() or path.name in arrays:
            warnings.warn(f"building {path.name} again: {reason}", stacklevel=4)
        damaged = not force and arrays.get(path.name, {}).get("settings") == settings
        for file in (*outputs.values(), folder / MANIFEST):
            _tidy(file, unfinished=force or damaged)
        if damaged:  # forgotten at once: from here on, an unfinished build is one of the mended array
            _write_manifest(folder, {name: record for name, record in arrays.items() if name != path.name})
        stats = plain(build())
        record = {"settings": settings, "stats": stats, "files": {n: file_record(f) for n, f in outputs.items()}}
        _write_manifest(folder, read_manifest(folder) | {path.name: record})
        _tidy(path, unfinished=True)
    return stats
