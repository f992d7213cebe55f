"""A database with replaced words: does the model say what it reads? (notebook 07)

Shapes: c chunks of the corpus, m tokens in each.
"""

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
from jaxtyping import Int32, Integer

from retro_nb.common.arrays import PathLike
from retro_nb.store.chunking import document_tokens, tokens_to_chunks
from retro_nb.text.tokens import TextTokenizer, get_tokenizer


def pieces(text: str, *, tokenizer: PathLike | TextTokenizer | None = None) -> list[str]:
    """Text of each token of a document, with the white space after it; empty for [CLS], without [SEP]."""
    starts = [start for part in document_tokens(text, tokenizer=tokenizer) for start, _ in part.spans.tolist()]
    return [text[start:stop] for start, stop in pairwise(starts)]


def rewritten(
    chunks: Integer[np.ndarray, "c m_plus_1"],
    first: int | np.integer,
    text: str,
    words: Mapping[tuple[int, int], str],
    *,
    tokenizer: PathLike | TextTokenizer | None = None,
) -> Int32[np.ndarray, "c m_plus_1"]:
    """Copy of the chunk array in which some words of a document are replaced: an edited database.

    The words are replaced in the document's text, and the text is chunked again. The neighbours of all chunks remain
    the same; only their content changes.

    Args:
        chunks: the chunk array; it is not modified.
        first: the number of the document's first chunk.
        text: the document's text.
        words: replacements of the characters [start, stop).
        tokenizer: the chunk array's (see `tokens.get_tokenizer`).

    Raises:
        ValueError: not exactly one token changes for each word. Another number of tokens would shift all later ones.
    """
    edited, m = text, chunks.shape[1] - 1
    for (start, stop), word in sorted(words.items(), reverse=True):  # from the end, so that earlier places stay valid
        edited = edited[:start] + word + edited[stop:]
    tokenizer = get_tokenizer(tokenizer)
    cut = tokens_to_chunks(document_tokens(edited, tokenizer=tokenizer), m, tokenizer.ids.pad)
    rows = np.concatenate([part.rows for part in cut])
    old = chunks[first : first + len(rows)]
    changed = int((rows[:, :-1] != old[:, :-1]).sum()) if rows.shape == old.shape else rows.size
    if changed != len(words):
        raise ValueError(
            f"{changed} tokens of document {text[:30]!r} change with {len(words)} words ({', '.join(words.values())}): "
            f"pass another word of one word piece in place of each, and the first chunk of this text"
        )
    made = chunks.astype(np.int32)
    made[first : first + len(rows)] = rows
    return made
