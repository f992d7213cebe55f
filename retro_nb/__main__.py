"""The command line: `python -m retro_nb survey`, `build`, `predict`, `train`, `evaluate`, `run`, `sweep`, `refresh`."""

import argparse
import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from retro_nb.common.launch import launched
from retro_nb.lab import commands
from retro_nb.measure.evaluation import MODES
from retro_nb.text.document import printable

SURVEY = """Report on a corpus before any long work: what is in it, what a build will take here, what to mend first.

  python -m retro_nb survey -p corpus my_texts/ -p knn 4
  python -m retro_nb survey -f experiments/train_speeches.yaml --seconds inf

The settings are those of `build`. What is not read in --seconds is estimated, or said to be there at least."""

BUILD = """Chunk a corpus, embed the chunks, index them and find every chunk's neighbours; once, on disk.

  python -m retro_nb build                                          the speeches
  python -m retro_nb build -p corpus my_texts/ -p knn 4             a folder of texts (or a .jsonl or .parquet file)
  python -m retro_nb build -f experiments/train_speeches.yaml       what `train` with this file will want
  accelerate launch --multi_gpu --num_processes 2 -m retro_nb build …   two GPUs embed
  python -m retro_nb build --engine ray --workers 4 …               four workers, here or with --address on a cluster

What an earlier run has built with the same settings is used again, also by `train` and the notebooks. A build
that was stopped goes on where it was."""

PREDICT = """Predict what retrieval will save on a corpus, before anything is trained; builds first what is missing.

  python -m retro_nb predict -p corpus my_texts/
  python -m retro_nb predict -p corpus code -p packages "[numpy, scipy]" -p tokenizer 8000 --share 0.1

Some documents are left out. An n-gram of all others, mixed with what each has said itself, forecasts them; then it may
also copy from their neighbours. What that saves is printed, also by how much the neighbours repeat. On the corpora of
experiments/results/prediction.json, trained models saved about as much, or somewhat less."""

TRAIN = """Train a model on a corpus, whose database is built first if need be.

  python -m retro_nb train -f experiments/train_speeches.yaml
  python -m retro_nb train -f experiments/train_speeches.yaml -p retrieval off -p dec_depth 12 -p out_dir runs/baseline
  accelerate launch --multi_gpu --num_processes 2 -m retro_nb train -f …   two GPUs share each batch

Settings, weights, log.jsonl, metrics.json and checkpoints lie in out_dir, runs/<name of the file> if not given.
The same command goes on after a stop, with any number of processes: batch_size counts over all of them."""

EVALUATE = """Measure bits per byte of a trained model on the documents that it has not seen; prints JSON.

  python -m retro_nb evaluate runs/train_speeches
  python -m retro_nb evaluate runs/train_speeches --baseline runs/baseline --modes on off shuffled "N only" "F only"
  python -m retro_nb evaluate runs/train_speeches -p knn 8

With the neighbours on, off, and shuffled, the control: a model that ignores what it retrieves scores the same."""

RUN = """Execute notebooks with papermill into a new folder in runs/, each in a process of its own.

  python -m retro_nb run tutorial                     notebooks 00 to 11 as they are
  python -m retro_nb run 05_training -p seed 3        one notebook, one parameter changed
  python -m retro_nb run 04 05 -f experiments/small.yaml

The folder holds the executed notebooks, their metrics.json, and an index of seconds, memory and metrics.
A notebook that fails is reported and the others go on."""

SWEEP = """Execute one notebook for every point of a grid, then draw a table and a plot.

  python -m retro_nb sweep experiments/sweep_neighbours.yaml

The results lie in runs/sweep-<name>/. Say the same again to go on after a stop or a failure, or after
adding values to the grid: finished points are kept."""

REFRESH = """Execute the committed notebooks and their solutions again, in place, in one normal form.

  python -m retro_nb refresh            all
  python -m retro_nb refresh 03 05      these two and their solutions

A notebook is replaced only after it has succeeded."""

NAMES = "a stem (05_training), a number (05), a path, or tutorial (00 to 11)"


class _Command(argparse.ArgumentParser):
    """A command whose help ends with its settings."""

    def __init__(self, *, settings: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.settings = settings

    def format_help(self) -> str:
        if self.settings is None:
            return super().format_help()
        return f"{super().format_help()}\nsettings, for -p and -f:\n{commands.explain_settings(self.settings)}"


def _parser() -> argparse.ArgumentParser:
    # argparse and not typer, whose options cannot be repeated pairs such as `-p seed 3 -p steps 10`
    parser = argparse.ArgumentParser("python -m retro_nb", description="RETRO-nb: build, train, experiment.")
    subparsers = parser.add_subparsers(dest="command", required=True, parser_class=_Command)

    def add(name: str, summary: str, text: str, settings: str | None = None) -> argparse.ArgumentParser:
        form = argparse.RawDescriptionHelpFormatter
        return subparsers.add_parser(name, help=summary, description=text, settings=settings, formatter_class=form)

    def add_values(command: argparse.ArgumentParser) -> None:
        command.add_argument("-f", dest="file", type=Path, metavar="FILE", help="YAML file of parameters")
        text = "a parameter, also as NAME=VALUE; wins over the file; may be repeated"
        pair = ("NAME", "VALUE")
        command.add_argument("-p", dest="given", nargs=2, action="append", default=[], metavar=pair, help=text)

    command = add("survey", "report on a corpus before building", SURVEY, "build")
    command.add_argument("--seconds", type=float, default=20, metavar="S", help="read no longer than so (20)")
    add_values(command)
    command = add("build", "chunk, embed and index a corpus", BUILD, "build")
    command.add_argument("--engine", choices=["here", "ray"], default="here", help="this process, or a Ray cluster")
    command.add_argument("--workers", type=int, metavar="N", help="with ray: how many work at once (2)")
    command.add_argument("--address", help="with ray: a running cluster's, e.g. auto; else one is started here")
    add_values(command)
    command = add("predict", "predict what retrieval will save", PREDICT, "build")
    command.add_argument("--share", type=float, default=0.05, metavar="S", help="of the documents, left out (0.05)")
    add_values(command)
    add_values(add("train", "train a model on a corpus", TRAIN, "train"))
    command = add("evaluate", "measure a trained model on unseen documents", EVALUATE)
    command.add_argument("run", type=Path, metavar="RUN", help="the out_dir of `train`")
    command.add_argument("--baseline", type=Path, metavar="RUN", help="a run without retrieval, to compare with")
    command.add_argument("--modes", nargs="+", default=["on", "off", "shuffled"], choices=MODES)
    add_values(command)
    command = add("run", "execute notebooks with other parameters", RUN)
    command.add_argument("notebooks", nargs="+", metavar="NOTEBOOK", help=NAMES)
    add_values(command)
    command = add("sweep", "execute a notebook over a grid of parameters", SWEEP)
    command.add_argument("file", type=Path, metavar="FILE", help="see experiments/ for the form")
    command = add("refresh", "execute the committed notebooks again, in place", REFRESH)
    command.add_argument("notebooks", nargs="*", metavar="NOTEBOOK", help=f"{NAMES}; none means all")
    return parser


def _build(arguments: argparse.Namespace) -> None:
    """Build in this process or on a cluster."""
    settings = commands.choose_settings("build", arguments.file, dict(arguments.given))
    cluster = {name: value for name in ("workers", "address") if (value := getattr(arguments, name)) is not None}
    if arguments.engine == "ray":
        commands.build_on_cluster(settings, **cluster)
    elif cluster:
        raise ValueError(f"--{next(iter(cluster))} is of a Ray cluster: add --engine ray")
    else:
        commands.build(settings)


def _use_notebooks(arguments: argparse.Namespace) -> int:
    """Run, sweep or refresh; the exit code. Imported here, papermill is not needed where models are trained."""
    from retro_nb.lab.refresh import refresh
    from retro_nb.lab.runner import results_table, run
    from retro_nb.lab.sweep import run_sweep

    if arguments.command == "refresh":
        return _report(refresh(arguments.notebooks))
    if arguments.command == "run":
        folder, results = run(arguments.notebooks, arguments.file, dict(arguments.given))
        print(printable(f"\n{results_table(results)}\n"), flush=True)
        code = _report(results)
        print(f"Open {os.path.relpath(folder)}/index.md, or `make lab` to work through the notebooks.")
        return code
    folder, results = run_sweep(arguments.file)
    print(printable((folder / "table.md").read_text(encoding="utf-8")), flush=True)
    code = _report(results)
    print(f"Open {os.path.relpath(folder)}/plot.png; each point's notebook lies in a folder beside it.")
    return code


def _report(results: Sequence[Any]) -> int:
    """Print a line for each failure; the exit code."""
    failed = [result for result in results if result.status == "failed"]
    for result in failed:
        print(printable(f"FAILED {result.notebook}, {result.error}"), file=sys.stderr)
    print(f"{len(results) - len(failed)} of {len(results)} done", flush=True)
    return 1 if failed else 0


def _split_pairs(arguments: Sequence[str]) -> list[str]:
    """`-p name=value` as `-p name value`, which is how argparse takes it."""
    split: list[str] = []
    for argument in arguments:
        after_p = split[-1:] == ["-p"]
        split += argument.split("=", 1) if after_p else [argument]
    return split


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 if a notebook failed, 2 for bad input, 130 for Ctrl-C."""
    arguments = _parser().parse_args(_split_pairs(sys.argv[1:] if words is None else words))
    with _terminated_like_interrupted(), _warnings_in_a_line():
        return _run(arguments)


@contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """Print a warning as one line, without the line of code that warned."""

    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"warning: {printable(message)}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Let SIGTERM end a command as Ctrl-C does: it leaves no kernel or worker behind."""

    def stop(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    alone = launched()[1] == 1  # one of several may wait for the others in code that runs no handler
    if not alone or threading.current_thread() is not threading.main_thread():  # other threads cannot handle signals
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(arguments: argparse.Namespace) -> int:
    try:
        if arguments.command == "survey":
            settings = commands.choose_settings("build", arguments.file, dict(arguments.given))
            print(commands.survey_corpus(settings, arguments.seconds))
        elif arguments.command == "build":
            _build(arguments)
        elif arguments.command == "predict":
            settings = commands.choose_settings("build", arguments.file, dict(arguments.given))
            print(commands.predict_gain(settings, arguments.share))
        elif arguments.command == "train":
            commands.train(commands.choose_settings("train", arguments.file, dict(arguments.given)))
        elif arguments.command == "evaluate":
            found = commands.evaluate_run(arguments.run, arguments.baseline, arguments.modes, dict(arguments.given))
            print(json.dumps(found, indent=2))
        else:
            return _use_notebooks(arguments)
        return 0
    except (ValueError, KeyError, OSError, ModuleNotFoundError, FloatingPointError) as error:
        process, message = launched()[0], error.args[0] if isinstance(error, KeyError) else error
        print(printable(f"error{f' in process {process}' if process else ''}: {message}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print(str(stopped) or "stopped; what was finished is kept", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
