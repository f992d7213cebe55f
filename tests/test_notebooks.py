"""The house rules, on every committed notebook; that they run is nbval's part (`make test`)."""

import ast
import re
import statistics
from collections.abc import Callable
from functools import cache
from itertools import groupby
from pathlib import Path

import nbformat
import papermill

ROOT = Path(__file__).resolve().parent.parent
LESSONS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SOLUTIONS = sorted((ROOT / "notebooks" / "solutions").glob("*.ipynb"))

# A path in somebody's file system, but not data/work/… and not an address
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|root|work|tmp|Users|opt|var)/.{0,40}|\b[A-Z]:\\+\w.{0,40}")


def name(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def for_each(paths: list[Path]) -> Callable[[Callable[[Path], None]], Callable[[], None]]:
    """Make one test of a check of a notebook: it looks at all of them and names those that fail."""

    def make_test(check: Callable[[Path], None]) -> Callable[[], None]:
        def test() -> None:
            failed = {}
            for path in paths:
                try:
                    check(path)
                except AssertionError as error:
                    failed[name(path)] = str(error)
            assert not failed

        test.__name__ = check.__name__
        return test

    return make_test


every_notebook, every_lesson = for_each(LESSONS + SOLUTIONS), for_each(LESSONS)


@cache
def cells(path: Path, kind: str = "") -> list[nbformat.NotebookNode]:
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    return [cell for cell in notebook.cells if kind in ("", cell.cell_type)]


def source(path: Path, kind: str) -> str:
    return "\n\n".join(cell.source for cell in cells(path, kind))


def lines(cell: nbformat.NotebookNode) -> int:
    return sum(1 for line in cell.source.splitlines() if line.strip())


def outputs(path: Path) -> list[nbformat.NotebookNode]:
    return [output for cell in cells(path, "code") for output in cell.outputs]


# stored in the normal form: `make refresh` sees to it


def test_the_numbers_have_no_gap_and_the_names_one_form():
    assert [path.stem[:2] for path in LESSONS] == [f"{number:02d}" for number in range(len(LESSONS))]
    assert all(re.fullmatch(r"\d\d(_[a-z0-9]+)+", path.stem) for path in LESSONS)
    assert [path.name for path in SOLUTIONS] == [path.name for path in LESSONS]


@every_notebook
def test_it_was_executed_from_top_to_bottom_without_complaint(path):
    counts = [cell.execution_count for cell in cells(path, "code") if cell.source.strip()]
    assert counts == list(range(1, len(counts) + 1))
    assert not [output for output in outputs(path) if output.output_type == "error"]
    assert not [output.text for output in outputs(path) if output.get("name") == "stderr"]


@every_notebook
def test_its_metadata_names_no_machine(path):
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    assert notebook.nbformat == 4 and notebook.nbformat_minor >= 5
    assert notebook.metadata.kernelspec == {
        "display_name": "Python 3 (ipykernel)",
        "language": "python",
        "name": "python3",
    }
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags"}, cell.metadata
        # papermill ends with an error on cells that may raise: show a mistake with try and except
        assert "raises-exception" not in cell.metadata.get("tags", [])
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)


@every_notebook
def test_it_holds_no_path_of_a_machine(path):
    texts = [source(path, "")]
    for output in outputs(path):
        data = {kind: text for kind, text in output.get("data", {}).items() if not kind.startswith("image/")}
        texts += [output.get("text", ""), str(data)]
    assert not MACHINE_PATH.findall("\n".join(texts))


@every_notebook
def test_it_is_small(path):
    assert path.stat().st_size <= 300 * 1024


@every_notebook
def test_it_assumes_nothing_about_where_it_runs(path):
    code = source(path, "code")
    for word in ("sys.path", "!pip", "%pip", "getcwd", "chdir", "set_matplotlib_formats", "%matplotlib"):
        assert word not in code
    assert not re.findall(r"^\s*!", code, re.MULTILINE), "a shell command"


@every_notebook
def test_its_only_h1_is_its_title(path):
    prose = re.sub(r"```.*?```", "", source(path, "markdown"), flags=re.DOTALL)
    assert len(re.findall(r"^# ", prose, re.MULTILINE)) == 1
    assert cells(path)[0].source.startswith("# ")


@every_notebook
def test_its_links_resolve(path):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", source(path, "markdown")):
        if not re.match(r"[a-z]+:", target):
            assert (path.parent / target).exists(), target


# readable


@every_lesson
def test_prose_and_code_alternate(path):
    share = len(cells(path, "markdown")) / len(cells(path))
    assert 30 <= len(cells(path)) <= 60
    assert 0.4 <= share <= 0.7
    runs = [len(list(run)) for kind, run in groupby(cells(path), lambda cell: cell.cell_type) if kind == "code"]
    assert max(runs) <= 3


@every_lesson
def test_its_code_is_short(path):
    sizes = [lines(cell) for cell in cells(path, "code")]
    assert statistics.median(sizes) <= 6
    assert max(sizes) <= 40 and sum(sizes) <= 200


# a lesson


@every_lesson
def test_its_parameters_are_typed_literals_with_help(path):
    (cell,) = [cell for cell in cells(path, "code") if "parameters" in cell.metadata.get("tags", [])]
    names = []
    for line in cell.source.splitlines():
        assert line.count("=") == 1 and re.fullmatch(r"\w+: [\w\[\], ]+ = .*\S  # \S.*", line), line
        (node,) = ast.parse(line).body
        ast.literal_eval(node.value)
        names.append(node.target.id)
    assert list(papermill.inspect_notebook(path)) == names, "papermill cannot read every parameter"
    assert {"seed", "out_dir"} <= set(names)
    assert re.search(r'^out_dir: str = ""', cell.source, re.MULTILINE)


@every_lesson
def test_it_starts_checks_itself_and_leaves_metrics(path):
    code = source(path, "code")
    assert re.search(r"\bstart\(", code) and re.search(r"\bshow\(", code)
    assert re.search(r"^#{2,3} .*Check it", source(path, "markdown"), re.MULTILINE)
    assert re.search(r"^assert |assert_close\(|assert_allclose\(", code, re.MULTILINE)
    assert re.search(r"\bsave_metrics\(", cells(path, "code")[-1].source), "the last code cell saves the metrics"


@every_lesson
def test_it_has_three_exercises_and_solutions_to_them(path):
    number = str(int(path.stem[:2]))
    wanted = [f"{number}.{exercise}" for exercise in (1, 2, 3)]
    heading = re.compile(r"^#{2,4} Exercise (\d+\.\d+)", re.MULTILINE)
    solution = path.parent / "solutions" / path.name
    for place in (path, solution):
        assert heading.findall(source(place, "markdown")) == wanted, place
        code = source(place, "code")
        assert all(re.search(rf"\bcheck\(\s*\"{exercise}", code) for exercise in wanted), place
    assert len(re.findall(r"^assert check\(", source(solution, "code"), re.MULTILINE)) >= 3


@every_lesson
def test_it_links_to_the_lessons_before_and_after(path):
    place = LESSONS.index(path)
    for neighbour in LESSONS[max(place - 1, 0) : place] + LESSONS[place + 1 : place + 2]:
        assert f"]({neighbour.name})" in cells(path)[0].source, f"the first cell has no link to {neighbour.name}"


@every_notebook
def test_its_pictures_have_an_alternative_text(path):
    pictures = [output for output in outputs(path) if "image/png" in output.get("data", {})]
    assert all(output.metadata["image/png"]["alt"] for output in pictures)
