"""Changes the class of a live object and back: how an instance gets new behaviour in place.

The object, its attributes, ``isinstance``, the name of its class and the signatures of its methods
stay as they are. A copy or a pickle of the object has its own class again. Several owners may have
marks on one object, and take them off in any order; where somebody has put a class of their own on
top meanwhile, ours stays beneath it and does nothing. What somebody reads, sets or deletes on the
class of an object, such as a ``__call__`` around the usual one, is that of its own class, and
outlives ours.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

MARK = "_vidattn"


@cache
def _behind(meta: type) -> type:
    """The class of classes that show the one they were made from to those who look at them."""

    class Behind(meta):
        def __getattribute__(cls, name):
            own = meta.__getattribute__(cls, "__dict__")
            if name in own.get("_vidattn_names", ()):
                return getattr(own["_vidattn_base"], name)
            return meta.__getattribute__(cls, name)

        def __setattr__(cls, name, value):
            if (base := _shown(cls, name)) is not None:
                setattr(base, name, value)
            else:
                super().__setattr__(name, value)

        def __delattr__(cls, name):
            if (base := _shown(cls, name)) is not None:
                delattr(base, name)
            else:
                super().__delattr__(name)

    return Behind


def _shown(cls: type, name: str) -> type | None:
    """The class that an assignment to one of ours is meant for; abstract ones keep their notes."""
    is_own = name.startswith(("_abc_", "__abstract"))
    return None if is_own else vars(cls).get("_vidattn_base")


@cache
def swapped(base: Any, namespace_of: Callable[[type], dict[str, object]]) -> type:
    """The class that ``namespace_of`` makes of another, one for all instances: Dynamo guards it."""
    ours = namespace_of(base)
    namespace = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _reduce,
        "_vidattn_base": base,
        "_vidattn_names": frozenset(ours),
        **ours,
    }
    meta: Any = type(base)
    return _behind(meta)(base.__name__, (base,), namespace)


def swap_in(thing: object, namespace_of: Callable[[type], dict[str, object]], mark: object) -> None:
    """Put a mark on ``thing``, whose class becomes what ``namespace_of`` makes of its own."""
    if not is_swapped(thing):
        base: Any = type(thing)
        object.__setattr__(thing, "__class__", swapped(base, namespace_of))
    thing.__dict__[MARK] = (*marks(thing), mark)


def swap_out(thing: object, mark: object) -> None:
    """Take a mark off; with the last one, ``thing`` gets its own class back."""
    left = tuple(other for other in marks(thing) if other is not mark)
    if left:
        thing.__dict__[MARK] = left
        return
    thing.__dict__.pop(MARK, None)
    ours: Any = type(thing)
    if "_vidattn_base" in vars(ours):
        object.__setattr__(thing, "__class__", ours._vidattn_base)


def is_swapped(thing: object) -> bool:
    """Whether ``thing`` runs with a class of ours."""
    return hasattr(type(thing), "_vidattn_base")


def marks(thing: object) -> tuple[Any, ...]:
    """The marks on ``thing``, in the order in which they were put."""
    return thing.__dict__.get(MARK, ())


def _reduce(self: Any, protocol: int) -> tuple[object, ...]:
    state = {name: value for name, value in self.__dict__.items() if name != MARK}
    return _new, (type(self)._vidattn_base,), state


def _new(cls):
    return cls.__new__(cls)
