"""State of the process that no result may depend on."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache

import torch


@contextmanager
def _restored(set_state: Callable, value: object, before: object) -> Iterator[None]:
    set_state(value)
    try:
        yield
    finally:
        set_state(before)


def _dtype(dtype: torch.dtype):
    return _restored(torch.set_default_dtype, dtype, torch.get_default_dtype())


def _device(device: str):
    return torch.device(device)


STATES = {
    "autocast bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", torch.float16),
    "default float64": lambda: _dtype(torch.float64),
    "default bfloat16": lambda: _dtype(torch.bfloat16),
    "default float16": lambda: _dtype(torch.float16),
    "default device meta": lambda: _device("meta"),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "deterministic": lambda: _restored(
        torch.use_deterministic_algorithms, True, torch.are_deterministic_algorithms_enabled()
    ),
    "two threads": lambda: _restored(torch.set_num_threads, 2, torch.get_num_threads()),
    "anomaly detection": lambda: torch.autograd.set_detect_anomaly(True, check_nan=False),
}
# in these no gradient is recorded
WITHOUT_GRADIENT = ("inference mode", "no grad")


@contextmanager
def within(names: tuple[str, ...]) -> Iterator[None]:
    """The process in some states at once."""
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(STATES[name]())
        yield


def forget() -> None:
    """Drop what planners keep between calls, so that a case depends on no case before it."""
    for function in _kept(len(sys.modules)):
        function.cache_clear()


@lru_cache(maxsize=1)
def _kept(num_modules: int) -> list[Callable]:
    """The functions outside of the engines that keep what they returned."""
    modules = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("vidattn.") and not name.startswith("vidattn.kernels")
    ]
    values = [value for module in modules for value in vars(module).values()]
    return [value for value in values if callable(getattr(value, "cache_clear", None))]
