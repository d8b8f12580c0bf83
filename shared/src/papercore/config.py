"""Plain mappings (YAML, JSON) -> frozen dataclasses, with every value checked against its annotation."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from beartype.door import is_bearable

from papercore.errors import InputError

T = TypeVar("T")


def build(cls: type[T], values: Mapping[str, Any], where: object) -> T:
    """The dataclass `cls` made from `values`.

    Raises:
        InputError: a key that is no field, a value of the wrong type, or a missing required field; names `where`.
    """
    checked = check(cls, values, where)
    required = [
        field.name
        for field in dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    for name in required:
        if name not in checked:
            raise InputError(f"field {name}", where=where, found="nothing", expected="a value")
    return cls(**checked)


def check(cls: type, values: Any, where: object) -> dict[str, Any]:
    """The entries of `values` converted to the types of the fields of `cls`; fields that are absent stay absent."""
    if not isinstance(values, Mapping):
        found = "nothing" if values is None else values
        raise InputError("the whole file", where=where, found=found, expected="a mapping of field names to values")
    hints = typing.get_type_hints(cls)
    fields = {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}
    checked = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1)
            raise InputError(
                f"field {key}",
                where=where,
                found="a name that does not exist",
                expected=f"one of {', '.join(fields)}",
                hint=f"did you mean {close[0]}?" if close else None,
            )
        checked[name] = convert(value, fields[name], where, name)
    return checked


def convert(value: Any, hint: Any, where: object, name: str) -> Any:
    """`value` as `hint` asks: strings become paths, lists become tuples, whole numbers become floats."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    # bool is an int to Python; to a person who writes `steps: true` it is a mistake
    plain = [option for option in options if not (isinstance(value, bool) and option in (int, float))]
    if any(is_bearable(value, option) for option in plain):
        return value
    for option in plain:
        if option is Path and isinstance(value, str):
            return Path(value)
        if option is float and isinstance(value, int):
            return float(value)
        if option is float and isinstance(value, str) and _is_number(value):
            return float(value)  # YAML 1.1 reads 1e-3 as a string
        if typing.get_origin(option) is tuple and isinstance(value, Sequence) and not isinstance(value, str):
            inner = typing.get_args(option)
            if len(inner) == 2 and inner[1] is Ellipsis:
                return tuple(convert(item, inner[0], where, f"{name}[{i}]") for i, item in enumerate(value))
        if dataclasses.is_dataclass(option) and isinstance(option, type) and isinstance(value, Mapping):
            return build(option, value, f"{where}: {name}")
    raise InputError(f"field {name}", where=where, found=f"{value!r} ({type(value).__name__})", expected=describe(hint))


def describe(hint: Any) -> str:
    """A type as a person would say it."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(option) for option in inner)
    if origin is typing.Literal:
        return " or ".join(repr(option) for option in inner)
    if origin in (tuple, list):
        return f"list of {describe(inner[0])}" if inner else "list"
    if origin is dict:
        return f"mapping of {describe(inner[0])} to {describe(inner[1])}" if inner else "mapping"
    names = {
        type(None): "nothing",
        Path: "path",
        int: "whole number",
        float: "number",
        str: "text",
        bool: "true or false",
    }
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def load_yaml(path: Path) -> Any:
    """The content of a YAML (or JSON) file, read with the safe loader.

    Raises:
        InputError: the file cannot be read or is not YAML; names file and line.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=UniqueKeys)  # noqa: S506 - a safe loader
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read: {getattr(error, 'strerror', None) or error}", where=path) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise InputError(
            "not YAML", where=f"{path}{line}", found=getattr(error, "problem", None) or "?", expected="key: value lines"
        ) from error


class UniqueKeys(yaml.SafeLoader):
    """The safe loader, which also refuses a key that is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(problem=f"key {key.value} twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
