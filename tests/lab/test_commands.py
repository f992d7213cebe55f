"""`python -m retro_nb build` and `train`: settings, what they leave, stopping and going on, several processes."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from filelock import FileLock
from transformers import AutoTokenizer

from retro_nb import RETRO, Store, TrainingWrapper, docstrings, evaluate_loss, split_by_document
from retro_nb.__main__ import main
from retro_nb.lab import commands
from retro_nb.lab.commands import BUILD, TRAIN, choose_settings
from retro_nb.lab.settings import parse_as, read_yaml
from retro_nb.measure.evaluation import evaluate
from retro_nb.store.splits import hold_out
from retro_nb.text.tokens import get_tokenizer
from retro_nb.training.log import read_log

ROOT = Path(__file__).resolve().parents[2]
MODEL = dict(
    max_seq_len=128, chunk_size=64, enc_dim=16, enc_depth=1, dec_dim=16, dec_depth=2, dec_cross_attn_layers=[2],
    heads=2, dim_head=8,
)  # fmt: skip
RUN = dict(steps=12, batch_size=4, lr="1e-2", valid_share=0.3, eval_every=6, checkpoint_every=5, log_every=1)


@pytest.fixture
def recipe(tmp_path, tiny_bert) -> Path:
    """A settings file for a tiny run on the sample documents, in a folder with a space."""
    folder = tmp_path / "my recipes"
    folder.mkdir()
    database = {"corpus": str(ROOT / "data" / "sample"), "bert": str(tiny_bert), "work_dir": str(tmp_path / "work")}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(database | MODEL | RUN | {"out_dir": str(tmp_path / "out")}), encoding="utf-8")
    return path


def arguments(command: str, recipe: Path, **given: object) -> list[str]:
    pairs = [part for name, value in given.items() for part in ("-p", name, str(value))]
    return [command, "-f", str(recipe), *pairs]


def lasting(path: Path) -> list[dict]:
    """A run's records without what depends on the clock."""
    return [{k: v for k, v in record.items() if "second" not in k} for record in read_log(path / "log.jsonl")]


# settings


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        ("1e-4", float | None, 1e-4),
        ("null", int | None, None),
        (None, float | None, None),
        ("None", str | os.PathLike | None, None),
        ("[6, 9]", TRAIN["dec_cross_attn_layers"].annotation, [6, 9]),
        ("LayerNorm", TRAIN["norm_klass"].annotation, "LayerNorm"),
        (".inf", float, math.inf),
        ("off", bool, False),
        ("300", TRAIN["tokenizer"].annotation, 300),
        ("gpt2", TRAIN["tokenizer"].annotation, "gpt2"),
        ("./300", TRAIN["tokenizer"].annotation, "./300"),
        ("null", TRAIN["tokenizer"].annotation, None),
    ],
)
def test_cast(value, kind, expected):
    got = parse_as(value, kind)
    assert got == expected and type(got) is type(expected)


def test_settings_are_the_functions_own_and_the_last_word_wins(recipe):
    settings = choose_settings("train", recipe, {"lr": "1e-3", "retrieval": "off", "precision": "no"})
    assert settings["lr"] == 1e-3 and settings["retrieval"] is False and settings["dec_cross_attn_layers"] == [2]
    assert settings["heads"] == 2 and settings["wd"] == 0.1 and settings["knn"] == 2
    assert set(settings) == set(TRAIN) and settings == json.loads(json.dumps(settings))
    built = choose_settings("build", recipe)
    assert set(built) == set(BUILD) < set(TRAIN) and built.items() <= settings.items()


def test_the_model_knows_the_tokenizers_ids_unless_other_numbers_are_given(recipe, tokenizers):
    def sizes(**given):
        settings = choose_settings("train", recipe, given)
        return settings["num_tokens"], settings["pad_id"]

    gpt2 = get_tokenizer(tokenizers["gpt2"])
    assert sizes() == sizes(tokenizer="null") == (30522, 0)
    assert sizes(tokenizer="300") == (300, 0)
    assert sizes(tokenizer=str(tokenizers["gpt2"])) == (gpt2.size, gpt2.ids.pad) and gpt2.ids.pad > 0
    assert sizes(tokenizer="300", num_tokens="512") == (512, 0)
    assert sizes(tokenizer=str(tokenizers["gpt2"]), num_tokens="512", pad_id=511) == (512, 511)
    with open(recipe, "a", encoding="utf-8") as file:
        file.write("tokenizer: 300\nnum_tokens: 320\n")
    assert sizes() == (320, 0) and "num_tokens" not in choose_settings("build", recipe)


def test_without_a_word_it_is_the_speeches_and_the_file_names_the_folder(recipe, tmp_path):
    settings = choose_settings("train", given={"steps": "3"})
    assert settings["corpus"] == "speeches" and Path(settings["out_dir"]).parts[-2:] == ("runs", "train")
    recipe.write_text("epochs: 1", encoding="utf-8")
    assert Path(choose_settings("train", recipe)["out_dir"]).parts[-2:] == ("runs", "tiny")


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("train_*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_are_known_and_make_a_model(path):
    settings = choose_settings("train", path)
    with torch.device("meta"):
        assert RETRO(**{name: settings[name] for name in RETRO(max_seq_len=64).config}).num_parameters() > 10**6


@pytest.mark.parametrize(
    ("command", "given", "message"),
    [
        ("train", {"step": 3}, "-p: unknown parameter 'step' (did you mean steps?); train knows absolute_positions,"),
        ("build", {"steps": 3}, "-p: unknown parameter 'steps'; build knows bert, chunk_size, corpus,"),
        ("train", {"lr": "fast"}, "parameter lr: cannot read 'fast' as declared: lr: float = 0.0003"),
        ("train", {"dec_cross_attn_layers": 3}, "parameter dec_cross_attn_layers: cannot read '3' as declared"),
        ("train", {"epochs": 1}, "Pass either steps or epochs"),
        ("train", {"steps": "null"}, "Pass either steps or epochs"),
        ("train", {"corpus": "speech"}, "nor hf:NAME or speeches or almanac or docstrings or code (did"),
        ("build", {"corpus": "almanac", "max_chars": 9}, "max_chars is 9, but corpus almanac has none: only speeches"),
        ("train", {"corpus": "almanac", "min_chars": 9}, "min_chars is 9, but corpus almanac has none: only docst"),
        ("build", {"corpus": "docstrings", "packages": "numpy"}, "parameter packages: cannot read 'numpy' as declared"),
        ("build", {"corpus": "docstrings", "packages": "[nowhere]"}, "nowhere: no Python files here, try: pip install"),
        ("build", {"glob": "*.md"}, "matches glob '*.md'"),
        ("build", {"max_seq_len": 100}, "seq_len 100 is not a multiple of chunk_size 64"),
        ("train", {"dec_cross_attn_layers": "[3]"}, "names layer 3, but the layers are 1 … 2"),
        ("train", {"batch_size": 0}, "batch_size is 0"),
        ("train", {"bert": "/nowhere"}, "/nowhere"),
        ("train", {"tokenizer": "/nowhere"}, "there is no tokenizer '/nowhere'"),
        ("build", {"tokenizer": 200}, "a vocabulary of 200 has no room for all bytes"),
        ("train", {"tokenizer": 300, "num_tokens": 299}, "the model knows 299 tokens"),
        ("train", {"tokenizer": 300, "pad_id": 7}, "pads with 7, the tokenizer gives 300 and pads with 0"),
    ],
)
def test_bad_input_is_named_and_no_traceback_shown(recipe, tmp_path, command, given, message, capsys):
    assert main(arguments(command, recipe, **given)) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_a_file_with_an_unknown_name_is_refused_by_both(recipe, capsys):
    recipe.write_text("stepz: 3\n", encoding="utf-8")
    for command in ("build", "train"):
        assert main(arguments(command, recipe)) == 2
        assert "tiny.yaml: unknown parameter 'stepz' (did you mean steps?); train knows" in capsys.readouterr().err


# building and training


def test_a_tokenizer_of_the_corpus_from_build_to_evaluation(recipe, tmp_path, capsys):
    """`-p tokenizer 300`: trained by the first, used by all; the model's vocabulary follows it."""
    assert main(arguments("build", recipe, tokenizer=300)) == 0
    work = tmp_path / "work"
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*.npy")} | {
        path: path.stat().st_mtime_ns for path in (work / "tokenizer").glob("*.json")
    }
    assert len(before) >= 6 + 2 and len(AutoTokenizer.from_pretrained(work / "tokenizer")) == 300
    assert main(arguments("train", recipe, tokenizer=300)) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before, "nothing is built twice"
    retro = RETRO.from_pretrained(tmp_path / "out")
    assert (retro.num_tokens, retro.pad_id) == (300, 0)
    assert read_yaml(tmp_path / "out" / "settings.yaml")["tokenizer"] == 300
    history = read_log(tmp_path / "out" / "log.jsonl")
    assert history.losses[-1] < history.losses[0] < 2 * math.log(300)
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    made, loaded = json.loads(printed[printed.index("{") :]), AutoTokenizer.from_pretrained(work / "tokenizer")
    files = sorted((ROOT / "data" / "sample").rglob("*.txt"))
    texts = [files[document].read_text(encoding="utf-8") for document in hold_out(np.arange(7), 0.3, 0)]
    assert made["bytes"] == sum(len(text.encode()) for text in texts)
    assert made["tokens"] == sum(len(loaded(text, add_special_tokens=False).input_ids) for text in texts)
    assert 0 < made["on"]["perplexity"] < 600
    assert main(arguments("train", recipe, tokenizer=301)) == 2
    assert "settings.yaml says tokenizer 300, not 301" in capsys.readouterr().err


def test_build_makes_what_train_uses(recipe, tmp_path, capsys):
    assert main(arguments("build", recipe)) == 0
    said, work = capsys.readouterr().out, tmp_path / "work"
    assert said.startswith("7 documents, 28 chunks,") and "2 neighbours a chunk (recall 1.000)" in said
    before = {path: path.stat().st_mtime_ns for path in work.iterdir() if path.suffix != ".lock"}
    assert {"chunks.npy", "chunks.embedded.npy", "knn.index", "chunks.knn.npy"} <= {path.name for path in before}
    assert main(arguments("train", recipe, steps=1)) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_survey_says_what_build_will_take_and_writes_nothing(recipe, tmp_path, capsys):
    assert main(arguments("survey", recipe, knn=3, max_seq_len=128)) == 0
    said = capsys.readouterr().out
    assert said.startswith("All was read, in ") and not (tmp_path / "work").exists()
    assert "7, 0 of them empty" in said and "28 of 64 tokens, in 14 sequences of up to 128" in said
    assert "index them: Flat" in said and "search 3 neighbours of each" in said
    assert main([*arguments("survey", recipe, tokenizer=300), "--seconds", "0"]) == 0
    assert "Of 7 documents 1 were read, in " in capsys.readouterr().out
    assert main(arguments("survey", recipe, index="Tree")) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: 'Tree' is no index")


def test_predict_says_what_copying_from_the_neighbours_saves(recipe, tmp_path, capsys):
    folder = tmp_path / "letters"
    folder.mkdir()
    for number in range(12):  # of every two documents the second repeats the first
        words = np.random.default_rng(number // 2).permutation([f"word{i}" for i in range(40)])
        (folder / f"{number}.txt").write_text(" ".join(words), encoding="utf-8")
    given = {"corpus": str(folder), "knn": 1, "chunk_size": 16, "max_seq_len": 64}
    assert main([*arguments("predict", recipe, **given), "--share", "0.7"]) == 0
    assert "8 documents of " in capsys.readouterr().out
    assert main([*arguments("predict", recipe, **given), "--share", "0.1"]) == 2
    assert "larger share" in capsys.readouterr().err
    assert main([*arguments("predict", recipe, **given), "--share", "1.5"]) == 2
    assert "1.5" in capsys.readouterr().err


def test_build_takes_the_packages_of_the_docstrings(recipe, capsys):
    given = {"corpus": "docstrings", "packages": "[einops]", "min_chars": 3000}
    assert main(arguments("build", recipe, **given)) == 0
    assert capsys.readouterr().out.startswith(f"{len(list(docstrings(['einops'], 3000)))} documents, ")


def test_build_takes_a_table(recipe, tmp_path, capsys):
    """The sample's texts in a parquet file, under another name, give the sample's chunks."""
    texts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "data" / "sample").glob("*.txt"))]
    pq.write_table(pa.table({"body": texts}), tmp_path / "my.parquet")
    assert main(arguments("build", recipe)) == 0
    chunks = np.load(tmp_path / "work" / "chunks.npy")
    given = {"corpus": tmp_path / "my.parquet", "text_field": "body", "work_dir": tmp_path / "table"}
    assert main(arguments("build", recipe, **given)) == 0
    assert np.array_equal(np.load(tmp_path / "table" / "chunks.npy"), chunks)
    assert capsys.readouterr().out.count("7 documents, 28 chunks,") == 2


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_bert) -> tuple[dict, Path]:
    """The settings and the folder of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("finished")
    database = {"corpus": str(ROOT / "data" / "sample"), "bert": str(tiny_bert), "work_dir": str(folder / "work")}
    settings = database | MODEL | RUN | {"out_dir": str(folder / "out")}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    assert main(arguments("train", folder / "tiny.yaml")) == 0
    return choose_settings("train", folder / "tiny.yaml"), folder / "out"


def test_train_leaves_what_the_wrapper_gives(finished, tmp_path):
    settings, out = finished
    torch.manual_seed(0)
    wrapper = TrainingWrapper(
        retro=RETRO(**MODEL), chunk_size=64, knn=2, documents_path=settings["corpus"], bert=settings["bert"],
        work_dir=tmp_path, progress=False,
    )  # fmt: skip
    history = wrapper.fit(**(RUN | {"lr": 1e-2}), progress=False)
    assert read_log(out / "log.jsonl").losses == history.losses and len(history) == 12
    loaded = RETRO.from_pretrained(out)
    for name, weight in wrapper.retro.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name
    record = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    _, valid = split_by_document(wrapper.ds, 0.3, 0)
    assert record["metrics"]["valid_loss"] == pytest.approx(evaluate_loss(loaded, valid), rel=1e-5)
    assert record["metrics"]["steps"] == 12 and record["metrics"]["processes"] == 1 and record["seed"] == 0
    assert record["config"] == settings == yaml.safe_load((out / "settings.yaml").read_text(encoding="utf-8"))


def test_evaluate_measures_the_held_out_documents(finished, capsys):
    settings, out = finished
    command = ["evaluate", str(out), "--baseline", str(out), "--modes", "off", "N only", "-p", "knn", "1"]
    assert main([*command, "-p", "work_dir", settings["work_dir"]]) == 0
    printed = capsys.readouterr().out
    made = json.loads(printed[printed.index("{") :])
    retro = RETRO.from_pretrained(out)
    wrapper = TrainingWrapper(
        retro=retro, chunk_size=64, knn=1, documents_path=settings["corpus"], bert=settings["bert"],
        work_dir=settings["work_dir"], progress=False,
    )  # fmt: skip
    _, valid = split_by_document(wrapper.ds, 0.3, 0)
    documents = sorted(set(wrapper.ds.sequence_documents[valid.indices].tolist()))
    sizes = np.load(wrapper.work_dir / "chunks.bytes.npy")
    expected = evaluate({"off": (retro, "off"), "N only": (retro, "N only")}, wrapper.ds, documents, sizes)
    assert made["off"]["bits_per_byte"] == pytest.approx(expected["off"]["bits_per_byte"], rel=1e-5)
    assert made["N only"]["bits_per_byte"] == pytest.approx(expected["N only"]["bits_per_byte"], rel=1e-5)
    assert made["baseline"]["more_than_off"]["bits_per_byte"] == pytest.approx(0, abs=1e-9)
    assert made["documents"] == len(documents) and made["knn"] == 1


@pytest.mark.parametrize("keep_out", ["0", "0.25"])
def test_held_out_documents_are_found_again_in_a_corpus_that_has_changed(tmp_path, tiny_bert, recipe, keep_out, capsys):
    """A file that sorts first moves the numbers of all others."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(12):
        words = np.random.default_rng(number).choice(["king", "queen", "snow", "ship", "war", "corn"], 150)
        (texts / f"text {number:02}.txt").write_text(" ".join(words))
    changes = {"corpus": texts, "valid_share": 0.25 if keep_out == "0" else "null", "keep_out": keep_out}
    assert main(arguments("train", recipe, steps=2, **changes)) == 0
    noted = json.loads((tmp_path / "out" / "held_out.json").read_text())
    held_out = [about["title"] for about in noted["documents"]]
    assert len(held_out) == 3 and noted["kept_out"] == (noted["documents"] if keep_out == "0.25" else [])
    assert main(["evaluate", str(tmp_path / "out")]) == 0
    before = capsys.readouterr().out
    before = json.loads(before[before.index("{\n") :])

    (texts / "a new one.txt").write_text("snow snow war war " * 40)
    assert main(["evaluate", str(tmp_path / "out"), "--modes", "off"]) == 0
    after = capsys.readouterr().out
    after = json.loads(after[after.index("{\n") :])
    assert after["documents"] == 3
    assert after["off"]["bits_per_byte"] == pytest.approx(before["off"]["bits_per_byte"], rel=1e-5)
    database = Store.open(tmp_path / "work", bert=tiny_bert, keep_out=noted["kept_out"])  # it was built so
    found = database.doc_ids[database.neighbours[database.neighbours >= 0]]
    retrieved = {database.documents[document]["title"] for document in np.unique(found)}
    assert len(database.documents) == 13 and (keep_out == "0" or not retrieved & set(held_out))

    (texts / f"{held_out[0]}.txt").write_text("another text")
    assert main(["evaluate", str(tmp_path / "out")]) == 2
    assert f"the text of document {held_out[0]!r} has changed" in capsys.readouterr().err
    (texts / f"{held_out[0]}.txt").unlink()
    assert main(["evaluate", str(tmp_path / "out")]) == 2
    assert f"no document {held_out[0]!r}" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "held_out.json").read_text()) == noted


def test_a_baseline_with_other_documents_is_refused(finished, tmp_path, capsys):
    _, out = finished
    other = tmp_path / "other"
    other.mkdir()
    noted = json.loads((out / "held_out.json").read_text())
    (other / "held_out.json").write_text(json.dumps(noted | {"documents": noted["documents"][1:]}))
    assert main(["evaluate", str(out), "--baseline", str(other)]) == 2
    assert "held out other documents" in capsys.readouterr().err


@pytest.mark.parametrize("noted", ["[]", '{"documents": [3]}', '{"documents": [], "kept_out": [{"name": "a"}]}', "{"])
def test_a_damaged_note_of_what_was_held_out_is_refused_by_name(finished, tmp_path, noted, capsys):
    other = shutil.copytree(finished[1], tmp_path / "other")
    (other / "held_out.json").write_text(noted)
    assert main(["evaluate", str(other)]) == 2
    assert re.search(r"held_out\.json (does not hold titles and|is truncated or corrupt)", capsys.readouterr().err)


def test_nothing_was_held_out(finished, capsys):
    _, out = finished
    assert main(["evaluate", str(out), "-p", "valid_share", "0"]) == 2
    assert "valid_share 0" in capsys.readouterr().err


def test_the_settings_it_leaves_are_a_recipe_that_goes_on_where_it_is(finished):
    _, out = finished
    before = lasting(out)
    assert main(["train", "-f", str(out / "settings.yaml"), "-p", "checkpoint_every", "4"]) == 0
    assert lasting(out) == before


@pytest.mark.parametrize(
    ("name", "value"), [("lr", "0"), ("grad_clip", "0"), ("wd", "nan"), ("warmup_steps", "12"), ("log_every", "0")]
)
def test_settings_of_fit_are_checked_before_anything_is_built(recipe, tmp_path, name, value, capsys):
    value = ".nan" if value == "nan" else value
    assert main(arguments("train", recipe, **{name: value})) == 2
    assert f"error: {name} " in capsys.readouterr().err
    assert not (tmp_path / "work").exists() and not (tmp_path / "out").exists()


def test_a_corpus_of_one_document_has_none_to_validate_on(recipe, tmp_path, capsys):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "only.txt").write_text("the people of every state " * 90, encoding="utf-8")
    assert main(arguments("train", recipe, corpus=tmp_path / "one", steps=2)) == 2
    assert "1 document(s) cannot be split by document: pass a larger corpus, or the share 0" in capsys.readouterr().err
    assert not (tmp_path / "out" / "log.jsonl").exists()
    assert main(arguments("train", recipe, corpus=tmp_path / "one", steps=2, valid_share=0)) == 0


def test_a_second_run_is_refused_before_it_builds_or_writes_anything(recipe, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".fit.lock"):
        assert main(arguments("train", recipe)) == 2
    assert f"another run is training in {tmp_path}/out" in capsys.readouterr().err
    assert os.listdir(tmp_path / "out") == [".fit.lock"] and not (tmp_path / "work").exists()
    assert main(arguments("train", recipe, steps=2)) == 0


def test_a_corpus_that_has_changed_is_not_gone_on_with(recipe, tmp_path, capsys):
    texts = {f"{name}.txt": f"the people of {name} " * 60 for name in ("one", "two", "three", "four")}
    (tmp_path / "texts").mkdir()
    for name, text in texts.items():
        (tmp_path / "texts" / name).write_text(text, encoding="utf-8")
    command = arguments("train", recipe, corpus=tmp_path / "texts", steps=4, checkpoint_every=2)
    assert main(command) == 0
    before = lasting(tmp_path / "out")
    (tmp_path / "texts" / "two.txt").write_text("commerce with foreign nations " * 60, encoding="utf-8")
    capsys.readouterr()
    with pytest.warns(UserWarning, match="the corpus has changed"):
        assert main(command) == 2
    said = capsys.readouterr().err
    assert "is of other training data: " in said and "resume=False to start over" in said
    assert lasting(tmp_path / "out") == before


@pytest.mark.parametrize(("name", "value"), [("knn", "3"), ("lr", "1e-3"), ("dec_depth", "3"), ("use_cls_repr", "on")])
def test_other_settings_are_met_before_anything_is_built(finished, tmp_path, name, value, capsys):
    settings, out = finished
    before = lasting(out)
    given = {name: value, "work_dir": tmp_path / "elsewhere"}
    assert main(arguments("train", out / "settings.yaml", **given)) == 2
    assert f"says {name} {settings[name]}, not " in capsys.readouterr().err
    assert not (tmp_path / "elsewhere").exists() and lasting(out) == before


def test_starting_over_with_other_settings(recipe, tmp_path):
    assert main(arguments("train", recipe, steps=2, retrieval="off")) == 0
    assert main(arguments("train", recipe, steps=3, resume="false")) == 0
    assert read_log(tmp_path / "out" / "log.jsonl").steps == [1, 2, 3]
    assert yaml.safe_load((tmp_path / "out" / "settings.yaml").read_text(encoding="utf-8"))["retrieval"] is True


# several processes


def launch(processes: int, command: list[str]) -> str:
    """Run `python -m retro_nb` in so many processes; what they printed."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    variables = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *launcher, "-m", "retro_nb", *command]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_stopped_alone_and_finished_by_two_processes(recipe, tmp_path, finished, monkeypatch, capsys):
    """Two processes build the same database from nothing, and go on from where Ctrl-C stopped one."""
    forward, passes = RETRO.forward, iter(range(1, 10**6))

    def interrupted(self, *args, **kwargs):
        if next(passes) == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return forward(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(RETRO, "forward", interrupted)
        assert main(arguments("train", recipe)) == 130
    assert "saved in" in capsys.readouterr().err.splitlines()[-1]
    alone = read_log(tmp_path / "out" / "log.jsonl")
    assert 5 <= len(alone) < 12 and not (tmp_path / "out" / "metrics.json").exists()

    printed = launch(2, arguments("train", recipe, work_dir=tmp_path / "again"))
    assert printed.count("7 documents") == printed.count("12 steps, loss") == 1
    shared, whole = read_log(tmp_path / "out" / "log.jsonl"), read_log(finished[1] / "log.jsonl")
    assert shared[: len(alone)] == alone
    for name in ("loss", "grad_norm", "valid_loss", "tokens"):
        assert shared.curve(name)[1] == pytest.approx(whole.curve(name)[1], rel=1e-4), name
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))["metrics"]
    assert metrics["processes"] == 2 and metrics["loss"] == shared.losses[-1]
    for array in ("chunks.npy", "seqs.npy", "chunks.knn.npy"):
        assert np.array_equal(np.load(tmp_path / "work" / array), np.load(tmp_path / "again" / array)), array
    vectors = [np.load(tmp_path / folder / "chunks.embedded.npy") for folder in ("work", "again")]
    np.testing.assert_allclose(*vectors, atol=1e-5)


def test_more_processes_than_gpus(recipe, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert main(arguments("build", recipe)) == 2
    assert "4 processes, but 2 GPU(s)" in capsys.readouterr().err


@pytest.mark.slow
def test_training_needs_no_notebook_tools(recipe):
    """A machine that only trains has no Jupyter: neither papermill nor nbformat is imported."""
    block = "import sys; sys.modules.update(papermill=None, nbformat=None, matplotlib=None)"
    code = f"{block}\nfrom retro_nb.__main__ import main\nsys.exit(main({arguments('train', recipe, steps=1)!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["survey", "build", "train"])
def test_help_has_every_setting_with_type_default_and_sentence(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    printed = capsys.readouterr().out
    for name, parameter in (TRAIN if command == "train" else BUILD).items():
        assert re.search(rf"^  {name}: .*= {re.escape(repr(parameter.default))}$", printed, re.MULTILINE), name
    lines = printed.split("the corpus:", 1)[1].splitlines()
    last = [line for line, after in pairwise(lines) if line.startswith("  ") and not after.strip()]
    assert last and all(line.startswith("      ") for line in last), "a group ends with a setting without a sentence"


def test_escape_sequences_in_names_do_not_reach_the_terminal(recipe, tmp_path):
    """Neither by an error nor by a warning; each is one line, without the line of code that warned."""
    texts = tmp_path / "t\x1b[31mexts"
    texts.mkdir()
    (texts / "b\x1b]0;owned\x07.txt").write_text("")
    (texts / "c.p\x1b[2Jdf").write_text("")
    command = [sys.executable, "-m", "retro_nb", *arguments("build", recipe, corpus=texts)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "\x1b" not in done.stdout + done.stderr and "\x07" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith(("warning:", "error:"))]
    assert "files left out: 1 .p" in lines[0] and "no text to chunk" in lines[-1]
    assert not any(line.startswith(" ") for line in done.stderr.splitlines())


def test_sigterm_ends_a_command_like_ctrl_c(recipe, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(commands, "build", lambda settings: os.kill(os.getpid(), signal.SIGTERM))
    assert main(["build", "-f", str(recipe)]) == 130 and "stopped" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_store_of_a_newer_format_is_refused_before_a_tokenizer_is_trained(recipe, tmp_path, capsys):
    (tmp_path / "newer").mkdir()
    (tmp_path / "newer" / "manifest.json").write_text('{"format": 99, "arrays": {}}')
    given = ["-p", "work_dir", str(tmp_path / "newer"), "-p", "tokenizer", "300"]
    assert main(["build", "-f", str(recipe), *given]) == 2
    assert "format 99" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "newer").iterdir()] == ["manifest.json"]
