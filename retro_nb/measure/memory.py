"""A database in which words were exchanged: does the model say what it reads? (notebook 07)

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
    """The text of each token of a document, with the white space after it: [CLS] has none, [SEP] is left out."""
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
    """The chunk array as it would be if some words of a document were others: a database that has been edited.

    The words are exchanged in the document's text, and the text is cut into chunks anew. What was found stays found:
    the neighbours of all chunks are left as they were, only what they say has changed.

    Args:
        chunks: the chunk array; it stays as it is.
        first: the number of the document's first chunk.
        text: the document's text.
        words: what is to stand in place of the characters [start, stop).
        tokenizer: the chunk array's (see `tokens.get_tokenizer`).

    Raises:
        ValueError: not exactly one token changes for each word. If their number did, all later tokens would move.
    """
    edited, m = text, chunks.shape[1] - 1
    for (start, stop), word in sorted(words.items(), reverse=True):  # from the end: the places before stay
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
