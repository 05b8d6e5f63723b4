"""A case: everything that decides what the fuzzer tries, in plain values that can be written down.

Letters: B batch, H query heads, S tokens, D head dim.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from vidattn.grid import Grid

DTYPES = {
    name: getattr(torch, name) for name in ("float32", "float64", "float16", "bfloat16")
}  # fmt: skip


class Wrong(Exception):
    """The code under test did something else than it says.

    Args:
        what: which promise was broken, in words without figures: shrinking keeps to it.
        detail: the figures.
    """

    def __init__(self, what: str, detail: object = ""):
        super().__init__(f"{what}: {detail}" if str(detail) else what)
        self.what = what


class Refused(Exception):
    """The code under test refused the case with a ValueError, as it says it may."""


@dataclass(frozen=True)
class Case:
    """One thing to try; the defaults are the simplest values, and those that are not written."""

    kind: str = "attend"
    size: tuple[int, int, int] = (1, 1, 1)
    text: int = 0
    text_first: bool = False
    batch: int = 1
    key_heads: int = 1
    group: int = 1  # query heads to a key head
    dim: int = 8
    method: str = "dense"  # or one of ``plans.MADE``
    options: dict[str, Any] = field(default_factory=dict)
    again: bool = False  # plan a second time, from the plan before
    dtype: str = "float32"
    values: str = "normal"
    scale: float | None = None
    key_mask: str = "none"
    strides: str = "plain"
    engine: str = "auto"
    gradients: bool = False
    lse: bool = False
    precision: str | None = None
    states: tuple[str, ...] = ()
    bad: str = ""
    seed: int = 0

    @property
    def grid(self) -> Grid:
        """Where the tokens are."""
        return Grid(*self.size, text=self.text, text_first=self.text_first)

    @property
    def heads(self) -> int:
        """H."""
        return self.key_heads * self.group

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of queries, keys and values."""
        return DTYPES[self.dtype]

    @property
    def attended(self) -> str:
        """The dtype that attention is computed in: autocast casts all but float64 to its own."""
        casts = [name.split()[1] for name in self.states if name.startswith("autocast")]
        return casts[-1] if casts and self.dtype != "float64" else self.dtype

    def __str__(self) -> str:
        """The values that are not the simplest, as JSON."""
        plain, given = asdict(Case()), asdict(self)
        return json.dumps({name: x for name, x in given.items() if x != plain[name]})


def parse(text: str) -> Case:
    """The case that ``str(case)`` describes.

    Raises:
        ValueError: no JSON, or a field that cases do not have.
    """
    given = json.loads(text)
    known = {x.name for x in fields(Case)}
    if strange := set(given) - known:
        raise ValueError(f"a case has no {sorted(strange)}; it has {sorted(known)}")
    given["options"] = {name: as_tuple(x) for name, x in given.get("options", {}).items()}
    return Case(**{name: as_tuple(x) for name, x in given.items()})


def as_tuple(value: Any) -> Any:
    """Lists as the tuples they were before JSON."""
    return tuple(map(as_tuple, value)) if isinstance(value, list) else value
