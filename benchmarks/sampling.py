"""Sampling token by token beside the reference: `python benchmarks/sampling.py` (on a GPU if there is one).

The reference samples with its own `TrainingWrapper.generate`. Both sides have the same weights, filter by top-k,
draw with Gumbel noise, and take the neighbours of a chunk from the same table: what BERT and the index cost is in
neither. Checked first: the logits that ours draws from are at every position those of the reference with its
query positions put right. `python benchmarks/sampling.py profile` lists the kernels of a token on a GPU.
"""

import contextlib
import io
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from unittest.mock import patch

import torch
from measure import Comparison, compare, synchronize, timed, write_results
from peer import import_reference
from torch import Tensor, nn
from training import LARGE, corrected_reference, pair

from retro_nb import RETRO, generate, gumbel_sample, top_k
from retro_nb.model import cuda_graphs, transformer

CLS, SEP, V, M, K = 101, 102, 30522, 64, 2
SMALL = dict(
    num_tokens=V, max_seq_len=1024, enc_dim=256, enc_depth=2, dec_dim=256, dec_depth=4,
    dec_cross_attn_layers=(2, 4), heads=8, dim_head=32,
)  # fmt: skip
EARLY, LATE = range(40, 73), range(480, 513)  # positions whose cost is compared

Fetch = Callable[[Tensor], Tensor]  # (b, m) tokens of a chunk -> (b, k, r)


class Host(nn.Module):
    """What the reference's `generate` asks of its wrapper, without an index."""

    def __init__(self, retro: nn.Module, fetch: Fetch):
        super().__init__()
        self.retro, self.fetch_knn_chunks_fn, self.chunk_size = retro, fetch, M
        self.max_seq_len = retro.seq_len

    def write(self, start: Tensor, tokens: int) -> Tensor:
        """`start` and so many tokens more."""
        self.max_seq_len = start.shape[1] + tokens - 1  # it writes one more than it says
        with contextlib.redirect_stdout(io.StringIO()):
            return import_reference().TrainingWrapper.generate(self, start=start)


def models(config: dict, device: str) -> tuple[nn.Module, RETRO, Fetch]:
    """The reference and ours with the same weights, which never end a text; and neighbours for any chunk."""
    reference, ours = pair(config, device)
    with torch.no_grad():
        for model in (reference, ours):
            model.eval().to_logits.bias[SEP] = -100
    table = torch.randint(1000, V, (997, K, 2 * M), generator=torch.Generator().manual_seed(0)).to(device)
    return reference, ours, lambda chunk: table[chunk.sum(dim=-1) % len(table)]


def write(model: RETRO, fetch: Fetch, tokens: int, b: int = 1, **options) -> Tensor:
    start = torch.full((b, 1), CLS)
    return generate(model, start, lambda chunk, u: fetch(chunk), max_new_tokens=tokens, **options)


@contextlib.contextmanager
def without_graphs() -> Iterator[None]:
    with patch.object(transformer, "can_record", lambda x: False):
        yield


@torch.inference_mode()
def check_equal(reference: nn.Module, ours: RETRO, fetch: Fetch, tokens: int) -> str:
    """The logits of every step against the reference's and our own forward on the whole text, in float32."""
    drawn_from = []

    def watch(logits: Tensor, thres: float) -> Tensor:
        drawn_from.append(logits.clone())
        return top_k(logits, thres)

    text = write(ours, fetch, tokens, filter_fn=watch)[:, :-1]
    near = torch.stack([fetch(text[:, u * M : (u + 1) * M]) for u in range(tokens // M)], dim=1)
    logits = torch.stack(drawn_from, dim=1)
    with corrected_reference():
        apart = (reference(text, retrieved=near) - logits).abs().max().item()
    uncached = (ours(text, near) - logits).abs().max().item()
    assert text.shape[1] == tokens and max(apart, uncached) < 1e-3, (text.shape, apart, uncached)
    print(f"{len(text.unique())} different tokens; logits spread {logits.std().item():.2f}", flush=True)
    return f"logits of all {tokens} steps within {apart:.0e} (reference corrected), {uncached:.0e} of ours uncached"


def greedy_texts(ours: RETRO, fetch: Fetch, tokens: int) -> dict[str, int]:
    """How many greedy tokens are the same with and without CUDA graphs, and as the uncached forward chooses."""
    text = write(ours, fetch, tokens, temperature=0)
    with without_graphs():
        eager = write(ours, fetch, tokens, temperature=0)
    near = torch.stack([fetch(text[:, u * M : (u + 1) * M]) for u in range(tokens // M)], dim=1)
    with torch.inference_mode():
        whole = ours(text[:, :-1], near).argmax(dim=-1)
    same = {"eager": (text == eager)[:, 1:], "uncached": text[:, 1:] == whole}
    return {"tokens": tokens} | {name: int(each.sum()) for name, each in same.items()}


def cost_by_position(ours: RETRO, fetch: Fetch, repeats: int = 3) -> dict[str, float]:
    """Milliseconds a token early and late in a text, without the tokens before which a chunk ends."""
    runs = []
    for _ in range(repeats):
        clock = [time.perf_counter()]

        def tick(position: int, tokens: Tensor, clock: list[float] = clock) -> None:
            synchronize()
            clock.append(time.perf_counter())

        write(ours, fetch, LATE.stop - 1, on_token=tick)
        runs.append(clock)
    early, late = (
        1000 * statistics.median(run[p] - run[p - 1] for run in runs for p in places if p % M)
        for places in (EARLY, LATE)
    )
    print(f"a token costs {early:.2f} ms at 40–72 and {late:.2f} ms at 480–512: {late / early:.2f} times", flush=True)
    return {"early_ms": early, "late_ms": late, "ratio": late / early, "target": 1.2}


def on_cpu(tokens: int = 256) -> None:
    reference, ours, fetch = models(SMALL, "cpu")
    equal = check_equal(reference, ours, fetch, tokens)
    start, host = torch.full((1, 1), CLS), Host(reference, fetch)
    row = compare(
        f"sampling, CPU, {tokens} tokens", "tokens/s", lambda: write(ours, fetch, tokens),
        lambda: host.write(start, tokens), amount=tokens, target=10, equal=equal,
    )  # fmt: skip
    cost = cost_by_position(ours, fetch)
    write_results("sampling", [row], SMALL, cost_by_position=cost, remarks=[flat(cost)])


def flat(cost: dict[str, float]) -> str:
    return (
        f"The sampled tokens 480–512 cost {cost['ratio']:.2f} times as much as the tokens 40–72 (target: at most "
        f"{cost['target']}), medians without the tokens at which a chunk ends."
    )


def in_windows(host: Host, text: Tensor, tokens: int, window: int = 8) -> int:
    """Let the reference write `window` tokens in the middle of every 64: on average they cost what all cost."""
    starts = range(M // 2 - window // 2, tokens, M)
    for start in starts:
        host.write(text[:, :start], window)
    return len(starts) * window


def on_gpu(tokens: int = 512) -> None:
    reference, ours, fetch = models(LARGE, "cuda")
    torch.set_float32_matmul_precision("highest")
    equal = check_equal(reference, ours, fetch, tokens)
    print("equal:", equal, flush=True)
    greedy = greedy_texts(ours, fetch, tokens)
    print("the same greedy tokens:", greedy, flush=True)

    torch.set_float32_matmul_precision("high")  # tf32, which serves the reference best
    rows, host = [], Host(reference, fetch)
    for b, target in ((1, 20), (16, 30), (64, 30)):
        text = write(ours, fetch, tokens, b)
        rows.append(compare(
            f"sampling, GPU, batch {b}, {tokens} tokens", "tokens/s",
            lambda b=b: write(ours, fetch, tokens, b), lambda text=text: in_windows(host, text, tokens),
            amount=b * tokens, peer_amount=b * in_windows(host, text, tokens), target=target, equal=equal,
        ))  # fmt: skip
    whole = tokens / timed(lambda: host.write(torch.full((1, 1), CLS, device="cuda"), tokens))
    print(f"the reference over all {tokens} tokens: {whole:.1f} tokens/s", flush=True)
    with without_graphs():
        eager = [tokens / timed(lambda: write(ours, fetch, tokens)) for _ in range(3)][1:]
    more = {
        "cost_by_position": cost_by_position(ours, fetch), "greedy": greedy, "parts": parts(ours, fetch, tokens),
        "reference_whole_text": whole, "without_graphs": eager,
        "batch_16_against_reference_alone": rows[1].ours / rows[0].peer,
    }  # fmt: skip
    print(more, flush=True)
    write_results("sampling", rows, LARGE | {"precision": "float32 with tf32"}, **more, remarks=remarks(rows, more))


def remarks(rows: list[Comparison], more: dict) -> list[str]:
    return [
        flat(more["cost_by_position"]),
        f"Sixteen texts at once are {more['batch_16_against_reference_alone']:.0f} times the reference's tokens a "
        "second at batch 1.",
        "The reference was timed on 8 tokens in the middle of every 64; over a whole text it makes "
        f"{more['reference_whole_text']:.1f} tokens/s at batch 1.",
    ]


@torch.inference_mode()
def parts(ours: RETRO, fetch: Fetch, tokens: int, repeats: int = 200) -> dict[str, float]:
    """Milliseconds of what a token is made of, at batch 1, and of making a recording."""
    recordings, record = [], cuda_graphs.record

    def watch(*args):
        started = time.perf_counter()
        out = record(*args)
        recordings.append(1000 * (time.perf_counter() - started))
        return out

    token = torch.full((1, 1), CLS, device="cuda")
    state = ours.start_decoding(1, capacity=tokens + 1)
    with patch.object(cuda_graphs, "record", watch):
        for position in range(M + 6):
            near = fetch(token.expand(1, M)) if (position + 1) % M == 0 else None
            logits = ours.decode(token, state, near)

    def again(position: int, near: Tensor | None) -> None:
        state.length = position
        ours.decode(token, state, near)

    near, found = fetch(token.expand(1, M)), {}
    functions = {
        "replay": state.recording.replay or (lambda: None),
        "decode": lambda: again(M + 5, None),
        "decode_where_a_chunk_ends": lambda: again(2 * M - 1, near),
        "filter_and_draw": lambda: gumbel_sample(top_k(logits[:, -1])),
    }
    for name, function in functions.items():
        function()
        found[name] = 1000 / repeats * timed(lambda function=function: [function() for _ in range(repeats)])
    return found | {"recording": recordings}


@torch.inference_mode()
def profile(repeats: int = 20) -> None:
    """The kernels of a token, with their milliseconds and how often each runs."""
    _, ours, fetch = models(LARGE, "cuda")
    for b in (1, 16):
        token, state = torch.full((b, 1), CLS, device="cuda"), ours.start_decoding(b, capacity=513)
        for position in range(M + 6):
            near = fetch(token.expand(b, M)) if (position + 1) % M == 0 else None
            logits = ours.decode(token, state, near)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
            for _ in range(repeats):
                state.length = M + 5
                logits = ours.decode(token, state)
                gumbel_sample(top_k(logits[:, -1]))
            torch.cuda.synchronize()
        events = sorted(trace.key_averages(), key=lambda event: -event.self_device_time_total)
        total = sum(event.self_device_time_total for event in events) / repeats / 1000
        count = sum(event.count for event in events) // repeats
        print(f"batch {b}: {total:.3f} ms in {count} kernels")
        for event in events[:40]:
            spent = event.self_device_time_total / repeats / 1000
            print(f"{spent:8.4f} ms {event.count // repeats:5} × {event.key[:110]}")


if __name__ == "__main__":
    if "profile" in sys.argv:
        profile()
    else:
        on_gpu() if torch.cuda.is_available() else on_cpu()
