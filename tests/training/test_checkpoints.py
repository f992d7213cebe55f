"""Checkpoints: what a crash, a second run, another corpus or a foreign folder can do to a run that goes on."""

import hashlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, Subset, TensorDataset

from retro_nb.model.pretrained import not_finite
from retro_nb.model.retro import RETRO
from retro_nb.training.log import read_log
from retro_nb.training.training import fit

CONFIG = dict(
    num_tokens=40, max_seq_len=12, chunk_size=4, enc_dim=8, enc_depth=1, dec_dim=16, dec_depth=1,
    dec_cross_attn_layers=(1,), heads=2, dim_head=8, dec_ff_dropout=0.1,
)  # fmt: skip
RUN = dict(steps=9, batch_size=4, lr=1e-2, checkpoint_every=3, log_every=1, progress=False)
FILES = ("optimizer.bin", "model.safetensors", "random_states_0.bin", "config.json")


def tiny_retro() -> RETRO:
    torch.manual_seed(7)
    return RETRO(**CONFIG)


def tiny_data(sequences: int = 18) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(1, 40, (sequences, *shape), generator=generator) for shape in ((13,), (3, 2, 8))]
    return TensorDataset(*tokens)


def train(out_dir: Path | None, data: Dataset | None = None, **changes) -> tuple[list[dict], torch.Tensor]:
    """The records without what depends on the clock, and the weights."""
    retro = tiny_retro()
    history = fit(retro, data or tiny_data(), out_dir=out_dir, **(RUN | changes))
    records = [{k: v for k, v in record.items() if "second" not in k} for record in history]
    return records, torch.cat([param.detach().flatten() for param in retro.parameters()])


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    out_dir = tmp_path_factory.mktemp("finished")
    train(out_dir)
    return out_dir


@pytest.fixture
def out_dir(finished, tmp_path) -> Path:
    """A run with checkpoints of steps 6 and 9, to be spoilt."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture(scope="module")
def expected() -> tuple[list[dict], torch.Tensor]:
    return train(None)


def goes_on(out_dir: Path, expected: tuple[list[dict], torch.Tensor]) -> None:
    records, weights = train(out_dir)
    assert records == expected[0] and torch.equal(weights, expected[1])
    assert sorted(os.listdir(out_dir / "checkpoints")) == ["step-00000006", "step-00000009"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is wrong any more
        train(out_dir)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {"empty": lambda path: path.write_bytes(b""), "cut": truncate, "flipped": flip, "missing": Path.unlink}


# damage


def test_the_two_newest_are_kept(finished):
    assert sorted(os.listdir(finished / "checkpoints")) == ["step-00000006", "step-00000009"]


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_taken(out_dir, expected, name, kind):
    DAMAGE[kind](out_dir / "checkpoints" / "step-00000009" / name)
    with pytest.warns(UserWarning, match=f"going on from .*step-00000006, since step-00000009: {re.escape(name)} is"):
        goes_on(out_dir, expected)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "[" * 99_999, '{"step": 9}', '{"step": 9, "files": {}, "model": 1}']
)
def test_a_damaged_note_is_named_and_the_checkpoint_before_is_taken(out_dir, expected, content):
    (out_dir / "checkpoints" / "step-00000009" / "fit.json").write_text(content)
    with pytest.warns(UserWarning, match=r"step-00000009: fit\.json is empty, damaged"):
        goes_on(out_dir, expected)


@pytest.mark.parametrize("files", [None, [], ["model.safetensors"], {"model.safetensors": None}])
def test_a_note_without_digests_is_named_and_the_checkpoint_before_is_taken(out_dir, expected, files):
    note = out_dir / "checkpoints" / "step-00000009" / "fit.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | {"files": files}))
    with pytest.warns(UserWarning, match=r"step-00000009: fit\.json is empty, damaged"):
        goes_on(out_dir, expected)


def test_a_note_that_names_a_file_elsewhere_is_damaged_and_that_file_is_not_read(out_dir, expected):
    note = out_dir / "checkpoints" / "step-00000009" / "fit.json"
    content = json.loads(note.read_text())
    content["files"]["../../../elsewhere"] = {"bytes": 1, "sha256": "0"}
    note.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=r"step-00000009: fit\.json is damaged \('../../../elsewhere' is not the name"):
        goes_on(out_dir, expected)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "random_states_0.bin"])
def test_a_note_that_leaves_out_a_file_is_damaged(out_dir, expected, name):
    """Without random states, say, the losses after the checkpoint would be others."""
    newest = out_dir / "checkpoints" / "step-00000009"
    content = json.loads((newest / "fit.json").read_text())
    del content["files"][name]
    (newest / "fit.json").write_text(json.dumps(content))
    (newest / name).unlink()
    with pytest.warns(UserWarning, match=rf"step-00000009: fit\.json does not list {re.escape(name)}"):
        goes_on(out_dir, expected)


def replace_file(path: Path, save: Callable[[Path], None]) -> None:
    """Write other content, and its digest into fit.json."""
    save(path)
    note = path.parent / "fit.json"
    saved, content = json.loads(note.read_text()), path.read_bytes()
    saved["files"][path.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    note.write_text(json.dumps(saved))


@pytest.mark.parametrize("content", [{}, [], {"state": {}}, None])
@pytest.mark.parametrize("name", ["optimizer.bin", "random_states_0.bin"])
def test_a_state_that_is_empty_is_named(out_dir, name, content):
    newest = out_dir / "checkpoints" / "step-00000009"
    replace_file(newest / name, partial(torch.save, content))
    with pytest.raises(ValueError, match=rf"could not load .*{re.escape(name)} holds no .*resume=False") as error:
        train(out_dir)
    assert "weights_only" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"damaged"])
@pytest.mark.parametrize("name", ["optimizer.bin", "random_states_0.bin"])
def test_a_state_that_torch_has_not_saved_is_named(out_dir, name, content):
    newest = out_dir / "checkpoints" / "step-00000009"
    replace_file(newest / name, lambda path: path.write_bytes(content))
    with pytest.raises(ValueError, match=rf"could not load .*{re.escape(name)} holds more .*resume=False") as error:
        train(out_dir)
    assert "weights_only" not in str(error.value)


def test_a_run_that_was_saved_on_a_gpu_says_so(out_dir, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    file = out_dir / "checkpoints" / "step-00000009" / "random_states_0.bin"
    replace_file(file, partial(torch.save, torch.load(file, weights_only=True) | {"cuda": torch.get_rng_state()}))
    with pytest.warns(UserWarning, match="saved on a GPU and goes on on cpu"):
        train(out_dir)


def test_an_optimizer_without_moments_is_named(out_dir):
    file = out_dir / "checkpoints" / "step-00000009" / "optimizer.bin"
    state = torch.load(file, weights_only=True)
    replace_file(file, partial(torch.save, state | {"state": {}}))
    with pytest.raises(ValueError, match=r"could not load .*optimizer\.bin holds no moments"):
        train(out_dir)


def test_a_folder_in_place_of_a_file_is_damage(out_dir, expected):
    file = out_dir / "checkpoints" / "step-00000009" / "optimizer.bin"
    file.unlink()
    file.mkdir()
    with pytest.warns(UserWarning, match=r"step-00000009: optimizer\.bin is missing"):
        goes_on(out_dir, expected)


@pytest.mark.parametrize("line", [7, 9])
def test_a_damaged_line_of_the_log_is_named_and_the_checkpoint_before_is_taken(out_dir, expected, line):
    lines = (out_dir / "log.jsonl").read_bytes().splitlines(keepends=True)
    lines[line - 1] = b"\0" * 80 + b"\n"
    (out_dir / "log.jsonl").write_bytes(b"".join(lines))
    with pytest.warns(UserWarning, match=rf"step-00000009: line {line} of log\.jsonl is damaged"):
        goes_on(out_dir, expected)


def test_a_log_that_ends_too_soon(out_dir, expected):
    lines = (out_dir / "log.jsonl").read_bytes().splitlines(keepends=True)
    (out_dir / "log.jsonl").write_bytes(b"".join(lines[:8]))
    with pytest.warns(UserWarning, match=r"step-00000009: log\.jsonl does not have each of its steps once"):
        goes_on(out_dir, expected)


def test_where_none_is_whole_each_is_named(out_dir, expected):
    truncate(out_dir / "checkpoints" / "step-00000009" / "optimizer.bin")
    (out_dir / "checkpoints" / "step-00000006" / "model.safetensors").unlink()
    before = (out_dir / "log.jsonl").read_bytes()
    message = (
        r"is whole: step-00000009: optimizer\.bin is damaged \(\d+ of \d+ bytes\); step-00000006: model\.safetensors"
    )
    with pytest.raises(ValueError, match=rf"{message} is missing.*resume=False to start over"):
        train(out_dir)
    assert (out_dir / "log.jsonl").read_bytes() == before
    records, weights = train(out_dir, resume=False)
    assert records == expected[0] and torch.equal(weights, expected[1])


class Trap:
    def __reduce__(self):
        return os.mkdir, ("trap",)


def test_nothing_in_a_checkpoint_is_executed(out_dir, monkeypatch):
    """Even where somebody has changed the digests too; and nobody is advised to execute it."""
    monkeypatch.chdir(out_dir)
    newest = out_dir / "checkpoints" / "step-00000009"
    for name in ("optimizer.bin", "random_states_0.bin"):
        before = (newest / name).read_bytes(), (newest / "fit.json").read_bytes()
        torch.save({"state": Trap()}, newest / name)
        note, content = json.loads(before[1]), (newest / name).read_bytes()
        note["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (newest / "fit.json").write_text(json.dumps(note))
        with pytest.raises(ValueError, match=rf"could not load .*{name} holds more than tensors") as error:
            train(out_dir)
        assert "weights_only" not in str(error.value) and not (out_dir / "trap").exists()
        (newest / name).write_bytes(before[0])
        (newest / "fit.json").write_bytes(before[1])


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """A model of a crash: before a folder is renamed, every file in it and its list of files were made lasting."""
    lasting, renamed, fsync, replace = set(), [], os.fsync, os.replace

    def note_fsync(file) -> None:
        status = os.fstat(file)
        lasting.add((status.st_ino, status.st_size if os.path.isfile(f"/proc/self/fd/{file}") else 0))
        fsync(file)

    def note_replace(source, target) -> None:
        if Path(target).name.startswith("step-"):
            entries = [Path(source), *Path(source).rglob("*")]
            states = [(p.stat().st_ino, p.stat().st_size if p.is_file() else 0) for p in entries]
            assert len(entries) > 5 and set(states) <= lasting
            lasting.discard((Path(target).parent.stat().st_ino, 0))
            log = (tmp_path / "log.jsonl").stat()
            assert (log.st_ino, log.st_size) in lasting
            renamed.append(Path(target))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    train(tmp_path)
    assert len(renamed) == 3 and ((tmp_path / "checkpoints").stat().st_ino, 0) in lasting


# what fit has not made


@pytest.mark.parametrize("resume", [True, False])
def test_only_what_fit_has_made_is_deleted(out_dir, resume):
    """Folders and files of others are left, whatever their names."""
    others = [out_dir / "checkpoints" / name for name in ("step-00000001", "step-best", "step-", "notes")]
    for folder in others:
        folder.mkdir()
        (folder / "mine.txt").write_text("mine")
    (out_dir / "mine.txt").write_text("mine")
    if not resume:
        shutil.rmtree(others.pop(0))  # it is where a checkpoint of step 1 may have to be saved
    records, _ = train(out_dir, resume=resume)
    assert len(records) == 9
    assert all((folder / "mine.txt").read_text() == "mine" for folder in (*others, out_dir))
    assert {"step-00000006", "step-00000009"} < set(os.listdir(out_dir / "checkpoints"))


@pytest.mark.parametrize("name", ["saving", "step-00000009"])
@pytest.mark.parametrize("resume", [True, False])
def test_what_is_in_the_way_is_named_before_any_step(out_dir, name, resume):
    shutil.rmtree(out_dir / "checkpoints" / "step-00000009")
    folder = out_dir / "checkpoints" / name
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    before = (out_dir / "log.jsonl").read_bytes()
    with pytest.raises(FileExistsError, match=rf"{name} has no fit\.json.*move it away"):
        train(out_dir, resume=resume)
    assert (folder / "mine.txt").read_text() == "mine" and (out_dir / "log.jsonl").read_bytes() == before


# another run


@pytest.mark.parametrize("name", ["chosen", "more", "fewer"])
def test_other_data_is_refused(tmp_path, name):
    data = {
        "chosen": Subset(tiny_data(), range(1, 17)),
        "more": TensorDataset(*tiny_data(20).tensors),
        "fewer": Subset(tiny_data(), range(15)),
    }[name]
    train(tmp_path, Subset(tiny_data(), range(16)))
    content = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match=r"is of other training data: .* there and .* here\. Pass the same to go on"):
        train(tmp_path, data)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == content


def test_another_validation_set_is_warned_of(tmp_path):
    train(tmp_path, valid=Subset(tiny_data(), range(4)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(tmp_path, valid=Subset(tiny_data(), range(4)))
        train(tmp_path)
    with pytest.warns(UserWarning, match=r"another validation set: .* before and after step 9"):
        train(tmp_path, valid=Subset(tiny_data(), range(5)))


def test_no_clipping_can_be_gone_on_with(tmp_path):
    train(tmp_path, grad_clip=math.inf)
    note = (tmp_path / "checkpoints" / "step-00000009" / "fit.json").read_text()
    assert json.loads(note, parse_constant=pytest.fail)["run"]["grad_clip"] == "inf"
    assert len(train(tmp_path, grad_clip=math.inf)[0]) == 9
    with pytest.raises(ValueError, match=r"another run: grad_clip is 'inf' there and 1\.0 here"):
        train(tmp_path)


def test_random_numbers_go_on(tmp_path):
    """NumPy's and torch's, which dropout and a dataset may draw on; beartype draws on Python's in these tests."""

    class Drawing(TensorDataset):
        def __getitem__(self, index):
            drawn.append((np.random.rand(), torch.rand(()).item()))
            if len(drawn) == stop:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    data, drawn, stop = Drawing(*tiny_data().tensors), [], 0
    train(None, data)
    whole, drawn, stop = drawn[1:], [], 1 + 4 * 7 + 1  # `fit` first looks for a token
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, data)
    drawn, stop = [], 0
    train(tmp_path, data)
    assert drawn[1:] == whole[4 * 6 :]


def child(script: str, out_dir: Path) -> subprocess.Popen:
    code = f"from pathlib import Path\nfrom test_checkpoints import *\nout_dir = Path({str(out_dir)!r})\n{script}"
    return subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent, stdout=-1, stderr=-1, text=True)


def wait_for(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_second_run_in_the_same_folder_is_refused(tmp_path, expected):
    """The first one goes on; a kill frees the folder at once."""
    slow = "retro = tiny_retro(); retro.register_forward_pre_hook(lambda *_: time.sleep(0.2))\n"
    first = child(slow + "fit(retro, tiny_data(), out_dir=out_dir, **RUN)", tmp_path)
    wait_for(lambda: (tmp_path / "log.jsonl").exists() and (tmp_path / "log.jsonl").stat().st_size)
    for resume in (True, False):
        with pytest.raises(BlockingIOError, match=f"another run is training in {tmp_path}"):
            train(tmp_path, resume=resume)
    assert first.poll() is None
    wait_for(lambda: list(tmp_path.glob("checkpoints/step-*")))
    first.send_signal(signal.SIGKILL)
    first.communicate()
    records, weights = train(tmp_path)
    assert records == expected[0] and torch.equal(weights, expected[1])
    assert read_log(tmp_path / "log.jsonl").steps == list(range(1, 10))


def test_the_folder_is_free_after_an_error(tmp_path):
    def fail() -> None:
        raise ZeroDivisionError

    retro = tiny_retro()
    retro.register_forward_pre_hook(lambda *_: fail())
    with pytest.raises(ZeroDivisionError):
        fit(retro, tiny_data(), out_dir=tmp_path, **RUN)
    assert len(train(tmp_path)[0]) == 9


def die_at(out_dir: Path, number: int) -> None:
    """Train, and be killed before change `number` of what is in a folder."""
    changes = itertools.count()

    def dying(act: Callable) -> Callable:
        def change(*args, **kwargs) -> object:
            if next(changes) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return act(*args, **kwargs)

        return change

    torch.set_num_threads(1)
    os.replace, os.rmdir, os.unlink, os.mkdir = map(dying, (os.replace, os.rmdir, os.unlink, os.mkdir))
    torch.save = dying(torch.save)
    train(out_dir)


@pytest.mark.slow
def test_a_kill_at_any_moment_costs_no_checkpoint(tmp_path, expected, run_apart):
    killed, number = 0, 0
    while run_apart(die_at, tmp_path / str(number), number) == [-signal.SIGKILL]:
        out_dir = tmp_path / str(number)
        records, weights = train(out_dir)
        assert records == expected[0] and torch.equal(weights, expected[1])
        assert sorted(os.listdir(out_dir / "checkpoints")) == ["step-00000006", "step-00000009"]
        killed, number = killed + 1, number + 5
    assert killed > 5 and len(read_log(tmp_path / str(number) / "log.jsonl")) == 9


def test_not_finite_names_tensors():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert not_finite(model.named_parameters()) == []
    model[1].bias.data[1] = math.nan
    model[0].weight.data[0, 1] = -math.inf
    assert not_finite(model.named_parameters()) == ["0.weight", "1.bias"]
    assert not_finite([("ids", torch.tensor([1]))]) == []
