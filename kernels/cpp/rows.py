"""Tensors as the C++ engines take them; ``rows.h`` has a struct of the same name and fields."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

from torch import Tensor


class Rows(ctypes.Structure):
    """A (B, H, S, D) tensor whose last stride is 1; strides count numbers."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("sample", "head", "token")),
    ]


def rows_of(tensors: Mapping[str, Tensor]) -> dict[str, Rows]:
    """The fields of a call of these names."""
    return {name: Rows(x.data_ptr(), *x.stride()[:3]) for name, x in tensors.items()}
