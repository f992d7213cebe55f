"""Training examples a second beside the reference's: `python benchmarks/dataset.py`.

Both read the same invented corpus from the disk: sequences of n = 2048 tokens, l = 32 chunks of m = 64, with k = 2
neighbours of r = 128. Checked first: the examples are the same, where the reference is right, which is where a
sequence fills its document. How long a step of training waits for its batch is in every run's log
(`History`, waiting_seconds); scaling.py reports it.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from measure import compare, write_results
from peer import import_reference
from torch.utils.data import DataLoader, Dataset, Subset

from retro_nb import RETRODataset

N, M, K, VOCABULARY = 2048, 64, 2, 30522
DOCUMENTS, CHECKED, ITEMS, BATCH, TARGET = 64, 200, 320, 8, 5


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
        ]
    settings = {"n": N, "m": M, "k": K, "r": 2 * M, "chunks": ours.num_chunks, "items": ITEMS, "batch": BATCH}
    write_results("dataset", rows, settings)


if __name__ == "__main__":
    main()
