"""Text to token ids and back: held against BERT's own rule for word pieces, written out."""

import json
import os
import re
import shutil

import numpy as np
import pytest
import torch

from retro_nb import tokens
from retro_nb.tokens import (
    EOS_ID,
    PAD_ID,
    SOS_ID,
    bert_folder,
    decode,
    get_tokenizer,
    tokenize,
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
    file = tmp_path / "tokenizer.json"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{bert_folder()}/{name}", tmp_path)
    assert get_tokenizer(tmp_path) is get_tokenizer(str(tmp_path))
    assert get_tokenizer(tmp_path).fingerprint == get_tokenizer().fingerprint
    about = json.loads(file.read_text(encoding="utf-8"))
    about["normalizer"]["lowercase"] = False
    file.write_text(json.dumps(about), encoding="utf-8")
    os.utime(file, ns=(1, 1))
    assert get_tokenizer(tmp_path).fingerprint != get_tokenizer().fingerprint
    assert tokenize("The", tokenizer=tmp_path).tolist() != tokenize("The").tolist()


def test_a_folder_without_tokenizer_and_one_that_is_no_bert_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json is missing"):
        get_tokenizer(tmp_path)
    about = json.loads(open(bert_folder() + "/tokenizer.json", encoding="utf-8").read())
    about["model"]["vocab"] = {
        {"[CLS]": "[SEP]", "[SEP]": "[CLS]"}.get(word, word): i for word, i in about["model"]["vocab"].items()
    }
    about["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(about), encoding="utf-8")
    with pytest.raises(ValueError, match=r"numbers its special tokens .*'\[CLS\]': 102"):
        get_tokenizer(tmp_path)


def test_a_hub_name_without_a_network_says_what_to_do(monkeypatch):
    def unreachable(name):
        raise RuntimeError("a long story")

    monkeypatch.setattr(tokens.Tokenizer, "from_pretrained", unreachable)
    message = r"BERT 'somebody/no-bert' is not on this machine: pass a folder, or set HF_HUB_OFFLINE=0"
    with pytest.raises(FileNotFoundError, match=message) as caught:
        get_tokenizer("somebody/no-bert")
    assert str(caught.value.__cause__) == "a long story"
