"""RETROfit: a trained language model learns to read (paper §4.2; notebook 09).

The language model stays frozen. RETROfit adds an encoder of neighbours and, in the layers P, chunked
cross-attention after the self-attention. Together they are the `Reader`, the only part that is trained. Its output
layers begin at zero, so that training starts from the language model itself.

    layer i ∉ P    h = x + attention(x)                     out = h + feed-forward(h)
    layer i ∈ P    h = x + attention(x),  h += CCA(h, E)    out = h + feed-forward(h)

The language model runs its own code, including fast attention and caches. Hooks in its layers P read the
neighbours; without neighbours no hooks are registered, and the language model runs alone.

Shapes: b batch, n sequence length, m chunk length, l chunks in a sequence, k neighbours, r retrieved tokens per
neighbour, d width, v vocabulary; c the chunks of a batch that have neighbours.
"""

from collections.abc import ItemsView
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from retro_nb.common.arrays import PathLike
from retro_nb.common.devices import attention_kernels, vary
from retro_nb.model.backbone import (
    blocks,
    check_same,
    identity,
    language_model,
    load_backbone,
    reading,
    restore,
    vocabulary_size,
)
from retro_nb.model.base import ChunkedLM, Retrieved
from retro_nb.model.layers import ChunkedCrossAttention, OpenMemory, PreNorm, RMSNorm, rotary
from retro_nb.model.pretrained import find_included, load, plain_config
from retro_nb.model.transformer import Encoder, of_chunks
from retro_nb.text.tokens import TextTokenizer, get_tokenizer

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

LONGEST = 2048  # default limit of tokens in a sequence: the paper's n


# the added part


def of_text(
    read: Float[Tensor, "b n d"], real: Bool[Tensor, "b _"] | None, positions: Int[Tensor, " n"], m: int
) -> Float[Tensor, "b n d"]:
    """Mask what tokens at `positions` have read: zero if it was retrieved for a chunk of padding only.

    Such a chunk before the text then has no effect: a row is read as it would be without it.
    """
    if real is None:
        return read
    begun = real[:, (positions + 1) // m * m - 1]  # that chunk's last token; the first m−1 tokens have none, and no E
    return read.masked_fill(~rearrange(begun, "b n -> b n 1"), 0)


class CrossAttentions(nn.ModuleDict):
    """Chunked cross-attention of each layer in P, by its number; a ModuleDict that says what it holds."""

    if TYPE_CHECKING:

        def __getitem__(self, key: str) -> PreNorm[ChunkedCrossAttention]: ...
        def items(self) -> ItemsView[str, PreNorm[ChunkedCrossAttention]]: ...


class Reader(nn.Module):
    """The part that RETROfit adds: the encoder, and chunked cross-attention for the layers P.

    The encoder reads the language model's token embeddings of the neighbours, and H_u, the activations of the
    chunk that retrieved them. Both are normalised first, because their scale differs between language models.
    """

    def __init__(
        self,
        dim: int,
        layers: list[int],
        *,
        chunk_size: int,
        enc_dim: int,
        enc_depth: int,
        ff_mult: int,
        dropout: float,
        heads: int,
        dim_head: int,
    ):
        super().__init__()
        attention = dict(heads=heads, dim_head=dim_head, dropout=dropout)
        self.embed = nn.Sequential(RMSNorm(dim), nn.Linear(dim, enc_dim))
        self.norm_chunk = RMSNorm(dim)
        self.encoder = Encoder(
            enc_dim, enc_depth, range(1, enc_depth + 1), chunk_dim=dim, out_dim=None, ff_mult=ff_mult,
            ff_dropout=dropout, wrap=lambda fn: PreNorm(fn, RMSNorm(enc_dim)), norm_out=RMSNorm(enc_dim), **attention,
        )  # fmt: skip
        self.cross_attn = CrossAttentions()
        for number in layers:
            cca = ChunkedCrossAttention(chunk_size, dim=dim, context_dim=enc_dim, **attention)
            nn.init.zeros_(cca.attn.to_out.weight)
            nn.init.zeros_(cca.attn.to_out.bias)
            self.cross_attn[str(number)] = PreNorm(cca, RMSNorm(dim))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the reader computes, whatever the language model's is."""
        return self.norm_chunk.gamma.dtype

    def encode(
        self,
        x: Float[Tensor, "b l k r _"],
        mask: Bool[Tensor, "b l k r"],
        chunks: Float[Tensor, "b l m _"],
        chunk_mask: Bool[Tensor, "b l m"] | None = None,
    ) -> Float[Tensor, "b l k r _"]:
        """Encode neighbours with token embeddings `x`, conditioned on H; masks are False on padding."""
        inputs = self.embed(x.to(self.dtype)), mask, self.norm_chunk(chunks.to(self.dtype)), chunk_mask
        vary(self.encoder, inputs)
        return self.encoder(*inputs)


@dataclass
class WholeSequences:
    """The `Read` of the layers P for whole sequences (paper Algorithm 1)."""

    reader: Reader
    x: Float[Tensor, "_ _ k r _"]  # token embeddings of the neighbours of all l chunks, or (c, 1, k, r) of those kept
    mask: Bool[Tensor, "_ _ k r"]
    kept: Int[Tensor, " c"] | None
    real: Bool[Tensor, "b n"] | None  # False on padding before the text
    chunk_size: int
    encoded: Tensor | None = None

    def __call__(self, number: int, h: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        block, m = self.reader.cross_attn[str(number)], self.chunk_size
        if self.encoded is None and h.shape[1] >= m:  # layer min(P)
            real = None if self.real is None else of_chunks(self.real, m, self.kept)
            self.encoded = self.reader.encode(self.x, self.mask, of_chunks(h, m, self.kept), real)
        memory = None if self.encoded is None else block.fn.remember(self.encoded, self.mask)
        read = block.fn(block.norm(h.to(self.reader.dtype)), memory, kept=self.kept)
        return of_text(read, self.real, torch.arange(h.shape[1], device=h.device), m).type_as(h)


@dataclass
class FittedState:
    """Everything `RETROfit.decode` keeps about the tokens fed so far; also the `Read` for the next ones."""

    reader: Reader
    capacity: int  # most tokens that can be fed
    retrieval: bool
    cache: "DynamicCache"  # the language model's own
    chunk: Float[Tensor, "b m d"]  # the current chunk after self-attention at layer min(P)
    real: Bool[Tensor, "b _"]  # False on padding before the text
    padded: bool = False  # whether any row has such padding
    memories: dict[str, OpenMemory] = field(default_factory=dict)  # what each layer reads of E_u
    neighbours: tuple[Tensor, Tensor] | None = None  # embeddings and mask of neighbours not yet encoded
    length: int = 0  # tokens fed so far

    def __call__(self, number: int, h: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        m, name = self.chunk.shape[1], str(number)
        positions = torch.arange(self.length, self.length + h.shape[1], device=h.device)
        if name == next(iter(self.reader.cross_attn)):  # layer min(P)
            self._follow(h, m)
        block, turn = self.reader.cross_attn[name], m - 1 + (positions + 1) % m
        normed = block.norm(h.to(self.reader.dtype))
        read = block.fn.read(normed, self.memories.get(name), rotary(turn, block.fn.attn.dim_head))
        return of_text(read, self.real if self.padded else None, positions, m).type_as(h)

    def _follow(self, h: Float[Tensor, "b n d"], m: int) -> None:
        """Store the activations. If the first token ends its chunk, encode the chunk's neighbours."""
        start, ends = self.length % m, (self.length + 1) % m == 0
        if ends:
            self.chunk[:, -1] = h[:, 0].detach()
            self.memories = {}
        if self.neighbours is not None:
            real = self.real[:, self.length + 1 - m : self.length + 1] if self.padded else None
            chunks = rearrange(self.chunk, "b m d -> b 1 m d")
            chunk_mask = None if real is None else rearrange(real, "b m -> b 1 m")
            encoded = self.reader.encode(*self.neighbours, chunks, chunk_mask)
            for name, block in self.reader.cross_attn.items():
                self.memories[name] = block.fn.open(encoded, self.neighbours[1])
            self.neighbours = None
        rest = h[:, 1:] if ends else h
        begin = 0 if ends else start
        self.chunk[:, begin : begin + rest.shape[1]] = rest.detach()


# the model


class RETROfit(ChunkedLM):
    """A Hugging Face language model that reads neighbours; `retrofit` builds it and explains the arguments."""

    hides_padding = True

    def __init__(
        self,
        backbone: nn.Module,
        *,
        every: int = 3,
        start: int = 6,
        chunk_size: int = 64,
        max_seq_len: int | None = None,
        enc_dim: int | None = None,
        enc_depth: int = 2,
        heads: int = 8,
        dim_head: int = 64,
        ff_mult: int = 4,
        dropout: float = 0.0,
        freeze: bool = True,
        tokenizer: PathLike | TextTokenizer | None = None,
    ):
        arguments = {name: value for name, value in locals().items() if name not in ("backbone", "tokenizer")}
        super().__init__()
        model, every_block = language_model(backbone), blocks(backbone)
        depth, positions = len(every_block), model.config.max_position_embeddings
        if not 1 <= start <= depth or every < 1:
            raise ValueError(
                f"start {start}, every {every}: the layers are 1 … {depth}, and none or too few would read. Pass "
                f"start={max(1, depth // 2)}, every=2, say"
            )
        if max_seq_len is not None and not 1 <= max_seq_len <= positions:
            raise ValueError(f"max_seq_len {max_seq_len} is not in 1 … {positions}, the language model's positions")
        if chunk_size < 1:
            raise ValueError(f"chunk_size {chunk_size} must be 1 or more; the paper's is 64")
        if dim_head % 2:
            raise ValueError(f"dim_head {dim_head} is odd: rotary positions turn pairs of features, pass an even one")
        self.blocks = {number: every_block[number - 1] for number in range(start, depth + 1, every)}
        self.tokenizer = _own_tokenizer(model, tokenizer)
        self.words = vocabulary_size(model)
        self.pad_id = self.tokenizer.ids.pad
        self.num_tokens = max(self.words, self.pad_id + 1)
        self.chunk_size, self.seq_len = chunk_size, max_seq_len or min(positions, LONGEST)
        self.backbone, self.frozen = model.requires_grad_(not freeze), freeze
        dim = model.config.hidden_size
        with torch.device(model.device):
            self.reader = Reader(
                dim, list(self.blocks), chunk_size=chunk_size, enc_dim=enc_dim or dim, enc_depth=enc_depth,
                ff_mult=ff_mult, dropout=dropout, heads=heads, dim_head=dim_head,
            )  # fmt: skip
        self.config = {"backbone": identity(model, freeze), **plain_config(arguments)}
        self.config["tokenizer"] = self.tokenizer.fingerprint
        self.train(model.training)

    @property
    def to_logits(self) -> nn.Linear:  # type: ignore[override]  # never set: it is the language model's
        return self.backbone.get_output_embeddings()

    def train(self, mode: bool = True) -> "RETROfit":
        """Set training mode for the trained part; a frozen language model stays in evaluation mode, without dropout."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    # whole sequences

    def _hidden(self, seq: Int[Tensor, "b n"], retrieved: Retrieved | None) -> Float[Tensor, "b n d"]:
        self._check_length(seq.shape[1])
        retrieved = self._check_retrieved(retrieved, chunks=seq.shape[1] // self.chunk_size)
        retrieved, kept = self._with_neighbours(retrieved)
        real = self._real(seq)
        with ExitStack() as stack:
            if retrieved is not None:
                self._refuse_recomputing()
                x, mask = self._embed_retrieved(retrieved)
                read = WholeSequences(self.reader, x, mask, kept, real, self.chunk_size)
                stack.enter_context(reading(self.blocks, read))
            return self._run(self._ids(seq, "seq"), real, use_cache=False).last_hidden_state

    def _refuse_recomputing(self) -> None:
        """Gradient checkpointing runs the layers again in the backward pass, when they no longer read."""
        if not (self.backbone.training and torch.is_grad_enabled()):
            return
        if any(getattr(part, "gradient_checkpointing", False) for part in self.backbone.modules()):
            raise ValueError(
                "the language model uses gradient checkpointing, with which its layers would learn nothing from the "
                "neighbours: call backbone.gradient_checkpointing_disable(), and save memory by a smaller batch_size "
                "with accumulate"
            )

    # piece by piece

    def start_decoding(self, batch: int, capacity: int | None = None, retrieval: bool = True) -> FittedState:
        """An empty state for `decode`, for `batch` sequences of up to `capacity` tokens; see `RETRO.start_decoding`."""
        from transformers import DynamicCache

        weight, m, capacity = self.to_logits.weight, self.chunk_size, self._capacity(capacity)
        return FittedState(
            self.reader, capacity, retrieval,
            cache=DynamicCache(config=self.backbone.config),
            chunk=weight.new_zeros(batch, m, weight.shape[1]),
            real=torch.ones(batch, capacity, dtype=torch.bool, device=weight.device),
        )  # fmt: skip

    def decode(
        self, seq: Int[Tensor, "b n"], state: FittedState, retrieved: Int[Tensor, "b k r"] | None = None
    ) -> Float[Tensor, "b n v"]:
        """Feed the next tokens and return their logits; see `RETRO.decode`."""
        retrieved = self._check_piece(seq, state, retrieved)
        ids, start, stop = self._ids(seq, "seq"), state.length, state.length + seq.shape[1]
        state.neighbours = None if retrieved is None else self._embed_retrieved(retrieved)
        if state.padded or start == 0:  # padding before the text may end in a later piece
            real = self._real(seq, None if start == 0 else state.real[:, start - 1])
            state.padded |= real is not None
            if real is not None:
                state.real[:, start:stop] = real
        with ExitStack() as stack:
            if state.retrieval:
                stack.enter_context(reading(self.blocks, state))
            real = state.real[:, :stop] if state.padded else None
            hidden = self._run(ids, real, past_key_values=state.cache, use_cache=True).last_hidden_state
        state.length = stop
        return self.to_logits(hidden)

    # shared helpers

    def _real(self, seq: Int[Tensor, "b n"], begun: Bool[Tensor, " b"] | None = None) -> Bool[Tensor, "b n"] | None:
        """True from the first token of each row's text on; None if no row starts with padding."""
        if begun is None and not (seq[:, 0] == self.pad_id).any():
            return None
        real = (seq != self.pad_id).cumsum(dim=1) > 0
        return self._on_device(real if begun is None else real | rearrange(begun, "b -> b 1").to(real.device))

    def _run(self, ids: Int[Tensor, "b n"], real: Bool[Tensor, "b _"] | None, **options: Any) -> Any:
        """Run the language model without its output layer on the last n tokens; `real` covers all tokens so far."""
        if real is not None:
            positions = (real.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            options |= {"attention_mask": real.long(), "position_ids": positions}
        with attention_kernels():
            return self.backbone.base_model(input_ids=ids, return_dict=True, **options)

    def _ids(self, ids: Int[Tensor, "*b"], name: str) -> Int[Tensor, "*b"]:
        """Ids that the language model knows; a padding id outside its vocabulary becomes 0 (no text attends to it)."""
        self._check_tokens(ids, name)
        ids = self._on_device(ids)
        return ids if self.pad_id < self.words else ids.masked_fill(ids == self.pad_id, 0)

    def _embed_retrieved(
        self, retrieved: Int[Tensor, "b l k r"]
    ) -> tuple[Float[Tensor, "b l k r _"], Bool[Tensor, "b l k r"]]:
        ids = self._ids(retrieved, "retrieved")
        return self.backbone.get_input_embeddings()(ids), self._on_device(retrieved).ne(self.pad_id)

    # saving

    @property
    def compilable(self) -> tuple[nn.Module, ...]:
        return (self.reader.encoder,)

    @property
    def own_weights(self) -> nn.Module:
        """The reader; the whole model if the language model is trained too."""
        return self.reader if self.frozen else self

    @property
    def trained_share(self) -> float:
        """Share of the weights that are trained."""
        trained = sum(weight.numel() for weight in self.parameters() if weight.requires_grad)
        return trained / sum(weight.numel() for weight in self.parameters())

    @classmethod
    def from_pretrained(
        cls,
        folder: PathLike,
        backbone: "PreTrainedModel | None" = None,
        device: str | torch.device = "cpu",
        *,
        tokenizer: PathLike | TextTokenizer | None = None,
    ) -> "RETROfit":
        """The model that `save_pretrained` wrote into `folder`, in evaluation mode.

        Args:
            folder: holds the added weights only, unless the language model was trained too.
            backbone: the language model that they belong to; by default loaded by its folder or hub name.
            device: device of the model.
            tokenizer: as for `retrofit`.

        Raises:
            FileNotFoundError: a folder or file is missing.
            ValueError: the weights are damaged, or belong to another language model or tokenizer.
        """

        def build(config: dict) -> "RETROfit":
            known, fingerprint = config.pop("backbone"), config.pop("tokenizer")
            model = restore(known) if backbone is None else backbone
            check_same(model, known)
            own = _own_tokenizer(model, tokenizer)
            if own.fingerprint != fingerprint:
                raise ValueError(f"it was made for another tokenizer than this one of {own.size} ids")
            return cls(model, tokenizer=own, **config)

        return load(build, RETROfit.__name__, Path(folder), device)


def retrofit(model: nn.Module | PathLike, **options: Any) -> RETROfit:
    """Give a Hugging Face causal language model a memory: RETROfit (paper §4.2).

    The result is called like RETRO, `model(seq, retrieved=None)`, trained by `fit` or `TrainingWrapper.fit`, and
    sampled from by `generate`. Before training it predicts what the language model predicts; without neighbours it
    always does, to the last bit.

    Args:
        model: a GPT-2, Llama, Mistral, Qwen or any other with layers like theirs, or its folder or hub name. The
            model is not copied but frozen in place.
        every, start: P, the layers that read: start, start + every, … (counted from 1; the paper's are 6, 9, …).
        chunk_size: m, tokens.
        max_seq_len: longest sequence n; by default the language model's, at most 2048.
        enc_dim, enc_depth: width d' and layers of the encoder; d' is by default the language model's.
        heads, dim_head: of the encoder's and the cross-attention's attention.
        ff_mult, dropout: width of the encoder's feed-forward layers, as a multiple of d'; share dropped in training.
        freeze: train the added part only. False also trains the language model, so that RETRO[OFF] changes too.
        tokenizer: the language model's, by folder or name; by default found where the model was loaded from.

    Raises:
        ValueError: an unsupported architecture, layers that do not exist, or a tokenizer with more ids than the
            model knows.
        FileNotFoundError: no such model, or no tokenizer for it.
    """
    return RETROfit(model if isinstance(model, nn.Module) else load_backbone(model), **options)


def _own_tokenizer(backbone: "PreTrainedModel", tokenizer: PathLike | TextTokenizer | None) -> TextTokenizer:
    name = backbone.config.name_or_path
    if tokenizer is None:
        if not name:
            raise ValueError(f"this {type(backbone).__name__} does not say where it is from: pass tokenizer=…, its own")
        tokenizer = find_included(name)
    own, words = get_tokenizer(tokenizer), vocabulary_size(backbone)
    if own.own_size > words:
        raise ValueError(f"the tokenizer has {own.own_size} ids, the language model knows {words}: pass its own")
    return own
