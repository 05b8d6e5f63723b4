"""Names of things: a name gives the thing, a misspelt name gives its near matches."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """The error for a name that is not known, with the nearest ones and the whole list.

    >>> print(unknown("method", "radail", ["dense", "radial"]))
    unknown method 'radail': did you mean 'radial'? Known: dense, radial
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f": did you mean {' or '.join(map(repr, near))}?" if near else "."
    return ValueError(f"unknown {kind} {name!r}{hint} Known: {', '.join(names)}")
