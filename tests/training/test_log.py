"""The log: what is written can be read by anyone, what is damaged is named."""

import json
import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st

from retro_nb.training.log import History, Log, read_log, whole_records

numbers = st.floats(width=32) | st.sampled_from([math.nan, math.inf, -math.inf])


def make_log(out_dir: Path | str | None, done: int = 0) -> Log:
    return Log(Accelerator(cpu=True), out_dir, done, steps=100, progress=False)


def do_step(log: Log, step: int, loss: float, norm: float, tokens: int = 3) -> None:
    log.begin_step(iter([None]))
    log.end_step(step, 0.1, torch.tensor([loss, norm]), torch.tensor(tokens))


def lines(*steps: int) -> str:
    return "".join(json.dumps({"step": step}) + "\n" for step in steps)


@given(
    steps=st.lists(st.tuples(numbers, numbers, st.integers(0, 9)), min_size=1, max_size=30),
    every=st.integers(1, 7),
)
def test_records_count_the_skipped_steps_and_are_valid_json(tmp_path_factory, steps, every):
    out_dir = tmp_path_factory.mktemp("log")
    log, row, rows = make_log(out_dir), 0, []
    for step, (loss, norm, tokens) in enumerate(steps, start=1):
        do_step(log, step, loss, norm, tokens)
        if step % every == 0 or step == len(steps):
            log.collect()
            rows += log.newly_skipped
            log.write()
    log.close()
    text = (out_dir / "log.jsonl").read_text(encoding="utf-8")
    records = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    assert records == read_log(out_dir / "log.jsonl") == log.history
    expected = []
    for step, (record, (loss, norm, _)) in enumerate(zip(records, steps, strict=True), start=1):
        bad = not (math.isfinite(loss) and math.isfinite(norm))
        row = row + 1 if bad else 0
        expected += [(step, row)] if bad else []
        assert record["step"] == step and record["skipped"] == len(expected)
        assert record["tokens"] == sum(tokens for *_, tokens in steps[:step])
        assert record.get("loss") == (loss if math.isfinite(loss) else None)
        assert record.get("grad_norm") == (norm if math.isfinite(norm) else None)
    assert [(each.step, each.in_a_row) for each in rows] == expected


def test_a_run_that_goes_on_counts_on(tmp_path):
    log = make_log(tmp_path)
    for step in range(1, 5):
        do_step(log, step, math.nan if step == 2 else 1.0, 1.0)
    log.collect()
    log.close()  # what was collected is written
    assert read_log(tmp_path / "log.jsonl").curve("skipped")[1] == [0, 1, 1, 1]
    log = make_log(tmp_path, done=3)  # step 4 will be done again
    do_step(log, 4, math.inf, 1.0)
    record = log.collect()
    log.close()
    assert (record["skipped"], record["tokens"]) == (2, 12)
    assert read_log(tmp_path / "log.jsonl").steps == [1, 3] and len(log.history) == 4


def test_a_history_has_curves_of_what_was_recorded():
    history = History([{"step": 1, "loss": 2.0}, {"step": 2}, {"step": 3, "loss": 1.0, "valid_loss": 4.0}])
    assert history.steps == [1, 3] and history.losses == [2.0, 1.0]
    assert history.curve("valid_loss") == ([3], [4.0])


@pytest.mark.parametrize(
    "damaged",
    [b"\0\0\0\0\n", b"\n", b'{"step": 3, "lo\n', b"[3]\n", b'{"step": "3"}\n', b'{"loss": 1.0}\n', b'{"step": \xff}\n'],
)
def test_a_damaged_line_is_named(tmp_path, damaged):
    path = tmp_path / "log.jsonl"
    path.write_bytes(lines(1, 2).encode() + damaged + lines(4).encode())
    records, damage = whole_records(path)
    assert [record["step"] for record in records] == [1, 2] and damage.startswith("line 3 of log.jsonl is damaged")
    with pytest.raises(ValueError, match=r"line 3 of log\.jsonl is damaged"):
        read_log(path)


def test_a_line_that_a_kill_left_unfinished_is_not_counted(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(lines(1, 2) + '{"step": 3, "lo')
    assert len(read_log(path)) == 2 and whole_records(path)[1] is None


def test_an_empty_name_is_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_log("").close()
    assert (tmp_path / "log.jsonl").exists()


def test_a_log_that_is_missing(tmp_path):
    assert whole_records(tmp_path / "log.jsonl") == ([], "log.jsonl is missing")
    with pytest.raises(FileNotFoundError, match="there is no log"):
        read_log(tmp_path / "log.jsonl")
