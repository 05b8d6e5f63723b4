"""Values of flags: each function reads one from words, or says what it must be."""

from __future__ import annotations

import argparse
import math


def positive_int(text: str) -> int:
    """An integer of at least 1."""
    value = _integer(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def seed(text: str) -> int:
    """An integer that torch takes as a seed."""
    value = _integer(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must be from 0 to 2**63 - 1, got {text}")
    return value


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an integer, got {text!r}") from None


def count_or_share(text: str) -> int | float:
    """A count such as 2, or a share such as 0.25."""
    try:
        value = float(text) if "." in text or "e" in text else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be a count such as 2 or a share such as 0.1, got {text!r}"
        ) from None
    if not 0 <= value < math.inf or isinstance(value, float) and value > 1:
        raise argparse.ArgumentTypeError(
            f"must be a count of at least 0, or a share from 0.0 to 1.0, got {text}"
        )
    return value


def finite(text: str) -> float:
    """A number, neither infinite nor NaN."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}")
    return value


def size(text: str) -> tuple[int, int]:
    """A height and a width in pixels, such as 1080x1920."""
    height, _, width = text.lower().replace("×", "x").partition("x")
    if not (height.isdigit() and width.isdigit() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(
            f"must be a height and a width such as 1080x1920, got {text!r}"
        )
    return int(height), int(width)
