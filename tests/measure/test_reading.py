"""The weights of the cross-attention against what the layers give; the edited database against one built anew."""

import re

import numpy as np
import pytest
import torch
from einops import rearrange
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_retros import OPTIONS, batch, every_option, make
from torch.testing import assert_close

from retro_nb.measure.reading import cross_attention, pieces, rewritten
from retro_nb.store.chunking import documents_to_chunks_
from retro_nb.store.dataset import knn_to_retrieved_chunks
from retro_nb.text.document import Document
from retro_nb.text.tokens import decode, tokenize

M = 4  # the chunk size of `make`


def what_layers_did(retro, seq, retrieved) -> dict[int, tuple]:
    """For each layer of P its cross-attention, its memory, which chunks that holds, and what it gave."""
    seen, hooks = {}, []
    for number, layer in enumerate(retro.decoder.layers, start=1):
        if layer.cross_attn is not None:

            def note(cca, given, named, out, number=number):
                seen[number] = cca, given[1], named.get("kept"), out

            hooks.append(layer.cross_attn.fn.register_forward_hook(note, with_kwargs=True))
    with torch.no_grad():
        retro(seq, retrieved)
    for hook in hooks:
        hook.remove()
    return seen


@every_option
@pytest.mark.parametrize("n", [4, 7, 8, 14, 24])
def test_weights_times_values_are_what_the_layer_gives(option, n):
    """Token by token: the null value and the values of the chunk it reads, weighted; also where some have none."""
    retro = make(**OPTIONS[option])
    seq, retrieved = batch(n)
    retrieved[torch.rand(retrieved.shape) < 0.2] = 0
    if n >= 12:
        retrieved[1, 1] = 0  # a chunk without neighbours
    weights = cross_attention(retro, seq, retrieved)
    done = what_layers_did(retro, seq, retrieved)
    assert list(weights) == list(done) == [2, 3]
    for number, (cca, memory, kept, out) in done.items():
        attn, l = cca.attn, n // M
        rows = list(range(len(seq) * l)) if kept is None else kept.tolist()
        null = rearrange(attn.null_v, "(h d) -> h 1 d", h=attn.heads)
        for text in range(len(seq)):
            for i in range(M - 1, n):
                chunk, own = text * l + (i + 1) // M - 1, weights[number][text, :, i]
                assert_close(own.sum(dim=-1), torch.ones(attn.heads))
                value = own[:, :1] * null[:, 0]
                if chunk in rows:
                    row = rows.index(chunk)
                    value = value + (own[:, 1:, None] * memory.values[row]).sum(dim=1)
                    assert not own[:, 1:][:, ~memory.mask[row]].any(), "padding was read"
                else:
                    assert (own[:, 0] == 1).all() and not own[:, 1:].any()
                assert_close(attn.to_out(rearrange(value, "h d -> (h d)")), out[text, i], atol=1e-5, rtol=1e-4)


def test_the_first_tokens_read_nothing_and_weights_say_who_reads_whom():
    """Other neighbours of chunk 1 change the weights of those tokens only that read them, in the first layer of P."""
    retro, (seq, retrieved) = make(), batch(13, b=1)
    other = retrieved.clone()
    other[0, 1] = other[0, 1] % 39 + 1
    before, after = (cross_attention(retro, seq, near)[2][0] for near in (retrieved, other))
    assert not before[:, : M - 1].any()
    moved = (before != after).any(dim=-1).any(dim=0).nonzero()[:, 0].tolist()
    assert moved == [7, 8, 9, 10]


def test_dropout_is_off_and_the_model_left_as_it_was():
    retro, (seq, retrieved) = make(dec_attn_dropout=0.5, dec_ff_dropout=0.5), batch(8)
    calm = cross_attention(retro, seq, retrieved)
    retro.train()
    again = cross_attention(retro, seq, retrieved)
    assert retro.training and all(torch.equal(calm[number], again[number]) for number in calm)
    assert not any(layer.cross_attn.fn._forward_pre_hooks for layer in retro.decoder.layers if layer.cross_attn)


def test_without_a_chunk_there_is_nothing_to_read():
    retro, (seq, retrieved) = make(), batch(3)
    with pytest.raises(ValueError, match="3 tokens are no chunk of 4"):
        cross_attention(retro, seq, retrieved)


# editing

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
