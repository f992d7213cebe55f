"""Two GPUs of one host against one: the same losses, the same vectors, and how many times sooner.

    python benchmarks/scaling.py               10 minutes on two GPUs; writes benchmarks/results/scaling-….json
    python benchmarks/scaling.py embedding     this part alone

It starts what people start, `accelerate launch --num_processes N -m retro_nb train`, with the same global batch for
one process and for two, on documents of invented words and a BERT of random weights (bert-base's size), so that it
needs no other data. A third run goes on in two processes from a checkpoint of the single one. Without a GPU the same
happens in small with processes of one thread, to try the way; nothing is written then.
"""

import argparse
import cProfile
import json
import os
import pstats
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
import yaml
from measure import Comparison, write_results

from retro_nb.common.arrays import write_json
from retro_nb.lab.commands import processes
from retro_nb.reference import chunks_to_embeddings_
from retro_nb.training.log import History, read_log

ROOT = Path(__file__).resolve().parent.parent
GPUS = torch.cuda.device_count()
TARGETS = {"training": 1.8, "embedding": 1.9}
ROUNDS, WARM_UP = 2, 2  # rounds of embedding; first stretches of training that do not count

if GPUS:  # the model of issue 4, with 182 million parameters
    SIZES = {"enc_dim": 896, "dec_dim": 896, "enc_depth": 2, "dec_depth": 12, "dec_cross_attn_layers": [6, 9, 12]}
    SIZES |= {"heads": 8, "dim_head": 64, "max_seq_len": 2048}
    RUN = {"batch_size": 32, "steps": 60, "log_every": 6, "checkpoint_every": 30, "num_workers": 4, "lr": 3e-4}
    BERT = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    WORDS, DOCUMENTS, CHUNKS, TOLERANCE = 30522, 128, 1024 * 1024, 5e-3  # bfloat16 sums in another order
else:
    SIZES = {"enc_dim": 64, "dec_dim": 64, "enc_depth": 1, "dec_depth": 2, "dec_cross_attn_layers": [2]}
    SIZES |= {"heads": 4, "dim_head": 16, "max_seq_len": 256}
    RUN = {"batch_size": 4, "steps": 20, "log_every": 2, "checkpoint_every": 10, "lr": 1e-2}
    BERT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    WORDS, DOCUMENTS, CHUNKS, TOLERANCE = 4000, 8, 2 * 1024, 1e-4
RUN |= {"knn": 2, "valid_share": 0, "eval_every": 10**6}
SIZES |= {"num_tokens": WORDS}


# what is trained on and embedded


def write_bert(folder: Path) -> None:
    """A BERT of random weights, and a tokenizer for which "w2000" is word 2000."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=WORDS, **BERT)).save_pretrained(folder)
    names = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]"}
    vocabulary = {names.get(number, f"w{number}"): number for number in range(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(names.values()))
    tokenizer.save(str(folder / "tokenizer.json"))


def write_corpus(path: Path, sequences: int = 4) -> None:
    """Documents that fill so many sequences each; some words are frequent and each has a word that follows it."""
    rng = np.random.default_rng(0)
    follower = 1000 + rng.permutation(WORDS - 1000)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(DOCUMENTS):
            words = rng.zipf(1.2, sequences * SIZES["max_seq_len"] // 2) % (WORDS - 1000)
            both = np.stack([1000 + words, follower[words]], axis=1).ravel()[1:]
            file.write(json.dumps({"text": " ".join(f"w{word}" for word in both)}) + "\n")


# one or several processes


def launch(number: int, command: list[str], log: Path) -> subprocess.Popen:
    """Start a command in so many processes, as `accelerate launch` does on GPUs and torchrun on CPUs."""
    if GPUS:
        launcher = ["accelerate.commands.launch", "--num_processes", str(number), "--num_machines", "1"]
        launcher += ["--mixed_precision", "no", "--dynamo_backend", "no"] + ["--multi_gpu"] * (number > 1)
    else:
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(number)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    threads = "4" if GPUS else "1"
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": threads}
    with log.open("wb") as stream:
        command = [sys.executable, "-m", *launcher, *command]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stream, stderr=stream)


def finish(process: subprocess.Popen, log: Path, seconds: float = 240) -> None:
    """Wait for a launched command; if it fails or takes too long, show the end of what it said."""
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        code = f"not within {seconds} s"
    if code:
        sys.exit(f"{log.stem}: {code}\n" + log.read_text(encoding="utf-8", errors="replace")[-4000:])


def train(number: int, folder: Path, name: str, copy_half_to: str = "") -> History:
    """Train in so many processes; on the way keep a copy of the folder as it is at the first checkpoint."""
    started, out, log = time.perf_counter(), folder / name, folder / f"{name}.log"
    command = ["-m", "retro_nb", "train", "-f", str(folder / "run.yaml"), "-p", "out_dir", str(out)]
    process = launch(number, command, log)
    half = out / "checkpoints" / f"step-{RUN['checkpoint_every']:08d}"
    while copy_half_to and process.poll() is None and not half.exists():
        time.sleep(0.02)
    if half.exists() and copy_half_to:  # hard links: the run goes on, and will delete its own
        shutil.copytree(out, folder / copy_half_to, copy_function=os.link)
    finish(process, log)
    history = read_log(out / "log.jsonl")
    print(f"{name}: loss {history.losses[0]:.4f} … {history.losses[-1]:.4f}, waiting {waiting(history):.2%},", end=" ")
    print(f"{time.perf_counter() - started:.0f} s", flush=True)
    return history


def speeds(history: History) -> list[float]:
    """Tokens a second in each stretch of steps that was timed together, without the first ones."""
    return [speed for speed, _ in groupby(history.curve("tokens_per_second")[1])][WARM_UP:]


def waiting(history: History) -> float:
    """The share of the time, after the first stretch, in which no batch was there: at most what the GPU waited."""
    first, last = history[RUN["log_every"] - 1], history[-1]
    return (last["waiting_seconds"] - first["waiting_seconds"]) / (last["seconds"] - first["seconds"])


def difference(history: History, other: History) -> float:
    """The largest relative difference of two runs' losses."""
    pairs = zip(history.losses, other.losses, strict=True)
    return max(abs(a - b) / b for a, b in pairs)


# embedding


def embed(folder: Path) -> None:
    """What each process of the embedding benchmark does: a few chunks unmeasured, then all of them, again and again."""
    with processes() as here:
        vectors, seconds, profile = folder / f"vectors-{here.num_processes}.npy", [], cProfile.Profile()
        for count in [CHUNKS // 16, *[CHUNKS] * ROUNDS]:
            if here.is_main_process:  # to remove a file of gigabytes takes time, too
                vectors.unlink(missing_ok=True)
            here.wait_for_everyone()
            start = time.perf_counter()
            if len(seconds) == ROUNDS:
                profile.enable()
            chunks_to_embeddings_(
                num_chunks=count,
                chunk_size=64,
                chunks_memmap_path=folder / "random.npy",
                embeddings_memmap_path=vectors,
                bert=folder / "bert",
                force_reprocess=True,
                progress=False,
            )
            here.wait_for_everyone()
            seconds.append(time.perf_counter() - start)
        profile.disable()
        if here.is_main_process:
            write_json(vectors.with_suffix(".json"), {"seconds": seconds[1:], "profile": dearest(profile)})


def dearest(profile: cProfile.Profile, count: int = 12) -> dict[str, float]:
    """Seconds of the last round that the first process spent in single functions, without what these called."""
    stats = pstats.Stats(profile).stats.items()
    own = {f"{Path(file).name}:{name}": spent for (file, _, name), (_, _, spent, *_) in stats}
    return {name: round(own[name], 3) for name in sorted(own, key=own.get, reverse=True)[:count]}


def compare_embedding(folder: Path) -> None:
    """Embed random chunks with one process and with two."""
    chunks = np.random.default_rng(1).integers(1000, WORDS, (CHUNKS, 65), dtype=np.int32)
    np.save(folder / "random.npy", chunks)
    runs, vectors, profiles = {}, {}, {}
    for number in (1, 2):
        log = folder / f"embedding-{number}.log"
        finish(launch(number, [__file__, "--embed", str(folder)], log), log)
        file = folder / f"vectors-{number}.npy"
        found = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
        runs[number], vectors[number] = [CHUNKS / each for each in found["seconds"]], np.load(file)
        profiles[number] = found["profile"]
        print(f"{number}: {found}", flush=True)
    one, two = vectors.values()
    cosine = (one * two).sum(1) / (np.linalg.norm(one, axis=1) * np.linalg.norm(two, axis=1))
    equal = f"all {CHUNKS:,} vectors, cosine ≥ {cosine.min():.5f}"
    made = row("embedding", "chunks/s", runs, equal)
    assert cosine.min() > 0.9999, f"the vectors differ: {equal}"
    if GPUS:
        settings = {"bert": BERT, "chunks": CHUNKS, "rounds": ROUNDS}
        write_results("scaling-embedding", [made], settings, profiles=profiles)


def row(what: str, unit: str, runs: dict[int, list[float]], equal: str) -> Comparison:
    """A row of the table whose reference is one process."""
    one, two = (statistics.median(runs[number]) for number in (1, 2))
    title = f"{what} on 2 {'GPUs' if GPUS else 'processes'} of one host, against 1"
    made = Comparison(title, unit, two, one, TARGETS[what], equal, runs[2], runs[1])
    print(f"{made.what}: {two:,.0f} {unit} against {one:,.0f}, {made.ratio:.2f} times; {equal}", flush=True)
    return made


def compare_training(folder: Path) -> None:
    write_corpus(folder / "corpus.jsonl")
    places = {"corpus": folder / "corpus.jsonl", "bert": folder / "bert", "work_dir": folder / "work"}
    recipe = {name: str(path) for name, path in places.items()} | SIZES | RUN
    (folder / "run.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    one = train(1, folder, "one", copy_half_to="resumed")
    two = train(2, folder, "two")
    resumed = train(2, folder, "resumed")
    losses = {"two": difference(two, one), "resumed": difference(resumed, one)}
    equal = f"losses of {len(one)} steps within {losses['two']:.1e}, resumed from 1 with 2 {losses['resumed']:.1e}"
    made = row("training", "tokens/s", {1: speeds(one), 2: speeds(two)}, equal)
    assert max(losses.values()) < TOLERANCE, f"the losses differ by {losses}: more than {TOLERANCE}"
    assert one.losses[-1] < 0.9 * one.losses[0], "nothing was learnt, so equal losses mean little"
    if GPUS:
        waits = {"one": waiting(one), "two": waiting(two)}
        curves = {"one": one.losses, "two": two.losses, "resumed": resumed.losses}
        remark = f"Steps waited for their batches {waits['one']:.2%} of the time with 1 GPU, {waits['two']:.2%} with 2."
        more = {"largest_difference": losses, "waiting": waits, "remarks": [remark]}
        write_results("scaling-training", [made], {"model": SIZES, "run": RUN}, losses=curves, **more)


PARTS = {"training": compare_training, "embedding": compare_embedding}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="training, embedding; both when left out")
    parser.add_argument("--embed", type=Path, help=argparse.SUPPRESS)  # in the processes that are launched
    options = parser.parse_args()
    if options.embed:
        return embed(options.embed)
    if GPUS == 1:
        sys.exit("one GPU: this compares one with two, on a machine that has them")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_bert(folder / "bert")
        for part in options.parts or PARTS:
            PARTS[part](folder)


if __name__ == "__main__":
    main()
