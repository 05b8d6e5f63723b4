"""A patched pipeline: knows when a generation begins and ends, and times its parts."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from time import perf_counter
from typing import Any

import torch
from torch import nn

from vidattn.pipelines.generation import Generation, Generations
from vidattn.pipelines.hooks.swap import marks, swap_in, swap_out
from vidattn.pipelines.stopwatch import Stopwatch


class Calls:
    """The calls of one pipeline, each a generation.

    Args:
        pipe: gets a class that announces its calls.
        handle: whose they are.
        generations: told of them.
        begin: called at the beginning of each.
        finish: called after each that did not fail.
    """

    def __init__(
        self,
        pipe: Any,
        handle: object,
        generations: Generations,
        begin: Callable[[], None],
        finish: Callable[[Generation], None],
    ):
        self.pipe, self.handle, self.generations = pipe, handle, generations
        self._begin, self._finish = begin, finish
        self._undo: list[Callable[[], None]] = []
        for name, part in pipe.components.items():
            if not isinstance(part, nn.Module):
                continue
            if "encoder" in name:
                self._time_forward(part)
            elif name.startswith(("vae", "audio_vae")):
                # torch.compile leaves encode and decode to the module inside
                self._swap(getattr(part, "_orig_mod", part), vae_namespace)
        self._swap(pipe, pipeline_namespace)

    def remove(self) -> None:
        """Give everything its own class back."""
        while self._undo:
            self._undo.pop()()

    @contextmanager
    def running(self) -> Iterator[None]:
        """One call of the pipeline; a call from inside another is part of that."""
        if self.generations.open is not None:
            yield
            return
        with self.generations.begin() as generation:
            start = perf_counter()
            try:
                self._begin()
                yield
                self._finish(generation)
            finally:
                if torch.cuda.is_available() and torch.cuda.is_initialized():
                    torch.cuda.synchronize()
                generation.total_ms = (perf_counter() - start) * 1e3

    def _swap(self, thing: object, namespace_of: Callable[[type], dict[str, object]]) -> None:
        swap_in(thing, namespace_of, self)
        self._undo.append(functools.partial(swap_out, thing, self))

    def _time_forward(self, part: nn.Module) -> None:
        hook = TimingHook(self.generations)
        for handle in (
            part.register_forward_pre_hook(hook.before, with_kwargs=True),
            part.register_forward_hook(hook.after),
        ):
            self._undo.append(handle.remove)


class TimingHook:
    """Times the forward of a text encoder; a copy of it does nothing."""

    def __init__(self, generations: Generations | None = None):
        self._generations, self._starts = generations, threading.local()

    def __reduce__(self):
        return TimingHook, ()

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook."""
        if self._generations is not None and not torch.compiler.is_compiling():
            device = _device_of(*args, *kwargs.values())
            self._starts.latest = Stopwatch.now(device), device

    def after(self, module: nn.Module, args: tuple, output: object) -> None:
        """Forward hook."""
        if self._generations is None or torch.compiler.is_compiling():
            return
        start, self._starts.latest = getattr(self._starts, "latest", None), None
        if start is not None and self._generations.open is not None:
            self._generations.open.text_encoder.add(*start)


def pipeline_namespace(base: type) -> dict[str, object]:
    """What the subclass of a pipeline class has of its own."""

    @functools.wraps(base.__call__)
    def __call__(self, *args, **kwargs):
        with ExitStack() as stack:
            for calls in marks(self):
                stack.enter_context(calls.running())
            # read anew, as others put theirs around it while ours is on
            return base.__call__(self, *args, **kwargs)

    return {"__call__": __call__}


def vae_namespace(base: type) -> dict[str, object]:
    """What the subclass of a VAE class has of its own."""

    def timed(name):
        @functools.wraps(getattr(base, name))
        def run(self, *args, **kwargs):
            method = getattr(base, name)
            if torch.compiler.is_compiling():
                return method(self, *args, **kwargs)
            # a VAE may be that of several pipelines: the one that runs gets the time
            opened = [calls.generations.open for calls in marks(self)]
            with ExitStack() as stack:
                for generation in filter(None, opened):
                    device = _device_of(*args, *kwargs.values())
                    stack.enter_context(generation.vae.span(device))
                return method(self, *args, **kwargs)

        return run

    names = [name for name in ("encode", "decode") if hasattr(base, name)]
    return {name: timed(name) for name in names}


def _device_of(*values: object) -> torch.device:
    return next((x.device for x in values if isinstance(x, torch.Tensor)), torch.device("cpu"))
