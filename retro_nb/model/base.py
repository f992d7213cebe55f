"""What every model here can do, whatever it is made of: RETRO (notebook 04) and RETROfit (notebook 09).

A `ChunkedLM` is a causal language model that reads, after every chunk of m tokens, the neighbours retrieved for it.

Shapes: b batch, n sequence length, m chunk length, l chunks in a sequence, k neighbours, r retrieved tokens
per neighbour, d width, v vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from retro_nb.common.devices import send
from retro_nb.model.loss import linear_cross_entropy, token_cross_entropy
from retro_nb.model.pretrained import save
from retro_nb.text.tokens import TextTokenizer

Retrieved = Int[Tensor, "b l k r"] | Int[Tensor, "b l r"]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and afterwards back into the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class ChunkedLM(nn.Module):
    """The common part: losses, checks, pieces for decoding.

    A model has `_hidden` (what the output layer reads, for whole sequences), `start_decoding` and `decode`, and:

    config            its arguments, for JSON
    num_tokens        v, padding included
    pad_id            never attended to in neighbours, never counted in the loss
    seq_len           the longest sequence n
    chunk_size        m
    to_logits         the output layer
    tokenizer         what its ids mean, where the model is bound to a tokenizer
    hides_padding     whether padding before a text is as if it were not there
    frozen            whether only what reads the neighbours is trained
    """

    config: dict[str, Any]
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
            seq: (b, n) token ids; (b, n+1) with return_loss, whose last n tokens are then the labels. Like
                `retrieved` it may lie on the CPU: then a GPU need not be asked which of it is padding.
            retrieved: (b, l, k, r) the neighbours of the l = n // m complete chunks, r ≥ m; (b, l, r) for a
                single neighbour. None is the model without retrieval, RETRO[OFF].
            return_loss: return the mean cross-entropy in nats over all labels that are not padding
                (0 if all are), in training and evaluation mode alike.

        Raises:
            ValueError: a sequence that is empty or longer than max_seq_len, neighbours of another number of
                chunks or shorter than a chunk, a token outside the vocabulary (looked for on the CPU only;
                on a GPU the check would hold up every step).
        """
        if not return_loss:
            return self.to_logits(self._hidden(seq, retrieved))
        labels = rearrange(seq[:, 1:], "b n -> (b n)")
        asked = (labels != self.pad_id).nonzero()[:, 0]
        x = rearrange(self._hidden(seq[:, :-1], retrieved), "b n d -> (b n) d")[self._here(asked)]
        total = linear_cross_entropy(x, *self._output(), self._here(labels[asked].long()))
        return total / max(1, len(asked))

    @torch.no_grad()
    def token_losses(self, seq: Int[Tensor, "b _"], retrieved: Retrieved | None = None) -> Float[Tensor, "b n"]:
        """The loss of every label of its own, in nats, NaN where that is padding; without gradients.

        Args and errors as `forward`'s with return_loss: seq is (b, n+1).
        """
        labels = self._here(seq[:, 1:].long())
        padding = labels == self.pad_id
        x = rearrange(self._hidden(seq[:, :-1], retrieved), "b n d -> (b n) d")
        asked = rearrange(labels.masked_fill(padding, 0), "b n -> (b n)")  # padding may be no word of the output
        losses = token_cross_entropy(x, *self._output(), asked)
        return losses.reshape(labels.shape).masked_fill(padding, float("nan"))

    def _hidden(self, seq: Int[Tensor, "b n"], retrieved: Retrieved | None) -> Float[Tensor, "b n _"]:
        raise NotImplementedError

    def _output(self) -> tuple[Float[Tensor, "v d"], Float[Tensor, " v"]]:
        """Weights and bias of the output layer; a bias of zeros where it has none."""
        weight, bias = self.to_logits.weight, self.to_logits.bias
        return weight, weight.new_zeros(len(weight)) if bias is None else bias

    # piece by piece

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Cut the positions start … stop−1 before each chunk's last token, into pieces for `decode`."""
        m = self.chunk_size
        while start < stop:
            end = min(stop, (start + 1) // m * m + m - 1)
            yield start, end
            start = end

    def _capacity(self, capacity: int | None) -> int:
        """How many tokens a decoding state is to have room for, max_seq_len when left out."""
        capacity = self.seq_len if capacity is None else capacity
        if not 1 <= capacity <= self.seq_len:
            raise ValueError(f"capacity {capacity} is not in 1 … max_seq_len {self.seq_len}")
        return capacity

    def _check_piece(
        self, seq: Int[Tensor, "b n"], state: Any, retrieved: Int[Tensor, "b k r"] | None
    ) -> Int[Tensor, "b 1 k r"] | None:
        """Whether these tokens may be fed next, with these neighbours; the neighbours as those of one chunk."""
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

    # what both share

    def _check_length(self, n: int) -> None:
        if not 1 <= n <= self.seq_len:
            raise ValueError(
                f"the model was given {n} tokens (labels not counted) and takes 1 to {self.seq_len}: pass another "
                f"length or build {type(self).__name__} with a larger max_seq_len"
            )

    def _with_neighbours(
        self, retrieved: Int[Tensor, "b l k r"] | None
    ) -> tuple[Int[Tensor, "_ _ k r"] | None, Int[Tensor, " c"] | None]:
        """Leave out chunks that have no neighbours, such as padding: there is nothing to encode.

        Returns the neighbours of the c chunks that are kept, (c, 1, k, r), and which of the b·l chunks these are; or
        all neighbours and None, if every chunk has some. Two chunks are kept at least, with or without neighbours:
        torch.compile makes other code for a size of 0 or 1 than for all the others.
        """
        if retrieved is None:
            return None, None
        chunks = rearrange(retrieved, "b l k r -> (b l) 1 k r")
        missing = (chunks == self.pad_id).all(dim=(1, 2, 3))
        count = len(chunks) - int(missing.sum())
        if count == len(chunks):
            return retrieved, None
        kept = missing.byte().argsort(stable=True)[: max(2, count)]
        return chunks[kept], kept

    def _here(self, ids: Shaped[Tensor, "..."] | None) -> Shaped[Tensor, "..."] | None:
        return None if ids is None else send(ids, self.to_logits.weight.device)

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
        if retrieved.ndim == 3:
            retrieved = rearrange(retrieved, "b l r -> b l 1 r")
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

    # what is saved

    @property
    def compilable(self) -> tuple[nn.Module, ...]:
        """The parts that torch.compile makes faster in training, and with them what they call."""
        return ()

    @property
    def own_weights(self) -> nn.Module:
        """The part whose weights `save_pretrained` writes."""
        return self

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model.safetensors and config.json into `folder`, each replaced as a whole or not at all."""
        save(self.own_weights, self.config, type(self).__name__, folder)
