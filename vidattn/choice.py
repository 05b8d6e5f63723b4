"""A method with its options in words, such as ``radial:density=0.3``, read without PyTorch."""

from __future__ import annotations

import re
import typing
from dataclasses import dataclass, field
from typing import Any

from vidattn.catalog import HOMES, describe
from vidattn.support.config import alternatives, describe_type, show_value
from vidattn.support.registry import unknown

if typing.TYPE_CHECKING:
    from vidattn.planning.method import Method

SYNTAX = "NAME or NAME:OPTION=VALUE,... as in radial:density=0.3,window=tile"
_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


@dataclass(frozen=True)
class Choice:
    """A method by name, with the options that were given."""

    name: str
    options: dict[str, object] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The choice in the words of the command line.

        >>> Choice("neighborhood", {"window": (5, 9, 9)}).label
        'neighborhood:window=5,9,9'
        """
        options = ",".join(f"{name}={show_value(x)}" for name, x in self.options.items())
        return f"{self.name}:{options}" if options else self.name

    def create(self) -> Method:
        """The method itself.

        Raises:
            ValueError: a value out of range.
        """
        from vidattn.methods import create_method

        return create_method(self.name, **self.options)

    @property
    def arguments(self) -> dict[str, object]:
        """What ``patch`` is given for it."""
        return {"method": self.name, **self.options}


def parse_choice(text: str, home: str = "methods") -> Choice:
    """A choice from ``name:option=value,option=value``.

    A piece without '=' belongs to the value before it, so a size is written ``window=5,9,9``.

    Raises:
        ValueError: no such method or option (the nearest are listed), or a value of another type.

    >>> parse_choice("neighborhood:window=5,9,9,stride=1").options
    {'window': (5, 9, 9), 'stride': 1}
    """
    name, _, rest = text.partition(":")
    describe(name, home)
    given: dict[str, str] = {}
    last = ""
    for piece in filter(None, (x.strip() for x in rest.split(","))):
        option, equals, value = piece.partition("=")
        if equals:
            last = option.strip().replace("-", "_")
            if last in given:
                raise ValueError(f"{HOMES[home][0]} {text!r} says {last} twice: leave one out")
            given[last] = value.strip()
        elif last:
            given[last] += f",{piece}"
        else:
            word = HOMES[home][0]
            raise ValueError(f"{word} {text!r} has no '=' in {piece!r}; write {SYNTAX}")
    return make_choice(name, given, home)


def make_choice(name: str, given: dict[str, str], home: str = "methods") -> Choice:
    """A choice from options in words.

    Raises:
        ValueError: no such method or option (the nearest are listed), or a value of another type.
    """
    known = describe(name, home).options
    for option in given:
        if option not in known:
            raise unknown(f"option of {HOMES[home][0]} {name!r}", option, known)
    values = {
        option: parse_value(option, text, known[option].hint) for option, text in given.items()
    }
    return Choice(name, values)


def parse_value(option: str, text: str, hint: object) -> object:
    """A value of the type ``hint`` in words: 0.3, 5,9,9, true, none.

    Raises:
        ValueError: the words fit no type of the option.
    """
    for kind in sorted(alternatives(hint), key=_rank):
        try:
            return _parse(text.strip(), kind)
        except (ValueError, KeyError):
            continue
    raise ValueError(f"{option} must be {describe_type(hint)}, got {text!r}")


def _parse(text: str, kind: Any) -> object:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is type(None):
        return {"none": None}[text.lower()]
    if kind is bool:
        return _WORDS[text.lower()]
    if origin is tuple:
        pieces = [piece for piece in re.split(r"[,x×\s]+", text.strip("()[] ")) if piece]
        kinds = args[:1] * len(pieces) if args[-1] is Ellipsis else args
        if len(pieces) != len(kinds):
            raise ValueError
        return tuple(_parse(piece, kind) for piece, kind in zip(pieces, kinds))
    if origin is typing.Literal:
        return {str(arg): arg for arg in args}[text]
    return kind(text)


def _rank(kind: object) -> int:
    """Narrow types are tried before wide ones: everything is a str."""
    order = (type(None), bool, int, float, str)
    return order.index(kind) if kind in order[:-1] else len(order) + (kind is str)
