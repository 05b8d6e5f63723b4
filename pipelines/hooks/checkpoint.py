"""Ties what gradient checkpointing runs again to the forward pass that it belongs to."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from vidattn.pipelines.passes import Pass, Passes

FUNCTION = "_gradient_checkpointing_func"


class Tied:
    """diffusers' checkpointing function, given blocks that know their forward pass.

    That of a copy of the transformer is the function itself.
    """

    def __init__(self, function: Callable, passes: Passes):
        self.function, self.passes = function, passes

    def __deepcopy__(self, memo: dict) -> Callable:
        return self.function

    def __reduce__(self):
        return _same, (self.function,)

    def __call__(self, block: Callable, *args: object):
        if torch.compiler.is_compiling():
            return self.function(block, *args)
        return self.function(_Block(block, self.passes, self.passes.current()), *args)


class _Block:
    """A block in its forward pass, whenever it runs."""

    def __init__(self, block: Callable, passes: Passes, current: Pass):
        self._block, self._passes, self._current = block, passes, current

    def __call__(self, *args: object, **kwargs: object):
        with self._passes.inside(self._current):
            return self._block(*args, **kwargs)

    def __getattr__(self, name: str) -> object:
        return getattr(self._block, name)


def tie(model: nn.Module, passes: Passes) -> None:
    """Have the blocks of ``model`` that are checkpointed know their forward pass."""
    for module in _checkpointed(model):
        function = getattr(module, FUNCTION)
        if not (isinstance(function, Tied) and function.passes is passes):
            setattr(module, FUNCTION, Tied(function, passes))


def untie(model: nn.Module, passes: Passes) -> None:
    """Undo ``tie``."""
    for module in _checkpointed(model):
        function = getattr(module, FUNCTION)
        if isinstance(function, Tied) and function.passes is passes:
            setattr(module, FUNCTION, function.function)


def _checkpointed(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if module.__dict__.get(FUNCTION) is not None]


def _same(function: Callable) -> Callable:
    return function
