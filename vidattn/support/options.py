"""Things with options that are registered by the name of their file."""

from __future__ import annotations

import importlib
import inspect
import typing
from collections.abc import Iterable, Mapping
from typing import TypeVar

from vidattn.support.config import describe_type, takes_words
from vidattn.support.registry import unknown

Base = TypeVar("Base")


def class_in(module: str, base: type[Base]) -> type[Base]:
    """The class of a module that derives from another, and is defined there."""
    found = importlib.import_module(module)
    return next(
        cls
        for _, cls in inspect.getmembers(found, inspect.isclass)
        if issubclass(cls, base) and cls.__module__ == found.__name__
    )


def check_options(
    cls: type, known: Iterable[str], options: Mapping[str, object], what: str
) -> None:
    """Refuse options that a class has not, and words where it takes none.

    Args:
        what: the class in the words of an error, such as "method 'radial'".

    Raises:
        ValueError: no such option (the nearest are listed), or a word.
    """
    hints = typing.get_type_hints(cls)
    for option, value in options.items():
        if option not in known:
            raise unknown(f"option of {what}", option, known)
        if isinstance(value, str) and not takes_words(hints[option]):
            kind = describe_type(hints[option])
            raise ValueError(f"{option} of {what} must be {kind}, got the word {value!r}")
