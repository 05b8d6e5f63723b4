"""The sparse-attention methods, one file each; the file name is the registered name."""

from __future__ import annotations

from torch import Tensor

from vidattn.catalog import list_methods
from vidattn.grid import Grid
from vidattn.plan import AnyPlan
from vidattn.planning.method import Method
from vidattn.planning.reading import Reading
from vidattn.support.config import show_value
from vidattn.support.options import check_options, class_in
from vidattn.support.registry import unknown


def method_class(name: str) -> type[Method]:
    """The dataclass registered under a name.

    Raises:
        ValueError: no such method; the nearest names are listed.
    """
    if name not in list_methods():
        raise unknown("method", name, list_methods())
    return class_in(f"{__name__}.{name}", Method)


def create_method(name: str, **options: object) -> Method:
    """A method with its options set.

    Raises:
        ValueError: no such method, no such option (the nearest are listed), or a bad value.
    """
    cls = method_class(name)
    check_options(cls, cls.options(), options, f"method {name!r}")
    return cls(**options)


def name_of(method: Method) -> str:
    """The registered name of a method; of one that is not registered, its class."""
    package, _, name = type(method).__module__.rpartition(".")
    return name if package == __name__ else type(method).__name__


def label(method: Method) -> str:
    """A method with the options that differ from their defaults, as the command line reads it.

    >>> label(create_method("radial", density=0.3))
    'radial:density=0.3'
    """
    options = [
        f"{name}={show_value(getattr(method, name))}"
        for name, field in method.options().items()
        if getattr(method, name) != field.default
    ]
    return ":".join([name_of(method), *([",".join(options)] if options else [])])


def plan(
    name: str,
    grid: Grid,
    q: Tensor | None = None,
    k: Tensor | None = None,
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    **options: object,
) -> AnyPlan:
    """The plan of a method on a grid.

    Args:
        name: one of ``list_methods()``.
        q: (B, H, S, D) queries, for methods that read content.
        k: (B, K, S, D) keys, likewise.
        scale: factor of the scores, likewise; D ** -0.5 by default.
        key_mask: (B, S) bool, likewise, False for keys that nobody may read.
        options: fields of the method's dataclass.

    Raises:
        ValueError: unknown method or option, a bad value, q and k missing where they are read, or
            scale or key_mask given where they are not.

    >>> plan("neighborhood", Grid(5, 8, 8), window=(3, 5, 5)).density
    0.234375
    """
    method = create_method(name, **options)
    if not method.reads_content:
        if scale is not None or key_mask is not None:
            raise ValueError(f"method {name!r} reads no content: give attend scale and key_mask")
        return method.plan(grid)
    if q is None or k is None:
        raise ValueError(f"method {name!r} reads content: give q and k, (B, H, S, D)")
    return method.plan(grid, Reading(q, k, scale, key_mask))
