"""The forward passes of one transformer, in all threads, and those that are run again.

Gradient checkpointing runs parts of a forward pass once more during the backward pass. These see
what the forward pass saw: its step, its size, the plans that it read from content.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from vidattn.grid import Size
from vidattn.pipelines.diary import Diary
from vidattn.pipelines.generation import Generation
from vidattn.pipelines.loop import Loop, find_loop
from vidattn.pipelines.settings import Settings
from vidattn.pipelines.steps import PassKey, Run
from vidattn.pipelines.stopwatch import Stopwatch
from vidattn.plan import AnyPlan


class Context:
    """What diffusers' ``cache_context`` says about the passes of a thread."""

    def __init__(self, name: str | None = None, step_index=None, num_inference_steps=None, **_):
        self.name = name
        self.steps = None if step_index is None else (step_index, num_inference_steps)


@dataclass
class Pass:
    """One forward pass of a transformer, which ``key`` tells from the others of its step."""

    size: Size
    num_before: int
    generation: Generation
    diary: Diary
    run: Run
    step: int
    key: PassKey
    dense_step: bool
    start: object
    has_backward: bool
    ran: set[int] = field(default_factory=set)
    # calls of each layer: models may attend sample by sample
    calls: Counter[int] = field(default_factory=Counter)
    repeats: Counter[int] = field(default_factory=Counter)
    # the plans read from content, by layer and call, for a backward pass to come
    made: dict[tuple[int, int], AnyPlan] = field(default_factory=dict)

    @property
    def num_steps(self) -> int | None:
        """Of its run."""
        return self.run.num_steps

    def take_call(self, layer: int) -> int:
        """The number of a call of a layer, the same when it is run again."""
        if not is_backward():
            self.calls[layer] += 1
            return self.calls[layer] - 1
        self.repeats[layer] += 1
        return (self.repeats[layer] - 1) % max(self.calls[layer], 1)


class _Output(NamedTuple):
    """Whether the output of a forward pass is finite, and where it was made."""

    finite: Tensor
    run: Run
    step: int


class _Facts(NamedTuple):
    """The mean of the time step, and whether all is finite and a loop is at that time."""

    time: float
    is_finite: bool
    was_finite: bool
    agrees: bool


class Passes:
    """The forward passes of one transformer."""

    def __init__(self, name: str, settings: Settings):
        self.name, self._settings = name, settings
        self._local = threading.local()
        self._latest: Pass | None = None
        # by the latents, which live for as long as a backward pass may come
        self._pending: WeakIdKeyDictionary[Tensor, Pass] = WeakIdKeyDictionary()

    def begin(
        self, latents: Tensor, timestep: Tensor, size: Size, num_before: int, context: Context
    ) -> None:
        """A forward pass begins.

        Raises:
            FloatingPointError: the latents are not finite, or what the last pass made of them.
            ValueError: the schedule needs the number of steps, and nothing says it.
        """
        if is_backward():
            again = self._repeated(latents)
            again.repeats.clear()
            self._local.repeated = torch._C._current_graph_task_id(), again
            return
        settings, (loop, call) = self._settings, find_loop()
        last, self._local.output = getattr(self._local, "output", None), None
        facts = _facts(latents, timestep, loop, last)
        generation = settings.generations.now(call)
        loop = loop if facts.agrees else None
        run = settings.steps.now(generation.walk, loop, context.steps, facts.time)
        generation.count(run)
        if last is not None and last.run is run and not facts.was_finite:
            _not_finite("the transformer gave NaN or infinity at", last.step, run)
        if not facts.is_finite:
            _not_finite("the latents were NaN or infinite at the start of", run.step, run)
        self._check_steps(run)
        guarded = settings.schedule.guard.num_steps(run.num_steps)
        self._local.current = self._latest = self._pending[latents] = Pass(
            size,
            num_before,
            generation,
            generation.diaries[self.name],
            run,
            run.step,
            run.take_key(self.name, context.name),
            run.step < guarded,
            Stopwatch.now(latents.device),
            torch.is_grad_enabled(),
        )

    def end(self, output: Tensor) -> bool:
        """A forward pass ends; whether it was the first of its transformer in its generation."""
        if is_backward():
            return False
        current = self.current()
        current.diary.time.add(current.start, output.device)
        current.diary.num_passes += 1
        finite = torch.isfinite(output.detach()).all()
        self._local.output = _Output(finite, current.run, current.step)
        return current.diary.num_passes == 1

    def check_finite(self) -> None:
        """Look at the latest output in this thread.

        Raises:
            FloatingPointError: it is not finite.
        """
        last, self._local.output = getattr(self._local, "output", None), None
        if last is not None and not bool(last.finite):
            _not_finite("the transformer gave NaN or infinity at", last.step, last.run)

    def current(self) -> Pass:
        """The forward pass that this thread is in.

        Raises:
            RuntimeError: there is none, or one of several is run again and nobody knows which.
        """
        bound = getattr(self._local, "bound", None)
        if bound is None and is_backward():
            # until the end of this backward pass: the repetition may stop halfway
            task, again = getattr(self._local, "repeated", (None, None))
            bound = again if task == torch._C._current_graph_task_id() else None
        # the backward pass runs blocks again in threads of its own
        current = bound or getattr(self._local, "current", None) or self._latest
        if current is None:
            raise RuntimeError(
                f"a layer of {self.name} ran before the transformer did: call the transformer, not "
                "its blocks"
            )
        if bound is None and is_backward():
            self._check_alone(current)
        return current

    @contextmanager
    def inside(self, current: Pass) -> Iterator[None]:
        """Have this thread be in a forward pass that is run again, in a with block."""
        before = getattr(self._local, "bound", None)
        self._local.bound = current
        try:
            yield
        finally:
            self._local.bound = before

    def _repeated(self, latents: Tensor) -> Pass:
        """The forward pass that is run again as a whole."""
        where = latents.untyped_storage().data_ptr()
        for given, made in list(self._pending.items()):
            if given.untyped_storage().data_ptr() == where and given.shape == latents.shape:
                return made
        return self.current()

    def _check_alone(self, current: Pass) -> None:
        """A block that somebody else runs again may belong to any forward pass yet to go back."""
        for other in list(self._pending.values()):
            same = (other.size, other.num_before, other.step, other.made) == (
                (current.size, current.num_before, current.step, current.made)
            )
            if other is not current and other.has_backward and not same:
                raise RuntimeError(
                    f"a layer of {self.name} is run again for a backward pass, and which of "
                    "several forward passes it belongs to is not known: use "
                    "enable_gradient_checkpointing() of the transformer, or go back after every "
                    "forward pass"
                )

    def _check_steps(self, run: Run) -> None:
        schedule = self._settings.schedule
        if schedule.needs_num_steps and run.num_steps is None:
            raise ValueError(
                f"{schedule.name} with dense_steps={schedule.guard.steps} names fractions of the "
                f"denoising steps, and nothing says how many there are: run {self.name} in a "
                "pipeline, say it with handle.generation(num_steps=...), or give counts"
            )


def is_backward() -> bool:
    """Whether this thread is in a backward pass."""
    return torch._C._current_graph_task_id() != -1


def _not_finite(what: str, step: int, run: Run) -> None:
    total = f" of {run.num_steps}" if run.num_steps else ""
    raise FloatingPointError(
        f"{what} step {step + 1}{total}: nothing after that can be right. Try a wider dtype, a "
        "milder method or more dense steps"
    )


def _facts(latents: Tensor, timestep: Tensor, loop: Loop | None, last: _Output | None) -> _Facts:
    is_finite = torch.isfinite(latents.detach()).all()
    device = is_finite.device
    was_finite = is_finite if last is None else last.finite.to(device)
    timestep = timestep.detach().to(device)
    agrees = torch.ones_like(is_finite)
    if loop is not None and loop.time is not None and not loop.is_trusted:
        time = loop.time.detach().to(device, timestep.dtype)
        agrees = torch.isin(timestep, time).any()
    # one wait for the device, not four
    flags = (x.float() for x in (is_finite, was_finite, agrees))
    facts = torch.stack([timestep.float().mean(), *flags])
    time, *others = facts.tolist()
    return _Facts(time, *map(bool, others))
