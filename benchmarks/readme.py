"""Write the measured numbers into README.md, and draw docs/speed.png: `python benchmarks/readme.py`.

The table of the notebooks comes from benchmarks/results/tutorial.json, which is the index.json of a run of
`make tutorial` (copy it from runs/<time>/). The tables of speed, one for each device, and the plot come from every
file in benchmarks/results with "comparisons", as `measure.write_results` writes them. The table of what retrieval is
worth comes from experiments/results, as experiments/evidence.py writes them.
"""

import json
import math
import re
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
EVIDENCE = ROOT / "experiments" / "results"
PLOT = ROOT / "docs" / "speed.png"
# The pipeline's order; others follow by name.
ORDER = "embedding neighbours neighbours-untuned dataset training sampling scaling-training scaling-embedding".split()

LEARN = {
    "00_start_here": "the map, the letters, and the whole road once in ten cells",
    "01_chunking": "documents become chunks of 64 tokens that know where they came from",
    "02_bert_embedding": "a frozen BERT makes each chunk a vector; what is near, and framing both sides alike",
    "03_faiss_knn": "exact and approximate search; why a chunk's own document is left out, and how",
    "04_retro_model": "encoder and chunked cross-attention by hand; causality measured to the token",
    "05_training": "the loop by hand, then `fit`: schedule, validation, baseline, exact resume",
    "06_sampling": "temperature, top-k, top-p; live retrieval with caches; who was quoted",
    "07_does_retrieval_help": "on, off, shuffled, baseline, oracle; a memory that is edited; where retrieval pays",
    "08_leakage": "what a chunk shares word for word with its neighbours, and what is left without it",
    "09_retrofit": "a frozen Hugging Face model learns to read; other tokenizers; when more weights look like reading",
    "10_your_own_corpus": "your texts in, a report before long work; documents that come and go without a rebuild",
    "11_scaling_out": "from a laptop to trillions of tokens, in numbers; many workers, one store; many machines train",
}

CLUSTER_STAGES = {"chunk": "chunk", "embed": "embed", "index": "fill the index", "search": "search"}

Record = dict[str, Any]  # a results file
Row = dict[str, Any]  # one of its comparisons


def notebook_table(index: dict) -> str:
    """The notebooks' table in Markdown: what you learn, minutes, memory."""
    rows = ["| notebook | what you learn | seconds | memory |", "|---|---|---|---|"]
    for result in index["notebooks"]:
        stem = result["notebook"]
        link = f"[`{stem}`](notebooks/{stem}.ipynb)"
        rows.append(f"| {link} | {LEARN[stem]} | {result['seconds']:.0f} | {result['peak_mb'] / 1000:.1f} GB |")
    total = sum(result["seconds"] for result in index["notebooks"])
    note = f"Seconds and peak memory on 2 CPU cores, in this order from nothing built: {total / 60:.1f} minutes in all."
    return "\n".join([*rows, "", note])


# speed


def read_comparisons(folder: Path = RESULTS) -> dict[str, list[Record]]:
    """The results files with comparisons, by device: CPUs first, and the files in the pipeline's order."""
    found = []
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if "comparisons" in record:
            name, _, kind = path.stem.rpartition("-")
            place = ORDER.index(name) if name in ORDER else len(ORDER)
            found.append(((kind, record["device"], place, name), record | {"kind": kind}))
    found.sort(key=lambda each: each[0])
    return {device: [record for _, record in group] for device, group in groupby(found, lambda each: each[0][1])}


def rounded(number: float, digits: int = 3) -> str:
    """A positive number with so many significant digits, thousands set apart: 37_123 is 37,100."""
    decimals = digits - 1 - math.floor(math.log10(number))
    return f"{round(number, decimals):,.{max(decimals, 0)}f}"


def missed(row: Row) -> bool:
    return row["ratio"] < row["target"]


def speed_table(device: str, records: list[Record]) -> str:
    """One device's comparisons in Markdown. A target that was missed is said to be."""
    lines = [f"**{device}**", "", "| what | ours | reference | ratio | target | held equal |", "|---" * 6 + "|"]
    for row in (row for record in records for row in record["comparisons"]):
        ours, peer = (f"{rounded(row[side])} {row['unit']}" for side in ("ours", "peer"))
        target = f"≥ {row['target']:g}×" + (", **missed**" if missed(row) else "")
        lines.append(f"| {row['what']} | {ours} | {peer} | {rounded(row['ratio'])}× | {target} | {row['equal']} |")
    remarks = [f"- {remark}" for record in records for remark in record.get("remarks", [])]
    return "\n".join([*lines, "", *remarks, *([""] if remarks else []), how_measured(records)])


def how_measured(records: list[Record]) -> str:
    """Commands and versions of one device's results, in a sentence or two."""
    commands = ", ".join(dict.fromkeys(f"`{record['command']}`" for record in records))
    torch = " and ".join(sorted({record["versions"]["torch"] for record in records}))
    threads = " or ".join(sorted({str(record["threads"]) for record in records}))
    runs = min(len(row[side]) for each in records for row in each["comparisons"] for side in ("ours_runs", "peer_runs"))
    return f"Medians of {runs} or more runs; torch {torch}, {threads} CPU threads; {commands}."


def speed_section(devices: dict[str, list[Record]]) -> str:
    """What README says about speed: the plot and a table for each device."""
    if not devices:
        return "Nothing has been measured yet."
    picture = f"![How many times faster, a bar for each row below]({PLOT.relative_to(ROOT).as_posix()})"
    return "\n\n".join([picture, *(speed_table(device, records) for device, records in devices.items())])


def growth_table(record: Record) -> str:
    """What becomes of each kind of index as the corpus grows; the one that is chosen is set in bold."""
    head = "| chunks | index | build, s | file, MB | search, ms a chunk | recall@2 | memory at the peak, MB |"
    lines = [head, "|---" * 7 + "|"]
    for run in record["runs"]:
        name = f"**{run['index']}**" if run["chosen"] else run["index"]
        numbers = [run["build_seconds"], run["index_MB"], run["search_seconds_per_1000"]]
        cells = [f"{run['chunks']:,}", name, *map(rounded, numbers), f"{run['recall@2']:.3f}", rounded(run["peak_MB"])]
        lines.append(f"| {' | '.join(cells)} |")
    about = f"`{record['command']}`, {record['threads']} threads of an {record['device']}"
    chosen = "Bold: what `choose_index` took (now with the power of two next to its 4·√n lists)."
    note = f"{chosen} {about}; the process alone has {record['runs'][0]['MB_before']:.0f} MB."
    return "\n".join([*lines, "", note])


def cluster_table(record: Record | None) -> str:
    """What workers of each stage do in a second, and the memory that one takes; from benchmarks/cluster.py."""
    if record is None:
        return "Not measured yet: `python benchmarks/cluster.py`."
    counts = sorted({run["workers"] for run in record["runs"]})
    runs = {(run["stage"], run["workers"]): run for run in record["runs"]}
    who = ["one process", *(f"{count} worker{'s' * (count > 1)}" for count in counts[1:])]
    lines = [f"| chunks a second | {' | '.join(who)} | a worker's memory, MB |"]
    lines.append("|---" * (len(who) + 2) + "|")
    for stage, name in CLUSTER_STAGES.items():
        rates = [runs[stage, count]["chunks_per_second"] for count in counts]
        most = max((runs[stage, count] for count in counts[1:]), key=lambda run: run["worker_MB"])
        if stage == "index":  # so few vectors are filled in too soon to be timed
            rates = [None] * len(rates)
        shown = ["–" if rate is None else rounded(rate) for rate in rates]
        lines.append(f"| {' | '.join([name, *shown, rounded(most['worker_MB'])])} |")
    idle, chunks = [run["idle_MB"] for run in record["runs"] if run["workers"]], record["settings"]["chunks"]

    def lost(stage: str) -> str:
        """What the stage took beside its work, with so many workers each."""
        these = [runs[stage, count] for count in counts[1:]]
        seconds = [run["seconds"] - chunks / run["chunks_per_second"] for run in these]
        return f"{min(seconds):.0f} to {max(seconds):.0f} s"

    note = (
        f"`{record['command']}`, {chunks:,} chunks of the speeches; a worker computes with one thread, on "
        f"{record['settings']['cores']} cores of an {record['device']}. The rates leave out what it takes to start a "
        f"stage's workers: {lost('search')} to search, {lost('embed')} to embed. An idle worker has "
        f"{rounded(min(idle))} to {rounded(max(idle))} MB for itself. "
        f"Equal to what one process builds: {record['equal']}."
    )
    return "\n".join([*lines, "", note])


# evidence

CORPORA = {
    "almanac": "almanac, nats per fact whose town was found",
    "speeches": "speeches, bits per byte",
    "docstrings": "docstrings, bits per byte",
    "code": "source code, bits per byte",
}


def evidence_table() -> str:
    """What each corpus costs with neighbours, without, with wrong ones, and a model of the same size without any."""
    modes = ("on", "shuffled", "off", "baseline")
    lines = [f"| corpus and unit | {' | '.join(modes)} |", "|---" * 5 + "|"]
    for name, unit in CORPORA.items():
        found = read_results(name)
        cells = [mean_of(found[mode]) for mode in modes]
        lines.append(f"| {unit} | {' | '.join(cells)} |")
    note = (
        "Means of three seeds (lowest to highest), of source code by `python experiments/sources.py`, of the others by "
        "`python experiments/evidence.py`."
    )
    return "\n".join([*lines, "", note])


def code_table() -> str:
    """Source code: RETRO's loss against the baseline's, in parts of the test files and with larger memories."""
    found = read_results("code")
    ratios, unseen = found["ratios"], found["unseen"]["all"]
    rows = [
        ("all", found["documents"], ratios["on"]),
        ("all, with eight neighbours", None, found["sweeps"]["k"]["ratios"]["8"]),
        ("all, with the oracle: the very chunk that comes next", None, ratios["oracle"]),
        ("all, with the neighbours of other files", None, ratios["shuffled"]),
    ]
    for share, part in found["copied"].items():
        rows.append((f"{share} of their 13-grams stand in the database", part, part["ratios"]["on"]))
    rows.append(("of two libraries that were not trained on", unseen, unseen["ratios"]["on"]))
    for share, words in (("1/4", "a quarter"), ("1/2", "half"), ("1", "all")):
        memory = unseen["ratios"][f"memory {share}"]
        rows.append((f"the same, with {words} of their other files in the memory", None, memory))
    lines = ["| files | how many | loss against the baseline | 95 % interval |", "|---|---|---|---|"]
    for words, part, ratio in rows:
        mean, interval = _percent(ratio).rstrip(")").split(" (")
        lines.append(f"| {words} | {_count(part)} | {mean} | {interval} |".replace(">=", "≥"))
    return "\n".join(lines)


CONTROLS = {
    "retro": "RETRO, trained and read with two neighbours",
    "baseline": "baseline: an equal number of weights (12 layers)",
    "decoder": "RETRO's decoder without what reads (8 layers)",
    "flops": "as many operations in training as RETRO (19 layers)",
    "box": "a RETRO of half the size, which comes with the project",
    "mixed": "RETRO, a fifth of the training chunks with other neighbours",
}


def controls_table() -> str:
    """Source code: every model that was trained, what it has and takes, and its loss against the baseline's."""
    found, of_controls = read_results("code"), read_results("code")["controls"]
    lines = ["| model | weights, M | MFLOP a token in training | seeds | loss against the baseline | with the oracle |"]
    lines.append("|---" * 6 + "|")
    for model, words in CONTROLS.items():
        cost, part = found["costs"][model], {"seeds": found["seeds"], "ratios": found["ratios"]}
        part = of_controls.get(model, part)
        of_mode = {mode: _percent(part["ratios"][mode]) for mode in ("on", "off", "oracle") if mode in part["ratios"]}
        loss, oracle = of_mode.get("on", of_mode["off"]), of_mode.get("oracle", "").partition(" (")[0]
        if model == "baseline":
            loss, oracle = "0", ""
        size, operations = cost["parameters"] / 1e6, cost["flops_a_token"]["training"] / 1e6
        lines.append(f"| {words} | {size:.1f} | {operations:.0f} | {len(part['seeds'])} | {loss} | {oracle} |")
    memory, runs = _percent(found["knnlm"]["ratio"]), found["knnlm"]["runs"]
    base = " | ".join(lines[3].split(" | ")[1:3])
    lines.append(
        f"| kNN-LM: the baseline, and a memory of all its training tokens | {base} | {len(runs)} | {memory} | |"
    )
    return "\n".join(lines)


def _percent(ratio: dict) -> str:
    """By how much a loss is more or less than the baseline's, with its interval."""
    mean, low, high = (f"{value:+.1f} %".replace("-0.0", "0.0").replace("-", "−") for value in ratio["per_cent"])
    return f"{mean} ({low} … {high})"


def _count(part: dict | None) -> str:
    if part is None:
        return ""
    return str(part["documents"] if "documents" in part else len(part["titles"]))


def read_results(name: str) -> dict:
    return json.loads((EVIDENCE / f"{name}.json").read_text(encoding="utf-8"))


def retrofit_table() -> str:
    """A language model, its RETROfit and RETRO from scratch, for all and for a tenth of the training tokens."""
    units = {"almanac": "nats per fact", "speeches": "bits per byte"}
    models = {
        "retrofit-tenth": "RETROfit, a tenth",
        "retrofit": "RETROfit, all",
        "scratch-tenth": "from scratch, a tenth",
        "scratch": "from scratch, all",
    }
    lines = ["| corpus, unit, training tokens | on | shuffled | off |", "|---" * 4 + "|"]
    for name, unit in units.items():
        found = read_results(f"{name}-retrofit")
        lines.append(f"| {name}, {unit}: the language model alone | | | {mean_of(found['baseline']['off'])} |")
        for model, words in models.items():
            if model in found:
                cells = [mean_of(found[model][mode]) for mode in ("on", "shuffled", "off")]
                lines.append(f"| {name}: {words} | {' | '.join(cells)} |")
    note = "Means of three seeds (lowest to highest), by `python experiments/retrofit.py`; the results name commands."
    return "\n".join([*lines, "", note])


def mean_of(seeds: list[float]) -> str:
    return f"{np.mean(seeds):.3f} ({min(seeds):.3f}–{max(seeds):.3f})"


def bars(devices: dict[str, list[Record]]) -> list[Row]:
    """What the plot shows, from top to bottom; it is also kept in the PNG, so that a test can compare."""
    return [
        {"what": row["what"], "kind": record["kind"], "ratio": row["ratio"], "target": row["target"]}
        for records in devices.values()
        for record in records
        for row in record["comparisons"]
    ]


def draw_speed(devices: dict[str, list[Record]], path: Path = PLOT) -> None:
    """A bar for each comparison, from 1× on a logarithmic axis, with its target as a tick across."""
    from matplotlib.figure import Figure

    from retro_nb.plotting.style import COLOURS, use_style

    use_style()
    rows = bars(devices)
    figure = Figure(figsize=(8, 0.9 + 0.36 * len(rows)), layout="constrained")
    axes = figure.subplots()
    furthest = max(max(row["ratio"], row["target"]) for row in rows)
    for place, row in enumerate(rows):
        colour = COLOURS["model"] if row["kind"] == "gpu" else COLOURS["chunk"]
        fill = {"color": "white", "hatch": "////"} if missed(row) else {"color": colour}
        axes.barh(place, row["ratio"] - 1, left=1, height=0.6, **fill | {"edgecolor": colour})
        axes.plot([row["target"]] * 2, [place - 0.42, place + 0.42], color=COLOURS["ink"], linewidth=2.2)
        label = f" {rounded(row['ratio'])}×" + (", missed" if missed(row) else "")
        axes.text(max(row["ratio"], row["target"]) * 1.03, place, label, va="center", fontsize=9)
    axes.set_xscale("log")
    ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if tick <= 2 * furthest]
    axes.set_xticks(ticks, [f"{tick}×" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(min(0.95, 0.9 * min(row["ratio"] for row in rows)), furthest * 1.9)
    axes.set_yticks(range(len(rows)), [row["what"] for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.axvline(1, color=COLOURS["ink"], linewidth=0.8)
    axes.set_title("How many times faster, at the same result")
    axes.set_xlabel("blue: CPU · green: GPU · black tick: the target · hatched: target missed")
    figure.savefig(path, dpi=120, metadata={"Description": json.dumps(rows), "Software": None})


# README.md


def replace_section(text: str, name: str, content: str) -> str:
    """`text` with what stands between `<!-- name: … -->` and `<!-- end -->` replaced."""
    pattern = rf"(<!-- {name}: [^>]*-->\n).*?(<!-- end -->)"
    replaced, count = re.subn(pattern, lambda match: f"{match[1]}{content}\n{match[2]}", text, flags=re.S)
    if count != 1:
        raise ValueError(f"README.md has {count} sections <!-- {name}: … -->, wanted one")
    return replaced


def main() -> None:
    readme = ROOT / "README.md"
    index = json.loads((RESULTS / "tutorial.json").read_text(encoding="utf-8"))
    devices = read_comparisons()
    text = replace_section(readme.read_text(encoding="utf-8"), "notebooks", notebook_table(index))
    text = replace_section(text, "fast", speed_section(devices))
    text = replace_section(text, "evidence", evidence_table())
    text = replace_section(text, "code", code_table())
    text = replace_section(text, "controls", controls_table())
    text = replace_section(text, "retrofit", retrofit_table())
    growth = json.loads((RESULTS / "growth-cpu.json").read_text(encoding="utf-8"))
    text = replace_section(text, "growth", growth_table(growth))
    cluster = RESULTS / "cluster-cpu.json"
    record = json.loads(cluster.read_text(encoding="utf-8")) if cluster.exists() else None
    readme.write_text(replace_section(text, "cluster", cluster_table(record)), encoding="utf-8")
    if devices:
        draw_speed(devices)


if __name__ == "__main__":
    main()
