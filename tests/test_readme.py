"""README.md promises nothing that is not there."""

import ast
import json
import re
import runpy
import statistics
from pathlib import Path

import pytest
from PIL import Image

import retro_nb
from retro_nb.measure.results import results
from retro_nb.text import opening

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def flat(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/differences.md"])
def test_links_lead_somewhere(page):
    text, folder = (ROOT / page).read_text(encoding="utf-8"), (ROOT / page).parent
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in target]
    assert targets and [target for target in targets if not (folder / target).exists()] == []


def test_what_to_expect_is_what_was_measured():
    almanac, speeches = results("almanac"), results("speeches")
    on, baseline = (statistics.fmean(almanac[mode]) for mode in ("on", "baseline"))
    assert f"it loses {on:.2f} nats" in README and f"guess among 40 words and loses {baseline:.2f}" in README
    assert f"with {speeches['retro_runs'][0]['parameters'] / 1e6:.0f} million weights, writes" in README
    assert "the baseline's mean is lower, on the speeches in every seed, on the docstrings in two of three" in flat(
        README
    )
    for corpus, ahead in ((speeches, 3), (results("docstrings"), 2)):
        assert sum(base < on for base, on in zip(corpus["baseline"], corpus["on"], strict=True)) == ahead
        assert all(on < wrong for on, wrong in zip(corpus["on"], corpus["shuffled"], strict=True))


def test_what_a_copier_saves_is_what_was_measured():
    path = ROOT / "experiments" / "results" / "speeches-copier.json"
    gains = json.loads(path.read_text(encoding="utf-8"))["gains"]
    low, high = (f"{100 * gain:.1f}" for gain in (min(gains.values()), max(gains.values())))
    fewest, most = min(map(int, gains)), max(map(int, gains))
    said = f"saves {low} to {high} % of the speeches' loss, with {fewest} to {most} neighbours"
    assert said in flat(README)


def test_what_predict_promised_is_what_was_predicted():
    points = results("prediction")["points"]
    for name, words in (
        ("source code", "promised {:.1f} % on the source code, where RETRO saved {:.1f} %"),
        ("speeches", "{:.1f} % on the speeches, where it saved nothing"),
        ("docstrings", "On the docstrings it promised {:.1f} %"),
    ):
        predicted, measured = (100 * value for value in points[name])
        assert words.format(predicted, measured) in flat(README)
        assert (measured > 0) == (name == "source code")


def test_the_table_of_evidence_is_the_measured_one():
    script = runpy.run_path(str(ROOT / "benchmarks" / "readme.py"))
    assert script["replace_section"](README, "evidence", script["evidence_table"]()) == README


def test_the_table_of_source_code_is_the_measured_one():
    script = runpy.run_path(str(ROOT / "benchmarks" / "readme.py"))
    assert script["replace_section"](README, "code", script["code_table"]()) == README
    ratios, unseen = results("code")["ratios"], results("code")["unseen"]["all"]["ratios"]
    assert "loses about 4 % less than" in flat(README) and round(ratios["on"]["per_cent"][0]) == -4
    assert "gains more than 5 % when" in flat(README) and unseen["memory 1"]["per_cent"][0] < -5
    operations = [results("code")["costs"][name]["flops_a_token"]["training"] for name in ("retro", "baseline")]
    assert f"{operations[0] / operations[1]:.1f} times the operations" in flat(README)


def test_the_table_of_controls_is_the_measured_one():
    script = runpy.run_path(str(ROOT / "benchmarks" / "readme.py"))
    assert script["replace_section"](README, "controls", script["controls_table"]()) == README
    code = results("code")
    seed_0, controls = code["on"][code["seeds"].index(0)], code["controls"]
    for model, share in (("flops", "3.1 %"), ("decoder", "6.4 %")):
        assert controls[model]["seeds"] == [0] and f"{1 - seed_0 / controls[model]['off'][0]:.1%}" == share.replace(
            " ", ""
        )
        assert f"by {share}" in flat(README)
    box, mixed = controls["box"], controls["mixed"]
    assert abs(box["ratios"]["on"]["per_cent"][0]) < 0.5 and box["oracle"][0] < 0.5 * box["off"][0]
    assert mixed["oracle"][0] > 0.99 * mixed["off"][0]
    assert code["knnlm"]["ratio"]["per_cent"][0] < 2 * code["ratios"]["on"]["per_cent"][0]
    tokens = code["corpus"]["parts"]["train"]["tokens"]
    assert f"{tokens / 1e6:.0f} million, {tokens * 512 * 2 / 1e9:.0f} GB as float16" in flat(README)


def test_the_table_of_retrofit_is_the_measured_one():
    script = runpy.run_path(str(ROOT / "benchmarks" / "readme.py"))
    assert script["replace_section"](README, "retrofit", script["retrofit_table"]()) == README
    found = results("speeches-retrofit")
    alone = statistics.fmean(found["baseline"]["off"])
    for model, mode in (("retrofit-tenth", "on"), ("retrofit-tenth", "shuffled"), ("scratch", "on")):
        assert 100 * (1 - statistics.fmean(found[model][mode]) / alone) == pytest.approx(0.35, abs=0.015)
    assert "needs all of them for, 0.35 % below the language model" in flat(README)


def test_the_sample_stands_in_notebook_06():
    cells = json.loads((ROOT / "notebooks" / "06_sampling.ipynb").read_text(encoding="utf-8"))["cells"]
    outputs = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
    pages = " ".join("".join(data.get("text/html", [])) for data in outputs)
    seen = " ".join(re.sub(r"<[^>]+>", "", pages).split())
    (sample,) = re.findall(r"```text\n(.*?)```", README, flags=re.S)
    text, title, passage = re.fullmatch(r"(.*?)\n    (.*?): (.*)", sample, flags=re.S).groups()
    for part in (text, title, passage):
        assert " ".join(part.split()) in seen, "notebook 06 has changed: take README's sample from it again"


@pytest.mark.parametrize("page", ["differences", "inputs"])
def test_the_tests_that_a_page_names_exist(page):
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", text)
    missing = [
        (file, name)
        for file, name in named
        if not any(f"\ndef {name}(" in path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob(file))
    ]
    assert len(named) > 10 and missing == []


def test_the_map_has_a_line_for_every_module():
    drawn = README.split("## Where things are", 1)[1].split("```")[1]
    named = re.findall(r"(\w+\.py)\b", drawn.replace("style.py is", ""))
    there = [path.name for path in (ROOT / "retro_nb").rglob("*.py") if path.name != "__init__.py"]
    assert sorted(named) == sorted([*there, "__init__.py"])


FITTED, WRITTEN = re.findall(r"```python\n(.*?)```", README, flags=re.S)


@pytest.mark.parametrize("example", [FITTED, WRITTEN])
def test_an_example_is_python_with_public_names(example):
    tree = ast.parse(example)
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert set(names) <= set(retro_nb.__all__) and len(example.splitlines()) <= 15


def run_with(example: str, other: dict[str, str]) -> None:
    for said, meant in other.items():
        assert said in example
        example = example.replace(said, meant)
    exec(example, {})


def test_the_example_of_retrofit_runs(tmp_path, monkeypatch, capsys):
    """As it stands, but with three towns and a single step, in a folder of its own."""
    monkeypatch.setattr(opening, "WORK", tmp_path)
    run_with(FITTED, {"towns=20": "towns=3", "steps=5": "steps=1", "runs/reader": str(tmp_path / "reader")})
    assert capsys.readouterr().out.startswith("The flag of")
    assert retro_nb.RETROfit.from_pretrained(tmp_path / "reader").tokenizer.size == 2500


@pytest.mark.slow
def test_the_example_runs(tmp_path, monkeypatch, capsys):
    """As it stands, but with three short speeches, in a folder of its own."""
    monkeypatch.chdir(ROOT)
    other = {"max_chars=4000": "max_chars=800, max_documents=3", "data/work/speeches-4000": str(tmp_path)}
    run_with(WRITTEN, other)
    said = capsys.readouterr().out
    assert said.startswith("my fellow citizens") and re.search(r"^    \[\d{4} \w+, d²=", said, flags=re.M)


def test_the_table_of_notebooks_is_the_measured_one():
    results = ROOT / "benchmarks" / "results" / "tutorial.json"
    if not results.exists():
        pytest.skip("not measured yet")
    script = runpy.run_path(str(ROOT / "benchmarks" / "readme.py"))
    table = script["notebook_table"](json.loads(results.read_text(encoding="utf-8")))
    assert script["replace_section"](README, "notebooks", table) == README


def speed() -> tuple[dict, dict]:
    """benchmarks/readme.py, and the results that it finds."""
    script = runpy.run_path(str(ROOT / "benchmarks" / "readme.py"))
    return script, script["read_comparisons"]()


def test_the_tables_of_speed_are_the_measured_ones():
    script, devices = speed()
    assert script["replace_section"](README, "fast", script["speed_section"](devices)) == README


def test_the_table_of_growth_is_the_measured_one():
    script, _ = speed()
    record = json.loads((ROOT / "benchmarks" / "results" / "growth-cpu.json").read_text(encoding="utf-8"))
    assert script["replace_section"](README, "growth", script["growth_table"](record)) == README
    chosen = [run for run in record["runs"] if run["chosen"]]
    assert [run["chunks"] for run in chosen] == [10_000, 100_000, 1_000_000]
    assert all(run["recall@2"] >= 0.95 for run in chosen)


def test_the_table_of_the_cluster_is_the_measured_one():
    script, _ = speed()
    results = ROOT / "benchmarks" / "results" / "cluster-cpu.json"
    record = json.loads(results.read_text(encoding="utf-8")) if results.exists() else None
    assert script["replace_section"](README, "cluster", script["cluster_table"](record)) == README


def test_a_table_of_the_cluster_has_a_row_for_each_stage_and_a_column_for_each_number_of_workers():
    script, _ = speed()
    rows = [
        {"workers": workers, "stage": stage, "chunks_per_second": 50.0 * (workers or 1)}
        | {"seconds": 100 / (workers or 1) + 9}
        | ({"worker_MB": 400.0 + workers, "idle_MB": 250.0, "stated_MB": 300.0} if workers else {})
        for workers in (0, 1, 2)
        for stage in ("chunk", "embed", "index", "search")
    ]
    rows[2]["chunks_per_second"] = None
    record = {"runs": rows, "settings": {"chunks": 5000, "cores": 2}, "device": "CPU", "equal": "all", "command": "c"}
    table = script["cluster_table"](record)
    assert "| chunks a second | one process | 1 worker | 2 workers | a worker's memory, MB |\n" in table
    assert "| embed | 50.0 | 50.0 | 100 | 402 |\n" in table and "| fill the index | – | – | – | 402 |\n" in table
    assert "a stage's workers: 9 to 9 s to search, 9 to 9 s to embed" in table and "5,000 chunks" in table


def test_the_plot_of_speed_is_the_measured_one():
    script, devices = speed()
    if not devices:
        pytest.skip("not measured yet")
    assert json.loads(Image.open(script["PLOT"]).info["Description"]) == script["bars"](devices)


def write_speed(folder: Path, name: str, device: str, **ratios: float) -> None:
    rows = [
        {"what": what, "unit": "tokens/s", "ours": ratio * 37_123, "peer": 37_123, "target": 2, "ratio": ratio}
        | {"equal": "loss", "ours_runs": [1.0] * 7, "peer_runs": [1.0] * 5}
        for what, ratio in ratios.items()
    ]
    record = {"command": f"python {name}.py", "device": device, "threads": 2, "versions": {"torch": "2.13.0"}}
    (folder / f"{name}.json").write_text(json.dumps(record | {"comparisons": rows}), encoding="utf-8")


def test_each_device_has_a_table_and_a_missed_target_is_said_to_be(tmp_path):
    script, _ = speed()
    write_speed(tmp_path, "training-gpu", "H100", large=2.0)
    write_speed(tmp_path, "training-cpu", "Xeon", small=1.999)
    write_speed(tmp_path, "embedding-cpu", "Xeon", words=12.3)
    (tmp_path / "other.json").write_text('{"runs": []}', encoding="utf-8")
    devices = script["read_comparisons"](tmp_path)
    cpu, gpu = script["speed_section"](devices).split("**H100**")
    rows = [line for line in cpu.splitlines() if "tokens/s" in line]
    assert rows[0].startswith("| words | 457,000 tokens/s | 37,100 tokens/s | 12.3× | ≥ 2× | loss |")
    assert rows[1].endswith("| 2.00× | ≥ 2×, **missed** | loss |") and len(rows) == 2
    assert "| large | 74,200 tokens/s | 37,100 tokens/s | 2.00× | ≥ 2× | loss |" in gpu and "Medians of 5" in gpu
    script["draw_speed"](devices, tmp_path / "plot.png")
    drawn = json.loads(Image.open(tmp_path / "plot.png").info["Description"])
    assert [(bar["what"], bar["kind"]) for bar in drawn] == [("words", "cpu"), ("small", "cpu"), ("large", "gpu")]


@pytest.mark.parametrize(
    ("number", "text"),
    [(37_123, "37,100"), (999.6, "1,000"), (41.66, "41.7"), (0.8, "0.800"), (2, "2.00"), (0.00321, "0.00321")],
)
def test_numbers_have_three_digits(number, text):
    assert speed()[0]["rounded"](number) == text


def test_the_benchmarks_that_are_run_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (named,) = re.findall(r"for name in ([a-z ]+); do", makefile)
    gpu = runpy.run_path(str(ROOT / "benchmarks" / "gpu.py"))["LIMITS"]
    assert [name for name in {*named.split(), *gpu} if not (ROOT / "benchmarks" / f"{name}.py").exists()] == []
