"""Training RETRO: the optimizer, the order of the data, the loop (notebook 05).

`fit` is the loop that notebook 05 writes by hand, made safe for long runs: gradient accumulation, several
processes, bfloat16, a log, checkpoints and an exact resume. It rests on two decisions.

- *The data is one endless stream*: epoch after epoch of shuffled sequences. A step is a position in it, so a
  resumed run only needs its step number.
- *A step's loss is the mean over its tokens*: micro-batches and processes are weighted by their tokens, so
  splitting a batch changes neither the loss nor the gradient.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from itertools import count, islice
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object, set_seed
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from retro_nb.common.arrays import PathLike, to_jsonable
from retro_nb.common.devices import can_compile, compile_in_place, few_cpu_threads, send
from retro_nb.common.launch import Interrupted
from retro_nb.model.base import ChunkedLM, evaluating
from retro_nb.model.pretrained import not_finite
from retro_nb.training.checkpoints import Checkpoints, interrupt_between_steps
from retro_nb.training.log import History, Log, Skipped
from retro_nb.training.runs import FREE_SETTINGS, check_data, length, only_run, resolve_settings

MOST_SKIPPED = 10  # consecutive steps with non-finite numbers that end a run


def get_optimizer(
    params: Iterable[nn.Parameter], lr: float = 3e-4, wd: float = 1e-1, filter_by_requires_grad: bool = False
) -> AdamW:
    """AdamW with weight decay on all parameters but vectors: biases and norm gains (1-D) are not decayed.

    Parameters keep the order of `params` within the two groups; a tied one counts once. Checkpoints identify
    moments by position, so an order that varied between processes would resume with the wrong moments.
    `filter_by_requires_grad` leaves out frozen parameters.
    """
    kept = [param for param in dict.fromkeys(params) if param.requires_grad or not filter_by_requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [param for param in kept if param.ndim >= 2]},
        {"params": [param for param in kept if param.ndim < 2], "weight_decay": 0.0},
    ]
    fused = bool(kept) and all(param.device.type in ("cpu", "cuda") for param in kept)
    return AdamW(groups, lr=lr, weight_decay=wd, fused=fused or None)  # fused, it can skip a step (`skip_step`)


def skip_step(optimizer: AdamW, skip: Bool[Tensor, ""]) -> None:
    """If `skip`, make the optimizer's next step change nothing: no weights, no moments, no step count.

    The device decides, so the CPU does not wait for it: the fused AdamW reads the flag that torch's GradScaler sets.
    """
    optimizer.found_inf = skip.float()  # type: ignore[attr-defined]  # torch itself sets it from outside


def learning_rate(step: int, *, steps: int, lr: float = 3e-4, warmup_steps: int = 0) -> float:
    """Learning rate of optimizer step `step`, counted from 1 to `steps` (paper, appendix C.1).

    It rises linearly from 1e-7 at step 0 to `lr` at step `warmup_steps`, then falls along half a cosine to a tenth of
    `lr` at the last step.
    """
    if step < warmup_steps:
        first = min(1e-7, lr)
        return first + (lr - first) * step / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return lr * (0.1 + 0.9 * (1 + math.cos(math.pi * min(1.0, progress))) / 2)


class ShuffledBatches(Sampler[list[int]]):
    """Endless batches of sequence numbers, for a DataLoader's `batch_sampler`.

    Every epoch holds each of `length` sequences once, in an order drawn from (seed, epoch). A batch may span
    the end of one epoch and the start of the next, so all batches are full. `start` skips that many batches
    at no cost. With `share` (p, q), process p of q gets every q-th sequence of each batch.
    """

    def __init__(
        self, length: int, batch_size: int, seed: int = 0, *, start: int = 0, share: tuple[int, int] = (0, 1)
    ) -> None:
        if length < 1 or batch_size < share[1]:
            raise ValueError(f"{length} sequences in batches of {batch_size}: too few for {share[1]} process(es)")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.start, self.share = start, share

    def __iter__(self) -> Iterator[list[int]]:
        epoch, skip = divmod(self.start * self.batch_size, self.length)
        batch: list[int] = []
        while True:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.length)
            for number in order[skip:].tolist():
                batch.append(number)
                if len(batch) == self.batch_size:
                    yield batch[self.share[0] :: self.share[1]]
                    batch = []
            epoch, skip = epoch + 1, 0


def _count_targets(retro: ChunkedLM, seq: Tensor) -> Tensor:
    return seq[:, 1:].ne(retro.pad_id).sum()


def _forward_loss(
    model: nn.Module, batch: Sequence[Tensor], device: torch.device, retrieval: bool, precision: str
) -> Tensor:
    seq, retrieved = batch[0], batch[1] if retrieval else None  # the model moves them to its device
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        return model(seq, retrieved, return_loss=True)


class _LossSum(NamedTuple):
    loss: float  # nats
    tokens: int  # number of tokens in the sum
    bad: list[int]  # sequences of batches with a non-finite loss


@torch.no_grad()
def _loss_sum(
    retro: ChunkedLM, data: Dataset, batch_size: int, retrieval: bool, precision: str, share: tuple[int, int] = (0, 1)
) -> _LossSum:
    """Summed cross-entropy over `data`; with `share` (p, q), over every q-th sequence starting at the p-th."""
    device, numbers = next(retro.parameters()).device, range(share[0], length(data), share[1])
    total, tokens = 0.0, 0
    bad: list[int] = []
    batches = DataLoader(Subset(data, numbers), batch_size, generator=torch.Generator())
    with evaluating(retro), torch.compiler.set_stance("force_eager"):  # faster than compiling again
        for first, batch in zip(count(step=batch_size), batches, strict=False):
            if targets := int(_count_targets(retro, batch[0])):
                loss = _forward_loss(retro, batch, device, retrieval, precision).item()
                total, tokens = total + loss * targets, tokens + targets
                bad += [] if math.isfinite(loss) else numbers[first : first + batch_size]
    return _LossSum(total, tokens, bad)


def _mean_loss(sums: list[_LossSum]) -> float:
    if bad := sorted(number for each in sums for number in each.bad):
        raise FloatingPointError(
            f"the loss is not finite on sequences {bad} of the dataset to evaluate on, or on some of them: look at "
            f"them, and at the model's weights"
        )
    if not (tokens := sum(each.tokens for each in sums)):
        raise ValueError("the dataset to evaluate on holds no token to predict: pass one with text in it")
    return sum(each.loss for each in sums) / tokens


def evaluate_loss(
    retro: ChunkedLM, dataset: Dataset, *, batch_size: int = 8, retrieval: str = "on", precision: str = "no"
) -> float:
    """Mean cross-entropy over all tokens of `dataset`, in nats per token, without dropout.

    `dataset` yields (seq (n+1,), retrieved (l, k, r)). Padding is not counted, and every token has the same weight
    in any batch. `retrieval="off"` drops the neighbours (the paper's RETRO[OFF]). The model keeps its device and
    its mode.

    Raises:
        ValueError: the dataset holds no token to predict, or `retrieval` is unknown.
        FloatingPointError: a loss is not finite; the message names the sequences.
    """
    if retrieval not in ("on", "off"):
        raise ValueError(f'retrieval {retrieval!r} is unknown: pass "on" or "off"')
    return _mean_loss([_loss_sum(retro, dataset, batch_size, retrieval == "on", precision)])


class _Trainer:
    """This process's model, optimizer and stream of batches in one run."""

    def __init__(self, accelerator: Accelerator, retro: ChunkedLM, run: dict[str, Any], train: Dataset) -> None:
        set_seed(run["seed"], device_specific=True)
        self.accelerator, self.retro, self.run, self.train = accelerator, retro, run, train
        self.was_training = retro.training
        retro.train().to(accelerator.device)
        optimizer = get_optimizer(retro.parameters(), run["lr"], run["wd"], filter_by_requires_grad=True)
        compile = run["compile"]
        if compile is None:
            compile = accelerator.device.type == "cuda" and can_compile("cuda")
        self.compiled = retro.compilable if compile else ()
        compile_in_place(self.compiled)
        self.model, self.optimizer = accelerator.prepare(retro, optimizer)

    def _sampler(self, done: int, share: tuple[int, int]) -> ShuffledBatches:
        run, start = self.run, done * self.run["accumulate"]
        return ShuffledBatches(length(self.train), run["batch_size"], run["seed"], start=start, share=share)

    def sequences(self, step: int) -> list[int]:
        """Numbers in `train` of the sequences that all processes read in a step."""
        batches = islice(self._sampler(step - 1, share=(0, 1)), self.run["accumulate"])
        return [number for batch in batches for number in batch]

    def stream(self, done: int) -> Iterator[list[Sequence[Tensor]]]:
        """Yield the micro-batches (seq, retrieved) of each step, starting at step `done` + 1."""
        sampler = self._sampler(done, (self.accelerator.process_index, self.accelerator.num_processes))
        # A separate generator keeps the loader from drawing on the global one, which dropout uses.
        options = {"generator": torch.Generator(), "pin_memory": self.accelerator.device.type == "cuda"}
        batches = iter(DataLoader(self.train, batch_sampler=sampler, num_workers=self.run["num_workers"], **options))
        while True:
            yield list(islice(batches, self.run["accumulate"]))

    def step(self, step: int, batches: list[Sequence[Tensor]]) -> tuple[float, Float[Tensor, "2"], Int[Tensor, ""]]:
        """Take one optimizer step; return (learning rate, loss and gradient norm, tokens) over all processes.

        Each micro-batch's mean loss is weighted by its share of the step's tokens. The factor `num_processes`
        undoes the averaging of gradients over processes. If loss or norm is not finite, no weight changes; all
        processes see the same numbers, so they agree.
        """
        accelerator, device, run = self.accelerator, self.accelerator.device, self.run
        counts = send(torch.stack([_count_targets(self.retro, batch[0]) for batch in batches]), device)
        tokens = accelerator.reduce(counts.sum())
        step_loss = torch.zeros((), device=device)
        for left, batch, targets in zip(reversed(range(len(batches))), batches, counts, strict=True):
            with accelerator.no_sync(self.model) if left else nullcontext():  # processes synchronize at the last
                loss = _forward_loss(self.model, batch, device, run["retrieval"], run["precision"])
                share = loss.float() * (targets / tokens.clamp(min=1))  # a batch may be all padding
                accelerator.backward(share * accelerator.num_processes)
            step_loss += share.detach()
        lr = learning_rate(step, steps=run["steps"], lr=run["lr"], warmup_steps=run["warmup_steps"])
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        grad_norm = accelerator.clip_grad_norm_(self.model.parameters(), run["grad_clip"])
        loss_and_norm = accelerator.reduce(torch.stack([step_loss, grad_norm.float() / accelerator.num_processes]))
        skip_step(self.optimizer.optimizer, ~loss_and_norm.isfinite().all())
        self.optimizer.step()
        self.optimizer.zero_grad()
        return lr, loss_and_norm, tokens

    def check_weights(self) -> None:
        """Reject a model with non-finite weights before training."""
        if names := not_finite(self.retro.named_parameters()):
            raise FloatingPointError(
                f"{len(names)} weights hold numbers that are not finite before the first step, {names[0]} first: make "
                f"or load the model again"
            )

    def check_skipped(self, skipped: list[Skipped], last_good: str) -> None:
        """Warn about skipped steps; end the run after MOST_SKIPPED in a row, or if every step was skipped."""
        most = min(MOST_SKIPPED, self.run["steps"])
        too_many = [each for each in skipped if each.in_a_row == most]
        if not skipped:
            return
        last = (too_many or skipped)[-1]
        about = f"step {last.step}: loss {last.loss}, gradient norm {last.grad_norm}, sequences "
        about += f"{self.sequences(last.step)} of train"
        if too_many:
            raise FloatingPointError(
                f"{most} steps in a row gave numbers that are not finite and changed no weight, up to {about}; "
                f"{last_good}. Look at these sequences. If they are sound, start over with a lower lr, a longer "
                f"warm-up or a smaller grad_clip (resume=False)"
            )
        if self.accelerator.is_main_process:
            warnings.warn(
                f"{len(skipped)} step(s) gave numbers that are not finite and changed no weight, the last {about}",
                stacklevel=4,
            )

    def evaluate(
        self, valid: Dataset, step: int, measure: Callable[[], dict[str, float]] | None
    ) -> dict[str, float | int]:
        """Compute `valid_loss`, each process on its share of the sequences, and add the numbers from `measure`."""
        run, accelerator = self.run, self.accelerator
        share = accelerator.process_index, accelerator.num_processes
        sums = _loss_sum(self.retro, valid, run["batch_size"], run["retrieval"], run["precision"], share)
        found = {"valid_loss": _mean_loss(gather_object([sums]))} | (measure() if measure is not None else {})
        for name, value in found.items():
            if not isinstance(value, Real):
                kind = type(value).__name__
                raise TypeError(f"after step {step}, measure gives {name} {value!r}, a {kind}: it must be a number")
            if not math.isfinite(value):
                raise FloatingPointError(f"after step {step}, measure gives {name} {value}: it must be finite")
        return to_jsonable(found)

    def close(self) -> None:
        """Hand back the trained model in its former mode."""
        self.retro.train(self.was_training).zero_grad()
        for module in self.compiled:
            module._compiled_call_impl = None  # torch has no public way to undo compiling
        self.retro.__dict__.pop("_is_accelerate_prepared", None)  # or a later `prepare` would do nothing
        self.accelerator.free_memory()


def _new_accelerator(retrieval: bool) -> Accelerator:
    AcceleratorState._reset_state()  # a notebook's earlier Accelerator may have had another precision
    # Without retrieval the encoder gets no gradient, which training on several processes does not expect.
    handler = DistributedDataParallelKwargs(find_unused_parameters=not retrieval, gradient_as_bucket_view=True)
    return Accelerator(mixed_precision="no", cpu=not torch.cuda.is_available(), kwargs_handlers=[handler])


def fit(
    retro: ChunkedLM,
    train: Dataset,
    valid: Dataset | None = None,
    *,
    steps: int | None = None,
    epochs: int | None = None,
    batch_size: int = 8,
    accumulate: int = 1,
    lr: float = 3e-4,
    wd: float = 0.1,
    warmup_steps: int | None = None,
    grad_clip: float = 1.0,
    precision: str | None = None,
    compile: bool | None = None,
    retrieval: bool = True,
    seed: int = 0,
    out_dir: PathLike | None = None,
    resume: bool = True,
    log_every: int = 10,
    eval_every: int = 100,
    checkpoint_every: int = 100,
    measure: Callable[[], dict[str, float]] | None = None,
    progress: bool = True,
    num_workers: int = 0,
) -> History:
    """Train `retro` in place on `train`, which yields (seq (n+1,), retrieved (l, k, r)); return the history.

    The model moves to Accelerate's device and stays there with the trained weights, in its former mode.
    Under `accelerate launch` the processes share each batch.

    Args:
        steps, epochs: optimizer steps, or passes over `train` rounded up to whole steps; pass one of them.
        batch_size, accumulate: sequences per micro-batch, over all processes, and micro-batches per step.
        lr, wd, warmup_steps: AdamW's peak learning rate and weight decay, and the warm-up of the schedule
            (`learning_rate`), by default a tenth of the steps, at most the paper's 750.
        grad_clip, precision: largest gradient norm (math.inf: no clipping); "no" or "bf16" (autocast), by default
            "bf16" on a GPU that supports it.
        compile: fuse the layers' kernels by torch.compile, which takes a minute at the start; by default on a
            GPU where it works.
        retrieval, seed: False trains the baseline, without neighbours; seeds the data order and the global generators.
        out_dir, resume: folder for log.jsonl and checkpoints/; None writes nothing. A run with a checkpoint there
            resumes, with the same losses as an uninterrupted run; resume=False deletes the checkpoint.
        log_every, eval_every, checkpoint_every: steps between reading the losses off the device, evaluating
            `valid`, and saving; each also happens at the last step.
        measure: called after each evaluation of `valid`; the numbers it returns join the step's record.

    Ctrl-C finishes the current step, saves a checkpoint and raises KeyboardInterrupt (a single process only;
    several keep the newest regular checkpoint).

    Raises:
        TypeError: a setting has the wrong type, a dataset has no length, or `measure` returns something other than
            numbers.
        ValueError: a setting is out of range; retrieval is off for a frozen language model; the data has no token to
            predict, or another chunk size or tokenizer; or the checkpoint is of another model, other settings or data.
        BlockingIOError: another run is training in `out_dir`.
        FileExistsError: `fit` did not create the folder where a checkpoint would be saved.
        FloatingPointError: the loss or gradient is not finite in 10 steps in a row, or in all (a single such step is
            skipped and changes no weight), or a weight or a measured number is not finite. The message names the step
            and its sequences.
    """
    accelerator = _new_accelerator(retrieval)
    asked = dict(
        steps=steps, epochs=epochs, batch_size=batch_size, accumulate=accumulate, lr=lr, wd=wd,
        warmup_steps=warmup_steps, grad_clip=grad_clip, precision=precision, retrieval=retrieval, seed=seed,
        log_every=log_every, eval_every=eval_every, checkpoint_every=checkpoint_every, compile=compile,
        num_workers=num_workers, resume=resume, progress=progress,
    )  # fmt: skip
    check_data(retro, train, valid)
    if not retrieval and retro.frozen:
        raise ValueError("retrieval is off and the model frozen: nothing would be trained. Pass retrieval=True")
    run = resolve_settings(asked, length(train), accelerator.device, accelerator.num_processes)
    with only_run(accelerator, out_dir), few_cpu_threads(accelerator.device):
        lasting = {name: value for name, value in run.items() if name not in FREE_SETTINGS}
        checkpoints = Checkpoints(accelerator, retro, train, valid, out_dir, lasting, resume)
        with (
            closing(_Trainer(accelerator, retro, run, train)) as trainer,
            closing(Log(accelerator, out_dir, checkpoints.step, run["steps"], progress)) as log,
        ):
            _train(trainer, checkpoints, log, valid, measure)
    return log.history


def _train(
    trainer: _Trainer,
    checkpoints: Checkpoints,
    log: Log,
    valid: Dataset | None,
    measure: Callable[[], dict[str, float]] | None,
) -> None:
    """Run the remaining steps."""
    run, optimizer, alone = trainer.run, trainer.optimizer, trainer.accelerator.num_processes == 1
    with interrupt_between_steps(alone) as interrupted:
        checkpoints.load(optimizer)
        trainer.check_weights()
        stream = trainer.stream(checkpoints.step)
        for step in range(checkpoints.step + 1, run["steps"] + 1):
            batches = log.begin_step(stream)
            log.end_step(step, *trainer.step(step, batches))
            last, stop = step == run["steps"], interrupted.is_set()
            evaluate = valid is not None and (last or step % run["eval_every"] == 0)
            save = last or stop or step % run["checkpoint_every"] == 0
            if not (evaluate or save or step % run["log_every"] == 0):
                continue
            record = log.collect()
            trainer.check_skipped(log.newly_skipped, checkpoints.last_good())
            if evaluate and valid is not None:
                record |= trainer.evaluate(valid, step, measure)
            log.write(on_disk=save)
            if save:
                checkpoints.save(step, optimizer)
            if stop and not last:
                where = f"saved in {checkpoints.newest}: the same call goes on" if checkpoints.newest else "not saved"
                raise Interrupted(f"stopped after step {step} of {run['steps']}, {where}")
