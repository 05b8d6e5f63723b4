"""A patched pipeline: knows when a generation begins and ends, and times its parts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

import torch
from torch import nn

from vidattn.pipelines.stopwatch import Stopwatch
from vidattn.pipelines.swap import swap_in, swap_out


class Generation:
    """The calls of one pipeline.

    Args:
        pipe: gets a class that announces its calls.
        begin: called before each generation.
        finish: called after each generation that did not fail.
    """

    def __init__(self, pipe: object, begin: Callable[[], None], finish: Callable[[], None]):
        self.pipe, self._begin, self._finish = pipe, begin, finish
        self._depth = 0
        self.reset()
        self._undo: list[Callable[[], None]] = []
        for name, part in pipe.components.items():
            if not isinstance(part, nn.Module):
                continue
            if "encoder" in name:
                self._time_forward(part)
            elif name.startswith(("vae", "audio_vae")):
                # torch.compile leaves encode and decode to the module inside
                part = getattr(part, "_orig_mod", part)
                swap_in(part, vae_namespace, self)
                self._undo.append(functools.partial(swap_out, part))
        swap_in(pipe, pipeline_namespace, self)

    def reset(self) -> None:
        """Forget the times."""
        self.vae, self.text_encoder, self.total_ms = Stopwatch(), Stopwatch(), 0.0

    def remove(self) -> None:
        """Give everything its own class back."""
        swap_out(self.pipe)
        for undo in self._undo:
            undo()

    @contextmanager
    def running(self) -> Iterator[None]:
        """One call of the pipeline; a call from inside another is part of that."""
        if self._depth:
            yield
            return
        self.reset()
        self._begin()
        self._depth += 1
        start = perf_counter()
        try:
            yield
            self._finish()
        finally:
            self._depth -= 1
            if torch.cuda.is_available() and torch.cuda.is_initialized():
                torch.cuda.synchronize()
            self.total_ms = (perf_counter() - start) * 1e3

    def _time_forward(self, part: nn.Module) -> None:
        hook = TimingHook(self)
        for handle in (
            part.register_forward_pre_hook(hook.before, with_kwargs=True),
            part.register_forward_hook(hook.after),
        ):
            self._undo.append(handle.remove)


class TimingHook:
    """Times the forward of a text encoder; a copy of it does nothing."""

    def __init__(self, generation: Generation | None = None):
        self._generation, self._start = generation, None

    def __reduce__(self):
        return TimingHook, ()

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook."""
        if self._generation is not None and not torch.compiler.is_compiling():
            device = _device_of(*args, *kwargs.values())
            self._start = Stopwatch.now(device), device

    def after(self, module: nn.Module, args: tuple, output: object) -> None:
        """Forward hook."""
        if self._start is not None and not torch.compiler.is_compiling():
            self._generation.text_encoder.add(*self._start)
            self._start = None


def pipeline_namespace(base: type) -> dict[str, object]:
    """What the subclass of a pipeline class has of its own."""
    call = base.__call__

    @functools.wraps(call)
    def __call__(self, *args, **kwargs):
        with self._vidattn.running():
            return call(self, *args, **kwargs)

    return {"__call__": __call__}


def vae_namespace(base: type) -> dict[str, object]:
    """What the subclass of a VAE class has of its own."""

    def timed(method):
        @functools.wraps(method)
        def run(self, *args, **kwargs):
            if torch.compiler.is_compiling():
                return method(self, *args, **kwargs)
            with self._vidattn.vae.span(_device_of(*args, *kwargs.values())):
                return method(self, *args, **kwargs)

        return run

    names = [name for name in ("encode", "decode") if hasattr(base, name)]
    return {name: timed(getattr(base, name)) for name in names}


def _device_of(*values: object) -> torch.device:
    return next((x.device for x in values if isinstance(x, torch.Tensor)), torch.device("cpu"))
