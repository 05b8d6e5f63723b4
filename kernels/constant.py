"""Tells the compiler of PyTorch that a function gives the same whenever it traces it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable)


def constant_result(function: Function) -> Function:
    """Do what ``torch.compiler.assume_constant_result`` does, without importing the compiler.

    That import takes longer than all of PyTorch.
    """
    marked: Any = function
    marked._dynamo_marked_constant = True
    return function
