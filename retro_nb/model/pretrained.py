"""Saving and loading weights: safetensors with a config, and the reference implementation's state dict."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from retro_nb.common.arrays import SOURCE, PathLike, read_json, replacing, write_json

Model = TypeVar("Model", bound="Saveable")
INCLUDED = SOURCE / "data" / "checkpoints"  # models included in the project

# Regular expressions from the names of retro-pytorch's parameters to ours.
RETRO_PYTORCH_NAMES = [
    (r"^to_decoder_model_dim\.", "to_dec_dim."),
    (r"(layers\.\d+)\.0\.", r"\1.attn."),
    (r"(layers\.\d+)\.1\.", r"\1.cross_attn."),
    (r"(layers\.\d+)\.2\.", r"\1.ff."),
    (r"\.fn\.cross_attn\.", ".fn.attn."),
    (r"\.fn\.ff\.", ".fn.net."),
]


class Saveable(nn.Module):
    """A model that writes its weights and arguments, for `load`."""

    config: dict[str, Any]

    @property
    def own_weights(self) -> nn.Module:
        """The part whose weights `save_pretrained` writes."""
        return self

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model.safetensors and config.json into `folder`, each atomically."""
        save(self.own_weights, self.config, type(self).__name__, folder)


def renamed(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the parameters of a retro-pytorch state dict to ours."""
    weights = {}
    for name, value in state_dict.items():
        if name.endswith("inv_freq"):
            continue  # rotary frequencies, computed here
        if name.replace(".weight", ".gamma") in state_dict:  # the weight of a gated RMSNorm is its gate
            name = name.replace(".weight", ".gate")
        for theirs, ours in RETRO_PYTORCH_NAMES:
            name = re.sub(theirs, ours, name)
        weights[name] = value
    return weights


def plain_config(arguments: dict) -> dict:
    """Constructor arguments in JSON form."""
    config = {key: value for key, value in arguments.items() if key not in ("self", "__class__")}
    for key, value in config.items():
        if isinstance(value, type):
            config[key] = value.__name__
        elif isinstance(value, Sequence) and not isinstance(value, str):
            config[key] = list(value)
    return config


def _kind(name: str) -> str:
    return f"retro_nb.{name}"


def _read_config(path: Path, name: str) -> dict:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict) or config.get("model") != _kind(name):
        raise ValueError(f"{path} is not the configuration of a {name} saved with save_pretrained")
    return config


def save(weights: nn.Module, config: dict, name: str, folder: str | Path) -> None:
    """Write a model of the class `name`: model.safetensors and config.json, each atomically."""
    config = {"model": _kind(name), **config}
    with replacing(Path(folder) / "model.safetensors") as temporary:
        temporary.touch()
        readers = temporary.stat().st_mode
        save_model(weights, str(temporary), metadata={"config": json.dumps(config)})
        temporary.chmod(readers)  # safetensors lets only the owner read
    write_json(Path(folder) / "config.json", config)


def find_included(name: PathLike) -> PathLike:
    """Folder of the included model `name`; any other name or path is returned unchanged."""
    return INCLUDED / name if (INCLUDED / name).is_dir() and not Path(name).is_dir() else name


def included_names(wanted: Callable[[dict], bool]) -> str:
    """Names of the included models with such a config.json, for error messages."""
    paths = sorted(INCLUDED.glob("*/config.json"))
    return ", ".join(path.parent.name for path in paths if wanted(read_json(path))) or "none"


def load_weights(weights: nn.Module, folder: str | Path, device: str | torch.device = "cpu") -> None:
    """Load the weights that `save` wrote into a module of the same architecture."""
    load_model(weights, Path(folder) / "model.safetensors", device=str(device))


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the tensors that contain non-finite values. Waits for the device once."""
    named = [(name, tensor) for name, tensor in tensors if tensor.is_floating_point()]
    if not named:
        return []
    finite = torch.stack([tensor.detach().isfinite().all() for _, tensor in named]).tolist()
    return [name for (name, _), sound in zip(named, finite, strict=True) if not sound]


def _check_shapes(model: nn.Module, path: Path) -> None:
    """Reject a file whose tensors do not have the model's shapes; the model may be on the meta device."""
    with safe_open(path, "pt") as weights:
        saved = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}
    own = model.state_dict(keep_vars=True)
    stored = {id(own[name]) for name in saved.keys() & own.keys()}  # of tied weights, one is saved
    for name, tensor in own.items():
        if saved.get(name, shape := tuple(tensor.shape)) != shape:
            raise ValueError(f"{name} has the shape {saved[name]} in the file and {shape} in the model")
        if id(tensor) not in stored:
            raise ValueError(f"the file has no {name}")


def load(
    build: Callable[[dict], Model],
    name: str,
    folder: str | Path,
    device: str | torch.device = "cpu",
    *,
    meta_first: bool = False,
) -> Model:
    """Load a model that `save` wrote into build(config), in evaluation mode. Errors as in `from_pretrained`.

    With `meta_first`, the shapes are compared on the meta device before the model takes time and memory.
    """
    folder = Path(find_included(folder))
    if not folder.is_dir():
        names = included_names(lambda config: config.get("model") == _kind(name))
        raise FileNotFoundError(f"{folder} is no folder with a model, nor the name of an included one ({names})")
    config_path, weights_path = folder / "config.json", folder / "model.safetensors"
    for path in (config_path, weights_path):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: save_pretrained({str(folder)!r}) writes it")
    config = _read_config(config_path, name)
    try:
        with safe_open(weights_path, "pt") as weights:
            saved_with = json.loads((weights.metadata() or {}).get("config", "null"))
        if saved_with != config:
            raise ValueError("they were saved with another configuration")
        arguments = {key: value for key, value in config.items() if key != "model"}
        if meta_first:
            with torch.device("meta"):
                _check_shapes(build(arguments), weights_path)
        model = build(arguments)
        load_weights(model.own_weights, folder, device)
        if broken := not_finite(model.own_weights.named_parameters()):
            raise ValueError(f"{len(broken)} tensors hold numbers that are not finite, {broken[0]} first")
    except (SafetensorError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{weights_path} does not hold the weights of the model in {config_path}: {error}. Save both "
            f"again with save_pretrained"
        ) from error
    return model.to(device).eval()
