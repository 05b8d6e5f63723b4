"""YAML files as frozen dataclasses, and back; a key that nothing reads is an error."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from vidattn.support.registry import unknown

Config = TypeVar("Config")


def read_yaml(path: Path) -> dict[str, object]:
    """The mapping in a YAML file.

    Raises:
        ValueError: no such file, no YAML, or something else than a mapping in it.
    """
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"'{path}' cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"'{path}' is no valid YAML: {error}") from error
    if not isinstance(given, dict):
        raise ValueError(f"'{path}' must hold keys and values, got {type(given).__name__}")
    return given


def build(cls: type[Config], given: object, what: str) -> Config:
    """A dataclass from a mapping of plain types; lists become tuples.

    Args:
        what: the mapping in the words of an error, such as "rule 3 of schedule 'a.yaml'".

    Raises:
        ValueError: no mapping, a key that the class has not (the nearest are listed), a key that is
            missing, a value of another type, or one that the class refuses.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"{what} must hold keys and values, got {given!r}")
    kind: Any = cls
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = typing.get_type_hints(cls)
    for key in given:
        if key not in fields:
            raise unknown(f"key of {what}", str(key), fields)
    for name, field in fields.items():
        if name not in given and field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{what} lacks {name!r}")
    values = {key: convert(value, hints[key], f"{key} of {what}") for key, value in given.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


def convert(value: Any, hint: Any, what: str) -> object:
    """A value read from YAML as the type of a dataclass field.

    Raises:
        ValueError: it fits none of the types of the field.
    """
    for kind in alternatives(hint):
        is_config = dataclasses.is_dataclass(kind) and isinstance(value, Mapping)
        if is_config:
            return build(kind, value, what)
        if _fits(value, kind):
            return _tuple(value) if isinstance(value, list) else value
    # an integer will do for a number
    if float in alternatives(hint) and _fits(value, int):
        return float(value)
    raise ValueError(f"{what} must be {describe_type(hint)}, got {value!r}")


def plain(config: Any) -> dict[str, object]:
    """The fields of a dataclass that differ from their defaults, as YAML writes them."""
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.default is dataclasses.MISSING or value != field.default:
            found[field.name] = _plain(value)
    return found


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value):
        return plain(value)
    return [_plain(x) for x in value] if isinstance(value, tuple) else value


def _tuple(value: object) -> object:
    return tuple(_tuple(x) for x in value) if isinstance(value, list) else value


def _fits(value: Any, kind: Any) -> bool:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return value in args
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return False
        kinds = args[:1] * len(value) if args[-1] is Ellipsis else args
        return len(value) == len(kinds) and all(
            any(_fits(x, one) or one is float and _fits(x, int) for one in alternatives(kind))
            for x, kind in zip(value, kinds)
        )
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The types that a union allows, or the one type there is."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def takes_words(hint: Any) -> bool:
    """Whether a type has words among its values."""
    kinds = alternatives(hint)
    return any(kind is str or typing.get_origin(kind) is typing.Literal for kind in kinds)


def describe_type(hint: Any) -> str:
    """A type in plain words: 'one integer or t,h,w', 'a number or none'."""
    words = {int: "one integer", float: "a number", bool: "true or false", str: "a word"}
    words |= {type(None): "none", dict: "keys and values"}
    said = []
    for kind in alternatives(hint):
        if typing.get_origin(kind) is tuple:
            args = typing.get_args(kind)
            if args[-1] is Ellipsis or len(args) != 3:
                of = f" of {len(args)} integers" if set(args) == {int} else ""
                said.append("a list" + of)
                continue
            inner = "true or false each" if args[0] is bool else ""
            said.append("t,h,w" + (f" ({inner})" if inner else ""))
        elif typing.get_origin(kind) is typing.Literal:
            said.append(" or ".join(map(str, typing.get_args(kind))))
        else:
            said.append("keys and values" if dataclasses.is_dataclass(kind) else words[kind])
    return " or ".join(said)


def show_value(value: object) -> str:
    """A value the way the command line reads it."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, tuple | list):
        return ",".join(show_value(x) for x in value)
    return str(value)
