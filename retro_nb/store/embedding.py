"""A frozen BERT turns chunks into vectors (notebook 02).

The key of a chunk is BERT(N) averaged over time (paper, §2.3). Indexed chunks (`write_vectors`) and queries
(`embed_chunks`) get the same frame, `[CLS] the chunk's words [SEP]`, and the same average. The reference frames them
differently, so that a chunk has a non-zero distance to itself and may find other neighbours.
"""

import hashlib
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int, Integer
from safetensors import safe_open
from torch import Tensor
from tqdm.auto import tqdm

from retro_nb.common.arrays import PathLike, ResumableRows, open_array
from retro_nb.common.devices import best_device, best_dtype, send
from retro_nb.common.launch import launched
from retro_nb.common.manifest import array_key, cached
from retro_nb.store.chunking import read_documents, store_tokenizer
from retro_nb.store.settings import StoreSettings
from retro_nb.text.tokens import BERTS_IDS, PAD_ID, SpecialIds, TextTokenizer, bert_folder, get_tokenizer, padded

if TYPE_CHECKING:
    from transformers import BertModel


class Sizes(NamedTuple):
    """Numbers of chunks that a device processes at a time."""

    batch: int  # chunks per forward pass: enough to keep the device busy, few enough for a CPU's cache
    block: int  # chunks written together: the work that a killed build repeats
    ahead: int  # blocks started before an earlier one is written, so that a GPU never waits for the disk


ON_CPU, ON_GPU = Sizes(32, 1024, ahead=0), Sizes(2048, 8192, ahead=2)


def sizes_on(device: torch.device) -> Sizes:
    """`Sizes` for a device."""
    return ON_GPU if device.type == "cuda" else ON_CPU


def get_bert(bert: PathLike | None = None, device: torch.device | str | None = None) -> "BertModel":
    """Frozen BERT in eval mode, loaded once (see `tokens.bert_folder` for the accepted names)."""
    return _load_bert(bert_folder(bert), _weights(bert), torch.device(device or best_device()))


Weights = tuple[tuple[str, int, int], ...]


def _weights(bert: PathLike | None) -> Weights:
    """Name, size and modification time of a BERT's weight files; empty if it is not in a local folder."""
    folder = Path(bert_folder(bert))
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    return tuple((str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files)


@lru_cache(maxsize=2)
def _load_bert(source: str, weights: Weights, device: torch.device) -> "BertModel":
    """Load a BERT; `weights` is only a cache key, so that changed files are loaded again."""
    from transformers import AutoModel  # takes seconds: only when a BERT is needed
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # its report on the unused pooler is irrelevant
    logging.disable_progress_bar()
    try:
        with _explain_loading(source):
            model, report = AutoModel.from_pretrained(source, add_pooling_layer=False, output_loading_info=True)
            if missing := sorted(report["missing_keys"]):  # transformers would draw them at random
                raise ValueError(f"{len(missing)} tensors are missing in its weights, first {missing[0]}")
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    return model.to(device=device, dtype=best_dtype(device)).eval().requires_grad_(False)


@contextmanager
def _explain_loading(source: str) -> Iterator[None]:
    """Around loading a BERT: errors name it and what is needed."""
    try:
        yield
    except Exception as error:  # of many types, some from Rust
        kind = FileNotFoundError if isinstance(error, OSError) else ValueError
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if Path(source).is_absolute() and not Path(source).exists():
            reason = "there is no such folder"
        raise kind(
            f"{source} cannot be loaded as a BERT: {reason.rstrip('.')}. Pass the folder of a BertModel or a similar "
            f"encoder, with config.json, tokenizer.json and model.safetensors (model.save_pretrained and "
            f"tokenizer.save_pretrained write them), or its name on the hub"
        ) from error


def check_bert(bert: PathLike | None = None) -> None:
    """Raise unless a BERT's configuration can be read, and its weights, in a local folder, are there and whole.

    Raises:
        FileNotFoundError, ValueError: the message names what is missing or damaged.
    """
    embedding_dim(bert)
    source = bert_folder(bert)
    with _explain_loading(source):
        if Path(source).is_dir() and not _weights(bert):
            raise FileNotFoundError("there is no model.safetensors or pytorch_model.bin in it")
        for name, *_ in _weights(bert):
            if name.endswith(".safetensors"):
                safe_open(name, framework="pt").keys()


def bert_fingerprint(bert: PathLike | None = None) -> str:
    """Identity of a BERT: the SHA-256 of its weights, or its name if it is not in a local folder."""
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
    """Embed rows of token ids that begin with [CLS]; the vectors are float32 on the CPU.

    Args:
        token_ids: rows of ids, padded on the right.
        return_cls_repr: the last hidden state of [CLS] instead of the mean over the other tokens.
        eps: keeps the mean of a row without tokens at 0.
        pad_id: marks padding, which is neither attended to nor averaged.
        bert: which BERT (see `tokens.bert_folder`).
        device: where to run it; this process's GPU if there is one, else the CPU.

    Raises:
        ValueError: the rows are longer than the BERT's positions, or an id is outside its vocabulary.
        FloatingPointError: a vector is not finite.
    """
    model = get_bert(bert, device)
    if not token_ids.numel():
        return torch.zeros(len(token_ids), model.config.hidden_size)
    _check_ids(model.config, token_ids.shape[1], int(token_ids.min()), int(token_ids.max()))
    words = token_ids != pad_id
    mask = None if words.all() else words.to(model.device)
    vectors = _vectors(model, token_ids.to(model.device), mask, return_cls_repr, eps).cpu()
    check_vectors(vectors.numpy())
    return vectors


def check_vectors(
    vectors: Float[np.ndarray, "b d"], first: int = 0, chunks_memmap_path: PathLike | None = None
) -> None:
    """Raise if a vector is not finite: distances to it are meaningless.

    Args:
        vectors: the vectors of consecutive rows.
        first: the number of the first row.
        chunks_memmap_path: the chunk array they were computed from, for naming the document.

    Raises:
        FloatingPointError: names the first such row, and its document.
    """
    bad = first + np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if not len(bad):
        return
    where = f"of {len(bad)} row(s), the first of them row {bad[0]}"
    if chunks_memmap_path is not None:
        where = f"of {len(bad)} chunk(s), the first of them chunk {bad[0]} of {chunks_memmap_path}"
        with suppress(FileNotFoundError):  # the reference's arrays record no documents
            for number, document in enumerate(read_documents(chunks_memmap_path)):
                if document["chunks"][0] <= bad[0] < document["chunks"][1]:
                    where += f", in document {number}, {document['title']!r}"
    raise FloatingPointError(
        f"the BERT gives vectors that are not finite: {where}. Nothing of them was stored. Load or download the BERT "
        f'again, try device="cpu", or leave the document out'
    )


def _check_ids(config: Any, length: int, lowest: int, highest: int) -> None:
    """Raise ValueError unless the BERT can read rows of `length` ids from `lowest` to `highest`."""
    if length > config.max_position_embeddings:
        limit = config.max_position_embeddings
        raise ValueError(f"{length} tokens in a row, but this BERT has {limit} positions: shorten it")
    if not 0 <= lowest <= highest < config.vocab_size:
        last = config.vocab_size - 1
        raise ValueError(f"ids from {lowest} to {highest}, but this BERT knows 0 to {last}: same tokenizer?")


def _vectors(
    model: "BertModel", ids: Int[Tensor, "b n"], mask: Bool[Tensor, "b n"] | None, cls: bool, eps: float = 1e-8
) -> Float[Tensor, "b d"]:
    """Compute the vectors of `bert_embed` on the model's device, without waiting for a GPU.

    A mask of None means no padding; attention is faster then.
    """
    attended = None
    if mask is not None:
        attended = mask.clone()
        attended[:, :1] = True  # a row of padding alone would leave the softmax nothing to sum over
        attended = torch.where(rearrange(attended, "b n -> b 1 1 n"), 0.0, torch.finfo(model.dtype).min)
        attended = attended.to(model.dtype)  # added to the scores
    hidden = model(input_ids=ids, attention_mask=attended).last_hidden_state
    if cls:
        return hidden[:, 0].float()
    if mask is None:
        return hidden[:, 1:].sum(dim=1, dtype=torch.float32) / (ids.shape[1] - 1 + eps)
    return masked_mean(hidden.float(), mask, eps)


def masked_mean(
    hidden: Float[Tensor, "b n d"],
    mask: Bool[Tensor, "b n"],
    eps: float = 1e-8,
) -> Float[Tensor, "b d"]:
    """Mean of the hidden states where `mask` is true, without the first, which is [CLS]'s.

    `eps` keeps the mean of a row without tokens at 0.
    """
    weight = rearrange(mask[:, 1:].float(), "b n -> b n 1")
    return (hidden[:, 1:] * weight).sum(dim=1) / (weight.sum(dim=1) + eps)


def frame_chunks(chunks: Int[Tensor, "b m"], ids: SpecialIds = BERTS_IDS) -> Int[Tensor, "b m_plus_2"]:
    """Frame each chunk as `[CLS] words [SEP]`, padded on the right.

    Special tokens inside a chunk (the document's [CLS] and [SEP], padding) are removed first, so that the first,
    middle and last chunks of a document get the same frame. `ids` are the BERT's special ids.
    """
    words = ~torch.isin(chunks, torch.tensor(ids, device=chunks.device))
    order = torch.argsort(~words, dim=1, stable=True)  # words to the left, their order kept
    moved = torch.gather(chunks.masked_fill(~words, ids.pad), 1, order)
    framed = torch.nn.functional.pad(moved, (1, 1), value=ids.pad)
    framed[:, 0] = ids.sos
    end = words.sum(dim=1, keepdim=True) + 1
    return framed.scatter(1, end, ids.eos)


def frames_for_bert(
    chunks: Int[Tensor, "b m"], tokenizer: TextTokenizer | None = None, *, bert: PathLike | None = None
) -> Int[Tensor, "b _"]:
    """Frame chunks of any tokenizer for a BERT.

    Ids of the BERT's tokenizer are used as they are; other ids are decoded, and their text is tokenised again. A text
    with more tokens than the BERT has positions is truncated.
    """
    berts = get_tokenizer(bert)
    if tokenizer is None or tokenizer.fingerprint == berts.fingerprint:
        return frame_chunks(chunks, berts.ids)
    room = _config(bert).max_position_embeddings - 2
    texts = [tokenizer.decode(row) for row in chunks.tolist()]
    rows = [[berts.ids.sos, *row[:room], berts.ids.eos] for row in berts.encode(texts)]
    return padded(rows, berts.ids.pad)


def embed_chunks(
    chunks: Int[Tensor, "b m"],
    *,
    tokenizer: TextTokenizer | None = None,
    use_cls_repr: bool = False,
    bert: PathLike | None = None,
    device: torch.device | str | None = None,
) -> Float[Tensor, "b d"]:
    """Embed chunks, for building an index and for querying it: BERT(N) averaged over time.

    Args:
        chunks: token ids.
        tokenizer: the tokenizer of these ids; the BERT's if left out. Ids of another one are embedded as text.
        use_cls_repr: [CLS] instead of the mean.
        bert, device: see `bert_embed`.
    """
    frames = frames_for_bert(chunks, tokenizer, bert=bert)
    return bert_embed(frames, use_cls_repr, pad_id=get_tokenizer(bert).ids.pad, bert=bert, device=device)


def embedding_dim(bert: PathLike | None = None) -> int:
    """Width of a BERT's vectors: 384 for the default, 768 for bert-base-cased."""
    return _config(bert).hidden_size


def _config(bert: PathLike | None) -> Any:
    from transformers import AutoConfig

    with _explain_loading(bert_folder(bert)):
        return AutoConfig.from_pretrained(bert_folder(bert))


def flops_per_chunk(config: Any, tokens: int) -> int:
    """Floating-point operations of a BERT's matrix products for a row of `tokens` tokens.

    A product of (a, b) with (b, c) takes 2·a·b·c: a multiplication and an addition per term. A chunk of 64 words is
    framed as 66 tokens.

    Args:
        config: the BERT's, e.g. `get_bert().config`.
    """
    d, inner = config.hidden_size, config.intermediate_size
    projections = 2 * tokens * d * 4 * d  # queries, keys, values, output
    attention = 2 * 2 * tokens * tokens * d  # scores, weighted values
    feed_forward = 2 * 2 * tokens * d * inner
    return config.num_hidden_layers * (projections + attention + feed_forward)


# to disk


def _batches(lengths: list[int], longest: int, size: int) -> Iterator[slice]:
    """Split rows of ascending length into batches; rows of length `longest` stay apart, since they need no mask."""
    shorter = bisect_left(lengths, longest)
    for first, last in ((0, shorter), (shorter, len(lengths))):
        for start in range(first, last, size):
            yield slice(start, min(start + size, last))


@torch.inference_mode()
def begin_block(
    chunks: Integer[np.ndarray, "c m"],
    tokenizer: TextTokenizer,
    batch_size: int | None = None,
    on_batch: Callable[[int], Any] = lambda size: None,
    *,
    use_cls_repr: bool = False,
    bert: PathLike | None = None,
    device: torch.device | str | None = None,
) -> Callable[[], np.ndarray]:
    """Start embedding a store's chunks; the returned function gives the vectors, and waits for a GPU if necessary.

    Chunks of similar length share a batch, so that there is hardly any padding.

    Args:
        chunks: token ids of a block of chunks.
        tokenizer: the tokenizer of these ids.
        batch_size: chunks per forward pass; None for the device's (`sizes_on`).
        on_batch: called with the number of chunks in each batch.
        use_cls_repr, bert, device: see `embed_chunks`.
    """
    device, pad_id = torch.device(device or best_device()), get_tokenizer(bert).ids.pad
    framed = frames_for_bert(torch.from_numpy(chunks.astype(np.int32)), tokenizer, bert=bert)
    model = get_bert(bert, device)
    _check_ids(model.config, framed.shape[1], int(framed.min()), int(framed.max()))
    sizes, order = (framed != pad_id).sum(dim=1).sort(stable=True)
    framed, lengths, parts = send(framed[order], model.device), sizes.tolist(), []
    for batch in _batches(lengths, framed.shape[1], batch_size or sizes_on(device).batch):
        shortest, longest = lengths[batch.start], lengths[batch.stop - 1]
        ids = framed[batch, :longest]
        parts.append(_vectors(model, ids, None if shortest == longest else ids != pad_id, use_cls_repr))
        on_batch(len(ids))
    vectors = torch.cat(parts)[send(order.argsort(), model.device)]
    if vectors.device.type != "cuda":
        return vectors.numpy
    fetched = vectors.to("cpu", non_blocking=True)
    copied = torch.cuda.current_stream(vectors.device).record_event()

    def wait() -> np.ndarray:
        copied.synchronize()
        return fetched.numpy()

    return wait


def embedding_settings(
    chunks_memmap_path: PathLike, num_chunks: int, bert: PathLike | None, use_cls_repr: bool
) -> dict:
    """Everything that the vectors of a chunk array depend on, as recorded in the manifest."""
    return {
        "chunks": array_key(chunks_memmap_path),
        "num_chunks": num_chunks,
        "bert": bert_fingerprint(bert),
        "pooling": "cls" if use_cls_repr else "mean",
        "tokenizers": [store_tokenizer(chunks_memmap_path, bert).fingerprint, get_tokenizer(bert).fingerprint],
    }


def write_vectors(
    chunks_path: Path,
    vectors_path: Path,
    settings: StoreSettings,
    *,
    shape: tuple[int, int] | None = None,
    fill: Callable[[ResumableRows], None] | None = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    force_reprocess: bool = False,
    progress: bool = True,
) -> dict:
    """Embed every chunk of a chunk array to disk, as float32 rows.

    Chunks of a tokenizer other than the BERT's are embedded as text. An interrupted build resumes where it stopped; a
    finished one with the same chunks, BERT and pooling is reused. Processes launched together on a host
    (`accelerate launch`, torchrun) share the work, and each must call this.

    Args:
        chunks_path, vectors_path: the file to read and the file to write.
        settings: the store's; its `bert` and `use_cls_repr` are used.
        shape: shape of the chunk array, (c, m + 1); only a raw memory map, as the reference writes, needs it.
        fill: writes all missing rows, if the caller embeds them.
        batch_size: chunks per forward pass; the device's if left out (`sizes_on`).
        device: where to embed; see `bert_embed`.

    Returns:
        `rows`, `dim`, `dtype` of the computation.

    Raises:
        ValueError: the rows are longer than the BERT's positions.
        FloatingPointError: a vector is not finite; the message names the chunk and its document. It is not stored.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: pass 1 or more")
    chunks, device = open_array(chunks_path, shape=shape), torch.device(device or best_device())
    count, dim = len(chunks), embedding_dim(settings.bert)
    described = embedding_settings(chunks_path, count, settings.bert, settings.use_cls_repr)

    def build() -> dict:
        rows = ResumableRows(vectors_path, (count, dim), np.float32, described, shared=fill is None)
        if fill:
            fill(rows)
        else:
            _embed_blocks(rows, chunks, chunks_path, settings, batch_size, device, progress)
        rows.finish()
        return {"rows": count, "dim": dim, "dtype": str(best_dtype(device)).removeprefix("torch.")}

    return cached(vectors_path, described, build, force_reprocess=force_reprocess, shared=fill is None)


def _embed_blocks(
    rows: ResumableRows,
    chunks: Integer[np.ndarray, "c m_plus_1"],
    chunks_path: Path,
    settings: StoreSettings,
    batch_size: int | None,
    device: torch.device,
    progress: bool,
) -> None:
    """Embed and write this process's share of the missing rows; a thread writes while the next block is embedded."""
    bert, sizes = settings.bert, sizes_on(device)
    options: dict[str, Any] = {"use_cls_repr": settings.use_cls_repr, "bert": bert, "device": device}
    tokenizer, blocks, writes = store_tokenizer(chunks_path, bert), list(rows.blocks(sizes.block)), deque[Future]()
    total, hidden = sum(block.stop - block.start for block in blocks), not progress or launched()[0] > 0

    def write(block: slice, fetch: Callable[[], np.ndarray]) -> None:
        vectors = fetch()
        check_vectors(vectors, block.start, chunks_path)
        rows.write(block, vectors)

    bar = tqdm(total=total, desc="embedding", unit=" chunks", disable=hidden)
    with bar, ThreadPoolExecutor(1) as writer:
        for block in blocks:
            fetch = begin_block(chunks[block, :-1], tokenizer, batch_size, bar.update, **options)
            writes.append(writer.submit(write, block, fetch))
            if len(writes) > sizes.ahead:
                writes.popleft().result()
        for each in writes:
            each.result()
