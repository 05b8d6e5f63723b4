"""Names of things: a name gives the thing, a misspelt name gives its near matches."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def unknown(
    kind: str, name: str, known: Iterable[str], near: Sequence[str] | None = None
) -> ValueError:
    """The error for a name that is not known, with the nearest ones and the whole list.

    Args:
        near: those that may be meant; found by their spelling when not given.

    >>> print(unknown("method", "radail", ["dense", "radial"]))
    unknown method 'radail': did you mean 'radial'? Known: dense, radial
    """
    names = sorted(known)
    if near is None:
        near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
    hint = f": did you mean {' or '.join(map(repr, near))}?" if near else "."
    return ValueError(f"unknown {kind} {name!r}{hint} Known: {', '.join(names)}")
