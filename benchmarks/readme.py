"""Write the measured numbers into README.md: `python benchmarks/readme.py`.

The table of the notebooks comes from benchmarks/results/tutorial.json, which is the index.json of a run of
`make tutorial` (copy it from runs/<time>/).
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

LEARN = {
    "00_start_here": "the map, the letters, and the whole road once in ten cells",
    "01_chunking": "documents become chunks of 64 tokens that know where they came from",
    "02_bert_embedding": "a frozen BERT makes each chunk a vector; what is near, and framing both sides alike",
    "03_faiss_knn": "exact and approximate search; why a chunk's own document is left out, and how",
    "04_retro_model": "encoder and chunked cross-attention by hand; causality measured to the token",
    "05_training": "the loop by hand, then `fit`: schedule, validation, baseline, exact resume",
    "06_sampling": "temperature, top-k, top-p; live retrieval with caches; who was quoted",
}


def notebook_table(index: dict) -> str:
    """The notebooks' table in Markdown: what you learn, minutes, memory."""
    rows = ["| notebook | what you learn | seconds | memory |", "|---|---|---|---|"]
    for result in index["notebooks"]:
        stem = result["notebook"]
        link = f"[`{stem}`](notebooks/{stem}.ipynb)"
        rows.append(f"| {link} | {LEARN[stem]} | {result['seconds']:.0f} | {result['peak_mb'] / 1000:.1f} GB |")
    total = sum(result["seconds"] for result in index["notebooks"])
    note = f"Seconds and peak memory on 2 CPU cores, from nothing built: {total / 60:.1f} minutes in all."
    return "\n".join([*rows, "", note])


def replace_section(text: str, name: str, content: str) -> str:
    """`text` with what stands between `<!-- name: … -->` and `<!-- end -->` replaced."""
    pattern = rf"(<!-- {name}: [^>]*-->\n).*?(<!-- end -->)"
    replaced, count = re.subn(pattern, lambda match: f"{match[1]}{content}\n{match[2]}", text, flags=re.S)
    if count != 1:
        raise ValueError(f"README.md has {count} sections <!-- {name}: … -->, wanted one")
    return replaced


def main() -> None:
    readme = ROOT / "README.md"
    index = json.loads((ROOT / "benchmarks" / "results" / "tutorial.json").read_text(encoding="utf-8"))
    text = replace_section(readme.read_text(encoding="utf-8"), "notebooks", notebook_table(index))
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
