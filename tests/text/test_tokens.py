"""Text to token ids and back: held against BERT's and GPT-2's own rules, written out, and against transformers."""

import json
import os
import re
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, BertConfig, ByT5Tokenizer, GPT2Config

from retro_nb.text.tokens import (
    EOS_ID,
    PAD_ID,
    SMALLEST,
    SOS_ID,
    SpecialIds,
    TextTokenizer,
    bert_folder,
    decode,
    get_tokenizer,
    tokenize,
    train_tokenizer,
)


def test_special_tokens_are_where_bert_expects_them():
    names = [get_tokenizer().token(token) for token in (PAD_ID, SOS_ID, EOS_ID)]
    assert names == ["[PAD]", "[CLS]", "[SEP]"]


def wordpiece(text):
    """BERT's tokenizer for plain ASCII, from its paper: split, then take the longest piece that is known."""
    vocabulary = get_tokenizer().backend.get_vocab()
    for word in re.findall(r"[a-z0-9]+|[^a-z0-9\s]", text.lower()):
        start = 0
        while start < len(word):
            pieces = (("##" if start else "") + word[start:stop] for stop in range(len(word), start, -1))
            piece = next(piece for piece in pieces if piece in vocabulary)
            start += len(piece.removeprefix("##"))
            yield vocabulary[piece]


def test_tokenize_gives_padded_rows_of_word_pieces(sample_corpus):
    texts = [document.text for document in sample_corpus] + ["", "Antediluvian [SEP] (U.S.)"]
    ids = tokenize(texts)
    assert ids.dtype == torch.int64 and ids.shape == (7, max(len(list(wordpiece(t))) for t in texts) + 2)
    for text, row in zip(texts, ids.tolist(), strict=True):
        expected = [101, *wordpiece(text), 102]
        assert row == expected + [0] * (len(row) - len(expected))
    assert tokenize("the people").tolist() == [[101, *wordpiece("the people"), 102]]
    assert tokenize("the people", add_special_tokens=False).tolist() == [list(wordpiece("the people"))]
    assert tokenize([]).shape == (0, 0) and tokenize("", add_special_tokens=False).shape == (1, 0)


def test_decode_is_the_way_back_for_plain_text():
    ids = tokenize("the antediluvian people")[0]
    for kind in (ids, ids.numpy().astype(np.int32), ids.tolist()):
        assert decode(kind) == "the antediluvian people"


def test_a_tokenizer_is_loaded_once_and_again_when_it_has_changed(tmp_path):
    file = tmp_path / "tokenizer_config.json"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{bert_folder()}/{name}", tmp_path)
    assert get_tokenizer(tmp_path) is get_tokenizer(str(tmp_path))
    assert get_tokenizer(tmp_path).fingerprint == get_tokenizer().fingerprint
    about = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**about, "do_lower_case": False}), encoding="utf-8")
    os.utime(file, ns=(1, 1))
    assert get_tokenizer(tmp_path).fingerprint != get_tokenizer().fingerprint
    assert tokenize("The", tokenizer=tmp_path).tolist() != tokenize("The").tolist()


# any tokenizer


SPECIAL = {
    "bert": ("[PAD]", "[CLS]", "[SEP]"),
    "bpe": ("<|pad|>", "<|start|>", "<|end|>"),
    "gpt2": (None, "<|end|>", "<|end|>"),
    "llama3": (None, "<|start|>", "<|end|>"),
    "llama2": (None, "<s>", "</s>"),
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_special_ids_are_the_tokenizers_own_and_padding_may_be_the_next_id(tokenizers, kind):
    folder = tokenizers.get(kind, bert_folder())
    ids, made = AutoTokenizer.from_pretrained(folder).get_vocab(), get_tokenizer(folder)
    pad, sos, eos = SPECIAL[kind]
    assert made.ids == (len(ids) if pad is None else ids[pad], ids[sos], ids[eos])
    assert made.size == len(ids) + (pad is None)
    assert [made.token(each) for each in made.ids] == [pad or "[PAD]", sos, eos]
    rows = tokenize(["a", "a b a"], tokenizer=folder)
    texts = [made.encode([text])[0] for text in ("a", "a b a")]
    assert rows[1].tolist() == [ids[sos], *texts[1], ids[eos]]
    assert rows[0].tolist() == [ids[sos], *texts[0], ids[eos], *[made.ids.pad] * (len(texts[1]) - len(texts[0]))]


@pytest.mark.parametrize(("kind", "pad"), [("gpt2", "<|end|>"), ("llama3", "<|start|>"), ("llama2", "<unk>")])
def test_padding_that_means_something_else_as_well_is_replaced(tokenizers, tmp_path, kind, pad):
    """Else the end of a document would not be learnt, or an unknown character not be read."""
    folder = edited(tokenizers[kind], tmp_path / kind, "tokenizer_config.json", lambda was: was | {"pad_token": pad})
    ids = AutoTokenizer.from_pretrained(folder).get_vocab()
    assert pad in ids and get_tokenizer(folder).ids == get_tokenizer(tokenizers[kind]).ids
    assert get_tokenizer(folder).ids.pad == max(ids.values()) + 1


@pytest.mark.parametrize("kind", ["gpt2", "bpe"])
def test_ids_may_have_gaps(tokenizers, tmp_path, kind):
    """Padding is still no word, and the vocabulary reaches to the last id."""

    def with_a_gap(rules):
        moved = {word: i + 50 * (i > 200) for word, i in rules["model"]["vocab"].items()}
        return rules | {"model": rules["model"] | {"vocab": moved}}

    made = get_tokenizer(edited(tokenizers[kind], tmp_path / "gap", "tokenizer.json", with_a_gap))
    last = max(made.backend.get_vocab().values())
    assert last == made.backend.get_vocab_size() - 1 + 50 and made.backend.id_to_token(last) is not None
    assert (made.ids.pad, made.size) == ((0, last + 1) if kind == "bpe" else (last + 1, last + 2))
    assert made.own_size == last + 1, "what a model must know: padding of ours is not in it"


def edited(source, folder, name, change):
    """A copy of a tokenizer with one of its JSON files changed."""
    shutil.copytree(source, folder)
    content = json.loads((folder / name).read_text(encoding="utf-8"))
    (folder / name).write_text(json.dumps(change(content)), encoding="utf-8")
    return folder


def gpt2s_byte(character):
    """The byte that a character of a byte-level token stands for: itself, or the next of those that cannot be seen."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    unseen = [byte for byte in range(256) if byte not in seen]
    return ord(character) if ord(character) in seen else unseen[ord(character) - 256]


BYTE_LEVEL = ["bpe", "gpt2", "llama3"]
texts = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("ab \n'tse中👍🏽\u0301"), max_size=60)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=texts, kind=st.sampled_from(BYTE_LEVEL))
@example(text="<|end|><|start|> <|pad|>", kind="bpe")  # in a text they are text
@example(text="<|end|>", kind="gpt2")
def test_byte_level_tokens_are_the_bytes_of_the_text_and_come_back_as_it(tokenizers, text, kind):
    made = get_tokenizer(tokenizers[kind])
    (ids,) = made.encode([text])
    assert bytes(gpt2s_byte(character) for token in ids for character in made.token(token)) == text.encode()
    assert not set(ids) & set(made.ids)
    rows = tokenize([text, "a longer text than that one"], tokenizer=made)
    assert decode(rows[0], tokenizer=made) == made.decode(np.array(ids, np.int32)) == text


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=texts.map(lambda text: text.replace("▁", "")))
def test_sentencepiece_gives_back_all_but_its_own_sign_for_a_space(tokenizers, text):
    made = get_tokenizer(tokenizers["llama2"])
    assert made.decode(made.encode([text])[0]) == text


def test_a_trained_tokenizer_learns_the_most_frequent_pairs(tmp_path):
    """Within words: t + h six times, Ġ + th five, Ġth + e three, Ġthe + n once; then nothing is left to learn."""
    stats = train_tokenizer(["th th th", " the the then"], tmp_path, size=1000, progress=False)
    made = get_tokenizer(tmp_path)
    learnt = [made.token(id) for id in range(SMALLEST, made.size)]
    assert learnt == ["th", "Ġth", "Ġthe", "Ġthen"] and stats == {"size": SMALLEST + 4}
    assert [made.token(id) for id in range(3)] == ["<|pad|>", "<|start|>", "<|end|>"]
    assert {gpt2s_byte(made.token(id)) for id in range(3, SMALLEST)} == set(range(256))


def test_a_trained_tokenizer_is_the_same_each_time_and_no_larger_than_asked(tmp_path, sample_corpus, run_apart):
    texts = [document.text + " naïve \ud800" for document in sample_corpus]  # half a character, too
    train_tokenizer(texts, tmp_path / "here", size=300, progress=False)
    assert run_apart(train_apart, texts, tmp_path / "apart") == [0]
    names = ["tokenizer.json", "tokenizer_config.json"]
    here, apart = ([(tmp_path / place / name).read_bytes() for name in names] for place in ("here", "apart"))
    assert here == apart and sorted(os.listdir(tmp_path / "here")) == names
    assert get_tokenizer(tmp_path / "here").size == 300


def train_apart(texts, folder):
    train_tokenizer(texts, folder, size=300, progress=False)


def test_transformers_reads_a_trained_tokenizer(tokenizers):
    made, loaded = get_tokenizer(tokenizers["bpe"]), AutoTokenizer.from_pretrained(tokenizers["bpe"])
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id) == made.ids and len(loaded) == made.size
    for text in ("the people of  every state", "naïve 中文\n\n\t’s", ""):
        ids = loaded(text, add_special_tokens=False).input_ids
        assert ids == made.encode([text])[0] and loaded.decode(ids) == text


@pytest.mark.parametrize("size", [258, 0, -1])
def test_a_vocabulary_without_room_for_all_bytes_is_refused(tmp_path, size):
    with pytest.raises(ValueError, match=f"a vocabulary of {size} has no room for all bytes: pass 259 or more"):
        train_tokenizer(["a text"], tmp_path, size=size)
    assert not os.listdir(tmp_path)
    assert train_tokenizer(["a text"], tmp_path, size=259, progress=False) == {"size": 259}


@pytest.mark.parametrize(("words", "dtype"), [(2**16 - 1, np.uint16), (2**16, np.uint16), (2**16 + 1, np.int32)])
def test_arrays_of_ids_are_as_narrow_as_the_vocabulary_allows(words, dtype):
    made = of_words(words)
    assert made.size == words and made.dtype == dtype
    assert np.array([words - 1]).astype(made.dtype) == words - 1


def of_words(count):
    """A tokenizer that knows the words w0, w1, …, of which the first three are special."""
    model = models.WordLevel({f"w{i}": i for i in range(count)}, unk_token="w0")
    return TextTokenizer(Tokenizer(model), SpecialIds(0, 1, 2))


def test_identity_is_that_of_rules_and_special_ids_wherever_they_lie(tokenizers, tmp_path):
    shutil.copytree(tokenizers["gpt2"], tmp_path / "copy")
    copy = get_tokenizer(tmp_path / "copy")
    assert copy is not get_tokenizer(tokenizers["gpt2"])
    assert copy.fingerprint == get_tokenizer(tokenizers["gpt2"]).fingerprint
    every = {get_tokenizer(folder).fingerprint for folder in (None, *tokenizers.values())}
    assert len(every) == 5, "bpe and gpt2 differ by their special ids alone"


# what is refused


@pytest.mark.parametrize("config", [None, BertConfig(), GPT2Config()], ids=["nothing", "a BERT", "a GPT-2"])
def test_a_folder_without_a_tokenizer_is_named(tmp_path, config):
    """Also where transformers makes one up that knows no words, since it knows what kind the model is of."""
    if config is not None:
        config.save_pretrained(tmp_path)
    message = rf"there is no tokenizer '{re.escape(str(tmp_path))}' .*: AutoTokenizer.*save_pretrained\("
    with pytest.raises(FileNotFoundError, match=message):
        get_tokenizer(tmp_path)


def test_a_tokenizer_that_cannot_end_a_document_is_refused(tokenizers, tmp_path):
    def endless(about):
        return {name: value for name, value in about.items() if name != "eos_token"}

    folder = edited(tokenizers["bpe"], tmp_path / "endless", "tokenizer_config.json", endless)
    with pytest.raises(ValueError, match=rf"{re.escape(str(folder))} names neither sep_token nor eos_token: set one"):
        get_tokenizer(folder)


def test_a_tokenizer_in_python_is_refused(tmp_path):
    """It cannot say which characters a token came from."""
    ByT5Tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a tokenizer written in Python, ByT5Tokenizer: pass one that is_fast"):
        get_tokenizer(tmp_path)


def test_a_hub_name_without_a_network_says_what_to_do():
    message = r"there is no tokenizer 'somebody/no-bert' on this machine: pass a folder, or set HF_HUB_OFFLINE=0"
    with pytest.raises(FileNotFoundError, match=message) as caught:
        get_tokenizer("somebody/no-bert")
    assert isinstance(caught.value.__cause__, OSError)


def train_on_full_disk(folder):
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    with pytest.raises(OSError, match=r"could not write .*tokenizer\.json: File too large.*MB are free"):
        train_tokenizer(["a text"], folder, size=300, progress=False)


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process are POSIX")
def test_a_full_disk_names_the_tokenizers_file(tmp_path, run_apart):
    assert run_apart(train_on_full_disk, tmp_path) == [0] and not list(tmp_path.iterdir())
