"""The commands `survey`, `build`, `predict`, `train`, `evaluate`: from a corpus to a model and its bits per byte.

Their settings are the arguments of the functions that do the work, by the same names: `TrainingWrapper` and
`StoreSettings` (what is built), `RETRO` (the model) and `fit` (the training), whose docstrings explain them;
and some of the corpora's. A YAML file holds them flat, `name: value`.

`build` and `train` run in one process, or in several that `accelerate launch` starts. Then all take part in
embedding and training, and the first alone does the rest.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from datetime import timedelta
from inspect import Parameter
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from retro_nb.common.arrays import ROOT, read_json, to_jsonable, write_json
from retro_nb.common.devices import best_device
from retro_nb.lab.lesson import Run
from retro_nb.lab.settings import (
    Parameters,
    explain,
    parameters,
    read_as_declared,
    read_yaml,
    refuse_unknown,
    sentences,
    write_yaml,
)
from retro_nb.measure.evaluation import bytes_of_chunks, evaluate
from retro_nb.model.retro import RETRO
from retro_nb.planning.prediction import Prediction, predict
from retro_nb.planning.survey import Survey, survey
from retro_nb.store.cluster import build_store
from retro_nb.store.settings import StoreSettings
from retro_nb.store.splits import document_numbers, identity
from retro_nb.store.store import Store
from retro_nb.text.opening import NAMED, OPTIONS, as_corpus, recognise
from retro_nb.training.log import History
from retro_nb.training.runs import FREE_SETTINGS, check_settings, only_run
from retro_nb.training.training import fit
from retro_nb.training.wrapper import TrainingWrapper

Settings = dict[str, Any]

# the settings and their defaults


def _own(name: str, kind: Any, default: Any) -> Parameters:
    return {name: Parameter(name, Parameter.KEYWORD_ONLY, annotation=kind, default=default)}


LIMITS: dict[str, Parameters] = {  # of the corpora that have a name
    "speeches": parameters(NAMED["speeches"], "max_documents", "max_chars"),
    "almanac": parameters(NAMED["almanac"], "towns"),
    "docstrings": parameters(NAMED["docstrings"], "packages", "min_chars"),
    "code": parameters(NAMED["code"], "packages", "min_bytes", "max_bytes"),
}
READING: Parameters = {}  # of those in files
for option, default in OPTIONS.items():
    READING |= _own(option, str | None if option == "encoding" else str, default)
CORPUS = _own("corpus", str, "speeches") | READING
for limits in LIMITS.values():
    CORPUS |= limits
DATABASE = (
    _own("knn", int, 2)
    | _own("chunk_size", int, parameters(RETRO)["chunk_size"].default)
    | parameters(TrainingWrapper, "keep_out", "glob", "max_chunks", "max_seqs", "work_dir", "bert", "tokenizer")
    | parameters(StoreSettings, "max_similarity", "index", "max_index_memory_usage", "use_cls_repr")
)
MODEL = parameters(RETRO)
FIT = parameters(TrainingWrapper.fit, "valid_share")
FIT |= parameters(fit, without=("retro", "train", "valid", "measure", "progress"))
BUILD = CORPUS | DATABASE | parameters(RETRO, "max_seq_len")
TRAIN = CORPUS | DATABASE | MODEL | FIT
KNOWN = {"build": BUILD, "train": TRAIN}
HELD_OUT = "held_out.json"  # beside settings.yaml
MAY_CHANGE = {*FREE_SETTINGS, "out_dir", "work_dir"}  # when a run goes on


ABOUT = {  # settings that no docstring describes
    "corpus": "speeches, almanac, docstrings or code; a folder; a .jsonl or .parquet file; or hf:NAME for the hub",
    "encoding": "encoding of a folder's files; null detects it file by file",
    "text_field": "field or column of the texts in tables and .jsonl files",
    "title_field": "field or column of the titles",
    "max_documents": "speeches: maximum number",
    "max_chars": "speeches: number of characters kept from the beginning of each",
    "towns": "almanac: number of towns",
    "packages": "docstrings, code: packages to read; null reads the default ones",
    "min_chars": "docstrings: minimum length of a module's docstrings, in characters",
    "min_bytes": "code: minimum size of a file",
    "max_bytes": "code: maximum size of a file",
    "num_workers": "processes that prepare batches; 0 prepares them in the training process",
}


def explain_settings(command: str) -> str:
    """Every setting of a command, with its type, its default and a sentence."""
    groups = (
        ("the corpus", CORPUS, ()),
        ("the database", DATABASE, (TrainingWrapper, StoreSettings)),
        ("the model", MODEL, (RETRO,)),
        ("the training", FIT, (TrainingWrapper.fit, fit)),
    )
    left, text = dict(KNOWN[command]), ""
    for title, group, functions in groups:
        if own := {name: left.pop(name) for name in group if name in left}:
            text += f"\n{title}:\n{explain(own, ABOUT | sentences(*functions))}\n"
    return text


def choose_settings(command: str, file: Path | None = None, given: dict[str, Any] | None = None) -> Settings:
    """All settings of a command. Given values override the file's, and those the functions' defaults.

    One file serves both commands: `build` leaves out what only `train` knows.

    Raises:
        ValueError: an unknown name, with the closest known one, or a value of another type.
    """
    known, given = KNOWN[command], given or {}
    values = {} if file is None else read_yaml(file)
    refuse_unknown(values, TRAIN, str(file), "train")
    refuse_unknown(given, known, "-p", command)
    values = {name: value for name, value in (values | given).items() if name in known}
    settings = {name: parameter.default for name, parameter in known.items()} | read_as_declared(values, known)
    _check_corpus(settings)
    if command == "train":
        vocabulary = zip(("num_tokens", "pad_id"), _store_settings(settings).vocabulary, strict=True)
        settings |= {name: number for name, number in vocabulary if name not in values}
        if (settings["steps"] is None) == (settings["epochs"] is None):
            raise ValueError("how long? Pass either steps or epochs, e.g. -p steps 1000")
        stem = "train" if file is None else file.stem
        settings["out_dir"] = settings["out_dir"] or str(ROOT / "runs" / stem)
    return to_jsonable(settings)  # as it comes back from settings.yaml


def _check_corpus(settings: Settings) -> None:
    name = settings["corpus"]
    for owner, limits in LIMITS.items():
        for limit, parameter in limits.items():
            if limit not in LIMITS.get(name, {}) and settings[limit] != parameter.default:
                raise ValueError(f"{limit} is {settings[limit]}, but corpus {name} has none: only {owner} has")
    recognise(name, glob=settings["glob"], **_of(settings, READING))


def _of(settings: Settings, *groups: Parameters) -> Settings:
    """The settings that belong to these functions."""
    return {name: settings[name] for group in groups for name in group}


# several processes


@contextmanager
def processes() -> Iterator[PartialState]:
    """Join the processes that `accelerate launch` has started; alone if it has not.

    They wait for one another as long as it takes: chunking a large corpus takes the first one hours.
    """
    local, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if local > gpus > 0:
        raise ValueError(f"{local} processes, but {gpus} GPU(s) on this machine: launch one process for each GPU")
    state = PartialState(cpu=not gpus, timeout=timedelta(days=30))
    yield state
    state.destroy_process_group()


# the commands


def choose_corpus(settings: Settings) -> tuple[Any, Path]:
    """The corpus that the settings mean, and the folder of its database."""
    name, folder = settings["corpus"], settings["work_dir"]
    named = NAMED[name](**_of(settings, LIMITS[name])) if name in NAMED else None
    corpus, default = as_corpus(name if named is None else named, settings["glob"], **_of(settings, READING))
    place = default if folder is None else Path(folder)
    if place is None:
        raise ValueError(f"corpus {name} has no fingerprint to name its folder by: pass work_dir")
    return corpus, place


def _store_settings(settings: Settings) -> StoreSettings:
    shared = {each.name for each in fields(StoreSettings)} & settings.keys()
    return StoreSettings(seq_len=settings["max_seq_len"], **{name: settings[name] for name in shared})


def _wrap(retro: RETRO, settings: Settings, progress: bool) -> TrainingWrapper:
    """Build whatever is missing for this model; every process calls it."""
    corpus, folder = choose_corpus(settings)
    database = _of(settings, DATABASE) | {"work_dir": folder}
    return TrainingWrapper(retro=retro, documents_path=corpus, progress=progress, **database)


def survey_corpus(settings: Settings, seconds: float | int = 20) -> Survey:
    """Report on a corpus and the cost of `build` (see `survey`).

    Args:
        settings: from `choose_settings("build", …)`.
        seconds: time limit for reading.
    """
    corpus, folder = choose_corpus(settings)
    return survey(corpus, _store_settings(settings), work_dir=folder, seconds=seconds)


def build(settings: Settings) -> Store:
    """Chunk, embed, index and search a corpus, as `train` needs it with the same settings.

    Args:
        settings: from `choose_settings("build", …)`.
    """
    with processes() as state:
        corpus, folder = choose_corpus(settings)
        store = Store.build(corpus, folder, _store_settings(settings), progress=state.is_main_process)
        if state.is_main_process:
            print(store, flush=True)
        return store


def predict_gain(settings: Settings, share: float = 0.05) -> Prediction:
    """Predict what retrieval will save on a corpus, building first what is missing (see `predict`).

    Args:
        settings: from `choose_settings("build", …)`.
        share: of the documents, which are left out.
    """
    return predict(build(settings), share=share)


def build_on_cluster(settings: Settings, workers: int = 2, address: str | None = None) -> Store:
    """The same as `build`, by the workers of a Ray cluster (see `cluster.build_store`).

    Args:
        settings: from `choose_settings("build", …)`.
        workers: how many work at once.
        address: of a running cluster; None for one on this machine.
    """
    corpus, folder = choose_corpus(settings)
    build_store(corpus, folder, _store_settings(settings), workers=workers, address=address)
    os.environ.pop("REPROCESS", None)  # done: `build` below finds everything built
    return build(settings)


def train(settings: Settings) -> tuple[TrainingWrapper, History]:
    """Train a model on a corpus, building first what is missing; the same call goes on after a stop.

    It leaves in `out_dir`: settings.yaml, held_out.json, log.jsonl, checkpoints/, then metrics.json and the trained
    model, as `RETRO.from_pretrained(out_dir)` reads it.

    Args:
        settings: from `choose_settings("train", …)`.

    Returns:
        The corpus with the trained model, and the log.

    Raises:
        ValueError: a setting of `fit` is out of range, or `out_dir` holds a run with other settings.
        BlockingIOError: another run is training in `out_dir`.
    """
    check_settings(_of(settings, FIT))
    _check_same_run(settings)
    with processes() as state, only_run(state, settings["out_dir"]):
        main, out_dir = state.is_main_process, Path(settings["out_dir"])
        run = Run(settings["seed"], state.device, out_dir, settings)
        torch.manual_seed(settings["seed"])
        wrapper = _wrap(RETRO(**_of(settings, MODEL)), settings, main)
        if main:
            print(wrapper.store, flush=True)
            write_yaml(out_dir / "settings.yaml", settings)
        history = wrapper.fit(progress=main, **_of(settings, FIT))
        if main:
            wrapper.retro.save_pretrained(out_dir)
            _write_held_out(wrapper, settings)  # only now: `fit` refuses a corpus that has changed since the start
            metrics = run.save_metrics(_metrics(wrapper, history, state.num_processes))
            losses = ", ".join(f"{name} {metrics[name]:.3f}" for name in ("loss", "valid_loss") if name in metrics)
            print(f"{metrics['steps']} steps, {losses}, in {out_dir}")
        return wrapper, history


def evaluate_run(
    folder: Path,
    baseline: Path | None = None,
    modes: Sequence[str] = ("on", "off", "shuffled"),
    given: Settings | None = None,
) -> dict[str, Any]:
    """Measure what a run of `train` has learnt on the documents that it held out (see `evaluation.evaluate`).

    Args:
        folder: the run's out_dir: its model, and in settings.yaml its corpus.
        baseline: the out_dir of a model trained without retrieval on the same documents.
        modes: the first is what the others are compared with.
        given: settings that differ from the run's, such as knn.

    The documents are those that held_out.json names, wherever they now stand in the corpus; the database leaves out
    those that it left out in training, unless `given` says otherwise.

    Raises:
        ValueError: the run held out no document, or a setting is unknown.
        KeyError: a document that was held out is gone, or its text has changed; the message names it.
        FileNotFoundError: the run did not note its documents.
    """
    settings, given = choose_settings("train", folder / "settings.yaml", given), given or {}
    if "valid_share" in given:
        raise ValueError(
            f"valid_share {given['valid_share']}: a run is measured on the documents that it held out in training; "
            f"leave it out"
        )
    if settings["valid_share"] == 0:
        raise ValueError(f"{folder} was trained on all documents (valid_share 0): there is nothing to measure it on")
    held_out = _read_held_out(folder)
    if "keep_out" not in given:
        settings["keep_out"] = held_out["kept_out"]
    device = best_device()
    retro = RETRO.from_pretrained(folder, device)
    models = {mode: (retro, mode) for mode in modes}
    if baseline is not None:
        if _read_held_out(baseline)["documents"] != held_out["documents"]:
            raise ValueError(f"{baseline} held out other documents than {folder}: train it on the same")
        models["baseline"] = (RETRO.from_pretrained(baseline, device), "off")
    wrapper = _wrap(retro, settings, progress=True)
    documents = document_numbers(held_out["documents"], wrapper.store.documents)
    sizes = bytes_of_chunks(wrapper.store.files.chunks)
    found = evaluate(models, wrapper.ds, documents, sizes, batch_size=settings["batch_size"])
    return {"run": str(folder), "corpus": settings["corpus"], "knn": settings["knn"], **found}


def _check_same_run(settings: Settings) -> None:
    """Refuse other settings than those of the run in `out_dir`, before hours are spent on building."""
    file = Path(settings["out_dir"]) / "settings.yaml"
    begun = any(file.parent.glob("checkpoints/step-*"))  # else there is nothing to go on with
    if not (settings["resume"] and begun and file.exists()):
        return
    for name, before in read_yaml(file).items():
        if name not in MAY_CHANGE and settings.get(name, before) != before:
            raise ValueError(
                f"{file} says {name} {before}, not {settings[name]}: say the same to go on with that run, "
                f"-p resume false to start over, or -p out_dir with another folder"
            )


def _write_held_out(wrapper: TrainingWrapper, settings: Settings) -> None:
    """Note the documents that are held out of training and of the database: numbers move when a corpus changes."""
    documents, held_out = wrapper.store.documents, wrapper.held_out(settings["valid_share"], settings["seed"])
    about = {"documents": held_out, "kept_out": wrapper.kept_out}
    noted = {name: [identity(documents[number]) for number in numbers] for name, numbers in about.items()}
    write_json(Path(settings["out_dir"]) / HELD_OUT, noted)


def _read_held_out(folder: Path) -> dict[str, list[dict[str, str]]]:
    file = folder / HELD_OUT
    if not file.exists():
        raise FileNotFoundError(
            f"{file} is missing: it names the documents that the run held out. If the corpus is still the same, "
            f"run the same `train` again, which writes it and trains nothing twice"
        )
    noted = read_json(file)
    try:
        return {name: [identity(each) for each in noted[name]] for name in ("documents", "kept_out")}
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} does not hold titles and digests of documents ({error!r}): run the same `train` again, which "
            f"writes it and trains nothing twice"
        ) from error


def _metrics(wrapper: TrainingWrapper, history: History, processes: int) -> dict[str, Any]:
    last = history[-1]
    names = ("loss", "valid_loss", "tokens", "tokens_per_second")
    parameters = sum(weight.numel() for weight in wrapper.retro.parameters())
    counts = {"steps": last["step"], "parameters": parameters, "processes": processes}
    return counts | {name: last[name] for name in names if name in last} | {"training_seconds": last["seconds"]}
