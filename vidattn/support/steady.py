"""Work that comes out the same whatever the state of the process it is done in."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def steadily(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The function without gradients, deaf to autocast, inference mode and default dtype or device.

    What it makes are ordinary tensors, of use to a caller in any other state.
    """

    @functools.wraps(function)
    def run(*args: Arguments.args, **given: Arguments.kwargs) -> Result:
        devices = (getattr(x, "device", None) for x in (*args, *given.values()))
        with _steady({"cpu", *(x.type for x in devices if x is not None)}):
            return function(*args, **given)

    return run


def cast_by_autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors as autocast, where it is on, casts those of PyTorch's own attention.

    float64 stays what it is.
    """
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors)


@contextmanager
def _steady(devices: set[str]) -> Iterator[None]:
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for device in devices:
            if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if (dtype := torch.get_default_dtype()) != torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        yield
