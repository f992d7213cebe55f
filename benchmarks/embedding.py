"""Embedding beside the reference's, from the chunk file to the file of vectors: `python benchmarks/embedding.py`.

On a GPU if there is one: with all-MiniLM-L6-v2 (or random weights of its shape, where the package is missing) and
with random weights of bert-base's shape, the reference's own embedder. Else on the CPU, with MiniLM.

Checked first: our vectors are those of a plain float32 pass, written here anew. The reference's differ by design: it
frames a chunk as [CLS] and 64 tokens, here it is [CLS], the words and [SEP]. Printed besides: the share of the
processor's measured and of its datasheet's matrix rate that is reached, and where the time goes.
"""

import contextlib
import io
import os
import statistics
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import Comparison, bf16_peak, compare, timed, write_results
from peer import give_bert, import_reference
from torch import Tensor

from retro_nb.common.arrays import open_array
from retro_nb.common.devices import best_dtype
from retro_nb.reference import chunks_to_embeddings_, documents_to_chunks_
from retro_nb.store import embedding
from retro_nb.store.embedding import flops_per_chunk, frame_chunks, get_bert
from retro_nb.text.speeches import speeches
from retro_nb.text.tokens import bert_folder

CHECKED = 4096  # chunks compared with float32, and searched for each one's first neighbour
COSINE, SAME_NEIGHBOUR = 0.999, 0.97
TARGETS = {"cpu": 1.7, "cuda": 10}
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
AMOUNTS = {"MiniLM": (2**20, 4096), "bert-base": (2**17, 2048)}  # chunks a run on a GPU, ours and the reference's
CPU_AMOUNTS = (256, 256)
VOCABULARY = 30522


# what is embedded, and by whom


def some_chunks(folder: Path) -> tuple[np.ndarray, str]:
    """Chunks of 64 tokens and the next one's first, and what they are: speeches, or invented if those are missing."""
    names = ("chunks", "seqs", "doc_ids")
    try:
        places = {f"{name}_memmap_path": folder / f"{name}.npy" for name in names}
        documents_to_chunks_(speeches(40), **places, chunk_size=64, seq_len=2048, progress=False)
        return np.array(open_array(folder / "chunks.npy"), np.int32), "40 speeches"  # as the reference reads them
    except ModuleNotFoundError as missing:
        print(f"invented chunks, since {missing}", flush=True)
    rng = np.random.default_rng(0)
    chunks = rng.integers(1000, VOCABULARY, (6000, 65), dtype=np.int32)
    for row in range(0, len(chunks), 75):  # as many as are shorter in the speeches
        chunks[row, rng.integers(1, 64) :] = 0
    return chunks, "invented"


def random_bert(folder: Path, shape: dict[str, int]) -> Path:
    """A folder with a BERT of random weights, and a vocabulary, which the reference wants to read."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=VOCABULARY, **shape), add_pooling_layer=False).save_pretrained(folder)
    special = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]"}
    words = [special.get(number, f"w{number}") for number in range(VOCABULARY)]
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    return folder


def berts(folder: Path, device: str) -> dict[str, tuple[Path, bool]]:
    """Name -> (folder, whether its weights are trained)."""
    try:
        found = {"MiniLM": (Path(bert_folder()), True)}
    except ModuleNotFoundError as missing:
        print(f"random weights of MiniLM's shape, since {missing}", flush=True)
        found = {"MiniLM": (random_bert(folder / "minilm", MINILM), False)}
    if device == "cuda":
        found["bert-base"] = random_bert(folder / "base", BASE), False
    return found


# the same vectors


@torch.inference_mode()
def float32_vectors(bert: Path, chunks: np.ndarray, device: str) -> Tensor:
    """The mean of BERT's last hidden states after [CLS], the plain way."""
    from transformers import BertModel

    model = BertModel.from_pretrained(bert, add_pooling_layer=False).float().eval().to(device)
    vectors = []
    for start in range(0, len(chunks), 64):
        words = [[word for word in row if word > 102] for row in chunks[start : start + 64, :64].tolist()]
        rows = [torch.tensor([101, *row, 102]) for row in words]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
        mask = (ids != 0).long()
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state[:, 1:]
        vectors.append((hidden * mask[:, 1:, None]).sum(1) / mask[:, 1:].sum(1, keepdim=True))
    return torch.cat(vectors)


def first_neighbours(vectors: Tensor) -> Tensor:
    """The nearest other vector of each, by exact search."""
    vectors = vectors.double()
    distances = (vectors**2).sum(1) - 2 * vectors @ vectors.T  # squared, less what a row has in common
    return distances.fill_diagonal_(torch.inf).argmin(1)


def check_equal(bert: Path, trained: bool, chunks: np.ndarray, folder: Path, device: str) -> str:
    """Our vectors against float32. Random weights put all chunks near each other: then neighbours mean little."""
    embed(folder / "checked", chunks[:CHECKED], bert, device)
    ours = torch.from_numpy(np.array(open_array(folder / "checked" / "vectors.npy"))).to(device)
    exact = float32_vectors(bert, chunks[:CHECKED], device)
    cosine = torch.cosine_similarity(ours, exact).min().item()
    same = (first_neighbours(ours) == first_neighbours(exact)).float().mean().item()
    equal = f"cosine to float32 ≥ {cosine:.5f}, the same first of {len(ours)} for {same:.1%}"
    print(equal, "" if trained else "(random weights)", flush=True)
    assert cosine >= COSINE, equal
    assert same >= SAME_NEIGHBOUR or not trained, equal
    return equal


# both sides, from file to file


def embed(folder: Path, chunks: np.ndarray, bert: Path, device: str) -> None:
    """Ours; the chunks are written only if they are not there."""
    if not folder.exists():
        folder.mkdir()
        np.save(folder / "chunks.npy", chunks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # building again: asked for
        chunks_to_embeddings_(
            num_chunks=len(chunks),
            chunks_memmap_path=folder / "chunks.npy",
            embeddings_memmap_path=folder / "vectors.npy",
            bert=bert,
            device=device,
            force_reprocess=True,
            progress=False,
        )


def embed_as_reference(folder: Path, chunks: np.ndarray, dim: int) -> None:
    """The reference's, which prints a line for each batch."""
    from retro_pytorch import retrieval

    if not folder.exists():
        folder.mkdir()
        chunks.tofile(folder / "chunks.dat")
    with contextlib.redirect_stdout(io.StringIO()):
        retrieval.chunks_to_embeddings_(
            num_chunks=len(chunks),
            chunks_memmap_path=folder / "chunks.dat",
            embeddings_memmap_path=folder / "vectors.dat",
            embed_dim=dim,
        )


# how near to the processor's limit


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """Operations a second in a large square matrix product: the best of a few."""
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(timed(lambda: a @ b) for _ in range(8))


def disk_rate(folder: Path) -> float:
    """Bytes a second that reach the disk, in blocks as large as MiniLM's."""
    block = np.random.default_rng(0).bytes(embedding.ON_GPU.block * 384 * 4)

    def write() -> None:
        with open(folder / "disk", "wb") as file:
            file.write(block)
            file.flush()
            os.fsync(file.fileno())

    return len(block) / statistics.median(timed(write) for _ in range(9))


@torch.inference_mode()
def forward_rates(bert: Path, chunks: np.ndarray, device: str) -> dict[str, float]:
    """Chunks a second through BERT alone, without disk and framing, by the number of chunks in a pass.

    (With torch.compile, transformers' BERT did 91,571 a second on an H100 instead of 149,833, at 2048 in a pass.)
    """
    model, rates = get_bert(bert, device), {}
    sizes = (512, 1024, 2048, 4096, 8192) if device == "cuda" else (16, 32, 64, 128, 256)
    for batch in sizes:
        ids, passes = whole_chunks(chunks, batch).to(device), 2 * sizes[-1] // batch

        def run(ids=ids, passes=passes) -> None:
            for _ in range(passes):
                embedding._vectors(model, ids, None, False)

        rates[str(batch)] = passes * batch / statistics.median([timed(run) for _ in range(5)][2:])
        speed = rates[str(batch)] * flops_per_chunk(model.config, 66) / 1e12
        print(f"  forward, {batch} a pass: {rates[str(batch)]:,.0f} chunks/s, {speed:.2f} TFLOP/s", flush=True)
    return rates


def whole_chunks(chunks: np.ndarray, count: int) -> Tensor:
    """So many framed chunks without padding."""
    whole = chunks[(chunks[:, :64] > 102).all(1), :64]
    return frame_chunks(torch.from_numpy(np.resize(whole, (count, 64))))


@torch.inference_mode()
def time_by_kernel(bert: Path, chunks: np.ndarray, device: str) -> dict[str, float]:
    """The share of the time of a pass that each of the dearest operations takes."""
    from torch.profiler import ProfilerActivity, profile

    model, (batch, *_) = get_bert(bert, device), embedding.ON_GPU if device == "cuda" else embedding.ON_CPU
    run = partial(embedding._vectors, model, whole_chunks(chunks, batch).to(device), None, False)
    run()
    with profile(activities=[ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU]) as trace:
        timed(run)
    name = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    events = sorted(trace.key_averages(), key=lambda event: -getattr(event, name))
    total = sum(getattr(event, name) for event in events) or 1
    shares = {event.key[:100]: round(getattr(event, name) / total, 3) for event in events[:10]}
    for kernel, share in shares.items():
        print(f"  {share:6.1%} {kernel}", flush=True)
    return shares


# the measurement


def measure(name: str, bert: Path, trained: bool, chunks: np.ndarray, folder: Path, device: str) -> tuple:
    """One BERT: the row of the table, and what explains it."""
    equal = check_equal(bert, trained, chunks, folder, device)
    config = give_bert(bert).to(device).config
    ours, theirs = (np.resize(chunks, (n, 65)) for n in (AMOUNTS[name] if device == "cuda" else CPU_AMOUNTS))
    dtype = best_dtype(torch.device(device))
    processor = f"{'GPU' if device == 'cuda' else 'CPU'}, {name}{'' if trained else ' shape'}"
    row: Comparison = compare(
        f"embedding, {processor}, {str(dtype).removeprefix('torch.')}",
        "chunks/s",
        partial(embed, folder / "ours", ours, bert, device),
        partial(embed_as_reference, folder / "theirs", theirs, config.hidden_size),
        amount=len(ours),
        peer_amount=len(theirs),
        target=TARGETS[device],
        equal=equal,
    )
    more = explain(row, config, dtype, device) | {"disk_bytes_per_second": disk_rate(folder)}
    print(f"  the disk takes {more['disk_bytes_per_second'] / 1e6:,.0f} MB/s", flush=True)
    if dtype == torch.bfloat16:
        more["forward_chunks_per_second"] = forward_rates(bert, chunks, device)
    return row, more | {"time_by_kernel": time_by_kernel(bert, chunks, device)}


def explain(row: Comparison, config: Any, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Operations a chunk, and the share of the processor's matrix rate that either side reaches."""
    flops, peers = flops_per_chunk(config, 66), flops_per_chunk(config, 65)
    rates = {str(kind).removeprefix("torch."): matrix_rate(device, kind) for kind in {dtype, torch.float32}}
    mine = str(dtype).removeprefix("torch.")
    shares = {"ours": row.ours * flops / rates[mine], "reference": row.peer * peers / rates["float32"]}
    print(f"  {flops / 1e9:.2f} GFLOP a chunk, {row.ours * flops / 1e12:.3f} TFLOP/s; of the measured", end=" ")
    print(f"{rates[mine] / 1e12:.3f} in {mine} {shares['ours']:.1%}, the reference {shares['reference']:.1%}", end=" ")
    print(f"of {rates['float32'] / 1e12:.3f} in float32", flush=True)
    more = {"flops_per_chunk": flops, "matrix_rates": rates, "share_of_matrix_rate": shares}
    if device == "cuda":
        peak = bf16_peak()
        more |= {"bf16_peak": peak, "share_of_peak": peak and row.ours * flops / peak}
        print(f"  of the datasheet's bfloat16 rate: {more['share_of_peak'] or 0:.1%}", flush=True)
    return more


def main() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    import_reference()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        chunks, kind = some_chunks(folder)
        rows, details = [], {}
        for name, (bert, trained) in berts(folder, device).items():
            (folder / f"{name} files").mkdir()
            row, details[name] = measure(name, bert, trained, chunks, folder / f"{name} files", device)
            rows.append(row)
            sizes = {"cpu": embedding.ON_CPU, "cuda": embedding.ON_GPU}[device]._asdict()
            settings = {"chunks": kind, "checked": CHECKED, "sizes": sizes, "reference's batch": 16}
            write_results("embedding", rows, settings, details=details)


if __name__ == "__main__":
    main()
