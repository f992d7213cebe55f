"""Sampling from RETRO token by token, with new neighbours at the end of every chunk (notebook 06).

Shapes: b batch, n sequence length, m chunk length, l chunks, k neighbours, r retrieved tokens per neighbour,
v vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retro_nb.model.base import ChunkedLM, check_ids, check_model, evaluating
from retro_nb.model.cuda_graphs import Recording, can_record
from retro_nb.text.tokens import EOS_ID

FetchNeighbours = Callable[[Tensor, int], Tensor]  # (b, m) tokens of a chunk, its number -> (b, k, r)
OnToken = Callable[[int, Tensor], object]  # position, (b,) tokens
HOTTEST = 1e30  # highest temperature: its product with Gumbel noise (below 17) still fits float32
MEND = (
    "nothing can be drawn where a logit is NaN or ∞, or where all are −∞. Load a checkpoint whose weights are finite, "
    "compute in float32 if a smaller type overflows, or let the filter keep a token"
)


def top_k(logits: Float[Tensor, "*b v"], thres: float | int = 0.9) -> Float[Tensor, "*b v"]:
    """Keep the likeliest tokens; set the others to −inf.

    Args:
        logits: scores of the v tokens.
        thres: share of the vocabulary to filter out, 0 … 1. round((1 − thres) · v) tokens stay, at least one.
    """
    _check_share(thres)
    values, tokens = logits.topk(max(1, round((1 - thres) * logits.shape[-1])), sorted=False)
    return torch.full_like(logits, float("-inf")).scatter(-1, tokens, values)


def top_p(logits: Float[Tensor, "*b v"], thres: float | int = 0.9) -> Float[Tensor, "*b v"]:
    """Keep the smallest set of tokens whose probabilities sum to 1 − thres or more (nucleus sampling).

    Args:
        logits: scores of the v tokens.
        thres: share of the probability to filter out, 0 … 1: 0.1 keeps 90 % of it. At least one token stays.
    """
    _check_share(thres)
    if thres == 0:  # rounding must not drop the least likely tokens
        return logits
    values, tokens = logits.sort(descending=True, stable=True)
    probabilities = values.softmax(dim=-1)
    mass_before = probabilities.cumsum(dim=-1) - probabilities
    mass_before[..., 0] = -1  # the likeliest token always stays
    values = values.masked_fill(mass_before >= 1 - thres, float("-inf"))
    return torch.empty_like(logits).scatter(-1, tokens, values)


def _check_share(thres: float | int) -> None:
    if not 0 <= thres <= 1:
        raise ValueError(f"thres {thres} is the share to filter out: pass a number from 0 (nothing) to 1")


def gumbel_sample(
    t: Float[Tensor, "..."], temperature: float | int = 1.0, dim: int = -1, generator: torch.Generator | None = None
) -> Int[Tensor, "..."]:
    """Draw from softmax(t / temperature) along `dim`: the argmax after adding Gumbel noise.

    Temperature 0 is the plain argmax. `generator` (on t's device) makes the draw reproducible.

    Raises:
        ValueError: a temperature outside 0 … 1e30.
        FloatingPointError: on a CPU, a score is NaN or ∞, or all scores to choose from are −∞. A GPU would
            have to wait for this check and skips it; `generate` has its own.
    """
    _check_temperature(temperature)
    tokens, possible = draw(t, temperature, dim, _uniform(t, temperature, generator))
    if t.is_cpu and not possible.all():
        row = (~possible).nonzero()[0].tolist()
        raise FloatingPointError(f"the scores of row {row} of {list(possible.shape)} are not finite: {MEND}")
    return tokens


def _uniform(
    t: Float[Tensor, "*b v"], temperature: float | int, generator: torch.Generator | None
) -> Float[Tensor, "..."]:
    """Uniform random numbers in t's shape; a single one for greedy choice, which needs none."""
    return torch.rand(t.shape if temperature > 0 else (), generator=generator, device=t.device)


def draw(
    t: Float[Tensor, "..."], temperature: float | int, dim: int, uniform: Float[Tensor, "..."]
) -> tuple[Int[Tensor, "..."], Bool[Tensor, "..."]]:
    """The drawn tokens, and whether each draw was possible.

    If scores are NaN or ∞, argmax chooses one of them; if all are −∞, it must choose −∞. So the score of the drawn
    token reveals every fault, without another pass over all v scores.
    """
    noisy = t
    if temperature > 0:  # clamp avoids log 0; dividing by a temperature of 1e-40 would overflow
        noisy = t.float().sub(uniform.clamp(min=1e-30).log_().neg_().log_(), alpha=temperature)
    tokens = noisy.argmax(dim=dim, keepdim=True)
    return tokens.squeeze(dim), t.gather(dim, tokens).isfinite().squeeze(dim)


def _check_temperature(temperature: float | int) -> None:
    if not 0 <= temperature <= HOTTEST:
        raise ValueError(
            f"temperature {temperature} is not in 0 … {HOTTEST:g}: pass 0 for greedy, 1 to sample the model as it is"
        )


def generate(
    retro: ChunkedLM,
    prompt: Int[Tensor, "b _"],
    fetch_neighbours: FetchNeighbours | None = None,
    *,
    retrieved: Int[Tensor, "b l k r"] | None = None,
    prompt_lengths: Int[Tensor, " b"] | None = None,
    max_new_tokens: int | None = None,
    filter_fn: Callable[..., Tensor] = top_k,
    filter_thres: float | int = 0.9,
    temperature: float | int = 1.0,
    generator: torch.Generator | None = None,
    eos_id: int | None = None,
    on_token: OnToken | None = None,
) -> Int[Tensor, "b _"]:
    """Continue the prompts, one token at a time, in evaluation mode.

    Each row ends at the first `eos_id` that it generates, after max_new_tokens, or at the model's max_seq_len;
    the rest of the row is padding. Prompts stay unchanged, whatever they contain.

    Args:
        prompt: (b, p) with 1 ≤ p ≤ max_seq_len.
        fetch_neighbours: takes a completed chunk (b, m) and its number (from 0), returns its neighbours
            (b, k, r). Called once per chunk, if a token follows it. Rows that have ended hold padding there.
        retrieved: neighbours of the prompt's first l chunks, used unchanged. Chunks that neither this nor
            fetch_neighbours covers get all-padding neighbours. If both are None, the model reads nothing.
        prompt_lengths: (b,) lengths of the prompts, each padded at its end. Shorter rows already generate while
            longer prompts are still being read.
        max_new_tokens: limit per row, counted from the end of its prompt.
        filter_fn, filter_thres: top_k or top_p, and the share to filter out.
        temperature: 0 is greedy, 1 samples the model as it is.
        generator: draws noise for all rows at every step, so a row's text does not depend on when the
            others end. On a GPU it draws for up to 15 steps more than needed.
        eos_id: token that ends a text; by default that of the model's tokenizer, or BERT's [SEP] if it has none.
        on_token: called with each new position and its (b,) tokens.

    Returns:
        (b, n) tokens, prompts included; n is the length of the longest row.

    Raises:
        TypeError: the prompt, `retrieved` or neighbours are a list or an array instead of a tensor, or no whole
            numbers; or the model is in a wrapper such as DataParallel.
        ValueError: an empty prompt or one longer than max_seq_len, lengths outside the prompt, `retrieved`
            for chunks that the shortest prompt does not complete, a temperature outside 0 … 1e30.
        FloatingPointError: the logits of a row being generated hold NaN or ∞, or only −∞. On a GPU the error
            comes up to 15 tokens later, because the check runs together with that for ended rows.
    """
    _check_arguments(retro, prompt, retrieved, prompt_lengths)
    _check_temperature(temperature)
    if filter_fn in (top_k, top_p):
        _check_share(filter_thres)
    if eos_id is None:
        eos_id = EOS_ID if retro.tokenizer is None else retro.tokenizer.ids.eos
    prompt = prompt.to(retro.to_logits.weight.device)
    lengths, ends = _row_limits(retro, prompt, prompt_lengths, max_new_tokens)
    seq = _room(prompt, lengths, int(ends.max()), retro.pad_id)
    neighbours = _neighbours(retro, seq, fetch_neighbours, retrieved, shortest=int(lengths.min()))
    state = retro.start_decoding(len(seq), capacity=seq.shape[1], retrieval=neighbours is not None)
    rows = _Rows(seq, lengths, ends, torch.full_like(ends, seq.shape[1]), retro.pad_id, eos_id)
    choose = partial(rows.write, partial(filter_fn, thres=filter_thres), temperature)
    recording = Recording() if filter_fn in (top_k, top_p) else None
    positions, position, stop = torch.arange(seq.shape[1], device=seq.device), int(lengths.min()), seq.shape[1]
    patience = 1 if on_token is not None else _patience(retro, seq)

    with evaluating(retro), torch.inference_mode():
        while position < stop:
            for begin, end in retro.pieces(state.length, position):  # first the prompt, then single tokens
                chunk_ends = (begin + 1) % retro.chunk_size == 0
                found = neighbours(begin // retro.chunk_size) if neighbours and chunk_ends else None
                logits = retro.decode(seq[:, begin:end], state, found)[:, -1]

            inputs = logits, _uniform(logits, temperature, generator), positions[position : position + 1]
            recording.play(choose, *inputs) if recording and can_record(logits) else choose(*inputs)
            if position % patience == patience - 1:
                stop = rows.look()
            if on_token is not None:
                on_token(position, seq[:, position])
            position += 1
    return seq[:, : rows.look()]


@dataclass
class _Rows:
    """The rows being generated. All fields are updated in place, so that a GPU can replay `write`."""

    seq: Int[Tensor, "b n"]
    lengths: Int[Tensor, " b"]  # of the prompts
    ends: Int[Tensor, " b"]  # where each row ends, as known so far
    failed: Int[Tensor, " b"]  # where each row's logits were first not finite
    pad_id: int
    eos_id: int

    def write(
        self,
        filtered: Callable[[Tensor], Tensor],
        temperature: float | int,
        logits: Float[Tensor, "b v"],
        uniform: Float[Tensor, "*_"],
        position: Int[Tensor, " 1"],
    ) -> Int[Tensor, "b 1"]:
        """Draw tokens from the filtered logits and put them at `position`; return the tokens now there."""
        token, possible = draw(filtered(logits), temperature, -1, uniform)
        in_prompt, ended = position < self.lengths, self.ends <= position
        self.failed.copy_(self.failed.where(possible | in_prompt | ended, self.failed.minimum(position)))
        token = token.masked_fill(ended, self.pad_id)
        chosen = self.seq.index_select(1, position).where(
            rearrange(in_prompt, "b -> b 1"), rearrange(token, "b -> b 1")
        )
        self.seq.index_copy_(1, position, chosen)
        self.ends.copy_(self.ends.where(in_prompt | (token != self.eos_id), self.ends.minimum(position + 1)))
        return chosen

    def look(self) -> int:
        """Where the last row ends, as known so far. A GPU waits once for this and for the check of `failed`.

        Raises:
            FloatingPointError: a row's logits were not finite.
        """
        stop, where = torch.stack((self.ends.max(), self.failed.min())).tolist()
        if where < stop:
            row = int(self.failed.argmin())
            raise FloatingPointError(f"the logits of row {row} at position {where} are not finite: {MEND}")
        return stop


def left_pad(prompt: Int[Tensor, "b _"], chunk_size: int, pad_id: int) -> Int[Tensor, "b _"]:
    """Pad prompts on the left so that they end with a chunk.

    The first generated token then reads what was retrieved for the whole prompt, however short: the paper's recipe
    for answering questions (§4.3). Pass prompts of different lengths padded at their ends; the result aligns their
    ends. Use it with models that do not attend to padding before a text, such as those that `retrofit` makes.
    """
    prompt = F.pad(prompt, (-prompt.shape[1] % chunk_size, 0), value=pad_id)
    return prompt.gather(1, (prompt != pad_id).byte().argsort(dim=1, stable=True))  # padding first, else in order


def _check_arguments(retro: Any, prompt: Any, retrieved: Any, lengths: Any) -> None:
    """Reject another model, and what are no tensors of token ids; errors as in `generate`."""
    check_model(retro)
    check_ids("prompt", prompt, "b", "n")
    for name, rows, *axes in (("retrieved", retrieved, "b", "l", "k", "r"), ("prompt_lengths", lengths, "b")):
        if rows is None:
            continue
        check_ids(name, rows, *axes)
        if len(rows) != len(prompt):
            raise ValueError(f"{name} has {len(rows)} rows for {len(prompt)} prompts: pass one for each")


def _row_limits(
    retro: ChunkedLM, prompt: Int[Tensor, "b _"], lengths: Int[Tensor, " b"] | None, max_new_tokens: int | None
) -> tuple[Int[Tensor, " b"], Int[Tensor, " b"]]:
    """Length of each row's prompt, and the length at which the row ends at the latest."""
    b, p = prompt.shape
    if not b or not p:
        raise ValueError(f"the prompt has shape {(b, p)}: it needs one token at least, such as [CLS] (101)")
    if p > retro.seq_len:
        raise ValueError(f"the prompt holds {p} tokens, the model takes {retro.seq_len}: keep its last ones")
    if max_new_tokens is not None and max_new_tokens < 0:
        raise ValueError(f"max_new_tokens {max_new_tokens} is negative: pass 0 or more, or None for no limit")
    lengths = torch.full((b,), p, device=prompt.device) if lengths is None else lengths.to(prompt.device)
    if int(lengths.min()) < 1 or int(lengths.max()) > p:
        raise ValueError(f"prompt_lengths {lengths.tolist()} must lie in 1 … {p}, the width of the prompt")
    new = retro.seq_len if max_new_tokens is None else max_new_tokens
    return lengths, (lengths + new).clamp(max=retro.seq_len)


def _patience(retro: ChunkedLM, seq: Int[Tensor, "b n"]) -> int:
    """Number of tokens between checks whether all rows have ended; a check always precedes a fetch of neighbours.

    A check makes a GPU wait. Between checks, surplus padding may follow the rows; it is cut off at the end.
    """
    return 1 if seq.is_cpu else math.gcd(16, retro.chunk_size)


def _room(prompt: Int[Tensor, "b _"], lengths: Int[Tensor, " b"], n: int, pad_id: int) -> Int[Tensor, "b {n}"]:
    """Rows of n tokens: each prompt, then padding."""
    seq = F.pad(prompt.long(), (0, n - prompt.shape[1]), value=pad_id)  # a negative number crops
    positions = torch.arange(n, device=prompt.device)
    return seq.masked_fill(positions >= rearrange(lengths, "b -> b 1"), pad_id)


def _neighbours(
    retro: ChunkedLM,
    seq: Int[Tensor, "b n"],
    fetch: FetchNeighbours | None,
    given: Int[Tensor, "b l k r"] | None,
    shortest: int,
) -> Callable[[int], Tensor] | None:
    """Function from a chunk's number to its neighbours (b, k, r); None without retrieval."""
    if fetch is None and given is None:
        return None
    m, l = retro.chunk_size, 0 if given is None else given.shape[1]
    if l > shortest // m:
        raise ValueError(
            f"retrieved holds the neighbours of {l} chunks, but the shortest prompt ({shortest} tokens) "
            f"completes {shortest // m} of {m} tokens: pass retrieved[:, :{shortest // m}]"
        )

    def neighbours(u: int) -> Tensor:
        if given is not None and u < l:
            found = given[:, u]
        elif fetch is None:
            found = torch.full_like(seq[:, :1, None], retro.pad_id).expand(-1, 1, m)
        else:
            found = fetch(seq[:, u * m : (u + 1) * m], u)
        check_ids(f"the result of fetch_neighbours for chunk {u}", found, "b", "k", "r")
        if len(found) != len(seq) or not found.shape[1]:
            raise ValueError(
                f"the neighbours of chunk {u} have shape {tuple(found.shape)}: fetch_neighbours must return "
                f"(b, k, r) with b = {len(seq)} and k at least 1"
            )
        return found.to(seq.device)

    return neighbours
