"""The smallest case that fails as a given one does."""

import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

from fuzzing.cases import Case

# fields that say what a case is about, or that nothing is gained by changing
KEPT = ("kind", "method", "bad")


def shrink(case: Case, fails: Callable[[Case], bool], seconds: float = 20.0) -> Case:
    """A case with every field as simple as it can be while it still fails.

    Args:
        fails: whether a case fails in the same way; it must not raise.
        seconds: after which the smallest case so far will do.
    """
    end = time.monotonic() + seconds
    is_smaller = True
    while is_smaller and time.monotonic() < end:
        is_smaller = False
        for smaller in _simpler(case):
            if time.monotonic() > end:
                break
            if fails(smaller):
                case, is_smaller = smaller, True
                break
    return case


def _simpler(case: Case) -> Iterator[Case]:
    """Cases that are simpler in one field, the boldest first."""
    plain = Case()
    for field in fields(Case):
        name = field.name
        value, simplest = getattr(case, name), getattr(plain, name)
        # without its options there is nothing to refuse
        if name in KEPT or value == simplest or name == "options" and case.kind == "refusal":
            continue
        for other in _values(name, value, simplest):
            if other != value:
                yield replace(case, **{name: other})


def _values(name: str, value: Any, simplest: Any) -> Iterator[Any]:
    if name == "options":
        yield from _options(value)
    elif name == "states":
        yield from (value[:i] + value[i + 1 :] for i in range(len(value)))
    elif name == "size":
        for axis, extent in enumerate(value):
            for less in (1, extent // 2, extent - 1):
                if 1 <= less < extent:
                    yield value[:axis] + (less,) + value[axis + 1 :]
    elif isinstance(value, int) and not isinstance(value, bool):
        yield from (x for x in (simplest, value // 2, value - 1) if simplest <= x < value)
        if value < simplest:
            yield simplest
    else:
        yield simplest


def _options(options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Without one of the options, then with smaller numbers."""
    for name in options:
        yield {other: x for other, x in options.items() if other != name}
    for name, value in options.items():
        if isinstance(value, tuple) and value and all(type(x) is int for x in value):
            for i, x in enumerate(value):
                if x > 1:
                    yield options | {name: value[:i] + (x - 1,) + value[i + 1 :]}
        elif type(value) is int and value > 1:
            yield options | {name: value // 2}
