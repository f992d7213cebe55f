"""A training step beside the reference's: `python benchmarks/training.py` (on a GPU if there is one).

On a GPU, `… training.py curves` compares 200 steps of training, and `… training.py profile` says where the time
of a step goes.

Both sides start from the same weights and do the whole step: forward, loss, backward, AdamW. On a CPU in
float32; on a GPU under bfloat16 autocast, each at the batch that serves it best. Checked first: with its
query positions put right (see tests/model/test_parity.py), the reference's loss and gradients are ours.
"""

import itertools
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from measure import Comparison, bf16_peak, compare, timed, write_results
from peer import import_reference
from torch import Tensor

from retro_nb import RETRO, RETRODataset, get_optimizer, speeches
from retro_nb.common.devices import can_compile, compile_in_place
from retro_nb.planning.flops import flops_per_token
from retro_nb.reference import documents_to_chunks_

V, M, K = 30522, 64, 2
SMALL = dict(
    num_tokens=V, max_seq_len=512, enc_dim=128, enc_depth=2, dec_dim=128, dec_depth=4,
    dec_cross_attn_layers=(2, 4), heads=8, dim_head=32,
)  # fmt: skip
LARGE = dict(
    num_tokens=V, max_seq_len=2048, enc_dim=896, enc_depth=2, dec_dim=896, dec_depth=12,
    dec_cross_attn_layers=(6, 9, 12), heads=8, dim_head=64,
)  # fmt: skip
BATCHES = (16, 32)
COMPILED_BATCHES = (32,)  # each is compiled for a minute
STEPS = 4  # timed together on a GPU, as in training: then what the CPU does for one step hides behind another


def pair(config: dict, device: str) -> tuple[torch.nn.Module, RETRO]:
    """The reference's model and ours with the same weights."""
    torch.manual_seed(0)
    reference = import_reference().RETRO(**config).to(device)
    return reference, RETRO.from_retro_pytorch(reference.state_dict(), **config).to(device)


def random_batch(config: dict, b: int) -> tuple[Tensor, Tensor]:
    """Sequences without padding, and neighbours for every chunk, as a DataLoader gives them: on the CPU."""
    n, generator = config["max_seq_len"], torch.Generator().manual_seed(0)
    batch = [torch.randint(1000, V, size, generator=generator) for size in ((b, n + 1), (b, n // M, K, 2 * M))]
    return tuple(ids.pin_memory() if torch.cuda.is_available() else ids for ids in batch)


@contextmanager
def corrected_reference():
    """The reference with the queries of its cross-attention where they belong, not shifted a second time."""
    from retro_pytorch import retro_pytorch as module

    def pad(tensor: Tensor, *args, **kwargs) -> Tensor:
        return tensor if tensor.ndim == 4 else F.pad(tensor, *args, **kwargs)

    functions = {name: getattr(F, name) for name in dir(F)} | {"pad": pad}
    with patch.object(module, "F", SimpleNamespace(**functions)):
        yield


def check_equal(config: dict, device: str) -> str:
    """Losses and gradients in float32."""
    reference, ours = pair(config, device)
    seq, retrieved = (ids.to(device) for ids in random_batch(config, 2))
    losses, gradients = [], []
    with corrected_reference():
        for model in (reference, ours):
            loss = model(seq, retrieved, return_loss=True)
            loss.backward()
            losses.append(loss.item())
            gradients.append(torch.cat([p.grad.flatten() for p in model.token_emb.parameters()]))
    apart = ((gradients[0] - gradients[1]).norm() / gradients[0].norm()).item()
    assert abs(losses[0] - losses[1]) < 1e-4 * losses[0] and apart < 1e-3, (losses, apart)
    nats = abs(losses[0] - losses[1])
    return f"loss within {nats:.0e} nats, embedding gradient within {apart:.0e} (reference corrected)"


def several(step: Callable[[], Tensor]) -> Callable[[], list[Tensor]]:
    return lambda: [step() for _ in range(STEPS)]


def stepper(model: torch.nn.Module, batches: list[tuple[Tensor, Tensor]], bf16: bool) -> Callable[[], Tensor]:
    """One whole training step, on one batch after another, as a function that returns the loss."""
    if isinstance(model, RETRO):
        optimizer = get_optimizer(model.parameters(), lr=3e-4)
    else:
        optimizer = import_reference().optimizer.get_optimizer(model.parameters(), lr=3e-4)

    device, endless = next(model.parameters()).device, itertools.cycle(batches)

    def step() -> Tensor:
        seq, retrieved = next(endless)
        if not isinstance(model, RETRO):  # ours takes them there itself
            seq, retrieved = (ids.to(device, non_blocking=True) for ids in (seq, retrieved))
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = model(seq, retrieved=retrieved, return_loss=True)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def on_cpu() -> None:
    equal, b = check_equal(SMALL, "cpu"), 4
    batch, (reference, ours) = random_batch(SMALL, b), pair(SMALL, "cpu")
    row = compare(
        "training step, CPU", "tokens/s", stepper(ours, [batch], False), stepper(reference, [batch], False),
        amount=b * SMALL["max_seq_len"], target=1.5, equal=equal,
    )  # fmt: skip
    write_results("training", [row], SMALL | {"batch": b, "precision": "float32"})


def speeds(model: torch.nn.Module, config: dict, batches: tuple[int, ...], repeats: int = 5) -> dict[int, dict]:
    """Tokens a second and memory for every batch that fits."""
    found = {}
    for b in batches:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            torch._dynamo.reset()  # a batch size is compiled for itself, as in training
            step = stepper(model, [random_batch(config, b)], True)
            warm_up = [timed(step) for _ in range(3)]
            runs = [STEPS * b * config["max_seq_len"] / timed(several(step)) for _ in range(repeats)]
        except torch.OutOfMemoryError:
            print(f"  batch {b} does not fit", flush=True)
            model.zero_grad()
            break
        rate, memory = statistics.median(runs), torch.cuda.max_memory_allocated() / 1e9
        found[b] = {"tokens_per_second": rate, "runs": runs, "gigabytes": memory}
        print(f"  batch {b}: {rate:,.0f} tokens/s, {memory:.1f} GB, first {warm_up[0]:.0f} s", flush=True)
    return found


def on_documents(model: RETRO, config: dict, b: int, repeats: int = 5) -> dict[str, float]:
    """Tokens a second on real documents, which are shorter than n or end within it; padding does not count."""
    batches = document_batches(config["max_seq_len"], b)
    torch._dynamo.reset()
    step, tokens = stepper(model, batches, True), sum(int((seq[:, 1:] != 0).sum()) for seq, _ in batches) / len(batches)
    for _ in range(2 * len(batches)):
        step()
    rate = statistics.median(STEPS * tokens / timed(several(step)) for _ in range(repeats))
    share = tokens / (b * config["max_seq_len"])
    print(f"  documents, batch {b}: {rate:,.0f} tokens/s, {share:.0%} of the positions are text", flush=True)
    return {"batch": b, "tokens_per_second": rate, "share": share}


def document_batches(n: int, b: int) -> list[tuple[Tensor, Tensor]]:
    """STEPS batches of the speeches' sequences; their neighbours are random chunks: which ones costs the same."""
    with tempfile.TemporaryDirectory() as folder:
        chunks, seqs, doc_ids, knns = (Path(folder) / f"{name}.npy" for name in ("chunks", "seqs", "doc_ids", "knns"))
        made = documents_to_chunks_(
            speeches(), chunks_memmap_path=chunks, seqs_memmap_path=seqs, doc_ids_memmap_path=doc_ids, chunk_size=M,
            seq_len=n, progress=False,
        )  # fmt: skip
        found = np.random.default_rng(0).integers(made["chunks"], size=(made["chunks"], K))
        np.save(knns, found.astype(np.int32))
        data = RETRODataset(
            num_chunks=made["chunks"], chunk_size=M, seq_len=n, num_sequences=made["seqs"], num_neighbors=K,
            chunk_memmap_path=chunks, seq_memmap_path=seqs, doc_ids_memmap_path=doc_ids, chunk_nn_memmap_path=knns,
        )  # fmt: skip
        order = np.random.default_rng(0).permutation(len(data))[: STEPS * b].reshape(STEPS, b)
        batches = [map(torch.stack, zip(*data.__getitems__(some), strict=True)) for some in order.tolist()]
        return [tuple(ids.pin_memory() if torch.cuda.is_available() else ids for ids in batch) for batch in batches]


def curves(steps: int = 200, b: int = 4) -> None:
    """Both from the same weights on the same data, which can be learnt: every token tells the next."""
    losses = {}
    for name, model in zip(("reference", "ours"), pair(LARGE, "cuda"), strict=True):
        seq, retrieved = random_batch(LARGE, b)
        step, found = stepper(model, [(seq, retrieved)], True), []
        for i in range(steps):
            generator = torch.Generator().manual_seed(i)
            first = torch.randint(1000, 2000, (b, 1), generator=generator)
            torch.cuda.synchronize()  # the last step has read its batch
            seq.copy_(1000 + (first + torch.arange(seq.shape[1]) ** 2 // 7) % 1000)
            retrieved.copy_(torch.randint(1000, 2000, retrieved.shape, generator=generator))
            found.append(step())
        losses[name] = torch.stack(found).tolist()
        del model, step
        torch.cuda.empty_cache()
    gaps = [abs(x - y) for x, y in zip(*losses.values(), strict=True)]
    last = {name: statistics.mean(found[-20:]) for name, found in losses.items()}
    print(f"mean loss of the last 20 of {steps} steps: {last}; largest gap of a step {max(gaps):.4f}", flush=True)
    more = {"steps": steps, "batch": b, "last_20": last, "largest_gap": max(gaps), "losses": losses}
    write_results("training-curves", [], LARGE | {"precision": "bf16 autocast"}, **more)


def on_gpu() -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    equal = check_equal(LARGE, "cuda")
    print("equal:", equal, flush=True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    reference, ours = pair(LARGE, "cuda")
    ours.cpu()
    print("reference", flush=True)
    theirs = speeds(reference, LARGE, BATCHES)
    reference.cpu()
    del reference
    torch.cuda.empty_cache()
    ours.cuda()
    print("ours, without torch.compile", flush=True)
    eager = speeds(ours, LARGE, BATCHES[:1])
    if can_compile("cuda"):
        compile_in_place(ours.compilable)
    print("ours", flush=True)
    mine = speeds(ours, LARGE, COMPILED_BATCHES)
    documents = on_documents(ours, LARGE, COMPILED_BATCHES[0])
    del ours
    torch.cuda.empty_cache()

    best, their_best = (max(found, key=lambda b: found[b]["tokens_per_second"]) for found in (mine, theirs))
    flops = flops_per_token(RETRO(**LARGE), n=LARGE["max_seq_len"], k=K)
    peak = bf16_peak()
    per_sequence = mine[best]["gigabytes"] / best, theirs[their_best]["gigabytes"] / their_best
    rate = mine[best]["tokens_per_second"]
    row = Comparison(
        "training step, GPU, each at its best batch", "tokens/s", rate, theirs[their_best]["tokens_per_second"], 5.5,
        equal, mine[best]["runs"], theirs[their_best]["runs"],
    )  # fmt: skip
    remarks = [f"Memory for a sequence: {per_sequence[0]:.2f} GB against {per_sequence[1]:.2f} GB (target: half)."]
    if peak:
        share, theirs_share = (100 * x * flops / peak for x in (rate, row.peer))
        remarks.append(f"Model FLOP utilisation: {share:.1f} % against {theirs_share:.1f} % (target: 45 %).")
    share, rate = documents["share"], documents["tokens_per_second"]
    against = rate / share / mine[documents["batch"]]["tokens_per_second"]
    remarks.append(
        f"On the speeches, where {share:.0%} of the positions hold text, {rate:,.0f} tokens/s of text: {against:.2f} "
        f"times that share of the rate without padding at the same batch (target: 0.9)."
    )
    print(*remarks, sep="\n", flush=True)
    write_results(
        "training", [row], LARGE | {"precision": "bf16 autocast"}, remarks=remarks, flops_per_token=flops,
        bf16_peak=peak, batches={"ours": mine, "eager": eager, "reference": theirs}, documents=documents,
    )  # fmt: skip


def profile() -> None:
    """Where the time of our step goes: the dearest kernels."""
    _, ours = pair(LARGE, "cuda")
    if can_compile("cuda"):
        compile_in_place(ours.compilable)
    step = stepper(ours, [random_batch(LARGE, 32)], True)
    for _ in range(3):
        step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        for _ in range(3):
            step()
        torch.cuda.synchronize()
    for event in sorted(trace.key_averages(), key=lambda e: -e.self_device_time_total)[:90]:
        print(f"{event.self_device_time_total / 3e3:8.3f} ms {event.count // 3:5} × {event.key[:110]}")


if __name__ == "__main__":
    if sys.argv[1:]:
        {"profile": profile, "curves": curves}[sys.argv[1]]()
    else:
        on_gpu() if torch.cuda.is_available() else on_cpu()
