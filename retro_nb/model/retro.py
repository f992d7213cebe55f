"""RETRO, the Retrieval-Enhanced Transformer (Borgeaud et al. 2021, arXiv 2112.04426; notebook 04).

Shapes: b batch, n sequence length, m chunk length, l chunks in a sequence, k neighbours, r retrieved tokens
per neighbour, d width, v vocabulary.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from retro_nb.common.devices import vary
from retro_nb.model.base import ChunkedLM, Retrieved
from retro_nb.model.layers import Past, rotary
from retro_nb.model.linear import Linear
from retro_nb.model.presets import AS_IN_THE_PAPER, PRESETS
from retro_nb.model.pretrained import load, plain_config, renamed
from retro_nb.model.transformer import (
    Decoder,
    DecodingState,
    Encoder,
    deepnet_init,
    deepnet_scales,
    norm_of,
    residual,
)


class RETRO(ChunkedLM):
    """A causal language model that reads, after every chunk, the neighbours retrieved for it.

    The arguments are those of retro-pytorch 0.3.9. The last seven come from the paper; their defaults give the
    reference's model.

    Args:
        num_tokens: vocabulary size v.
        max_seq_len: longest sequence n, in tokens.
        enc_dim, enc_depth: width d' and layers of the encoder.
        enc_cross_attn_layers: P_enc, encoder layers (counted from 1) conditioned on the chunk; None = all.
        dec_dim, dec_depth: width d and layers of the decoder.
        dec_cross_attn_layers: P, decoder layers (counted from 1) that read the neighbours; None = all.
        heads, dim_head: attention heads and their size.
        enc_attn_dropout, enc_ff_dropout, dec_attn_dropout, dec_ff_dropout: shares dropped in training.
        chunk_size: m, in tokens.
        pad_id: the token that is never attended to in neighbours and never counted in the loss.
        use_deepnet: post-norm, with DeepNet's residual scales and initialisation, and LayerNorm.
        enc_scale_residual, dec_scale_residual: other residual scales for `use_deepnet`.
        norm_klass: RMSNorm (default) or LayerNorm, the class or its name.
        gated_rmsnorm: RMSNorm with a gate, see `layers.RMSNorm`.
        enc_heads, enc_dim_head: heads of the encoder and their size; by default the decoder's.
        ff_mult: width of the feed-forward layers, as a multiple of d (paper: 4).
        separate_embeddings: EMB_enc ≠ EMB (paper section 2.4: "disjoint"), each as wide as its stack. If False,
            one table of width enc_dim serves both, and a linear map projects to dec_dim.
        absolute_positions: a learned vector per position, in addition to relative positions. The paper has
            relative positions only; here these are always rotary.
        tied_output: the output weights are the decoder's token embedding (the paper's sizes count one table).
        project_encoded: the encoder ends in a linear map to dec_dim. In the paper, K and V of the chunked
            cross-attention project from width d' directly.

    The tokens of all-padding neighbours are never read, so adding such neighbours to real ones changes
    nothing. A chunk with no other neighbours reads the learned null value, a single vector that is not zero;
    only `retrieved=None` skips reading. The first m−1 tokens never read; with `use_deepnet` they
    are still normalised where they would have read, as in the reference.
    """

    def __init__(
        self,
        *,
        num_tokens: int = 30522,
        max_seq_len: int = 2048,
        enc_dim: int = 896,
        enc_depth: int = 2,
        enc_cross_attn_layers: Sequence[int] | None = None,
        dec_depth: int = 12,
        dec_cross_attn_layers: Sequence[int] | None = (1, 3, 6, 9),
        heads: int = 8,
        dec_dim: int = 768,
        dim_head: int = 64,
        enc_attn_dropout: float = 0.0,
        enc_ff_dropout: float = 0.0,
        dec_attn_dropout: float = 0.0,
        dec_ff_dropout: float = 0.0,
        chunk_size: int = 64,
        pad_id: int = 0,
        enc_scale_residual: float | None = None,
        dec_scale_residual: float | None = None,
        norm_klass: type[nn.Module] | str | None = None,
        gated_rmsnorm: bool = False,
        use_deepnet: bool = False,
        enc_heads: int | None = None,
        enc_dim_head: int | None = None,
        ff_mult: int = 4,
        separate_embeddings: bool = False,
        absolute_positions: bool = True,
        tied_output: bool = False,
        project_encoded: bool = True,
    ):
        self.config = plain_config(locals())
        super().__init__()
        for name in ("num_tokens", "max_seq_len", "chunk_size"):
            if self.config[name] < 1:
                raise ValueError(f"{name} is {self.config[name]}: pass 1 or more")
        if not 0 <= pad_id < num_tokens:
            raise ValueError(f"pad_id {pad_id} is not in the vocabulary, 0 … {num_tokens - 1}: pass the tokenizer's")
        enc_layers = _layers("enc_cross_attn_layers", enc_cross_attn_layers, enc_depth)
        dec_layers = _layers("dec_cross_attn_layers", dec_cross_attn_layers, dec_depth)
        if not dec_layers:
            raise ValueError("dec_cross_attn_layers is empty: name at least one layer, such as (1,), or None")
        if odd := [size for size in (dim_head, enc_dim_head or dim_head) if size % 2]:
            raise ValueError(f"dim_head {odd[0]} is odd: rotary positions turn pairs of features, pass an even one")
        embed_dim = dec_dim if separate_embeddings else enc_dim
        if tied_output and embed_dim != dec_dim:
            raise ValueError(
                f"tied_output needs embeddings as wide as the decoder, not enc_dim {enc_dim} and dec_dim {dec_dim}: "
                f"pass separate_embeddings=True, or enc_dim={dec_dim}"
            )
        self.num_tokens, self.pad_id, self.seq_len, self.chunk_size = num_tokens, pad_id, max_seq_len, chunk_size

        self.token_emb = nn.Embedding(num_tokens, embed_dim)
        self.enc_token_emb = nn.Embedding(num_tokens, enc_dim) if separate_embeddings else None
        self.pos_emb = nn.Embedding(max_seq_len, embed_dim) if absolute_positions else None
        self.to_dec_dim = Linear(embed_dim, dec_dim) if embed_dim != dec_dim else nn.Identity()

        norm, scales = norm_of(norm_klass, gated_rmsnorm, use_deepnet), deepnet_scales(enc_depth, dec_depth)
        encoded_dim = dec_dim if project_encoded else enc_dim
        self.encoder = Encoder(
            enc_dim, enc_depth, enc_layers, chunk_dim=dec_dim, out_dim=dec_dim if project_encoded else None,
            heads=enc_heads or heads, dim_head=enc_dim_head or dim_head, dropout=enc_attn_dropout, ff_mult=ff_mult,
            ff_dropout=enc_ff_dropout, **residual(norm, enc_dim, use_deepnet, enc_scale_residual, scales.encoder),
        )  # fmt: skip
        self.decoder = Decoder(
            dec_dim, dec_depth, dec_layers, chunk_size=chunk_size, encoded_dim=encoded_dim, heads=heads,
            dim_head=dim_head, dropout=dec_attn_dropout, ff_mult=ff_mult, ff_dropout=dec_ff_dropout,
            **residual(norm, dec_dim, use_deepnet, dec_scale_residual, scales.decoder),
        )  # fmt: skip
        if use_deepnet:
            deepnet_init(self.encoder, scales.encoder_gain)
            deepnet_init(self.decoder, scales.decoder_gain)

        self.to_logits = Linear(dec_dim, num_tokens)
        if tied_output:
            nn.init.normal_(self.token_emb.weight, std=dec_dim**-0.5)  # logits of variance 1
            self.to_logits.weight = self.token_emb.weight

    # whole sequences

    def _hidden(self, seq: Int[Tensor, "b n"], retrieved: Retrieved | None) -> Float[Tensor, "b n _"]:
        """Input of the output layer."""
        self._check_length(seq.shape[1])
        retrieved = self._check_retrieved(retrieved, chunks=seq.shape[1] // self.chunk_size)
        retrieved, kept = self._with_neighbours(retrieved)
        neighbours = (*self._embed_retrieved(retrieved), kept)
        if kept is not None:
            vary(self.decoder, neighbours)
        return self.decoder(self._embed(seq), self.encoder, *neighbours)

    # piece by piece

    def start_decoding(self, batch: int, capacity: int | None = None, retrieval: bool = True) -> DecodingState:
        """An empty state for `decode`.

        Args:
            batch: number of sequences.
            capacity: most tokens that will be fed, by default max_seq_len. On a GPU without the Triton kernels,
                every single token attends over this many positions, filled or not.
            retrieval: False for RETRO[OFF], the model of forward(retrieved=None).
        """
        capacity, weight, m = self._capacity(capacity), self.to_logits.weight, self.chunk_size
        positions = torch.arange(max(capacity, 2 * m), device=weight.device)
        return DecodingState(
            capacity, retrieval,
            pasts=[Past(capacity) for _ in self.decoder.layers],
            chunk=weight.new_zeros(batch, m, weight.shape[1]),
            angles=rotary(positions, self.decoder.dim_head),
        )  # fmt: skip

    def decode(
        self, seq: Int[Tensor, "b n"], state: DecodingState, retrieved: Int[Tensor, "b k r"] | None = None
    ) -> Float[Tensor, "b n v"]:
        """Feed the next tokens and return their logits: those of `forward` on everything fed so far.

        All tokens of a call must lie in one attending chunk, the last token of a chunk and the first m−1 of
        the next, because they read the same neighbours (`pieces` cuts a longer text). Pass a chunk's
        neighbours with the piece that begins with its last token.

        On a GPU, without gradients, single tokens replay a recording of the layers (cuda_graphs.py). So do not
        move the weights while a state is in use; hooks on the layers do not run.

        Args:
            seq: (b, n) the next tokens.
            state: from `start_decoding`; it is updated.
            retrieved: (b, k, r) the neighbours of the chunk that ends with this piece's first token. If None,
                the attending chunk reads nothing.

        Raises:
            ValueError: a piece that crosses into the next attending chunk, neighbours where no chunk ends
                or in a state without retrieval, more tokens than the state's capacity.
        """
        retrieved = self._check_piece(seq, state, retrieved)
        x = self._embed(seq, state.length)
        x = self.decoder.decode(x, state, self.encoder, *self._embed_retrieved(retrieved))
        return self.to_logits(x)

    # shared helpers

    def _embed(self, seq: Int[Tensor, "b n"], start: int = 0) -> Float[Tensor, "b n _"]:
        self._check_tokens(seq, "seq")
        x = self.token_emb(self._on_device(seq))
        if self.pos_emb is not None:
            x = x + self.pos_emb.weight[start : start + seq.shape[1]]
        return _residual_stream(self.to_dec_dim(x))

    def _embed_retrieved(
        self, retrieved: Int[Tensor, "b l k r"] | None
    ) -> tuple[Float[Tensor, "b l k r _"] | None, Bool[Tensor, "b l k r"] | None]:
        if retrieved is None:
            return None, None
        self._check_tokens(retrieved, "retrieved")
        embed, retrieved = self.enc_token_emb or self.token_emb, self._on_device(retrieved)
        return _residual_stream(embed(retrieved)), retrieved.ne(self.pad_id)

    @property
    def compilable(self) -> tuple[nn.Module, ...]:
        """The decoder, which calls the encoder."""
        return (self.decoder,)

    # sizes, weights

    @classmethod
    def preset(cls, name: str, **changes) -> "RETRO":
        """A model of the paper's Table 2: "172M", "425M", "1.5B" or "7.5B" (without embeddings).

        `changes` are constructor arguments that differ, such as num_tokens. Build inside
        `torch.device("meta")` to inspect a size without allocating its memory.
        """
        if name not in PRESETS:
            raise ValueError(f"no preset {name!r}: choose one of {', '.join(PRESETS)}")
        return cls(**{**AS_IN_THE_PAPER, **PRESETS[name], **changes})

    def num_parameters(self, embeddings: bool = True) -> int:
        """Number of parameters; embeddings=False leaves out the token, position and output tables."""
        tables = (self.token_emb, self.enc_token_emb, self.pos_emb, self.to_logits)
        left_out = {id(p) for table in tables if table is not None for p in table.parameters()}
        return sum(p.numel() for p in self.parameters() if embeddings or id(p) not in left_out)

    @classmethod
    def from_retro_pytorch(cls, state_dict: Mapping[str, Tensor], **config) -> "RETRO":
        """The model of a retro-pytorch 0.3.9 checkpoint.

        `config` holds the arguments that the checkpoint's RETRO was built with. The reference always has 8
        heads, whatever `heads` was, and so does this model. Outputs differ where the reference misplaces the
        queries of its chunked cross-attention: in every chunk it puts all but the first at position 0.

        Raises:
            ValueError: names or shapes do not fit, so `config` belongs to another model.
        """
        model = cls(**{**config, "heads": 8})
        try:
            model.load_state_dict(renamed(state_dict))
        except RuntimeError as error:
            raise ValueError(f"these are not the weights of retro_pytorch.RETRO(**{config}): {error}") from error
        return model

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device = "cpu") -> "RETRO":
        """The model that `save_pretrained` wrote into `folder`, in evaluation mode.

        `folder` may also be the name of an included model in data/checkpoints, such as "speeches".

        Raises:
            FileNotFoundError: no such folder or name, or a file in it is missing.
            ValueError: the configuration is not RETRO's, the weights are damaged or not finite, or the two do not
                belong together.
        """
        return load(lambda config: cls(**config), RETRO.__name__, folder, device, meta_first=True)


def _residual_stream(x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
    """Cast embeddings to the dtype of the residual stream: autocast's, if it is enabled.

    In bfloat16 the sums are rounded, but a GPU moves half the bytes between two matrix products.
    """
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def _layers(name: str, layers: Sequence[int] | None, depth: int) -> tuple[int, ...]:
    """Numbers of the layers that cross-attend; None means all."""
    layers = tuple(range(1, depth + 1)) if layers is None else tuple(layers)
    if outside := [i for i in layers if not 1 <= i <= depth]:
        raise ValueError(f"{name} names layer {outside[0]}, but the layers are 1 … {depth}: leave it out")
    return layers
