"""Triton's interpreter for tests: kernels run on a CPU, for as long as a test module lasts."""

import importlib
import sys
from collections.abc import Iterator

import numpy as np
import pytest

KERNELS = "vidattn.kernels.triton."


def _forget_kernels() -> None:
    """A kernel is compiled or interpreted as the environment says when its module is imported."""
    kernels = importlib.import_module(KERNELS.rstrip("."))
    for name in [name for name in sys.modules if name.startswith(KERNELS)]:
        del sys.modules[name]
        if hasattr(kernels, name.rpartition(".")[2]):
            delattr(kernels, name.rpartition(".")[2])


@pytest.fixture(scope="module")
def interpreted() -> Iterator[None]:
    """Run kernels in the interpreter; afterwards they are as before, ready to be compiled."""
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        _interpret_standard_functions(patch)
        _patch_once_per_launch(patch)
        _multiply_bfloat16(patch)
        _forget_kernels()
        yield
        _forget_kernels()


def _interpret_standard_functions(patch: pytest.MonkeyPatch) -> None:
    """tl.sum and its like are kernels too, made when Triton was imported."""
    import triton.language as tl
    from triton.language import standard
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    for owner in (standard, tl):
        for name, function in list(vars(owner).items()):
            if isinstance(function, JITFunction):
                patch.setattr(owner, name, InterpretedFunction(function.fn))


def _patch_once_per_launch(patch: pytest.MonkeyPatch) -> None:
    """The language is patched once in a launch and put back after it.

    The interpreter patches it again in every call of a function by a kernel, which takes a quarter
    of the time, and never puts back what it patched there.
    """
    from triton.runtime import interpreter

    patch_language, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    scopes = {}

    def patch_once(function):
        languages = frozenset(
            id(value)
            for value in function.__globals__.values()
            if value is interpreter.tl or value is interpreter.tl.core
        )
        if languages not in scopes:
            scopes[languages] = patch_language(function)
        return _Nothing

    def launch_and_restore(self, *args, **options):
        try:
            return launch(self, *args, **options)
        finally:
            for scope in reversed(scopes.values()):
                scope.restore()
            scopes.clear()

    patch.setattr(interpreter, "_patch_lang", patch_once)
    patch.setattr(interpreter.GridExecutor, "__call__", launch_and_restore)


class _Nothing:
    @staticmethod
    def restore() -> None:
        """The launch restores."""


def _multiply_bfloat16(patch: pytest.MonkeyPatch) -> None:
    """tl.dot multiplies the bit patterns of bfloat16, not the numbers."""
    import triton.language as tl
    from triton.runtime import interpreter

    dot = interpreter.InterpreterBuilder.create_dot

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        numbers = (x.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(numbers, tl.float32)

    def create_dot(self, a, b, *rest):
        return dot(self, widened(a), widened(b), *rest)

    patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
