"""Sparse spatio-temporal attention: Grid -> plan -> attend, and patch for diffusers pipelines."""

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

_HERE = Path(__file__).resolve().parent
if not (_HERE / "kernels").is_dir() and (_HERE.parent / "kernels").is_dir():
    # A wheel nests kernels/, pipelines/ and backbones/ in vidattn; a checkout has them beside it,
    # with links that git writes as text files where there are none.
    __path__.append(str(_HERE.parent))

if TYPE_CHECKING:
    from vidattn.attention import attend
    from vidattn.grid import Grid
    from vidattn.methods import list_methods, plan
    from vidattn.neighborhood import neighborhood_attention
    from vidattn.pipelines.guiding import guide
    from vidattn.pipelines.patch import patch, unpatch
    from vidattn.pipelines.streaming.recipe import Recipe
    from vidattn.pipelines.streaming.stream import stream

__version__ = "0.1.0"
__all__ = [
    "Grid",
    "Recipe",
    "attend",
    "guide",
    "list_methods",
    "neighborhood_attention",
    "patch",
    "plan",
    "stream",
    "unpatch",
]

# Imported when they are first asked for: the command line answers many questions without PyTorch,
# and attention needs no diffusers.
_HOMES = {
    "Grid": "vidattn.grid",
    "Recipe": "vidattn.pipelines.streaming.recipe",
    "attend": "vidattn.attention",
    "guide": "vidattn.pipelines.guiding",
    "list_methods": "vidattn.methods",
    "neighborhood_attention": "vidattn.neighborhood",
    "patch": "vidattn.pipelines.patch",
    "plan": "vidattn.methods",
    "stream": "vidattn.pipelines.streaming.stream",
    "unpatch": "vidattn.pipelines.patch",
}


class _Package(ModuleType):
    """The package, in which the function ``plan`` stands before the module of that name."""

    def __getattr__(self, name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module 'vidattn' has no attribute {name!r}")
        value = getattr(import_module(_HOMES[name]), name)
        self.__dict__[name] = value
        return value

    def __setattr__(self, name: str, value: object) -> None:
        # Importing a module binds its name in its package; one that means a function is left to it.
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted([*__all__, "__version__"])


sys.modules[__name__].__class__ = _Package
