"""Chunks become vectors by a frozen BERT (notebook 02).

The key of a chunk is BERT(N) averaged over time (paper, §2.3). What is indexed and what is asked for go
through one function, `embed_chunks`, with one framing: `[CLS] the chunk's words [SEP]`. The reference frames
them differently on the two sides, so that a chunk lies at a distance from itself and may find other neighbours.
"""

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from retro_nb.manifest import array_key, cached
from retro_nb.storage import PathLike, ResumableRows, open_array
from retro_nb.tokens import EOS_ID, PAD_ID, SOS_ID, bert_folder

if TYPE_CHECKING:
    from transformers import BertModel

# Rows whose embeddings are written together: what a killed build has to do again.
BLOCK_ROWS = 1024


def best_device() -> torch.device:
    """The first GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the processor multiplies it natively, else float32.

    A CPU without AVX512-BF16 or AMX runs bfloat16 too, several times slower than float32.
    """
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        checks = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
        native = device.type == "cpu" and any(check() for check in checks if check)
    return torch.bfloat16 if native else torch.float32


def get_bert(bert: PathLike | None = None, device: torch.device | str | None = None) -> "BertModel":
    """A frozen BERT in eval mode (see `tokens.bert_folder` for what may be named), loaded once."""
    return _load_bert(bert_folder(bert), _weights(bert), torch.device(device or best_device()))


Weights = tuple[tuple[str, int, int], ...]


def _weights(bert: PathLike | None) -> Weights:
    """Name, size and time of change of the files with a BERT's weights; none if it lies in no folder here."""
    folder = Path(bert_folder(bert))
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    return tuple((str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files)


@lru_cache(maxsize=2)
def _load_bert(source: str, weights: Weights, device: torch.device) -> "BertModel":
    """`weights` is there so that files that have changed are loaded again."""
    from transformers import AutoModel  # takes seconds: only where a BERT is really wanted
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # its report on the pooler, which is not used here, says nothing
    logging.disable_progress_bar()
    try:
        model = AutoModel.from_pretrained(source, add_pooling_layer=False)
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    return model.to(device=device, dtype=best_dtype(device)).eval().requires_grad_(False)


def bert_fingerprint(bert: PathLike | None = None) -> str:
    """Identity of a BERT: the SHA-256 of its weights, or its name if it lies in no folder here."""
    weights = _weights(bert)
    return _hash_weights(weights) if weights else bert_folder(bert)


@lru_cache(maxsize=4)
def _hash_weights(weights: Weights) -> str:
    checksum = hashlib.sha256()
    for name, *_ in weights:
        checksum.update(Path(name).read_bytes())
    return checksum.hexdigest()[:16]


@torch.no_grad()
def bert_embed(
    token_ids: Int[Tensor, "b n"],
    return_cls_repr: bool = False,
    eps: float = 1e-8,
    pad_id: int | float = PAD_ID,
    *,
    bert: PathLike | None = None,
    device: torch.device | str | None = None,
) -> Float[Tensor, "b d"]:
    """BERT's representation of token ids that begin with [CLS], in float32 on the CPU.

    Args:
        token_ids: rows of ids, padded on the right.
        return_cls_repr: the last hidden state of [CLS] instead of the mean over the other tokens.
        eps: keeps the mean of a row without tokens at 0.
        pad_id: marks what is not attended and not averaged.
        bert: which BERT (see `tokens.bert_folder`).
        device: where to run it; the first GPU if there is one, else the CPU.

    Raises:
        ValueError: the rows are longer than the BERT's positions, or an id is outside its vocabulary.
    """
    model = get_bert(bert, device)
    limit, vocabulary = model.config.max_position_embeddings, model.config.vocab_size
    if token_ids.shape[1] > limit:
        raise ValueError(f"{token_ids.shape[1]} tokens in a row, but this BERT has {limit} positions: shorten it")
    if not token_ids.numel():
        return torch.zeros(len(token_ids), model.config.hidden_size)
    if not 0 <= int(token_ids.min()) <= int(token_ids.max()) < vocabulary:
        lowest, highest = int(token_ids.min()), int(token_ids.max())
        raise ValueError(f"ids from {lowest} to {highest}, but this BERT knows 0 to {vocabulary - 1}: same tokenizer?")
    ids = token_ids.to(model.device)
    mask = ids != pad_id
    attended = mask.clone()
    attended[:, :1] = True  # a row of padding alone would leave the softmax nothing to sum over
    hidden = model(input_ids=ids, attention_mask=attended).last_hidden_state.float()
    if return_cls_repr:
        return hidden[:, 0].cpu()
    weight = rearrange(mask[:, 1:].float(), "b n -> b n 1")
    return ((hidden[:, 1:] * weight).sum(dim=1) / (weight.sum(dim=1) + eps)).cpu()


def frame_chunks(chunks: Int[Tensor, "b m"]) -> Int[Tensor, "b m_plus_2"]:
    """`[CLS] words [SEP]` for each chunk, padded on the right.

    Special tokens inside a chunk (the document's own [CLS] and [SEP], padding) are left out first, so that
    the first, middle and last chunk of a document are framed alike.
    """
    special = torch.tensor([PAD_ID, SOS_ID, EOS_ID], device=chunks.device)
    words = ~torch.isin(chunks, special)
    order = torch.argsort(~words, dim=1, stable=True)  # words to the left, their order kept
    moved = torch.gather(chunks * words, 1, order)
    framed = torch.nn.functional.pad(moved, (1, 1), value=PAD_ID)
    framed[:, 0] = SOS_ID
    end = words.sum(dim=1, keepdim=True) + 1
    return framed.scatter(1, end, EOS_ID)


def embed_chunks(
    chunks: Int[Tensor, "b m"],
    *,
    use_cls_repr: bool = False,
    bert: PathLike | None = None,
    device: torch.device | str | None = None,
) -> Float[Tensor, "b d"]:
    """The vectors of chunks, for building an index and for asking it: BERT(N) averaged over time."""
    return bert_embed(frame_chunks(chunks), use_cls_repr, bert=bert, device=device)


def embedding_dim(bert: PathLike | None = None) -> int:
    """Width of a BERT's vectors: 384 for the default, 768 for bert-base-cased."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(bert_folder(bert)).hidden_size


def chunks_to_embeddings_(
    *,
    num_chunks: int,
    chunks_memmap_path: PathLike,
    embeddings_memmap_path: PathLike,
    chunk_size: int = 64,
    embed_dim: int | None = None,
    batch_size: int = 64,
    use_cls_repr: bool = False,
    pad_id: int | float = PAD_ID,
    bert: PathLike | None = None,
    device: torch.device | str | None = None,
    force_reprocess: bool = False,
    progress: bool = True,
) -> dict:
    """Embed every chunk of a chunk array to disk (float32, num_chunks × embed_dim).

    A build that was interrupted goes on where it stopped; one that is finished, with the same chunks, BERT
    and pooling, is not repeated.

    Args:
        num_chunks, chunk_size: shape of the chunk array, without the extra token.
        chunks_memmap_path, embeddings_memmap_path: the file to read and the file to write.
        embed_dim: the width expected; the BERT's if left out.
        batch_size: chunks per forward pass.
        use_cls_repr: [CLS] instead of the mean.
        pad_id: the id of padding, 0.
        bert, device: see `bert_embed`.

    Returns:
        `rows`, `dim`, `dtype` of the computation.

    Raises:
        ValueError: `embed_dim` is not this BERT's width, the chunk array has another shape, or its rows are
            longer than the BERT's positions.
    """
    dim = embedding_dim(bert)
    if embed_dim not in (None, dim):
        raise ValueError(f"embed_dim {embed_dim}, but this BERT gives vectors of {dim}: leave embed_dim out")
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: pass 1 or more")
    if pad_id != PAD_ID:
        raise ValueError(f"pad_id {pad_id}: chunk arrays are padded with {PAD_ID}")
    chunks = open_array(chunks_memmap_path, shape=(num_chunks, chunk_size + 1))
    device = torch.device(device or best_device())
    settings = {
        "chunks": array_key(chunks_memmap_path),
        "num_chunks": num_chunks,
        "bert": bert_fingerprint(bert),
        "pooling": "cls" if use_cls_repr else "mean",
    }

    def build() -> dict:
        rows = ResumableRows(embeddings_memmap_path, (num_chunks, dim), np.float32, settings)
        with tqdm(total=num_chunks, initial=rows.done, desc="embedding", unit=" chunks", disable=not progress) as bar:
            for block in rows.blocks(BLOCK_ROWS):
                vectors = []
                for start in range(block.start, block.stop, batch_size):
                    part = chunks[start : min(start + batch_size, block.stop), :-1]
                    ids = torch.from_numpy(part.astype(np.int64))
                    vectors.append(embed_chunks(ids, use_cls_repr=use_cls_repr, bert=bert, device=device))
                    bar.update(len(part))
                rows.write(block, torch.cat(vectors).numpy())
        rows.finish()
        return {"rows": num_chunks, "dim": dim, "dtype": str(best_dtype(device)).removeprefix("torch.")}

    return cached(embeddings_memmap_path, settings, build, force_reprocess=force_reprocess)
