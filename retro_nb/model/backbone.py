"""Hugging Face language models as RETROfit uses them: layers with a place for reading neighbours (notebook 09).

Shapes: b batch, n sequence length, d width.
"""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from retro_nb.common.arrays import PathLike
from retro_nb.model.base import evaluating
from retro_nb.model.pretrained import find_included, included_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTIONS, SECOND_NORMS = ("self_attn", "attn", "attention"), ("post_attention_layernorm", "ln_2")
SAMPLED = 16  # number of weights that identify a language model
ROUNDING = 2**-8  # largest relative change of a weight in bfloat16

Read = Callable[[int, Tensor], Tensor]  # a layer's number and h (b n d): what the layer reads (b n d)


class Block(NamedTuple):
    """A layer of a language model, and the parts of it that RETROfit uses."""

    layer: nn.Module
    attention: nn.Module
    second_norm: nn.Module  # between attention and feed-forward


def language_model(model: nn.Module) -> "PreTrainedModel":
    """The same model, if it is one of Hugging Face's that end in an output layer.

    Raises:
        ValueError: it is another.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise ValueError(
            f"{type(model).__name__} is no Hugging Face causal language model: load one by AutoModelForCausalLM, and "
            f"pass it without a wrapper such as DataParallel (its .module)"
        )
    if absent := [name for name, weight in model.named_parameters() if weight.is_meta]:
        raise ValueError(
            f"{len(absent)} weights of this {type(model).__name__} are not in memory, {absent[0]} first (on disk, "
            f"offloaded, or on the meta device): load it whole, without device_map or offload_folder"
        )
    return model


def blocks(model: nn.Module) -> list[Block]:
    """The layers of a Hugging Face language model, checked on two tokens.

    Raises:
        ValueError: RETROfit does not support their architecture.
    """
    backbone, name = language_model(model), type(model).__name__
    lists = (part for part in backbone.base_model.children() if isinstance(part, nn.ModuleList))
    layers = next(lists, nn.ModuleList())
    found = [block for layer in layers if (block := _block(layer))]
    if not found or len(found) < len(layers):
        raise ValueError(
            f"{name} is not a row of layers with {' or '.join(ATTENTIONS)} and {' or '.join(SECOND_NORMS)}: "
            f"pass a decoder like GPT-2, Llama, Mistral or Qwen"
        )
    _try(backbone, found)
    return found


def _block(layer: nn.Module) -> Block | None:
    attention, norm = (
        next((getattr(layer, each) for each in names if hasattr(layer, each)), None)
        for names in (ATTENTIONS, SECOND_NORMS)
    )
    return None if attention is None or norm is None else Block(layer, attention, norm)


@torch.no_grad()
def _try(backbone: "PreTrainedModel", blocks: list[Block]) -> None:
    """Check that the second half of a layer receives h = x + attention(x), and that the logits are a linear map."""
    seen: dict[str, Tensor] = {}

    def note(module: nn.Module, args: tuple, named: dict) -> None:
        seen["h"] = hidden_states(args, named)

    def add(number: int, h: Tensor) -> Tensor:
        seen["expected"] = h
        return torch.zeros_like(h)

    name = type(backbone).__name__
    ids = torch.tensor([[0, 1]], device=backbone.device)
    with ExitStack() as stack:
        stack.enter_context(evaluating(backbone))
        hook = blocks[0].second_norm.register_forward_pre_hook(note, with_kwargs=True)
        stack.callback(hook.remove)
        stack.enter_context(reading({1: blocks[0]}, add))
        # With return_dict=False, a language model of transformers cannot read what its own layers return.
        stack.callback(setattr, backbone.config, "return_dict", backbone.config.return_dict)
        backbone.config.return_dict = True
        logits = backbone(input_ids=ids, use_cache=False).logits
        hidden = backbone.base_model(input_ids=ids, use_cache=False).last_hidden_state
    if not torch.allclose(seen["h"], seen["expected"]):
        raise ValueError(
            f"{name} does not add its attention to the input of the layer and go on from there (parallel or "
            f"normalised branches): there is no place for chunked cross-attention. Pass e.g. a GPT-2, Llama or Qwen"
        )
    head = backbone.get_output_embeddings()
    if not isinstance(head, nn.Linear) or not torch.equal(head(hidden), logits):
        raise ValueError(f"the logits of {name} are not a linear map of its last layer, as RETROfit needs them")


def hidden_states(args: tuple, named: dict) -> Tensor:
    return args[0] if args else named["hidden_states"]


def hooks(block: Block, read: Callable[[Tensor], Tensor]) -> tuple[RemovableHandle, RemovableHandle]:
    """Register hooks that add read(h), with h = x + attention(x), to the attention's output; return their handles.

    They act in this thread only: another one may use the same language model meanwhile, alone or with neighbours of
    its own.
    """
    entered: list[Tensor] = []
    owner = threading.get_ident()

    def enter(layer: nn.Module, args: tuple, named: dict) -> None:
        if threading.get_ident() == owner:
            entered[:] = [hidden_states(args, named)]

    def leave(attention: nn.Module, args: tuple, output: tuple) -> tuple:
        if threading.get_ident() != owner:
            return output
        attended, *others = output
        return attended + read(entered[0] + attended), *others

    return block.layer.register_forward_pre_hook(enter, with_kwargs=True), block.attention.register_forward_hook(leave)


@contextmanager
def reading(blocks: dict[int, Block], read: Read) -> Iterator[None]:
    """Context in which the layers read after their self-attention; on exit the hooks are removed."""
    with ExitStack() as stack:
        for number, block in blocks.items():
            for hook in hooks(block, partial(read, number)):
                stack.callback(hook.remove)
        yield


def vocabulary_size(backbone: "PreTrainedModel") -> int:
    """Number of tokens that a language model knows: the rows of its embeddings."""
    return len(next(backbone.get_input_embeddings().parameters()))


# loading and identity


def load_backbone(name: PathLike) -> "PreTrainedModel":
    """Load a causal language model by its folder, the name of an included model, or its hub name.

    Raises:
        FileNotFoundError: no such model on this machine.
    """
    from transformers import AutoModelForCausalLM

    source = find_included(name)
    is_local = Path(source).is_dir() or not _on_hub(str(name))
    try:
        model = AutoModelForCausalLM.from_pretrained(source, local_files_only=is_local)
    except OSError as error:
        names = included_names(lambda config: "model_type" in config)  # ours have no type
        raise FileNotFoundError(
            f"there is no language model {str(name)!r} on this machine: pass a folder, the name of an included one "
            f"({names}), or set HF_HUB_OFFLINE=0 and have a network"
        ) from error
    model.config.name_or_path = str(name)
    return model


def _on_hub(name: str) -> bool:
    """Ask the hub once whether it has a model; transformers would ask six times, seconds apart."""
    from huggingface_hub import HfApi

    try:
        return HfApi().model_info(name, timeout=5).id is not None
    except Exception:  # offline, no network, no such name: of many types, which depend on the client
        return False


def identity(backbone: "PreTrainedModel", frozen: bool) -> dict[str, Any]:
    """Data that identify a language model: name, architecture and, if it is frozen, a sample of its weights."""
    architecture = json.loads(backbone.config.to_json_string())  # keys are strings, as after reading config.json
    for key in ("transformers_version", "architectures", "dtype", "torch_dtype", "_name_or_path", "return_dict"):
        architecture.pop(key, None)  # redundant, or may change
    name = backbone.config.name_or_path
    return {"name": name, "architecture": architecture, "sample": _sample(backbone) if frozen else None}


def restore(known: dict[str, Any]) -> "PreTrainedModel":
    """The language model of this `identity`; with random weights if it was trained (the checkpoint has them)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if known["sample"]:
        return load_backbone(known["name"])
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**known["architecture"]))
    model.config.name_or_path = known["name"]
    return model


def check_same(backbone: "PreTrainedModel", known: dict[str, Any]) -> None:
    """Raise a ValueError if this is not the language model of this `identity`.

    Keys that only one configuration has are ignored, because versions of transformers differ in their names.
    """
    own, trained_with = identity(backbone, frozen=known["sample"] is not None), known["architecture"]
    equal = all(value == trained_with.get(name, value) for name, value in own["architecture"].items())
    if not equal or (known["sample"] and not np.allclose(own["sample"], known["sample"], rtol=ROUNDING, atol=1e-7)):
        raise ValueError(f"this {type(backbone).__name__} is not {known['name'] or 'the one'} that the weights are for")


def _sample(backbone: "PreTrainedModel") -> list[float]:
    """Sample of the weights; compared with a tolerance, because they may be loaded in 16 bits next time."""
    weights = list(backbone.parameters())
    picked = np.linspace(0, len(weights) - 1, SAMPLED).astype(int)
    return [float(weights[i].detach().flatten()[-1]) for i in picked]
