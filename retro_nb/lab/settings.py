"""Settings from YAML files and from the command line: known names, and values of the declared types.

YAML delivers `1e-4` as text and the command line delivers nothing but text, so every value is read as the type
that its parameter declares. A name that nobody knows is an error that says which one was probably meant. A file or a
notebook may come from somebody else: nothing in it is evaluated, and what YAML may hold is limited.
"""

import ast
import difflib
import inspect
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import reduce
from itertools import groupby
from operator import or_
from pathlib import Path
from types import GenericAlias, NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import docstring_parser
import yaml

from retro_nb.common.arrays import PathLike, write_text

MOST_BYTES = 10**6  # of a YAML file
MOST_VALUES = 10**5  # in it, an alias counting as all that it stands for
DEEPEST = 30  # lists and mappings within one another


# values and their types


def parse_as(value: Any, kind: Any) -> Any:
    """Read a value, which may be text from the command line or from YAML, as a declared type.

    Raises:
        ValueError: it cannot be meant as one.
    """
    try:
        return _cast(value, kind)
    except (TypeError, OverflowError, yaml.YAMLError) as error:
        raise ValueError(str(error)) from error


def _cast(value: Any, kind: Any) -> Any:
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, UnionType):
        return _cast_to_one_of(value, inner)
    if isinstance(value, str) and origin is not str:
        value = load_yaml(value)
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
        return [_cast(item, inner[0]) if inner else item for item in value]
    if origin in (dict, Mapping) and isinstance(value, dict):
        return {_cast(key, inner[0]): _cast(item, inner[1]) for key, item in value.items()} if inner else value
    raise ValueError(value)


def _cast_to_one_of(value: Any, kinds: Sequence[Any]) -> Any:
    if NoneType in kinds and value in (None, "None", "null"):
        return None
    for kind in kinds:
        with suppress(ValueError):
            return parse_as(value, kind)
    raise ValueError(value)


TYPES = {kind.__name__: kind for kind in (int, float, str, bool, list, dict)} | {"List": list, "Dict": dict}
LONGEST = 200  # characters of an annotation


def read_annotation(text: str) -> Any:
    """The type that an annotation in a notebook means: a name in TYPES, `list[X]`, `dict[X, Y]`, `Optional[X]`,
    `Union[X, Y]` or `X | Y`.

    Raises:
        ValueError: it is another one, which is not evaluated.
    """
    try:
        return _kind(ast.parse(text if len(text) <= LONGEST else "", mode="eval").body)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        known = ", ".join([*TYPES, "list[X]", "dict[X, Y]", "Optional[X]", "X | Y"])
        raise ValueError(f"the annotation {text!r:.80} is not known: write one of {known}") from None


def _kind(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=None):
            return NoneType
        case ast.Constant(value=str(text)):
            return read_annotation(text)
        case ast.Name(id=name) if name in TYPES:
            return TYPES[name]
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _kind(left) | _kind(right)
        case ast.Subscript(value=ast.Name(id="Optional"), slice=inner):
            return _kind(inner) | None
        case ast.Subscript(value=ast.Name(id="Union"), slice=ast.Tuple(elts=[_, *_] as kinds)):
            return reduce(or_, map(_kind, kinds))
        case ast.Subscript(value=ast.Name(id="list" | "List"), slice=inner):
            return GenericAlias(list, _kind(inner))
        case ast.Subscript(value=ast.Name(id="dict" | "Dict"), slice=ast.Tuple(elts=[key, value])):
            return GenericAlias(dict, (_kind(key), _kind(value)))
    raise ValueError(ast.dump(node))


# names


def refuse_unknown(names: Iterable[str], known: Iterable[str], where: str, owner: str) -> None:
    """Raise a ValueError that names the first unknown name, the closest known one, and all that `owner` knows."""
    known = sorted(known)
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ValueError(f"{where}: unknown parameter {name!r}{hint}; {owner} knows {', '.join(known)}")


# files


def load_yaml(text: str) -> Any:
    """What YAML text holds. All YAML that the package reads passes through here.

    Raises:
        ValueError: it is not YAML, or exceeds MOST_VALUES or DEEPEST, an alias stands for what it lies in, or a name
            has two values.
    """
    try:
        _check_events(text)
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


class _Loader(yaml.SafeLoader):
    """YAML's safe loader; of two values with one name it would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := [name for name, count in names.items() if name != "<<" and count > 1]:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: {twice[0]:.80} has two values: leave one out")
        return super().construct_mapping(node, deep)


def _check_events(text: str) -> None:
    """Count the values of YAML text and how deep they lie, without making them."""
    values = 0  # so far
    held: dict[str | None, int] = {}  # by each anchor
    opened: list[tuple[str | None, int]] = []  # the anchors of the lists and mappings around, and the count before
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        match event:
            case yaml.AliasEvent(anchor=anchor):
                if any(anchor == around for around, _ in opened):
                    raise ValueError(f"the alias *{anchor} stands for what it lies in: write out what is meant")
                values += held.get(anchor, 1)
            case yaml.ScalarEvent():
                values += 1
                held[event.anchor] = 1
            case yaml.CollectionStartEvent():
                opened.append((event.anchor, values))
                values += 1
            case yaml.CollectionEndEvent():
                anchor, before = opened.pop()
                held[anchor] = values - before
        if len(opened) > DEEPEST:
            where = f"line {event.start_mark.line + 1}: " if event.start_mark else ""
            raise ValueError(f"{where}more than {DEEPEST} lists and mappings lie in one another: flatten them")
        if values > MOST_VALUES:
            raise ValueError(f"it has more than {MOST_VALUES} values, aliases (*name) written out: leave some out")


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        ValueError: it cannot be read, has more than MOST_BYTES, or holds something else or too much (`load_yaml`).
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES} bytes: settings are shorter")
        content = load_yaml(content.decode("utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no `name: value` lines")
    return content


def write_yaml(path: PathLike, settings: dict[str, Any]) -> None:
    """Write settings as `name: value` lines, atomically."""
    write_text(path, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))


# settings of functions

Parameters = dict[str, inspect.Parameter]


def parameters(function: Callable, *names: str, without: Sequence[str] = ()) -> Parameters:
    """The parameters of a function by name: those named, or all but `without`."""
    every = inspect.signature(function).parameters
    return {name: every[name] for name in names or every if name not in without}


def sentences(*functions: Callable) -> dict[str, str]:
    """What the docstrings of functions and classes say of each parameter; the first that says something counts."""
    found: dict[str, str] = {}
    for function in functions:
        for about in docstring_parser.parse(inspect.getdoc(function) or "").params:
            for name in about.arg_name.split(","):
                found.setdefault(name.strip(), " ".join((about.description or "").split()))
    return found


def explain(declared: Parameters, descriptions: dict[str, str]) -> str:
    """A line for each parameter with its type and default, and its description, once where several share it."""
    shared = groupby(declared.values(), lambda parameter: descriptions.get(parameter.name, ""))
    paragraphs = [[*map(_declaration, group), *_indented(sentence)] for sentence, group in shared]
    return "\n".join(line for lines in paragraphs for line in lines)


def _declaration(parameter: inspect.Parameter) -> str:
    default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
    kind = re.sub(r"\b(?:\w+\.)+(?=\w)", "", inspect.formatannotation(parameter.annotation))  # Module, not torch.nn.…
    return f"  {parameter.name}: {kind}{default}"


def _indented(sentence: str) -> list[str]:
    return textwrap.wrap(sentence, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)


def read_as_declared(values: dict[str, Any], declared: Parameters) -> dict[str, Any]:
    """Each value as the type of its parameter; names must be known.

    Raises:
        ValueError: a value cannot be read as one.
    """
    return {name: read_value(name, value, declared[name].annotation, declared[name]) for name, value in values.items()}


def read_value(name: str, value: Any, kind: Any, declaration: object) -> Any:
    """A parameter's value as its declared type.

    Raises:
        ValueError: it cannot be read as one; the message has the declaration.
    """
    try:
        return parse_as(value, kind)
    except ValueError:
        raise ValueError(f"parameter {name}: cannot read {value!r:.80} as declared: {declaration}") from None
