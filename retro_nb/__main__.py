"""The command line: `python -m retro_nb run`, `sweep`, `refresh`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from retro_nb.experiments import Result, run
from retro_nb.refresh import refresh
from retro_nb.sweep import run_sweep

RUN = """Execute notebooks with papermill into a new folder in runs/, each in a process of its own.

  python -m retro_nb run tutorial                     notebooks 00 to 06 as they are
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

NAMES = "a stem (05_training), a number (05), a path, tutorial (00 to 06) or all"


def _parser() -> argparse.ArgumentParser:
    # argparse and not typer, whose options cannot be repeated pairs such as `-p seed 3 -p steps 10`
    parser = argparse.ArgumentParser("python -m retro_nb", description="RETRO-nb's notebooks as experiments.")
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, summary: str, text: str) -> argparse.ArgumentParser:
        form = argparse.RawDescriptionHelpFormatter
        return commands.add_parser(name, help=summary, description=text, formatter_class=form)

    command = add("run", "execute notebooks with other parameters", RUN)
    command.add_argument("notebooks", nargs="+", metavar="NOTEBOOK", help=NAMES)
    command.add_argument("-f", dest="preset", type=Path, metavar="FILE", help="YAML file of parameters")
    pairs = {"nargs": 2, "action": "append", "default": [], "metavar": ("NAME", "VALUE")}
    command.add_argument("-p", dest="given", help="a parameter; wins over the file; may be repeated", **pairs)
    command = add("sweep", "execute a notebook over a grid of parameters", SWEEP)
    command.add_argument("file", type=Path, metavar="FILE", help="see experiments/ for the form")
    command = add("refresh", "execute the committed notebooks again, in place", REFRESH)
    command.add_argument("notebooks", nargs="*", metavar="NOTEBOOK", help=f"{NAMES}; none means all")
    return parser


def _report(results: Sequence[Result]) -> int:
    """Print a line for each failure; the exit code."""
    failed = [result for result in results if result.status == "failed"]
    for result in failed:
        print(f"FAILED {result.notebook}: {result.error}", file=sys.stderr)
    print(f"{len(results) - len(failed)} of {len(results)} done")
    return 1 if failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 if a notebook failed, 2 for bad input, 130 for Ctrl-C."""
    said = _parser().parse_args(arguments)
    try:
        if said.command == "run":
            folder, results = run(said.notebooks, said.preset, dict(said.given))
            text = (folder / "index.md").read_text(encoding="utf-8")
        elif said.command == "sweep":
            folder, results = run_sweep(said.file)
            text = (folder / "table.md").read_text(encoding="utf-8")
        else:
            return _report(refresh(said.notebooks))
        print(f"{text}\nin {os.path.relpath(folder)}/")
        return _report(results)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; what was finished is kept", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
