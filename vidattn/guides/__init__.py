"""What a video can be guided by, one file each; the file name is the registered name."""

from __future__ import annotations

from typing import Any

from vidattn.catalog import list_names
from vidattn.guidance import Guide
from vidattn.support.options import check_options, class_in
from vidattn.support.registry import unknown


def list_guides() -> list[str]:
    """Names of the registered guides, in alphabetical order."""
    return list_names("guides")


def create_guide(name: str, **options: Any) -> Guide:
    """A guide with its options set.

    Raises:
        ValueError: no such guide, no such option (the nearest are listed), or a bad value.
    """
    if name not in list_guides():
        raise unknown("guide", name, list_guides())
    cls = class_in(f"{__name__}.{name}", Guide)
    check_options(cls, cls.options(), options, f"guide {name!r}")
    return cls(**options)
