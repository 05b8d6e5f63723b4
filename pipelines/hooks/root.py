"""Tells a patched transformer that a forward pass begins or ends, compiled or not."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vidattn.grid import Size
from vidattn.pipelines.family import Family
from vidattn.pipelines.passes import Context


class Passes(Protocol):
    """What is told about forward passes."""

    family: Family
    number: Tensor

    context: ContextOf

    def begin(self, hidden_states: Tensor, timestep: Tensor, size: Size, num_before: int) -> None:
        """A forward pass begins."""

    def end(self, output: Tensor) -> None:
        """A forward pass ends."""

    def put_in(self) -> None:
        """Put back what somebody has replaced."""


def install(site: Passes, model: nn.Module) -> list[Callable[[], None]]:
    """Have ``site`` told about the forward passes of ``model``; what undoes it."""
    hook = RootHook(site, list(inspect.signature(type(model).forward).parameters)[1:])
    undo = [
        model.register_forward_pre_hook(hook.before, with_kwargs=True).remove,
        model.register_forward_hook(hook.after).remove,
    ]
    if hasattr(type(model), "cache_context"):
        site.context.model = model
        model.cache_context = site.context
        undo.append(lambda: model.__dict__.pop("cache_context", None))
    return undo


class ContextOf:
    """Stands before the ``cache_context`` of a transformer and remembers what it is told.

    That of a copy of the transformer remembers nothing.
    """

    def __init__(self):
        self.model: nn.Module | None = None
        self._local: threading.local | None = threading.local()

    def __reduce__(self):
        return ContextOf, (), {"model": self.model, "_local": None}

    @property
    def now(self) -> Context:
        """What this thread is in."""
        return getattr(self._local, "now", None) or Context()

    @contextmanager
    def __call__(self, name: str, **steps: object) -> Iterator[None]:
        cls: Any = type(self.model)
        with cls.cache_context(self.model, name, **steps):
            if self._local is None:
                yield
                return
            before, self._local.now = self.now, Context(name, **steps)
            try:
                yield
            finally:
                self._local.now = before


class RootHook:
    """The two hooks of a transformer; a copy of them does nothing."""

    def __init__(self, site: Passes | None = None, parameters: list[str] | None = None):
        self.site, self.parameters = site, parameters or []

    def __reduce__(self):
        return RootHook, ()

    def before(self, model: nn.Module, args: tuple, kwargs: dict):
        """Forward pre-hook."""
        site = self.site
        if site is None:
            return None
        arguments = {**dict(zip(self.parameters, args)), **kwargs}
        size, num_before = site.family.place(model, arguments)
        given = arguments[site.family.latents]
        hidden_states = given if isinstance(given, Tensor) else given[0]
        timestep = torch.as_tensor(arguments[site.family.times])
        if not torch.compiler.is_compiling():
            site.put_in()
            site.begin(hidden_states, timestep, size, num_before)
            return None
        hidden_states = torch.ops.vidattn.begin(
            hidden_states, timestep, size, num_before, site.number
        )
        if not isinstance(given, Tensor):
            hidden_states = [hidden_states, *given[1:]]
        if args:
            at = self.parameters.index(site.family.latents)
            if at < len(args):
                return (*args[:at], hidden_states, *args[at + 1 :]), kwargs
        return args, {**kwargs, site.family.latents: hidden_states}

    def after(self, model: nn.Module, args: tuple, output):
        """Forward hook."""
        site = self.site
        if site is None:
            return None
        if not torch.compiler.is_compiling():
            site.end(first_tensor(output))
            return None
        return with_first(output, torch.ops.vidattn.end(first_tensor(output), site.number))


def first_tensor(output: Any) -> Tensor:
    """The first tensor in the output of a model."""
    return output if isinstance(output, Tensor) else first_tensor(output[0])


def with_first(output: Any, first: Tensor) -> Any:
    """The output of a model with another first tensor."""
    if isinstance(output, Tensor):
        return first
    inner = with_first(output[0], first)
    if isinstance(output, list | tuple):
        return type(output)([inner, *output[1:]])
    return type(output)(inner, *[output[key] for key in list(output.keys())[1:]])
