"""Language models as RETROfit sees them: where it can read and where it cannot, and how a model is known again."""

import json
import os
import socket
import subprocess
import sys
import threading
from copy import deepcopy

import pytest
import torch
from accelerate import disk_offload
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_language_models import CONFIGS, LAYERS, SIZES, language_model
from torch import nn
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    BertModel,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPTNeoXConfig,
    GraniteConfig,
    Olmo2Config,
    OPTConfig,
    PhiConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from retro_nb.model import pretrained
from retro_nb.model.backbone import blocks, check_same, identity, load_backbone, reading, restore

every_family = pytest.mark.parametrize("family", CONFIGS)
IDS = torch.arange(3, 14).view(1, -1)


# where it can read


@every_family
def test_a_layer_is_taken_apart(family):
    model = language_model(family).train()
    found = blocks(model)
    assert len(found) == LAYERS and model.training
    done = []
    for number, block in enumerate(found):
        for name, part in block._asdict().items():
            part.register_forward_hook(lambda _, __, ___, what=(number, name): done.append(what))
    model(IDS)
    assert done == [(number, name) for number in range(LAYERS) for name in ("attention", "second_norm", "layer")]


@every_family
@given(numbers=st.sets(st.integers(1, LAYERS)), where=st.integers(0, 10), seed=st.integers(0, 9))
@settings(max_examples=6, deadline=None)
def test_what_is_read_joins_h_and_nothing_else(family, numbers, where, seed):
    """h reaches the second norm with what was read of it; what one token reads changes no token before it."""
    model, asked, got = language_model(family, seed), {}, {}
    found = dict(enumerate(blocks(model), start=1))
    added = {number: torch.zeros(1, 11, 16) for number in found}
    for each in added.values():
        each[:, where] = torch.randn(16)
    for number, block in found.items():
        block.second_norm.register_forward_pre_hook(lambda _, args, number=number: got.update({number: args[0]}))

    def read(number, h):
        asked[number] = h
        return added[number]

    plain = model(IDS).logits
    with reading({number: found[number] for number in sorted(numbers)}, read):
        fitted = model(IDS).logits
    assert asked.keys() == numbers
    for number, h in asked.items():
        assert_close(got[number], h + added[number])
    changed = (fitted != plain).any(dim=-1)[0]
    assert not changed[:where].any() and changed[where] == bool(numbers)
    assert torch.equal(model(IDS).logits, plain)


def test_hooks_are_gone_even_after_an_error():
    model = language_model("llama")
    found = dict(enumerate(blocks(model), start=1))

    def fail(number, h):
        raise RuntimeError("nothing to read")

    plain = model(IDS).logits
    with pytest.raises(RuntimeError, match="nothing to read"), reading(found, fail):
        model(IDS)
    assert torch.equal(model(IDS).logits, plain)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


# where it cannot


def of_config(kind, **sizes):
    return lambda: AutoModelForCausalLM.from_config(kind(vocab_size=300, **{**SIZES, **sizes}))


def bert(kind, **changes):
    return lambda: kind(BertConfig(vocab_size=300, **{**SIZES, "pad_token_id": 0}, **changes))


def t5():
    return T5ForConditionalGeneration(T5Config(vocab_size=300, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2))


def with_pictures():
    vision = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=28)
    text = dict(vocab_size=300, head_dim=8, **SIZES)
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision | {"patch_size": 14}))


NO_MODEL, NO_LAYERS, NO_PLACE = "no Hugging Face causal", "is not a row of layers with", "no place for chunked cross"


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (lambda: nn.Linear(2, 2), "Linear", NO_MODEL),
        (bert(BertModel), "BertModel", NO_MODEL),
        (bert(BertForMaskedLM), "BertForMaskedLM", NO_LAYERS),
        (bert(BertLMHeadModel, is_decoder=True), "BertLMHeadModel", NO_LAYERS),
        (t5, "T5ForConditionalGeneration", NO_LAYERS),
        (with_pictures, "Gemma3ForConditionalGeneration", NO_LAYERS),
        (of_config(PhiConfig), "PhiForCausalLM", NO_LAYERS),  # one norm for both branches
        (of_config(OPTConfig, ffn_dim=16, word_embed_proj_dim=16), "OPTForCausalLM", NO_LAYERS),
        (of_config(GPTNeoXConfig), "GPTNeoXForCausalLM", NO_PLACE),  # parallel branches: Pythia
        (of_config(Gemma2Config, head_dim=8), "Gemma2ForCausalLM", NO_PLACE),  # a norm behind each branch, too
        (of_config(Olmo2Config), "Olmo2ForCausalLM", NO_PLACE),  # a norm behind each branch
        (of_config(GraniteConfig, residual_multiplier=0.5), "GraniteForCausalLM", NO_PLACE),
        (of_config(GraniteConfig, logits_scaling=2.0), "GraniteForCausalLM", "not a linear map of its last layer"),
    ],
)
def test_models_without_a_place_to_read_are_refused(make, name, message):
    model = make().train()
    with pytest.raises(ValueError, match=rf"{name} .*{message}|{message} .*{name}"):
        blocks(model)
    assert all(part.training and not part._forward_hooks for part in model.modules())


def test_the_sequential_kind_of_gpt_neox_is_taken():
    assert len(blocks(of_config(GPTNeoXConfig, use_parallel_residual=False)())) == LAYERS


# where it comes from


def test_a_model_by_its_folder_or_among_those_that_come_with_the_project(tmp_path, monkeypatch):
    model = language_model("gpt2")
    model.save_pretrained(tmp_path / "included" / "tiny")
    monkeypatch.setattr(pretrained, "INCLUDED", tmp_path / "included")
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "included/tiny", tmp_path / "included" / "tiny"):
        loaded = load_backbone(name)
        assert torch.equal(loaded(IDS).logits, model(IDS).logits) and not loaded.training
        assert loaded.config.name_or_path == str(name)


@pytest.mark.parametrize("name", ["nobody/nothing", "nowhere", "a/path/to/nowhere"])
def test_no_such_model(name, tmp_path):
    for each in (name, tmp_path / name):
        with pytest.raises(FileNotFoundError, match=f"no language model '{each}' on this machine: pass a folder"):
            load_backbone(each)


ASKING = """
from retro_nb.model.backbone import load_backbone
try:
    load_backbone("nowhere")
except FileNotFoundError as error:
    print(error)
"""


def test_a_hub_that_does_not_answer_is_asked_once_and_the_included_models_are_named():
    with socket.create_server(("127.0.0.1", 0)) as hub:
        asked = []

        def hang_up():
            while True:
                try:
                    connection = hub.accept()[0]
                except OSError:
                    return
                asked.append(connection.recv(100))
                connection.close()

        threading.Thread(target=hang_up, daemon=True).start()
        there = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.getsockname()[1]}", "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-c", ASKING]
        done = subprocess.run(command, env=os.environ | there, capture_output=True, text=True)
    assert "no language model 'nowhere' on this machine" in done.stdout and "(almanac-lm)" in done.stdout, done.stderr
    assert len([request for request in asked if b"nowhere" in request]) == 1


def offloaded(folder):
    model = language_model("gpt2")
    disk_offload(model, folder)
    return model


def on_meta(folder):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(language_model("gpt2").config)


@pytest.mark.parametrize("make", [offloaded, on_meta])
def test_a_model_whose_weights_are_elsewhere_is_refused(make, tmp_path):
    with pytest.raises(ValueError, match=r"are not in memory, transformer\.wte\.weight first .*load it whole"):
        blocks(make(tmp_path))


def test_a_wrapped_model_is_refused():
    with pytest.raises(ValueError, match=r"DataParallel is no Hugging Face .*\.module"):
        blocks(nn.DataParallel(language_model("gpt2")))


# how it is known again


@every_family
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_a_model_is_known_again_however_it_is_held(family, kind, tmp_path):
    model = language_model(family)
    known = json.loads(json.dumps(identity(model, frozen=True)))
    model.save_pretrained(tmp_path / "whole")
    deepcopy(model).to(kind).save_pretrained(tmp_path / "half")
    read = AutoModelForCausalLM.from_pretrained
    held = read(tmp_path / "whole"), read(tmp_path / "half"), read(tmp_path / "half", dtype=torch.float32)
    for each in (model, deepcopy(model).to(kind), *held):
        check_same(each, known)


@every_family
def test_another_model_is_not_taken_for_it(family):
    model = language_model(family)
    known = identity(model, frozen=True)
    trained_on = deepcopy(model)
    with torch.no_grad():
        for weight in trained_on.parameters():
            weight.mul_(1.01)
    deeper = {"n_layer": 4} if family == "gpt2" else {"num_hidden_layers": 4}
    for other in (language_model(family, seed=1), trained_on, language_model(family, **deeper)):
        with pytest.raises(ValueError, match=f"this {type(model).__name__} is not the one that the weights are for"):
            check_same(other, known)


def test_the_same_weights_in_another_architecture():
    model = language_model("llama")
    other = language_model("llama", rms_norm_eps=1e-3)
    other.load_state_dict(model.state_dict())
    model.config.name_or_path = "somebody/llama"
    with pytest.raises(ValueError, match="this LlamaForCausalLM is not somebody/llama that the weights are for"):
        check_same(other, identity(model, frozen=True))


def test_names_of_classes_are_read_again():
    """Their keys are numbers, which JSON does not have: distilgpt2's configuration is like that."""
    model = language_model("gpt2")
    model.config.id2label = {0: "LABEL_0"}
    known = json.loads(json.dumps(identity(model, frozen=True)))
    check_same(model, known)


def test_another_version_of_transformers_has_other_names_in_its_configurations():
    model = language_model("llama")
    known = identity(model, frozen=True)
    del known["architecture"]["pretraining_tp"]
    known["architecture"]["what_comes_with_the_next_version"] = None
    check_same(model, known)
    known["architecture"]["num_attention_heads"] = 1
    with pytest.raises(ValueError, match="is not the one that the weights are for"):
        check_same(model, known)


@every_family
def test_a_model_that_was_trained_too_is_made_anew(family):
    model = language_model(family)
    model.config.name_or_path = "somebody/something"
    known = json.loads(json.dumps(identity(model, frozen=False)))
    made = restore(known)
    check_same(made, known)
    assert made.config.name_or_path == "somebody/something"
    made.load_state_dict(model.state_dict())
    assert_close(made.eval()(IDS).logits, model(IDS).logits, atol=0, rtol=0)


def test_a_model_that_stays_as_it_is_is_looked_for_by_name(tmp_path):
    language_model("gpt2").save_pretrained(tmp_path)
    model = load_backbone(tmp_path)
    known = identity(model, frozen=True)
    assert torch.equal(restore(known)(IDS).logits, model(IDS).logits)
    with pytest.raises(FileNotFoundError, match="no language model 'gone'"):
        restore(known | {"name": "gone"})
