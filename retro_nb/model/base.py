"""Common base of the models: RETRO (notebook 04) and RETROfit (notebook 09).

A `ChunkedLM` is a causal language model that reads, after every chunk of m tokens, the neighbours retrieved for it.

Shapes: b batch, n sequence length, m chunk length, l chunks in a sequence, k neighbours, r retrieved tokens
per neighbour, d width, v vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from retro_nb.common.devices import send
from retro_nb.model.loss import linear_cross_entropy, token_cross_entropy
from retro_nb.model.pretrained import Saveable
from retro_nb.text.tokens import TextTokenizer

SEVERAL_GPUS = "`accelerate launch` starts `fit` on several GPUs"
Retrieved = Int[Tensor, "b l k r"] | Int[Tensor, "b l r"]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context with the model in evaluation mode; on exit its previous mode is restored."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def check_ids(name: str, ids: Any, *axes: str) -> None:
    """Reject what is not a tensor of token ids with these axes.

    Raises:
        TypeError: it is no tensor, or not one of whole numbers.
        ValueError: it has other axes.
    """
    mend = f"pass a tensor of token ids, ({', '.join(axes)})"
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} is {' '.join(repr(ids).split())[:60]}, of type {type(ids).__name__}: {mend}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{name} holds {ids.dtype}, which are no token ids: {mend}")
    if ids.ndim != len(axes):
        raise ValueError(f"{name} has the shape {tuple(ids.shape)}: {mend}")


def check_model(model: Any) -> None:
    """Raise a TypeError if this is no model of this package, such as one in a wrapper."""
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise TypeError(f"the model is in a {type(model).__name__}: pass its .module; {SEVERAL_GPUS}")
    if not isinstance(model, ChunkedLM):
        raise TypeError(f"{type(model).__name__} is no model that reads neighbours: pass a RETRO or a RETROfit")


class ChunkedLM(Saveable):
    """Base class: losses, checks, pieces for decoding.

    A subclass defines `_hidden` (input of the output layer, for whole sequences), `start_decoding`, `decode` and:

    config            its arguments in JSON form
    num_tokens        v, padding included
    pad_id            never attended to in neighbours, never counted in the loss
    seq_len           the longest sequence n
    chunk_size        m
    to_logits         the output layer
    tokenizer         the tokenizer of its ids, if the model is bound to one
    hides_padding     whether padding before a text has no effect
    frozen            whether only the part that reads neighbours is trained
    """

    num_tokens: int
    pad_id: int
    seq_len: int
    chunk_size: int
    to_logits: nn.Linear
    tokenizer: TextTokenizer | None = None
    frozen: bool = False
    hides_padding: bool = False

    # whole sequences

    def forward(
        self, seq: Int[Tensor, "b _"], retrieved: Retrieved | None = None, return_loss: bool = False
    ) -> Float[Tensor, "b n v"] | Float[Tensor, ""]:
        """Logits of the next token at every position, or the mean loss.

        Args:
            seq: (b, n) token ids; (b, n+1) with return_loss: the last n tokens are the labels. Both seq and
                `retrieved` may lie on the CPU, which saves a wait for the GPU to find the padding.
            retrieved: (b, l, k, r) the neighbours of the l = n // m complete chunks, r ≥ m; (b, l, r) for a
                single neighbour. None runs the model without retrieval, RETRO[OFF].
            return_loss: return the mean cross-entropy in nats over all labels that are not padding
                (0 if all are), in training and evaluation mode alike.

        Raises:
            TypeError: a list or an array instead of a tensor, or numbers that are not whole.
            ValueError: a sequence that is empty or longer than max_seq_len, neighbours for a wrong number of
                chunks or shorter than a chunk, a token outside the vocabulary (checked on the CPU only;
                on a GPU the check would hold up every step).
        """
        check_ids("seq", seq, "b", "n")
        if not return_loss:
            return self.to_logits(self._hidden(seq, retrieved))
        labels = rearrange(seq[:, 1:], "b n -> (b n)")
        asked = (labels != self.pad_id).nonzero()[:, 0]
        x = rearrange(self._hidden(seq[:, :-1], retrieved), "b n d -> (b n) d")[self._on_device(asked)]
        total = linear_cross_entropy(x, *self._output(), self._on_device(labels[asked].long()))
        return total / max(1, len(asked))

    @torch.no_grad()
    def token_losses(self, seq: Int[Tensor, "b _"], retrieved: Retrieved | None = None) -> Float[Tensor, "b n"]:
        """Loss of every label in nats, NaN for padding; without gradients.

        Arguments and errors are those of `forward` with return_loss: seq is (b, n+1).
        """
        labels = self._on_device(seq[:, 1:].long())
        padding = labels.eq(self.pad_id)
        x = rearrange(self._hidden(seq[:, :-1], retrieved), "b n d -> (b n) d")
        asked = rearrange(labels.masked_fill(padding, 0), "b n -> (b n)")  # the output layer may lack pad_id
        losses = token_cross_entropy(x, *self._output(), asked)
        return losses.reshape(labels.shape).masked_fill(padding, float("nan"))

    def _hidden(self, seq: Int[Tensor, "b n"], retrieved: Retrieved | None) -> Float[Tensor, "b n _"]:
        raise NotImplementedError

    def _output(self) -> tuple[Float[Tensor, "v d"], Float[Tensor, " v"]]:
        """Weights and bias of the output layer; zeros if it has no bias."""
        weight, bias = self.to_logits.weight, self.to_logits.bias
        return weight, weight.new_zeros(len(weight)) if bias is None else bias

    # piece by piece

    def start_decoding(self, batch: int, capacity: int | None = None, retrieval: bool = True) -> Any:
        """An empty state for `decode`; see `RETRO.start_decoding`."""
        raise NotImplementedError

    def decode(
        self, seq: Int[Tensor, "b n"], state: Any, retrieved: Int[Tensor, "b k r"] | None = None
    ) -> Float[Tensor, "b n v"]:
        """Feed the next tokens and return their logits; see `RETRO.decode`."""
        raise NotImplementedError

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Cut the positions start … stop−1 before each chunk's last token, into pieces for `decode`."""
        m = self.chunk_size
        while start < stop:
            end = min(stop, (start + 1) // m * m + m - 1)
            yield start, end
            start = end

    def _capacity(self, capacity: int | None) -> int:
        """Check the capacity of a decoding state, in tokens; by default max_seq_len."""
        capacity = self.seq_len if capacity is None else capacity
        if not 1 <= capacity <= self.seq_len:
            raise ValueError(f"capacity {capacity} is not in 1 … max_seq_len {self.seq_len}")
        return capacity

    def _check_piece(
        self, seq: Int[Tensor, "b n"], state: Any, retrieved: Int[Tensor, "b k r"] | None
    ) -> Int[Tensor, "b 1 k r"] | None:
        """Check that these tokens and neighbours may be fed next; return the neighbours with an axis of one chunk."""
        m, start, stop = self.chunk_size, state.length, state.length + seq.shape[1]
        if stop > state.capacity:
            raise ValueError(f"{stop} tokens exceed the state's capacity {state.capacity}: start with more")
        pieces = list(self.pieces(start, stop))
        if len(pieces) != 1:
            raise ValueError(f"positions {start} … {stop - 1} are not one piece: feed {pieces} one by one")
        if retrieved is None:
            return None
        if not state.retrieval or (start + 1) % m:
            raise ValueError(
                f"no neighbours are read at position {start} (retrieval={state.retrieval}): they come "
                f"with a chunk's last token, {m - 1}, {2 * m - 1}, …, after start_decoding(retrieval=True)"
            )
        return self._check_retrieved(rearrange(retrieved, "b k r -> b 1 k r"), chunks=1)

    # shared helpers

    def _check_length(self, n: int) -> None:
        if not 1 <= n <= self.seq_len:
            raise ValueError(
                f"the model was given {n} tokens (labels not counted) and takes 1 to {self.seq_len}: pass another "
                f"length or build {type(self).__name__} with a larger max_seq_len"
            )

    def _with_neighbours(
        self, retrieved: Int[Tensor, "b l k r"] | None
    ) -> tuple[Int[Tensor, "_ _ k r"] | None, Int[Tensor, " c"] | None]:
        """Leave out chunks without neighbours, such as padding, because there is nothing to encode.

        Returns the neighbours of the c kept chunks, (c, 1, k, r), and the numbers of these among the b·l chunks, the
        latter on the model's device; or all neighbours and None if every chunk has some. At least two chunks are kept,
        with or without neighbours: torch.compile generates separate code for sizes 0 and 1.
        """
        if retrieved is None:
            return None, None
        chunks = rearrange(retrieved, "b l k r -> (b l) 1 k r")
        missing = (chunks == self.pad_id).all(dim=(1, 2, 3))
        count = len(chunks) - int(missing.sum())
        if count == len(chunks):
            return retrieved, None
        kept = missing.byte().argsort(stable=True)[: max(2, count)]
        return chunks[kept], self._on_device(kept)

    def _on_device(self, ids: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        return send(ids, self.to_logits.weight.device)

    def _check_tokens(self, ids: Int[Tensor, "..."], name: str) -> None:
        if not ids.is_cpu or not ids.numel() or torch.compiler.is_compiling():
            return
        low, high = ids.aminmax()
        if low < 0 or high >= self.num_tokens:
            raise ValueError(
                f"{name} holds token {low if low < 0 else high}, the vocabulary is 0 … {self.num_tokens - 1}: "
                f"build {type(self).__name__} for the store's tokenizer (a missing neighbour is all {self.pad_id})"
            )

    def _check_retrieved(self, retrieved: Retrieved | None, chunks: int) -> Int[Tensor, "b l k r"] | None:
        if retrieved is None:
            return None
        if isinstance(retrieved, Tensor) and retrieved.ndim == 3:
            retrieved = rearrange(retrieved, "b l r -> b l 1 r")
        check_ids("retrieved", retrieved, "b", "l", "k", "r")
        _, l, _, r = retrieved.shape
        if l != chunks:
            raise ValueError(
                f"retrieved holds the neighbours of {l} chunks, but the sequence has {chunks} complete "
                f"chunks of {self.chunk_size} tokens: pass retrieved of shape (b, {chunks}, k, r)"
            )
        if r < self.chunk_size:
            raise ValueError(
                f"retrieved holds {r} tokens a neighbour, fewer than chunk_size {self.chunk_size}: pass each "
                f"neighbour's chunk, with its continuation ({2 * self.chunk_size} tokens) or padded"
            )
        return retrieved

    # training

    def _replicate_for_data_parallel(self) -> Any:
        """Refuse torch's DataParallel on several GPUs: its copies average losses of unlike token counts, and the
        layers of a copied language model would not read."""
        raise TypeError(f"DataParallel cannot run a {type(self).__name__}: call it without; {SEVERAL_GPUS}")

    @property
    def compilable(self) -> tuple[nn.Module, ...]:
        """The modules to compile for training; what they call is compiled with them."""
        return ()
