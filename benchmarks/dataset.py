"""Training examples a second beside the reference's, and whether a step waits for them: `python benchmarks/dataset.py`.

Both read the same invented corpus from the disk: sequences of n = 2048 tokens, l = 32 chunks of m = 64, with k = 2
neighbours of r = 128. Checked first: the examples are the same, where the reference is right, which is where a
sequence fills its document. Then steps of training are timed twice by turns: each with a batch of its own from a
DataLoader, and all with one batch that lies on the device.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from measure import Comparison, compare, write_results
from peer import import_reference
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from retro_nb import RETRO, RETRODataset, get_optimizer
from retro_nb.compiled import can_compile

N, M, K, VOCABULARY = 2048, 64, 2, 30522
DOCUMENTS, CHECKED, ITEMS, BATCH = 64, 200, 320, 8
TARGET, ON_TIME = 5, 0.98  # items against the reference's; steps against those of a batch that lies ready
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPS, STEP_BATCH = (20, 8) if DEVICE == "cuda" else (2, 1)
MODEL = dict(
    num_tokens=VOCABULARY, max_seq_len=N, enc_dim=896, enc_depth=2, dec_dim=896, dec_depth=12,
    dec_cross_attn_layers=(6, 9, 12), heads=8, dim_head=64,
)  # fmt: skip
if DEVICE == "cpu":
    MODEL |= dict(enc_dim=64, enc_depth=1, dec_dim=64, dec_depth=2, dec_cross_attn_layers=(2,), heads=2)


# the corpus


def write_corpus(folder: Path) -> tuple[RETRODataset, Dataset, list[int]]:
    """Our dataset, the reference's, and the sequences that fill their documents to the last token."""
    from retro_pytorch.data import RETRODataset as Reference

    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 1500, DOCUMENTS)  # in chunks
    count, ends, firsts = lengths.sum(), np.cumsum(lengths) - 1, np.cumsum(lengths) - lengths
    chunks = rng.integers(1000, VOCABULARY, (count, M + 1))
    chunks[ends, 40], chunks[ends, 41:] = 102, 0  # [SEP] and padding
    inside = np.setdiff1d(np.arange(count), ends)
    chunks[inside, M] = chunks[inside + 1, 0]
    seqs = np.concatenate([np.arange(f, f + c, N // M) for f, c in zip(firsts, lengths, strict=True)])
    doc_ids = np.repeat(np.arange(DOCUMENTS), lengths)
    arrays = {"chunk": chunks, "chunk_nn": rng.integers(0, count, (count, K)), "seq": seqs, "doc_ids": doc_ids}
    sizes = dict(num_chunks=int(count), chunk_size=M, seq_len=N, num_sequences=len(seqs), num_neighbors=K)
    places: dict[str, dict[str, Path]] = {"npy": {}, "raw": {}}
    for name, array in arrays.items():
        array = array.astype(np.int32)
        for kind, files in places.items():
            files[f"{name}_memmap_path"] = folder / f"{name}.{kind}"
        np.save(places["npy"][f"{name}_memmap_path"], array)
        room = np.zeros((N // M, *array.shape[1:]), np.int32)  # the reference wants some at the end
        np.concatenate([array, room]).tofile(places["raw"][f"{name}_memmap_path"])
    del places["raw"]["doc_ids_memmap_path"]
    last = np.minimum(seqs + N // M - 1, count - 1)
    whole = (doc_ids[last] == doc_ids[seqs]) & (last < ends[doc_ids[seqs]])
    return RETRODataset(**sizes, **places["npy"]), Reference(**sizes, **places["raw"]), whole.nonzero()[0].tolist()


def check_equal(ours: RETRODataset, theirs: Dataset, whole: list[int]) -> str:
    """Tokens and neighbours, one by one and in batches."""
    some = whole[:: max(1, len(whole) // CHECKED)]
    batches = DataLoader(Subset(ours, some), BATCH)
    for batch in (*zip(*(ours[ind] for ind in some), strict=True),), map(torch.cat, zip(*batches, strict=True)):
        for mine, expected in zip(batch, zip(*(theirs[ind] for ind in some), strict=True), strict=True):
            assert all(map(torch.equal, mine, expected)), "not the same examples"
    return f"all tokens of {len(some)} examples and of their neighbours"


# does a step wait?


def training_steps() -> Callable[[Iterator], None]:
    """A function that trains on one batch after another."""
    torch.manual_seed(0)
    retro = RETRO(**MODEL).to(DEVICE)
    optimizer = get_optimizer(retro.parameters())
    if DEVICE == "cuda" and can_compile("cuda"):
        retro.decoder.compile()

    def steps(batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        for batch in batches:
            seq, retrieved = (ids.to(DEVICE, non_blocking=True) for ids in batch)
            with torch.autocast("cuda", torch.bfloat16) if DEVICE == "cuda" else nullcontext():
                loss = retro(seq, retrieved, return_loss=True)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return steps


def compare_steps(ours: RETRODataset) -> Comparison:
    """Steps a second with a DataLoader in the same process, against one batch for all."""
    steps = training_steps()
    loader = DataLoader(ours, STEP_BATCH, shuffle=True, drop_last=True, pin_memory=DEVICE == "cuda")
    ready = [ids.to(DEVICE) for ids in next(iter(loader))]
    return compare(
        f"training steps with a DataLoader, {DEVICE.upper()}, against one batch reused",
        "steps/s",
        lambda: steps(islice(loader, STEPS)),
        lambda: steps(ready for _ in range(STEPS)),
        amount=STEPS,
        target=ON_TIME,
        equal="the same work: shapes and model",
    )


def main() -> None:
    import_reference()
    with tempfile.TemporaryDirectory() as temporary:
        ours, theirs, whole = write_corpus(Path(temporary))
        equal = check_equal(ours, theirs, whole)
        print(equal, flush=True)
        some = (whole * ITEMS)[:ITEMS]

        def read(dataset: Dataset) -> Callable[[], list]:
            return lambda: [dataset[ind] for ind in some]

        def load(dataset: Dataset) -> Callable[[], None]:
            return lambda: [None for _ in DataLoader(Subset(dataset, some), BATCH)]

        about = {"amount": ITEMS, "target": TARGET, "equal": equal}
        rows = [
            compare(f"dataset, DataLoader, batches of {BATCH}", "items/s", load(ours), load(theirs), **about),
            compare("dataset, one by one", "items/s", read(ours), read(theirs), **about),
            compare_steps(ours),
        ]
    settings = {"n": N, "m": M, "k": K, "r": 2 * M, "chunks": ours.num_chunks, "items": ITEMS, "batch": BATCH}
    write_results("dataset", rows, settings | {"step_model": MODEL, "step_batch": STEP_BATCH})


if __name__ == "__main__":
    main()
