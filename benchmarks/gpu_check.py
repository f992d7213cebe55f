"""Does this GPU compute what it should? `python benchmarks/gpu_check.py`, about 6 minutes on one H200.

    attention    gradients of every attention of the model against float64, also where all scores are near -120
    equations    the loss of real documents with padding: eager = compiled = the paper's equations in float64 loops
    sampling     logits of single tokens, by Triton kernels and CUDA graphs, against whole sequences
    embedding    BERT's vectors in bfloat16 against those of the CPU in float32
    resume       a run that was stopped goes on with the losses of one that was not
    training     3,000 steps on real documents without a number that is not finite

Without a GPU it says so and checks nothing. The results, with versions, lie in benchmarks/results/gpu_check.json;
the exit code is 1 if a check fails. Names of checks run these alone.
"""

import argparse
import contextlib
import copy
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from embedding import float32_vectors
from measure import COMMAND, RESULTS, where
from torch import Tensor
from torch.utils.data import Subset

from retro_nb import RETRO, RETRODataset, fit, speeches
from retro_nb.common.arrays import open_array, write_json
from retro_nb.common.devices import attention_kernels, best_dtype, compile_in_place
from retro_nb.model.base import ChunkedLM
from retro_nb.store.settings import StoreSettings
from retro_nb.store.store import Store
from retro_nb.text.tokens import bert_folder
from retro_nb.training.log import History

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # the paper's equations, written out

HEAD_SIZES = (32, 64, 128)
NORMS = {32: "plain", 64: "gated", 128: "plain"}  # which norms the models with these head sizes have
M, K = 64, 2


@dataclass
class Bench:
    """What the checks share: where they compute, a store of real documents, and how much they do."""

    device: torch.device
    folder: Path
    max_chars: int | None = None  # of each speech
    batch_size: int = 8
    n: int = 1024
    steps: int = 3000
    model: tuple[tuple[str, Any], ...] = (
        ("enc_dim", 512), ("enc_depth", 2), ("dec_dim", 512), ("dec_depth", 8), ("dec_cross_attn_layers", (3, 6)),
        ("heads", 8), ("dim_head", 64),
    )  # fmt: skip

    def store(self) -> RETRODataset:
        """Sequences of the speeches with their neighbours; built at the first call."""
        corpus, settings = speeches(max_chars=self.max_chars), StoreSettings(chunk_size=M, seq_len=self.n, knn=K)
        return Store.build(corpus, self.folder / "store", settings, progress=False).dataset()

    def retro(self, **changes: Any) -> RETRO:
        torch.manual_seed(0)
        config = dict(self.model) | {"absolute_positions": False, "tied_output": True, "max_seq_len": self.n}
        return RETRO(**config | changes)

    def fit(self, retro: RETRO, data: Any, valid: Any = None, **options: Any) -> History:
        return fit(retro, data, valid, batch_size=self.batch_size, progress=False, **options)


def relative(found: Tensor, expected: Tensor) -> float:
    """Distance from what is expected, as a share of its length."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def gradients(model: ChunkedLM) -> Tensor:
    return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])


# the checks: each returns what it measured, and raises AssertionError where that is wrong


def attention(bench: Bench) -> dict[str, Any]:
    """Each attention of the model at scores near −120, 0 and 120, its gradients against float64."""
    shapes = {  # queries, keys, causal, masked
        "self-attention": (512, 512, True, False),
        "self-attention of 5½ tiles": (704, 704, True, False),
        "encoder, self": (2 * M, 2 * M, False, True),
        "encoder, chunk": (K * 2 * M, M, False, False),
        "chunked cross-attention": (M, K * 2 * M + 1, False, True),
    }
    worst = {}
    for name, (queries, keys, causal, masked) in shapes.items():
        kinds = [(size, score) for size in HEAD_SIZES for score in (-120, 0, 120)]
        worst[name] = max(_attention_error(bench, queries, keys, causal, masked, *kind) for kind in kinds)
    assert max(worst.values()) < 0.02, worst  # bfloat16 rounds by 0.004; NaN is not below
    return worst


def _attention_error(bench: Bench, queries: int, keys: int, causal: bool, masked: bool, size: int, score: int) -> float:
    """The largest relative error of the gradients; inf where they are not finite."""
    generator = torch.Generator().manual_seed(0)
    rows = [0.3 * torch.randn(4, 2, n, size, generator=generator) for n in (queries, keys, keys, queries)]
    q, k, v, upstream = (each.bfloat16().to(bench.device) for each in rows)
    q[..., 0], k[..., 0] = 1, score * size**0.5
    mask = None
    if masked:
        mask = torch.rand(4, 1, 1, keys, generator=generator) > 0.3
        mask[..., 0] = True
        mask = mask.to(bench.device)
    found = []
    for dtype, kernels in ((torch.bfloat16, attention_kernels(queries, keys)), (torch.float64, attention_kernels())):
        inputs = [each.to(dtype).detach().requires_grad_() for each in (q, k, v)]
        with kernels:
            out = F.scaled_dot_product_attention(*inputs, attn_mask=mask, is_causal=causal)
        out.backward(upstream.to(dtype))
        # The first feature of the queries' gradient is score times the sum of numbers that cancel: left out.
        found.append([each.grad[..., 1:] for each in inputs])
    if not all(each.isfinite().all() for each in found[0]):
        return float("inf")
    return max(relative(*pair) for pair in zip(*found, strict=True))


def equations(bench: Bench) -> dict[str, Any]:
    """Losses and gradients for real documents with padding, head sizes 32, 64, 128, norms with a gate and without."""
    data, found = bench.store(), {}
    batches = [_padded(data, sequences) for sequences in ((0, 1, 2, 3), (4, 5, 6, 7))]
    for size, norms in NORMS.items():
        retro = bench.retro(
            enc_dim=64, enc_depth=1, dec_dim=64, dec_depth=1, dec_cross_attn_layers=(1,), heads=2, dim_head=size,
            gated_rmsnorm=norms == "gated", max_seq_len=4 * M,
        )  # fmt: skip
        found[f"head size {size}, {norms} norms"] = _ways(bench, retro, batches)
    for name, each in found.items():
        assert each["compiled, float32"] < 1e-4 and each["float64 loops"] < 1e-5, (name, each)
        assert each["compiled, bfloat16"] < 1.5 * each["eager, bfloat16"] + 1e-3, (name, each)
    return found


def _padded(data: RETRODataset, sequences: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Four chunks of each sequence, of which the later ones end early and lack their last neighbours."""
    seq, retrieved = map(torch.stack, zip(*data.__getitems__(sequences), strict=True))
    seq, retrieved = seq[:, : 4 * M + 1], retrieved[:, :4]
    for row, chunks in enumerate((4, 2, 1, 3)):
        seq[row, chunks * M + 1 :], retrieved[row, chunks:] = data.pad_id, data.pad_id
    return seq, retrieved


def _ways(bench: Bench, retro: RETRO, batches: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Distances of gradients from those of eager float32 on the device, and of its logits from the float64 loops."""
    retro = retro.to(bench.device)
    compiled = copy.deepcopy(retro)
    compile_in_place(compiled.compilable)
    found: dict[str, float] = {}
    for seq, retrieved in batches:
        exact = _step(bench, retro, seq, retrieved, bf16=False)[1]
        for name, model, bf16 in (
            ("compiled, float32", compiled, False),
            ("eager, bfloat16", retro, True),
            ("compiled, bfloat16", compiled, True),
        ):
            error = relative(_step(bench, model, seq, retrieved, bf16)[1], exact)
            found[name] = max(found.get(name, 0), error)
    return found | {"float64 loops": _from_the_paper(retro, *batches[0])}


def _step(bench: Bench, model: RETRO, seq: Tensor, retrieved: Tensor, bf16: bool) -> tuple[float, Tensor]:
    model.zero_grad()
    with torch.autocast(bench.device.type, torch.bfloat16, enabled=bf16):
        loss = model(seq, retrieved, return_loss=True)
    loss.backward()
    return loss.item(), gradients(model)


def _from_the_paper(retro: RETRO, seq: Tensor, retrieved: Tensor) -> float:
    """Distance of the logits of a chunk, and of 16 tokens that read its neighbours, from the paper's equations."""
    from paper_equations import retro_logits

    seq, retrieved = seq[:1, : M + 16], retrieved[:1, :1]
    expected = retro_logits(copy.deepcopy(retro).cpu().double(), seq[0], retrieved[0])
    with torch.no_grad():
        return relative(retro(seq, retrieved)[0].cpu(), expected)


@torch.inference_mode()
def sampling(bench: Bench) -> dict[str, Any]:
    """Logits of every token that is fed alone, for 1, 16 and 64 texts, against those of whole sequences."""
    data, found = bench.store(), {}
    retro = bench.retro().to(bench.device).eval()
    for b in (1, 16, 64):
        seq, retrieved = map(torch.stack, zip(*data.__getitems__(range(b)), strict=True))
        seq, retrieved = seq[:, : 3 * M + 8].to(bench.device), retrieved[:, :3].to(bench.device)
        whole = retro(seq, retrieved)
        state, logits = retro.start_decoding(b, capacity=seq.shape[1]), []
        for position in range(seq.shape[1]):
            near = retrieved[:, position // M] if (position + 1) % M == 0 else None
            logits.append(retro.decode(seq[:, position : position + 1], state, near).clone())
        found[f"{b} texts"] = relative(torch.cat(logits, dim=1), whole)
    assert max(found.values()) < 1e-4, found
    return found


def embedding(bench: Bench) -> dict[str, Any]:
    """The lowest cosine of a chunk's vector to the CPU's in float32."""
    bench.store()
    chunks, vectors = (open_array(bench.folder / "store" / f"{name}.npy") for name in ("chunks", "chunks.embedded"))
    some = np.linspace(0, len(chunks) - 1, min(512, len(chunks)), dtype=int)
    exact = float32_vectors(Path(bert_folder()), np.array(chunks[some], np.int32), "cpu")
    cosine = F.cosine_similarity(torch.from_numpy(np.array(vectors[some])), exact)
    assert cosine.min() > 0.999, cosine.min()
    return {"chunks": len(some), "lowest cosine": cosine.min().item(), "type": str(best_dtype(bench.device))}


def resume(bench: Bench) -> dict[str, Any]:
    """The largest difference of a loss between a run that was stopped in its middle and one that was not.

    Some gradients are summed in another order each time, and training makes much of little: only the first steps
    after the stop are compared.
    """
    data, runs = bench.store(), []
    options = dict(steps=24, lr=3e-4, eval_every=22, checkpoint_every=20, log_every=1, compile=False)

    def stop() -> dict[str, float]:
        raise InterruptedError

    runs.append(bench.fit(bench.retro(), data, **options).losses)
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.suppress(InterruptedError):
            bench.fit(bench.retro(), data, Subset(data, range(4)), measure=stop, out_dir=folder, **options)
        runs.append(bench.fit(bench.retro(), data, out_dir=folder, **options).losses)
    apart = max(abs(x - y) for x, y in zip(*runs, strict=True))
    assert len(runs[0]) == 24 and apart < 0.01, apart
    return {"steps": 24, "stopped after": 22, "resumed from": 20, "largest difference in nats": apart}


def training(bench: Bench) -> dict[str, Any]:
    """A run at a high learning rate: no number may fail to be finite, no step may be left out."""
    data, retro = bench.store(), bench.retro()
    history = bench.fit(retro, data, steps=bench.steps, lr=1e-3, log_every=50)
    last = np.mean(history.losses[-100:])
    assert all(weight.isfinite().all() for weight in retro.parameters())
    assert all(record.get("skipped", 0) == 0 for record in history)
    assert np.isfinite(history.losses).all() and last < history.losses[0] / 2, last
    return {
        "steps": len(history), "parameters": retro.num_parameters(), "first loss": history.losses[0],
        "mean of the last 100": float(last), "tokens": history[-1]["tokens"], "seconds": history[-1]["seconds"],
    }  # fmt: skip


CHECKS: tuple[Callable[[Bench], dict[str, Any]], ...] = (
    attention, equations, sampling, embedding, resume, training,
)  # fmt: skip


def run(bench: Bench, checks: tuple[Callable[[Bench], dict[str, Any]], ...] = CHECKS) -> dict[str, dict[str, Any]]:
    """Each check's outcome: whether it passed, its seconds, and what it measured or how it failed."""
    outcomes = {}
    for check in checks:
        print(f"— {check.__name__}", flush=True)
        started = time.perf_counter()
        try:
            outcome = {"passed": True, "measured": check(bench)}
        except Exception:  # whatever fails, the other checks are made
            outcome = {"passed": False, "error": traceback.format_exc(limit=-3)}
        torch._dynamo.reset()
        outcomes[check.__name__] = outcome | {"seconds": round(time.perf_counter() - started, 1)}
        print(outcomes[check.__name__], flush=True)
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = {check.__name__: check for check in CHECKS}
    parser.add_argument("checks", nargs="*", help=f"some of {', '.join(names)}; all if none is named")
    arguments = parser.parse_args()
    if unknown := set(arguments.checks) - set(names):
        parser.error(f"no check {', '.join(sorted(unknown))}: choose from {', '.join(names)}")
    if not torch.cuda.is_available():
        sys.exit(f"no GPU here, so nothing was checked. With one it checks {', '.join(names)}.")
    torch.set_float32_matmul_precision("highest")
    chosen = tuple(names[name] for name in arguments.checks) or CHECKS
    with tempfile.TemporaryDirectory() as folder:
        outcomes = run(Bench(torch.device("cuda"), Path(folder)), chosen)
    passed = all(outcome["passed"] for outcome in outcomes.values())
    if chosen == CHECKS:
        write_json(RESULTS / "gpu_check.json", {"command": COMMAND, **where(), "passed": passed, "checks": outcomes})
    print("passed" if passed else "FAILED", *outcomes)
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
