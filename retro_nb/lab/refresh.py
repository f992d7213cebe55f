"""The committed notebooks: executed again and stored in a normal form, so that diffs show only changes, and copied
for a learner, whose JupyterLab saves every run.

tests/test_notebooks.py requires this form of every committed notebook.
"""

import base64
import io
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from retro_nb.common.extras import extra

with extra("notebooks"):
    import nbformat
    from nbformat import NotebookNode
    from PIL import Image

from retro_nb.common.arrays import file_record, read_note, write_json, write_text
from retro_nb.lab import runner
from retro_nb.lab.runner import Result, execute_as_committed, find_notebooks, series

KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
WIDGET = "application/vnd.jupyter.widget-view+json"
PNG = "image/png"


def _small_png(encoded: str) -> str:
    """Reduce a picture to 256 colours, in base64: half the size, and invisible in a chart."""
    picture, packed = Image.open(io.BytesIO(base64.b64decode(encoded))), io.BytesIO()
    picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(packed, "png", optimize=True)
    return base64.b64encode(packed.getvalue()).decode()


def _normal_outputs(outputs: Sequence[NotebookNode]) -> list[NotebookNode]:
    """Drop stderr and live widgets, shrink pictures, and join text that was printed in pieces."""
    kept: list[NotebookNode] = []
    for output in outputs:
        if output.get("name") == "stderr" or WIDGET in output.get("data", {}):
            continue
        if "metadata" in output:  # of what is there only the alternative text of a picture stays
            alt = output.metadata.get(PNG, {}).get("alt")
            output.metadata = nbformat.from_dict({PNG: {"alt": alt}} if alt else {})
        if PNG in output.get("data", {}):
            output.data[PNG] = _small_png(output.data[PNG])
        if kept and output.output_type == "stream" == kept[-1].output_type:
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def normalise(notebook: NotebookNode) -> NotebookNode:
    """Bring an executed notebook into the committed form, in place; cell ids and tags stay as they are."""
    language = {"name": "python", "pygments_lexer": "ipython3"}
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNELSPEC, "language_info": language})
    for cell in notebook.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        if cell.cell_type == "code":
            cell.outputs = _normal_outputs(cell.outputs)
    nbformat.validate(notebook)
    return notebook


def _with_solutions(notebooks: list[Path]) -> list[Path]:
    solutions = [path.parent / "solutions" / path.name for path in notebooks]
    return notebooks + [path for path in solutions if path.exists()]


def copy_notebooks(folder: Path) -> None:
    """Copy the notebooks and their solutions into a folder of a learner's own, which Git ignores.

    After an update of the originals, a copy that is still as it was made is made anew. One that was changed, if only
    by running it, stays, and a line says so.
    """
    note = folder / ".copied.json"
    copied = read_note(note)
    copied = copied if isinstance(copied, dict) else {}  # name -> digest of what was copied
    for source in _with_solutions(series()):
        name = source.relative_to(runner.NOTEBOOKS).as_posix()
        copy, current = folder / name, file_record(source)["sha256"]
        if copy.exists() and copied.get(name) == current:
            continue
        if copy.exists() and file_record(copy)["sha256"] not in (copied.get(name), current):
            print(f"{name} has been updated, but your copy has changed and stays: delete {copy} to get the new one")
            continue
        write_text(copy, source.read_text(encoding="utf-8"))
        write_json(note, copied | {name: current})
        copied[name] = current


def refresh(names: Sequence[str] = ()) -> list[Result]:
    """Execute committed notebooks and their solutions, and replace each that succeeds, atomically.

    Args:
        names: see `find_notebooks`; none means all.

    Raises:
        ValueError: an unknown name.
    """
    notebooks = _with_solutions(find_notebooks(names or ["tutorial"]))
    results = []
    with tqdm(notebooks, unit="notebook") as bar:
        for notebook in bar:
            bar.set_description(notebook.stem)
            with tempfile.TemporaryDirectory() as folder:
                results.append(execute_as_committed(notebook, Path(folder)))
                if results[-1].status == "failed":
                    continue
                fresh = normalise(nbformat.read(Path(folder, notebook.name), as_version=4))
            write_text(notebook, nbformat.writes(fresh) + "\n")
    return results
