"""Changes the class of a live object and back: how an instance gets new behaviour in place.

The object, its attributes, ``isinstance``, the name of its class and the signatures of its methods
stay as they are. A copy or a pickle of the object has its own class again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

MARK = "_vidattn"


@cache
def swapped(base: type, namespace_of: Callable[[type], dict[str, object]]) -> type:
    """The class that ``namespace_of`` makes of another, one for all instances: Dynamo guards it."""
    namespace = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _reduce,
        "_vidattn_base": base,
        **namespace_of(base),
    }
    return type(base)(base.__name__, (base,), namespace)


def swap_in(thing: object, namespace_of: Callable[[type], dict[str, object]], mark: object) -> None:
    """Give ``thing`` the class that ``namespace_of`` makes of its own; ``mark`` is kept with it."""
    cls = swapped(type(thing), namespace_of)
    thing.__dict__[MARK] = mark
    object.__setattr__(thing, "__class__", cls)


def swap_out(thing: object) -> None:
    """Give ``thing`` its own class back."""
    object.__setattr__(thing, "__class__", type(thing)._vidattn_base)
    del thing.__dict__[MARK]


def is_swapped(thing: object) -> bool:
    """Whether ``thing`` runs with a class of ours."""
    return hasattr(type(thing), "_vidattn_base")


def _reduce(self, protocol):
    state = {name: value for name, value in self.__dict__.items() if name != MARK}
    return _new, (type(self)._vidattn_base,), state


def _new(cls):
    return cls.__new__(cls)
