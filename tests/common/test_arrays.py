"""Arrays on disk: whole or not there, in their place or as before, and rebuilt for a reason that is told."""

import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import accelerate
import numpy as np
import pytest
from filelock import FileLock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retro_nb.common import arrays, manifest
from retro_nb.common.arrays import (
    ArrayWriter,
    ResumableRows,
    file_record,
    inside,
    open_array,
    replacing,
    to_jsonable,
    write_json,
)
from retro_nb.common.launch import broadcast, launched
from retro_nb.common.manifest import (
    array_key,
    cached,
    check_writable,
    finish_replacement,
    folder_lock,
    intact,
    read_manifest,
    replace_store,
)

per_example = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


FSYNC = os.fsync


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)  # it matters to a power cut, not to a kill


def files_in(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()} - {".lock"}


# ArrayWriter


@per_example
@given(steps=st.lists(st.integers(0, 5), max_size=12), width=st.integers(1, 3))
def test_what_is_appended_is_what_numpy_reads(tmp_path, steps, width):
    path, model, values = tmp_path / "a.npy", [], iter(range(10_000))
    with ArrayWriter(path, np.int32, (width,)) as writer:
        for step in steps:
            rows = [[next(values) for _ in range(width)] for _ in range(step)]
            writer.append(np.array(rows, np.int64).reshape(-1, width))
            model += rows
    array = np.load(path)
    assert array.dtype == np.int32 and array.shape == (len(model), width) and array.tolist() == model
    assert path.stat().st_size == 128 + 4 * width * len(model)


def test_an_error_leaves_the_old_array_and_nothing_else(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(3))
    with pytest.raises(KeyError), ArrayWriter(tmp_path / "a.npy", np.int32) as writer:
        writer.append(np.arange(100))
        raise KeyError
    assert np.load(tmp_path / "a.npy").tolist() == [0, 1, 2] and files_in(tmp_path) == {"a.npy"}


def full_disk(limit):
    """Make this process unable to write more than so many bytes into any file."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def write_array_on_full_disk(path, limit):
    full_disk(limit)
    with pytest.raises(OSError, match=r"could not write .*a\.npy: File too large.*[\d,]+ MB are free") as caught:
        with ArrayWriter(path, np.int32) as writer:
            writer.append(np.arange(1000))
    assert caught.value.errno == errno.EFBIG


@pytest.mark.parametrize("limit", [0, 100, 128, 4000])  # nothing; not the header; the header alone; the start
def test_a_full_disk_is_told_with_the_file_and_leaves_the_old_array(tmp_path, run_apart, limit):
    np.save(tmp_path / "a.npy", np.arange(3))
    assert run_apart(write_array_on_full_disk, tmp_path / "a.npy", limit) == [0]
    assert np.load(tmp_path / "a.npy").tolist() == [0, 1, 2] and files_in(tmp_path) == {"a.npy"}


def write_rows_on_full_disk(path, limit):
    rows = ResumableRows(path, (1000, 4), np.float32, {})
    full_disk(limit)
    with pytest.raises(OSError, match=r"could not write .*a\.npy"):
        compute(rows, 100)


def test_after_a_full_disk_the_finished_blocks_are_kept(tmp_path, run_apart):
    np.save(tmp_path / "a.npy", np.arange(3))
    assert run_apart(write_rows_on_full_disk, tmp_path / "a.npy", 128 + 16 * 250) == [0]
    assert np.load(tmp_path / "a.npy").tolist() == [0, 1, 2]
    assert ResumableRows(tmp_path / "a.npy", (1000, 4), np.float32, {}).done == 200


# replacing and JSON


def write_many(path):
    for number in range(150):
        write_json(path, {"number": number, "padding": "x" * 20_000})


def test_two_processes_writing_one_file_never_break_it(tmp_path, run_apart):
    assert run_apart(write_many, tmp_path / "a.json", processes=2) == [0, 0]
    assert json.loads((tmp_path / "a.json").read_text())["number"] == 149 and files_in(tmp_path) == {"a.json"}


@pytest.mark.parametrize("name", ["with space.json", "naïve 日本 👍.json", "[a]*?.json"])
def test_unusual_names(tmp_path, name):
    value = {"title": "naïve", "undecodable file name": os.fsdecode(b"caf\xe9.txt"), "none": None}
    write_json(tmp_path / name, value)
    assert json.loads((tmp_path / name).read_text(encoding="utf-8")) == value and files_in(tmp_path) == {name}


def test_plain_is_what_json_gives_back():
    value = {"shape": (2, np.int64(3)), "rate": np.float32(0.5), "path": Path("a") / "b", 1: True}
    assert to_jsonable(value) == {"shape": [2, 3], "rate": 0.5, "path": os.path.join("a", "b"), "1": True}
    assert to_jsonable(to_jsonable(value)) == to_jsonable(value)
    with pytest.raises(TypeError):
        to_jsonable({"anything": object()})


# ResumableRows


def value_of(rows, row):
    """Rows that depend on the settings, so that a mixture of two would be seen."""
    return hash((row, json.dumps(rows.settings))) % 1000


def compute(rows, block, blocks=10**9):
    """Compute at most so many blocks; finish if all are done."""
    for part, _ in zip(rows.blocks(block), range(blocks), strict=False):
        rows.write(part, np.array([[value_of(rows, i)] * rows.shape[1] for i in range(part.start, part.stop)]))
    if rows.done == rows.shape[0]:
        rows.finish()


@per_example
@given(
    runs=st.lists(st.tuples(st.sampled_from(["a", ("b", 1)]), st.integers(1, 7), st.integers(0, 3)), max_size=8),
    count=st.integers(0, 12),
)
def test_runs_that_stop_anywhere_with_settings_to_and_fro_give_the_rows_of_the_last(tmp_path, runs, count):
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    for which, block, blocks in [*runs, ("a", 4, 10**9)]:
        rows = ResumableRows(tmp_path / "a.npy", (count, 2), np.float32, {"which": which})
        compute(rows, block, blocks)
    array = np.load(tmp_path / "a.npy")
    assert array.shape == (count, 2) and array[:, 0].tolist() == [value_of(rows, i) for i in range(count)]


def test_finished_rows_are_not_computed_again_even_if_settings_hold_tuples(tmp_path):
    compute(ResumableRows(tmp_path / "a.npy", (10, 2), np.float32, {"pair": (1, 2)}), 3, blocks=2)
    again = ResumableRows(tmp_path / "a.npy", (10, 2), np.float32, {"pair": (1, 2)})
    assert list(again.blocks(3)) == [slice(6, 9), slice(9, 10)]


@pytest.mark.parametrize("other", [{"shape": (11, 2)}, {"dtype": np.float64}, {"settings": {"b": 2}}])
def test_other_rows_start_afresh(tmp_path, other):
    about = {"shape": (10, 2), "dtype": np.float32, "settings": {"a": 1}}
    compute(ResumableRows(tmp_path / "a.npy", **about), 3, blocks=2)
    assert ResumableRows(tmp_path / "a.npy", **about).done == 6
    assert ResumableRows(tmp_path / "a.npy", **{**about, **other}).done == 0


def test_a_note_never_outlives_the_rows_that_it_is_about(tmp_path, monkeypatch):
    """Killed between beginning other rows and noting which they are: the old note must not vouch for them."""
    compute(ResumableRows(tmp_path / "a.npy", (10, 2), np.float32, {"which": "old"}), 5, blocks=1)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(arrays, "writing", killed)
        compute(ResumableRows(tmp_path / "a.npy", (10, 2), np.float32, {"which": "new"}), 5, blocks=1)
    assert ResumableRows(tmp_path / "a.npy", (10, 2), np.float32, {"which": "old"}).done == 0


@per_example
@given(count=st.integers(1, 30), block=st.integers(1, 7), seed=st.integers(0, 99), stop=st.integers(0, 9))
def test_blocks_come_in_any_order(tmp_path, count, block, seed, stop):
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    about = (tmp_path / "a.npy", (count, 2), np.float32, {})
    whole = np.random.default_rng(count).random((count, 2), np.float32)
    blocks = list(ResumableRows(*about).blocks(block))
    np.random.default_rng(seed).shuffle(blocks)
    for part in blocks[:stop]:
        ResumableRows(*about).write(part, whole[part])
    rows = ResumableRows(*about)
    left = list(rows.blocks(block))
    assert left == sorted(blocks[stop:], key=lambda part: part.start)
    assert rows.done == sum(part.stop - part.start for part in blocks[:stop])
    for part in left:
        rows.write(part, whole[part])
    rows.finish()
    assert np.array_equal(np.load(tmp_path / "a.npy"), whole)


@pytest.mark.parametrize("keep", [0, 100, 128 + 6 * 8 - 1])
def test_a_note_about_rows_that_are_not_there_is_not_believed(tmp_path, keep):
    compute(ResumableRows(tmp_path / "a.npy", (10, 2), np.float32, {}), 3, blocks=2)
    os.truncate(tmp_path / "a.npy.partial", keep)
    assert ResumableRows(tmp_path / "a.npy", (10, 2), np.float32, {}).done == 0


@pytest.mark.parametrize(
    "damage",
    [
        lambda note: b"",
        lambda note: b"{",
        lambda note: b"null",
        lambda note: note[1:],
        lambda note: note[:-1],
        lambda note: note + b"1",
        lambda note: note.replace(b'{"', b'{"b": 1, "'),
    ],
)
def test_a_corrupt_note_is_not_believed(tmp_path, damage):
    compute(ResumableRows(tmp_path / "a.npy", (10, 2), np.float32, {}), 3, blocks=2)
    note = tmp_path / "a.npy.progress"
    note.write_bytes(damage(note.read_bytes()))
    assert ResumableRows(tmp_path / "a.npy", (10, 2), np.float32, {}).done == 0


# processes launched together (with what they share, in test_embedding)


def test_a_process_that_is_alone_joins_no_others(monkeypatch):
    monkeypatch.setattr(accelerate, "PartialState", None)
    assert launched() == (0, 1) and broadcast("value") == "value"


def test_processes_that_do_not_know_of_each_other_are_told(monkeypatch):
    monkeypatch.setattr(accelerate, "PartialState", lambda cpu: SimpleNamespace(num_processes=1))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert launched() == (1, 2)
    with pytest.raises(RuntimeError, match="2 processes were launched, but PartialState knows 1: give it cpu=True"):
        broadcast("value")


# open_array


def test_arrays_open_read_only_and_in_the_shape_asked_for(tmp_path):
    rows = np.arange(12, dtype=np.int32).reshape(4, 3)
    np.save(tmp_path / "a.npy", rows)
    rows.tofile(tmp_path / "raw.dat")
    for array in (open_array(tmp_path / "a.npy"), open_array(tmp_path / "raw.dat", shape=(4, 3))):
        assert np.array_equal(array, rows) and not array.flags.writeable
    for name in ("a.npy", "raw.dat"):  # the reference allocates more rows than it fills
        assert np.array_equal(open_array(tmp_path / name, shape=(2, 3)), rows[:2])
    assert (tmp_path / "raw.dat").stat().st_size == 48, "reading must not grow a raw file"
    np.save(tmp_path / "none.npy", np.empty((0, 3), np.int32))
    assert open_array(tmp_path / "none.npy", shape=(0, 3)).shape == (0, 3)


def test_what_cannot_be_opened_is_named_with_the_reason(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no array at .*gone\.npy: build it first"):
        open_array(tmp_path / "gone.npy")
    np.save(tmp_path / "a.npy", np.zeros((4, 3), np.int32))
    for shape in [(5, 3), (4, 2), (4,), (4, 3, 1)]:
        with pytest.raises(ValueError, match=r"a.npy has shape \(4, 3\), wanted"):
            open_array(tmp_path / "a.npy", shape=shape)
    np.save(tmp_path / "scalar.npy", np.int32(3))
    with pytest.raises(ValueError, match=r"scalar.npy has shape \(\), wanted"):
        open_array(tmp_path / "scalar.npy", shape=(1,))
    for content, shape in [(b"", (4, 3)), (b"x" * 47, (4, 3)), (b"x" * 100, None)]:
        (tmp_path / "raw.dat").write_bytes(content)
        with pytest.raises(ValueError, match=f"raw.dat has no .npy header and {len(content)} bytes"):
            open_array(tmp_path / "raw.dat", shape=shape)


def test_a_file_truncated_anywhere_is_named(tmp_path):
    np.save(tmp_path / "whole.npy", np.arange(12, dtype=np.int32).reshape(4, 3))
    whole = (tmp_path / "whole.npy").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "a.npy").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"a\.npy .*truncated"):
            open_array(tmp_path / "a.npy", shape=(4, 3))


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_header_is_named_or_harmless(tmp_path):
    """Any byte of the header changed to any of these: a ValueError naming the file, or an array all the same."""
    np.save(tmp_path / "whole.npy", np.arange(12, dtype=np.int32).reshape(4, 3))
    whole = (tmp_path / "whole.npy").read_bytes()
    for place in range(6, 128):
        for value in {whole[place] ^ 1, whole[place] ^ 64, whole[place] ^ 128, 0, *b"(9'\\-#"}:
            damaged = bytearray(whole)
            damaged[place] = value
            (tmp_path / "a.npy").write_bytes(damaged)
            try:
                open_array(tmp_path / "a.npy")
            except ValueError as error:
                assert "a.npy" in str(error)


# the manifest and cached


def square(folder, size=3, *, fail=False, **options):
    """Build `square.npy` and its companion; return (stats, whether it was built)."""
    built = []

    def build():
        built.append(1)
        for name, power in (("square.npy", 2), ("cube.npy", 3)):
            with ArrayWriter(folder / name, np.int64) as writer:
                writer.append(np.arange(size) ** power)
        if fail:
            raise RuntimeError("failed")
        return {"size": np.int64(size)}

    options.setdefault("files", (folder / "cube.npy",))
    return cached(folder / "square.npy", {"size": size}, build, **options), bool(built)


def test_a_first_build_is_silent_and_a_second_does_nothing(tmp_path, recwarn):
    assert square(tmp_path / "new") == ({"size": 3}, True)
    assert square(tmp_path / "new") == ({"size": 3}, False)
    assert files_in(tmp_path / "new") == {"square.npy", "cube.npy", "manifest.json"} and not recwarn.list


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: os.truncate(folder / "square.npy", 140), "square.npy is truncated or corrupt"),
        (lambda folder: flip(folder / "square.npy", -1), "square.npy is truncated or corrupt"),
        (lambda folder: flip(folder / "cube.npy", 130), "cube.npy is truncated or corrupt"),
        (lambda folder: (folder / "cube.npy").unlink(), "cube.npy is gone"),
        (lambda folder: (folder / "square.npy").unlink(), "square.npy is gone"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json has no record of it"),
        (lambda folder: os.truncate(folder / "manifest.json", 100), "manifest.json is corrupt"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json is corrupt"),
        (lambda folder: (folder / "manifest.json").write_bytes(b"\xff\x00"), "manifest.json is corrupt"),
    ],
)
def test_damage_is_mended_and_the_reason_told(tmp_path, damage, reason):
    square(tmp_path)
    whole = {name: (tmp_path / name).read_bytes() for name in files_in(tmp_path)}
    damage(tmp_path)
    with pytest.warns(UserWarning, match=f"building square.npy again: {reason}"):
        assert square(tmp_path) == ({"size": 3}, True)
    assert {name: (tmp_path / name).read_bytes() for name in files_in(tmp_path)} == whole


def flip(file, place):
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


@pytest.mark.filterwarnings("ignore:building")
def test_any_byte_of_the_manifest_may_be_wrong(tmp_path):
    square(tmp_path)
    manifest = tmp_path / "manifest.json"
    whole = manifest.read_bytes()
    for place in range(0, len(whole), 3):
        flip(manifest, place)
        assert square(tmp_path)[0] == {"size": 3}
        manifest.write_bytes(whole)


def test_other_settings_rebuild_and_are_named(tmp_path):
    square(tmp_path)
    with pytest.warns(UserWarning, match="building square.npy again: size was 3 and is 4"):
        assert square(tmp_path, 4) == ({"size": 4}, True)
    assert np.load(tmp_path / "cube.npy").tolist() == [0, 1, 8, 27]


def test_a_setting_that_the_record_lacks_rebuilds(tmp_path):
    """Another version may know a setting more or a setting less."""
    path = tmp_path / "a.npy"

    def build(settings):
        return cached(path, settings, lambda: np.save(path, np.zeros(2)) or {"built with": settings})["built with"]

    fewer, more = {"size": 2}, {"size": 2, "pooling": "cls"}
    assert build(fewer) == fewer
    for known in (more, fewer):
        with pytest.warns(UserWarning, match="pooling"):
            assert build(known) == known


def test_a_companion_under_another_name_is_built(tmp_path):
    square(tmp_path)
    (tmp_path / "cube.npy").rename(tmp_path / "elsewhere.npy")
    with pytest.warns(UserWarning, match=r"manifest.json has no record of elsewhere.npy"):
        assert square(tmp_path, files=(tmp_path / "elsewhere.npy",))[1]


def test_a_failed_build_keeps_the_record_of_what_is_there(tmp_path):
    square(tmp_path)
    with pytest.warns(UserWarning), pytest.raises(RuntimeError):
        square(tmp_path, 4, files=(), fail=True)
    with pytest.warns(UserWarning, match="truncated or corrupt"):  # it had moved its files before it failed
        assert square(tmp_path)[1]


@pytest.mark.filterwarnings("ignore:building")
def test_a_damaged_array_is_mended_though_a_note_says_that_all_is_done(tmp_path):
    """Killed after recording the array and before clearing the note; then the array is damaged."""
    path, about = tmp_path / "a.npy", {"which": "a"}

    def build(blocks=10**9):
        rows = ResumableRows(path, (10, 2), np.float32, about)
        compute(rows, 3, blocks)
        if rows.done < 10:
            raise KeyboardInterrupt
        return {}

    cached(path, about, lambda: build() | {"note": (tmp_path / "a.npy.progress").read_text()})
    whole, note = path.read_bytes(), read_manifest(tmp_path)["a.npy"]["stats"]["note"]
    (tmp_path / "a.npy.progress").write_text(note)
    flip(path, -1)
    with pytest.raises(KeyboardInterrupt):
        cached(path, about, lambda: build(blocks=2))
    assert ResumableRows(path, (10, 2), np.float32, about).done == 6
    cached(path, about, build)
    assert path.read_bytes() == whole and files_in(tmp_path) == {"a.npy", "manifest.json"}


def test_reprocess_builds_all_from_the_beginning(tmp_path, monkeypatch):
    for force, variable in ((True, ""), (False, "1")):
        square(tmp_path)
        np.save(tmp_path / "square.npy.partial.npy", np.zeros(1))  # not ours: stays
        for name in ("partial", "progress", "4711.tmp"):
            (tmp_path / f"square.npy.{name}").write_text("left by a killed build")
        monkeypatch.setenv("REPROCESS", variable)
        with pytest.warns(UserWarning, match="building square.npy again: asked for"):
            assert square(tmp_path, force_reprocess=force) == ({"size": 3}, True)
        assert files_in(tmp_path) == {"square.npy", "cube.npy", "manifest.json", "square.npy.partial.npy"}


def test_arrays_of_one_folder_are_recorded_apart(tmp_path):
    square(tmp_path)
    cached(tmp_path / "b.npy", {"b": 1}, lambda: np.save(tmp_path / "b.npy", np.zeros(2)) or {"b": 2})
    assert square(tmp_path) == ({"size": 3}, False)
    assert set(read_manifest(tmp_path)) == {"square.npy", "b.npy"}


def build_slowly(folder):
    def build():
        with open(folder / "builds.log", "a") as log:
            log.write("built\n")
        time.sleep(0.3)
        np.save(folder / "a.npy", np.arange(5))
        return {"rows": 5}

    assert cached(folder / "a.npy", {"rows": 5}, build) == {"rows": 5}


def test_processes_that_want_the_same_array_build_it_once(tmp_path, run_apart):
    assert run_apart(build_slowly, tmp_path, processes=3) == [0, 0, 0]
    assert (tmp_path / "builds.log").read_text() == "built\n"


def test_who_waits_for_an_array_goes_on_once_it_is_there(tmp_path):
    """Though its builder holds the lock again: for the next array, of which it wants others to take their share."""
    square(tmp_path / "built")
    (tmp_path / "store").mkdir()
    waiting = threading.Thread(target=square, args=(tmp_path / "store",), daemon=True)
    with FileLock(tmp_path / "store" / ".lock"):
        waiting.start()
        time.sleep(0.3)  # until it waits; were it slower, it would find the array at once
        shutil.copytree(tmp_path / "built", tmp_path / "store", dirs_exist_ok=True, ignore=lambda *_: [".lock"])
        waiting.join(timeout=30)
        assert not waiting.is_alive()


def snapshot(folder):
    """Content and time of change of all files, and of the folder itself, in which a new file would show."""
    entries = [folder, *sorted(folder.iterdir())]
    return [(e.name, e.stat().st_mtime_ns, e.read_bytes() if e.is_file() else None) for e in entries]


def test_a_finished_folder_is_only_read(tmp_path):
    square(tmp_path)
    before = snapshot(tmp_path)
    assert square(tmp_path) == ({"size": 3}, False) and snapshot(tmp_path) == before


def read_only(folder):
    if os.geteuid() == 0:  # nothing is read-only to root
        os.setuid(65534)
    assert square(folder) == ({"size": 3}, False)
    with pytest.raises(PermissionError, match=r"the work folder .* has to be built but cannot be written"):
        square(folder, 4)


def test_a_read_only_folder_works_when_complete_and_says_so_when_not(tmp_path_factory, run_apart):
    folder = Path(os.path.realpath("/tmp")) / f"retro_nb_read_only_{os.getpid()}"  # pytest's own are closed to others
    try:
        square(folder)
        folder.chmod(0o555)
        before = snapshot(folder)
        assert run_apart(read_only, folder) == [0]
        assert snapshot(folder) == before
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_folders_that_cannot_be_are_met_at_the_door(tmp_path):
    (tmp_path / "file").write_text("in the way")
    places = [tmp_path / "file", tmp_path / "file" / "below"]
    for folder in [*places, Path("/proc/retro")] if sys.platform == "linux" else places:
        with pytest.raises(PermissionError, match=f"{folder} has to be built but cannot be written"):
            check_writable(folder)
    check_writable(tmp_path / "made" / "on the way")
    assert not list((tmp_path / "made" / "on the way").iterdir())


# identities


def test_records_of_large_files_are_of_a_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "CHECKSUM_BLOCK", 10)
    monkeypatch.setattr(arrays, "CHECKSUM_LIMIT", 40)
    file = tmp_path / "a"
    for size, kind in ((0, "sha256"), (40, "sha256"), (41, "sample_sha256"), (95, "sample_sha256")):
        file.write_bytes(bytes(size))
        before = file_record(file)
        assert set(before) == {"bytes", kind} and before["bytes"] == size
        for place in {0, size - 1} if size else ():  # the first and the last block are always in it
            flip(file, place)
            assert file_record(file) != before
            flip(file, place)
        assert file_record(file) == before
    before, sampled = file_record(file, whole=True), file_record(file)
    assert set(before) == {"bytes", "sha256"}
    for place in range(95):
        flip(file, place)
        assert file_record(file, whole=True) != before
        flip(file, place)
    assert file_record(file, whole=True) == before and file_record(file) == sampled


def test_the_identity_of_an_array_is_its_content(tmp_path):
    square(tmp_path)
    key = array_key(tmp_path / "square.npy")
    shutil.copy(tmp_path / "square.npy", tmp_path / "copy.npy")
    assert array_key(tmp_path / "copy.npy") == key
    with pytest.warns(UserWarning, match="asked for"):
        square(tmp_path, force_reprocess=True)
    assert array_key(tmp_path / "square.npy") == key
    flip(tmp_path / "square.npy", -1)
    assert array_key(tmp_path / "square.npy") != key


def test_a_temporary_name_is_gone_whatever_happens(tmp_path):
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    with replacing(tmp_path / "deep" / "a") as temporary:
        temporary.write_text("whole")
    assert files_in(tmp_path) == {"deep"} and files_in(tmp_path / "deep") == {"a"}
    with pytest.raises(FileNotFoundError, match=r"could not write .*/b:"), replacing(tmp_path / "b"):
        pass  # nothing was written


def test_what_is_moved_is_on_the_disk_before_and_its_place_after(tmp_path, monkeypatch):
    """Of a file: its last content, then its move, then the folder that names it."""
    events, replace = [], os.replace

    def note_fsync(file: int) -> None:
        status = os.fstat(file)
        events.append(("on disk", status.st_ino, status.st_size))
        FSYNC(file)

    def note_replace(source: Path, target: Path) -> None:
        status = os.stat(source)
        events.append(("moved", status.st_ino, status.st_size))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    with replacing(tmp_path / "text") as temporary:
        temporary.write_text("whole")
    with ArrayWriter(tmp_path / "rows.npy", np.int32) as writer:
        writer.append(np.arange(9))
    write_json(tmp_path / "note.json", {"a": 1})
    rows = ResumableRows(tmp_path / "blocks.npy", (4,), np.int32, {})
    rows.write(slice(0, 4), np.arange(4))
    rows.finish()
    moves = [number for number, (kind, *_) in enumerate(events) if kind == "moved"]
    assert len(moves) == 6  # the note of the blocks too, at their beginning and at their end
    for number in moves:
        _, file, size = events[number]
        assert ("on disk", file, size) in events[:number]
        assert events[number + 1][:2] == ("on disk", tmp_path.stat().st_ino)


# stores from elsewhere


def forge(folder, arrays, gone=None):
    """Write a manifest with a right checksum, as anybody can; with `gone`, as that of an update to be moved."""
    folder.mkdir(parents=True, exist_ok=True)
    checksum = hashlib.sha256(json.dumps(arrays, sort_keys=True).encode()).hexdigest()
    write_json(folder / "manifest.json", {"format": 1, "arrays": arrays, "sha256": checksum})
    if gone is not None:
        write_json(folder / "ready.json", {"gone": gone})


def record_of(*names, about=None):
    return {"settings": {"size": 3}, "stats": {"size": 3}, "files": {n: about or {"bytes": 0} for n in names}}


def everything(folder):
    """All files below a folder with their content, symbolic links with their targets."""
    found = sorted(path for path in folder.rglob("*") if path.name != ".lock")
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes()
        for path in found
    }


OUTSIDE = ["../precious.txt", "../../home/precious.txt", "{home}/precious.txt", "..", ".", "", "sub/a.npy", "a\\b.npy",
           "C:precious.txt", "link.npy", "chain.npy", "nul\0.npy"]  # fmt: skip


@pytest.fixture
def hostile(tmp_path):
    """A store's folder beside precious files, with links to one of them."""
    (tmp_path / "home").mkdir()
    for path in (tmp_path / "precious.txt", tmp_path / "home" / "precious.txt", tmp_path / "store" / "sub" / "a.npy"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("precious")
    (tmp_path / "store" / "link.npy").symlink_to(tmp_path / "precious.txt")
    (tmp_path / "store" / "chain.npy").symlink_to("link.npy")
    return tmp_path / "store"


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_leads_out_of_the_folder_is_refused(hostile, name):
    with pytest.raises(ValueError, match=r"is not the name of a file in|is a symbolic link to"):
        inside(hostile, name.format(home=hostile.parent / "home"))


@pytest.mark.parametrize("name", ["a.npy", "..a", "a..", "naïve 日本.npy", "[a]*?.npy", "alias.npy", "missing"])
def test_a_name_within_the_folder_is_taken(hostile, name):
    (hostile / "a.npy").touch()
    (hostile / "alias.npy").symlink_to("a.npy")
    assert inside(hostile, name) == hostile / name


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.filterwarnings("ignore:building")
def test_a_manifest_that_names_files_elsewhere_is_damaged(hostile, monkeypatch, name):
    name, read = name.format(home=hostile.parent / "home"), []
    outside = everything(hostile.parent / "home")
    forge(hostile, {"square.npy": record_of("square.npy", "cube.npy", name)})
    monkeypatch.setattr(manifest, "file_record", lambda path: read.append(Path(path)) or file_record(path))
    assert read_manifest(hostile) == {} and not intact(hostile / "square.npy")
    assert square(hostile) == ({"size": 3}, True)
    assert {path.name for path in read} <= {"square.npy", "cube.npy"}
    assert everything(hostile.parent / "home") == outside
    assert (hostile.parent / "precious.txt").read_text() == "precious"


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("where", ["own", "staged", "gone", "staged link"])
def test_an_update_that_names_files_elsewhere_is_not_moved(hostile, name, where):
    """A replaced store deletes the files that its own manifest names, and moves those that the new one names."""
    name, staging = name.format(home=hostile.parent / "home"), hostile / "update"
    forge(hostile, {"a.npy": record_of("a.npy", *[name] * (where == "own"))})
    staged, gone = record_of("b.npy", *[name] * (where == "staged")), ["a.npy", *[name] * (where == "gone")]
    forge(staging, {"b.npy": staged}, gone)
    (staging / "b.npy").write_text("new")
    if where == "staged link":
        (staging / "b.npy").unlink()
        (staging / "b.npy").symlink_to(hostile.parent / "precious.txt")
    before = everything(hostile.parent)
    with warnings.catch_warnings():
        warnings.filterwarnings("error" if where == "own" else "ignore", message="the update in")
        finish_replacement(hostile)
    after = everything(hostile.parent)
    if where != "own":
        assert after == before
    kept = ("precious.txt", "home/precious.txt", "store/link.npy", "store/chain.npy", "store/sub/a.npy")
    assert {path: after[path] for path in kept} == {path: before[path] for path in kept}


@pytest.mark.parametrize("part", ["update", "update/ready.json", "update/manifest.json"])
def test_an_update_that_lies_elsewhere_is_not_moved(hostile, part):
    forge(hostile, {"a.npy": record_of("a.npy")})
    forge(hostile / "update", {"b.npy": record_of("b.npy")}, ["a.npy"])
    (hostile / "update" / "b.npy").write_text("new")
    (hostile / part).rename(hostile.parent / "elsewhere")
    (hostile / part).symlink_to(hostile.parent / "elsewhere")
    before = everything(hostile.parent)
    with pytest.warns(UserWarning, match="the update in .* is damaged and left out"):
        finish_replacement(hostile)
    assert everything(hostile.parent) == before


@pytest.mark.parametrize("content", ["", "{", "[]", '{"gone": 3}', '{"gone": [["a"]]}', "[" * 100_000])
def test_a_damaged_update_is_left_alone(tmp_path, content):
    square(tmp_path)
    forge(tmp_path / "update", {"b.npy": record_of("b.npy")}, [])
    (tmp_path / "update" / "ready.json").write_text(content)
    before = everything(tmp_path)
    with pytest.warns(UserWarning, match="the update in .* is damaged and left out"):
        assert square(tmp_path) == ({"size": 3}, False)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("ending", ["partial", "progress", "4711.tmp"])
def test_no_link_beside_an_array_is_written_through(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(os, "getpid", lambda: 4711)
    (tmp_path / "store").mkdir()
    (tmp_path / "precious.txt").write_text("precious")
    about = (tmp_path / "store" / "a.npy", (10, 2), np.float32, {})
    compute(ResumableRows(*about), 3, blocks=2)
    link = tmp_path / "store" / f"a.npy.{ending}"
    if link.exists():
        link.rename(tmp_path / "moved")
    link.symlink_to(tmp_path / ("moved" if (tmp_path / "moved").exists() else "precious.txt"))
    before = everything(tmp_path)
    compute(ResumableRows(*about), 3)
    if ending.endswith("tmp"):
        with replacing(tmp_path / "store" / "a.npy") as temporary:
            temporary.write_text("whole")
    outside = ("precious.txt", "moved")
    assert {n: everything(tmp_path).get(n) for n in outside} == {n: before.get(n) for n in outside}


def test_no_lock_empties_what_a_link_leads_to(tmp_path):
    (tmp_path / "precious.txt").write_text("precious")
    for name in (".lock", ".other.lock"):
        (tmp_path / "store").mkdir(exist_ok=True)
        (tmp_path / "store" / name).symlink_to(tmp_path / "precious.txt")
    assert square(tmp_path / "store")[1]
    with folder_lock(tmp_path / "store", ".other.lock"):
        assert (tmp_path / "precious.txt").read_text() == "precious"


def test_files_that_a_build_wants_in_another_folder_are_its_own(tmp_path):
    files = (tmp_path / "elsewhere" / "cube.npy",)

    def build():
        for path in (tmp_path / "store" / "square.npy", *files):
            with ArrayWriter(path, np.int32) as writer:
                writer.append(np.arange(3))
        return {"size": 3}

    cached(tmp_path / "store" / "square.npy", {}, build, files=files)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cached(tmp_path / "store" / "square.npy", {}, pytest.fail, files=files)
    flip(files[0], -1)
    with pytest.warns(UserWarning, match="truncated or corrupt"):
        cached(tmp_path / "store" / "square.npy", {}, build, files=files)


# manifests of newer formats


@pytest.mark.parametrize("where", ["", "update"])
@pytest.mark.parametrize("force", [False, True])
def test_a_newer_store_is_refused_by_name_and_nothing_is_written(tmp_path, where, force):
    square(tmp_path)
    forge(tmp_path / "update", {"b.npy": record_of("b.npy")}, [])
    path = tmp_path / where / "manifest.json"
    write_json(path, {"format": 7, "arrays": [], "anything": "else"})
    before = snapshot(tmp_path), everything(tmp_path)
    message = rf"{path} is of format 7, and this version of retro_nb knows formats up to 1: update"
    with pytest.raises(ValueError, match=message):
        square(tmp_path, 4, force_reprocess=force)
    with pytest.raises(ValueError, match=message):
        replace_store(tmp_path)
    assert (snapshot(tmp_path), everything(tmp_path)) == before


# notes of what is done


def rows_built(path, which, value):
    """Build an array of rows of one value; the note that a kill just before the tidying would have left."""
    notes = []

    def build():
        rows = ResumableRows(path, (10, 2), np.float32, {"which": which})
        for block in rows.blocks(4):
            rows.write(block, np.full((block.stop - block.start, 2), value))
        rows.finish()
        notes.append(path.with_name(f"{path.name}.progress").read_bytes())
        return {}

    cached(path, {"which": which}, build)
    return notes


@pytest.mark.filterwarnings("ignore:building")
def test_a_note_does_not_vouch_for_another_file_in_the_place_of_its_own(tmp_path):
    """Killed before the tidying; another array took the place (as an update moves it); then the first is wanted."""
    path, note = tmp_path / "a.npy", tmp_path / "a.npy.progress"
    (left,) = rows_built(path, "first", 1)
    rows_built(path, "second", 2)
    note.write_bytes(left)
    assert ResumableRows(path, (10, 2), np.float32, {"which": "first"}).done == 0
    rows_built(path, "first", 1)
    assert np.load(path).tolist() == [[1, 1]] * 10


def test_killed_after_the_move_nothing_is_computed_again(tmp_path):
    path = tmp_path / "a.npy"
    compute(ResumableRows(path, (10, 2), np.float32, {}), 3)
    assert ResumableRows(path, (10, 2), np.float32, {}).done == 10
    flip(path, -1)
    assert ResumableRows(path, (10, 2), np.float32, {}).done == 0


@pytest.mark.filterwarnings("error")
def test_what_kills_left_is_tidied_where_all_is_whole(tmp_path):
    square(tmp_path)
    before, lefts = everything(tmp_path), ("square.npy.progress", "cube.npy.4711.tmp", "manifest.json.4711.tmp")
    for name in lefts:
        (tmp_path / name).write_text("left by a kill")
    with FileLock(tmp_path / ".lock"):  # somebody builds, and these may be theirs
        assert square(tmp_path) == ({"size": 3}, False) and files_in(tmp_path) > set(lefts)
    assert square(tmp_path) == ({"size": 3}, False) and everything(tmp_path) == before


def test_blocks_that_wait_for_a_build_with_other_settings_stay(tmp_path):
    square(tmp_path)
    waiting = {"square.npy.progress", "square.npy.partial"}
    for name in waiting:
        (tmp_path / name).write_text("of other settings")
    assert square(tmp_path)[1] is False and files_in(tmp_path) > waiting


def test_a_replaced_store_leaves_no_note_of_the_old_one(tmp_path):
    square(tmp_path)
    square(tmp_path / "update", 4)
    (tmp_path / "square.npy.progress").write_text("left by a kill")
    replace_store(tmp_path)
    assert files_in(tmp_path) == {"square.npy", "cube.npy", "manifest.json"} and square(tmp_path, 4)[1] is False


# folders


@pytest.mark.parametrize("write", [lambda path: write_json(path, {}), lambda path: check_writable(path.parent)])
def test_a_folder_that_may_not_be_written_is_named_with_the_setting_that_moves_the_projects_own(
    tmp_path, monkeypatch, write
):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OSError, match=rf"{tmp_path}.*Read-only.*choose a folder that you may write") as elsewhere:
        write(tmp_path / "work" / "a.json")
    monkeypatch.setattr(arrays, "ROOT", tmp_path)
    with pytest.raises(OSError, match=rf"{tmp_path}.*RETRO_NB_HOME") as own:
        write(tmp_path / "work" / "a.json")
    assert "MB are free" not in str(own.value) and "RETRO_NB_HOME" not in str(elsewhere.value)


def test_a_disk_without_room_for_a_file_is_no_matter_of_rights(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(manifest.tempfile, "TemporaryFile", full)
    with pytest.raises(OSError, match=r"No space left.*MB are free") as caught:
        check_writable(tmp_path)
    assert "may write" not in str(caught.value)


def write_plainly_on_full_disk(path):
    full_disk(100)
    with pytest.raises(OSError, match=r"could not write .*a\.txt: File too large.*MB are free"):
        with arrays.writing(path, "w") as file:  # whose caller explains nothing
            file.write("x" * 10**6)
    with pytest.raises(ConnectionResetError, match=r"^\[Errno 104\] of a network$"), arrays.writing(path, "w"):
        raise OSError(errno.ECONNRESET, "of a network")  # that is no matter of this file


def test_a_full_disk_is_explained_whoever_writes_and_other_errors_are_left(tmp_path, run_apart):
    assert run_apart(write_plainly_on_full_disk, tmp_path / "a.txt") == [0] and not files_in(tmp_path)


def test_another_home_moves_what_is_written_and_not_what_comes_with_the_project(tmp_path):
    lines = "from retro_nb import RETRO, WORK; from retro_nb.measure.results import results\n"
    lines += "RETRO.from_pretrained('speeches'); results('almanac'); print(WORK)"
    environment = os.environ | {"RETRO_NB_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", lines], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == str(tmp_path / "home" / "data" / "work"), done.stderr
