"""What a run is: settings, data and folder are checked before any step."""

import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import Dataset, Subset, TensorDataset

from retro_nb.reference import documents_to_chunks_
from retro_nb.store.dataset import RETRODataset
from retro_nb.text.document import Document
from retro_nb.training.runs import check_settings, data_identity, length, only_run, resolve_settings

SETTINGS = dict(
    steps=10, epochs=None, batch_size=4, accumulate=1, lr=1e-3, wd=0.1, warmup_steps=None, grad_clip=1.0,
    precision=None, retrieval=True, seed=0, log_every=10, eval_every=100, checkpoint_every=100, compile=None,
    num_workers=0, resume=True, progress=True,
)  # fmt: skip
CPU = torch.device("cpu")


# settings


@pytest.mark.parametrize("name", [name for name, value in SETTINGS.items() if type(value) in (int, float, bool)])
@pytest.mark.parametrize("value", ["3", [3], None])
def test_a_setting_of_another_type(name, value):
    if (name, value) == ("steps", None):
        pytest.skip("then epochs say how long")
    with pytest.raises(TypeError, match=f"^{name} is .*: pass "):
        check_settings(SETTINGS | {name: value})


@pytest.mark.parametrize("name", [name for name, value in SETTINGS.items() if type(value) is int])
@pytest.mark.parametrize("value", [2.5, 2.0, True, math.nan])
def test_a_whole_number_is_one(name, value):
    with pytest.raises(TypeError, match=f"^{name} is .*: pass a whole number"):
        check_settings(SETTINGS | {name: value})


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("steps", [0, -1]), ("batch_size", [0]), ("accumulate", [0]), ("warmup_steps", [-1, 10]), ("seed", [-1, 2**32]),
        ("log_every", [0]), ("eval_every", [0]), ("checkpoint_every", [-5]), ("num_workers", [-1]),
        ("lr", [0, 0.0, -1e-3, math.nan, math.inf]), ("wd", [-0.1, math.nan, math.inf]),
        ("grad_clip", [0, 0.0, 1e-320, -1.0, math.nan]), ("precision", ["fp8", ""]), ("epochs", [1]),
    ],
)  # fmt: skip
def test_a_setting_out_of_range(name, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"{name}\b.*{value}"):
            check_settings(SETTINGS | {name: value})


def test_neither_steps_nor_epochs():
    with pytest.raises(ValueError, match="pass exactly one"):
        check_settings(SETTINGS | {"steps": None})


def test_settings_that_are_right_become_plain_numbers():
    given = {"steps": np.int64(20), "lr": np.float32(0.5), "grad_clip": math.inf, "wd": 0, "seed": np.uint8(3)}
    run = resolve_settings(SETTINGS | given, 8, CPU)
    assert [run[name] for name in given] == [20, 0.5, math.inf, 0, 3]
    assert all(type(run[name]) in (int, float) for name in given) and json.dumps(run)
    assert (run["warmup_steps"], run["precision"]) == (2, "no")
    assert resolve_settings(SETTINGS | {"steps": None, "epochs": 3}, 9, CPU)["steps"] == 7
    assert resolve_settings(SETTINGS | {"steps": 10**5}, 9, CPU)["warmup_steps"] == 750


def test_a_batch_that_the_processes_cannot_share():
    assert resolve_settings(SETTINGS, 8, CPU, processes=4)
    with pytest.raises(ValueError, match="batch_size is 4, which 5 processes cannot share: pass at least 5"):
        resolve_settings(SETTINGS, 8, CPU, processes=5)


SCRIPT = """
from test_training import RUN, fit, killed, tiny_data, tiny_retro  # in a process that checks no annotation
for name, value in {"steps": "3", "accumulate": True, "lr": "1e-3", "log_every": 2.5, "retrieval": "off"}.items():
    retro = tiny_retro()
    retro.register_forward_pre_hook(lambda *_: killed())
    try:
        fit(retro, tiny_data(), **(RUN | {name: value}))
    except TypeError as error:
        print(str(error).split(",")[0])
"""


def test_fit_meets_wrong_types_before_any_step():
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    said = done.stdout.splitlines()
    assert said == [
        "steps is '3'", "accumulate is True", "lr is '1e-3'", "log_every is 2.5", "retrieval is 'off'"
    ], done.stderr  # fmt: skip


# data


def test_a_dataset_without_a_length_is_refused():
    assert length(TensorDataset(torch.zeros(3))) == 3
    with pytest.raises(TypeError, match="Dataset has no length: pass"):
        length(Dataset())


@pytest.fixture
def store(tmp_path) -> Path:
    documents = [Document(f"the people of state {number} " * (9 * number), f"d{number}", "s") for number in range(1, 5)]
    names = {"chunks": "chunks", "seqs": "seqs", "doc_ids": "doc_ids"}
    paths = {f"{kind}_memmap_path": tmp_path / f"{name}.npy" for kind, name in names.items()}
    stats = documents_to_chunks_(documents, **paths, chunk_size=8, seq_len=16, progress=False)
    np.save(tmp_path / "knns.npy", np.zeros((stats["chunks"], 2), np.int32))
    (tmp_path / "sizes.json").write_text(json.dumps(stats))
    return tmp_path


def dataset(folder: Path) -> RETRODataset:
    stats = json.loads((folder / "sizes.json").read_text())
    return RETRODataset(
        num_chunks=stats["chunks"], chunk_size=8, seq_len=16, num_sequences=stats["seqs"], num_neighbors=2,
        chunk_memmap_path=folder / "chunks.npy", chunk_nn_memmap_path=folder / "knns.npy",
        seq_memmap_path=folder / "seqs.npy", doc_ids_memmap_path=folder / "doc_ids.npy",
    )  # fmt: skip


def test_the_identity_of_data_follows_what_is_trained_on(store):
    data = dataset(store)
    identity = data_identity(data)
    assert identity == data_identity(dataset(store)) == json.loads(json.dumps(identity))

    def differs(other) -> set[str]:
        new = data_identity(other)
        return {name for name in identity.keys() | new.keys() if identity.get(name) != new.get(name)}

    assert differs(Subset(data, range(3))) == {"sequences", "chosen sequences"}
    assert differs(Subset(data, range(len(data)))) == {"chosen sequences"}
    assert differs(data.with_neighbours(np.ones_like(data.knns))) == {"neighbours"}
    assert differs(data.with_neighbours(np.array(data.knns), draw=1)) == {"neighbours", "drawn neighbours"}
    np.save(store / "knns.npy", np.ones_like(data.knns))
    assert differs(dataset(store)) == {"neighbours"}
    for file in ("manifest.json", "chunks.tokenizer.json"):  # as arrays of the reference
        (store / file).unlink()
    for name, told in (("chunks", "chunks"), ("seqs", "sequence starts"), ("doc_ids", "documents")):
        array = np.load(store / f"{name}.npy")
        array.flat[-1] += 1
        np.save(store / f"{name}.npy", array)
        assert told in differs(dataset(store))


def test_the_identity_of_subsets_of_subsets_is_that_of_the_sequences(store):
    data = dataset(store)
    nested = Subset(Subset(data, [4, 2, 0, 1]), [3, 0])
    assert data_identity(nested) == data_identity(Subset(data, [1, 4])) != data_identity(Subset(data, [4, 1]))


def test_of_another_dataset_the_length_counts():
    assert data_identity(TensorDataset(torch.zeros(5))) == {"sequences": 5}


# the folder


def test_a_folder_has_one_run(tmp_path):
    accelerator = Accelerator(cpu=True)

    def taken(name: str) -> bool:
        """Whether another thread is refused."""
        with ThreadPoolExecutor(1) as other:
            error = other.submit(only_run(accelerator, tmp_path / name).__enter__).exception()
        return isinstance(error, BlockingIOError)

    with only_run(accelerator, tmp_path / "a"):
        with only_run(accelerator, tmp_path / "a"), only_run(accelerator, tmp_path / "b"), only_run(accelerator, None):
            pass
        assert taken("a") and not taken("c")
    with pytest.raises(ZeroDivisionError), only_run(accelerator, tmp_path / "a"):
        raise ZeroDivisionError
    assert not taken("a")


def test_a_lock_that_cannot_be_written_names_the_mend(tmp_path):
    (tmp_path / ".fit.lock").mkdir()
    refused = pytest.raises(OSError, match=r"could not lock .*\.fit\.lock.* another out_dir")
    with refused, only_run(Accelerator(cpu=True), tmp_path):
        pass


def test_a_kill_frees_the_folder(tmp_path):
    script = "import sys; from accelerate import Accelerator; from retro_nb.training.runs import only_run\n"
    script += "with only_run(Accelerator(cpu=True), sys.argv[1]): print(1, flush=True); sys.stdin.read()"
    child = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdin=-1, stdout=-1)
    assert child.stdout.readline() == b"1\n"
    with pytest.raises(BlockingIOError), only_run(Accelerator(cpu=True), tmp_path):
        pass
    child.kill()
    child.wait()
    with only_run(Accelerator(cpu=True), tmp_path):
        pass
