"""Settings from YAML files and from the command line: known names, and values of the declared types.

YAML delivers `1e-4` as text and the command line delivers nothing but text, so every value is read as the type
that its parameter declares. A name that nobody knows is an error that says which one was probably meant.
"""

import difflib
import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import yaml


def cast(value: Any, kind: Any) -> Any:
    """Read a value, which may be text from the command line or from YAML, as a declared type.

    Raises:
        ValueError: it cannot be meant as one.
    """
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, UnionType):
        return _cast_to_one_of(value, inner)
    if isinstance(value, str) and origin is not str:
        value = yaml.safe_load(value)
    is_number = isinstance(value, int | float | str) and not isinstance(value, bool)
    if origin is float and is_number:
        return float(value)
    if origin is int and is_number and (isinstance(value, int) or float(value).is_integer()):
        return value if isinstance(value, int) else int(float(value))
    if origin is bool and value in (True, False):
        return bool(value)
    if origin is str and is_number:
        return str(value)
    if origin in (list, Sequence) and isinstance(value, list):
        return [cast(item, inner[0]) if inner else item for item in value]
    if origin is dict and isinstance(value, dict):
        return value
    raise ValueError(value)


def _cast_to_one_of(value: Any, kinds: Sequence[Any]) -> Any:
    if NoneType in kinds and value in (None, "None", "null"):
        return None
    for kind in kinds:
        with suppress(ValueError, TypeError, yaml.YAMLError):
            return cast(value, kind)
    raise ValueError(value)


def refuse_unknown(names: Iterable[str], known: Iterable[str], where: str, knower: str) -> None:
    """Raise a ValueError that names the first unknown name, the closest known one, and all that `knower` knows."""
    known = sorted(known)
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            meant = f" (did you mean {close[0]}?)" if close else ""
            raise ValueError(f"{where}: unknown parameter {name!r}{meant}; {knower} knows {', '.join(known)}")


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        ValueError: it cannot be read, or holds something else.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no `name: value` lines")
    return content


Parameters = dict[str, inspect.Parameter]


def parameters(function: Callable, *names: str, without: Sequence[str] = ()) -> Parameters:
    """The parameters of a function by name: those named, or all but `without`."""
    every = inspect.signature(function).parameters
    return {name: every[name] for name in names or every if name not in without}


def read_as_declared(values: dict[str, Any], declared: Parameters) -> dict[str, Any]:
    """Each value as the type of its parameter; names must be known.

    Raises:
        ValueError: a value cannot be read as one.
    """
    read = {}
    for name, value in values.items():
        try:
            read[name] = cast(value, declared[name].annotation)
        except (ValueError, TypeError, yaml.YAMLError):
            raise ValueError(f"parameter {name}: cannot read {value!r} as declared: {declared[name]}") from None
    return read
