"""Sparse spatio-temporal attention: Grid -> plan -> attend, and patch for diffusers pipelines."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

_HERE = Path(__file__).resolve().parent
if not (_HERE / "kernels").is_dir() and (_HERE.parent / "kernels").is_dir():
    # A wheel nests kernels/, pipelines/ and backbones/ in vidattn; a checkout has them beside it.
    __path__.append(str(_HERE.parent))

from vidattn.attention import attend
from vidattn.grid import Grid

# Importing the module vidattn.plan, which the lines above do, binds its name here. The function
# takes the name over, for good: Python binds a submodule only when it first loads it.
from vidattn.methods import list_methods, plan
from vidattn.neighborhood import neighborhood_attention

if TYPE_CHECKING:
    from vidattn.pipelines.patch import patch, unpatch

__version__ = "0.1.0"
__all__ = [
    "Grid",
    "attend",
    "list_methods",
    "neighborhood_attention",
    "patch",
    "plan",
    "unpatch",
]

# These import diffusers, which takes longer than everything else together.
_LAZY = {"patch": "vidattn.pipelines.patch", "unpatch": "vidattn.pipelines.patch"}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'vidattn' has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
