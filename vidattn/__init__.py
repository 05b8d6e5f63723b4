"""Sparse spatio-temporal attention: Grid -> plan -> attend, and patch for diffusers pipelines."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

_HERE = Path(__file__).resolve().parent
if not (_HERE / "kernels").is_dir() and (_HERE.parent / "kernels").is_dir():
    # A wheel nests kernels/, pipelines/ and backbones/ in vidattn; a checkout has them beside it.
    __path__.append(str(_HERE.parent))

if TYPE_CHECKING:
    from vidattn.attention import attend
    from vidattn.grid import Grid
    from vidattn.methods import list_methods, plan
    from vidattn.pipelines.patch import patch, unpatch

__version__ = "0.1.0"
__all__ = ["Grid", "__version__", "attend", "list_methods", "patch", "plan", "unpatch"]

_HOMES = {
    "Grid": "vidattn.grid",
    "attend": "vidattn.attention",
    "list_methods": "vidattn.methods",
    "patch": "vidattn.pipelines.patch",
    "plan": "vidattn.methods",
    "unpatch": "vidattn.pipelines.patch",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'vidattn' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
