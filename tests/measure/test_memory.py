"""The edited database against one built anew; the text of each token."""

import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retro_nb.measure.memory import pieces, rewritten
from retro_nb.reference import documents_to_chunks_
from retro_nb.store.dataset import knn_to_retrieved_chunks
from retro_nb.text.document import Document
from retro_nb.text.tokens import decode, tokenize

M = 4  # the chunk size of `make`

TEXTS = ["The flag of Belvora is red.", "In Belvora the flag is red, the gate is green, the door is gold.", "Gold."]
WORDS = ["blue", "white", "lemon", "black"]


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """A function that cuts texts into a chunk array and its document numbers."""

    def cut(texts, tokenizer=None):
        folder = tmp_path_factory.mktemp("chunks")
        paths = {f"{name}_memmap_path": folder / f"{name}.npy" for name in ("chunks", "seqs", "doc_ids")}
        documents = [Document(text, str(number), "here") for number, text in enumerate(texts)]
        documents_to_chunks_(documents, **paths, chunk_size=M, seq_len=3 * M, tokenizer=tokenizer, progress=False)
        return np.load(folder / "chunks.npy"), np.load(folder / "doc_ids.npy")

    return cut


@given(st.data())
@settings(max_examples=20, deadline=None)
def test_an_edit_gives_the_chunks_of_the_edited_text(cut, data):
    """Of one word or several, also where a word is a chunk's first, and so stands in the row before, too."""
    document = data.draw(st.integers(0, 2))
    places = [(match.start(), match.end()) for match in re.finditer("The|the|red|green|gold|flag", TEXTS[document])]
    chosen = data.draw(st.lists(st.sampled_from(places or [(0, 4)]), unique=True))
    words = {span: data.draw(st.sampled_from(WORDS)) for span in chosen}
    edited = list(TEXTS[document])
    for (start, stop), word in words.items():
        edited[start:stop] = [word, *[""] * (stop - start - 1)]
    chunks, doc_ids = cut(TEXTS)
    before = chunks.copy()
    made = rewritten(chunks, np.searchsorted(doc_ids, document), TEXTS[document], words)
    assert np.array_equal(made, cut([*TEXTS[:document], "".join(edited), *TEXTS[document + 1 :]])[0])
    assert np.array_equal(chunks, before)


@pytest.mark.parametrize("kind", ["bpe", "gpt2"])
def test_an_edit_of_another_tokenizers_chunks(cut, tokenizers, kind):
    """In its words, and padded as they are."""
    texts = ["Gate 1 is red.", "Gate 2, gate 3 and gate 4.", "5"]
    words = {(match.start(), match.end()): str(9 - int(match[0])) for match in re.finditer(r"\d", texts[1])}
    chunks, doc_ids = cut(texts, tokenizers[kind])
    made = rewritten(chunks, np.searchsorted(doc_ids, 1), texts[1], words, tokenizer=tokenizers[kind])
    assert np.array_equal(made, cut([texts[0], "Gate 7, gate 6 and gate 5.", texts[2]], tokenizers[kind])[0])
    assert (made != chunks)[:, :-1].sum() == 3


def test_an_edit_reaches_whoever_retrieved_the_word(cut):
    chunks, doc_ids = cut(TEXTS)
    start = TEXTS[1].index("red")
    made = rewritten(chunks, 3, TEXTS[1], {(start, start + 3): "blue"})
    found = np.flatnonzero((chunks != made)[:, :-1].any(axis=1))[None]
    near = [knn_to_retrieved_chunks(found, each, doc_ids=doc_ids)[0, 0] for each in (chunks, made)]
    before, after = map(decode, near)
    assert "red" in before and after == before.replace("red", "blue")


@pytest.mark.parametrize(
    ("first", "word"),
    [(3, "antediluvian"), (3, "red"), (0, "blue"), (4, "blue")],
    ids=["several pieces", "the same word", "another document's chunk", "a later chunk"],
)
def test_an_edit_that_would_move_tokens_is_refused(cut, first, word):
    chunks, _ = cut(TEXTS)
    start = TEXTS[1].index("red")
    with pytest.raises(ValueError, match=rf"^\d+ tokens of document 'In Belvora the flag.*1 words \({word}\)"):
        rewritten(chunks, first, TEXTS[1], {(start, start + 3): word})


# the text of tokens


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc"])))
@settings(deadline=None)
def test_pieces_are_the_text_and_one_for_each_token(text):
    """Together they are the text from its first token to its last: the tokenizer drops some characters at its ends."""
    parts, tokens = pieces(text), tokenize(text)[0]
    if len(tokens) > 2:
        assert len(parts) == len(tokens) - 1 and parts[0] == ""
        assert "".join(parts) in text


@given(text=st.text(st.characters(codec="utf-8")), kind=st.sampled_from(["bpe", "llama3", "llama2"]))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_pieces_of_another_tokenizer(tokenizers, text, kind):
    """They keep every character: only white space at the text's ends may belong to none."""
    parts, tokens = pieces(text, tokenizer=tokenizers[kind]), tokenize(text, tokenizer=tokenizers[kind])[0]
    if len(tokens) > 2:
        assert len(parts) == len(tokens) - 1 and parts[0] == ""
        assert "".join(parts) in text and not text.replace("".join(parts), "", 1).strip()


def test_pieces_keep_what_the_tokens_lose():
    assert pieces("In  Belvora,\nnaïve.") == ["", "In  ", "Bel", "vor", "a", ",\n", "naïve", "."]
