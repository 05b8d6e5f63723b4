"""Knows at which denoising step a forward pass is: told, read from the running loop, or counted."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from vidattn.pipelines.loop import Loop
from vidattn.plan import AnyPlan
from vidattn.planning.reading import Memory

# what tells a forward pass from the others of its step: evaluation, name and number
PassKey = tuple[int, str | None, int]


class Run:
    """One walk through the denoising steps, by one thread: a video, or one section of a long one.

    Args:
        num_steps: None where nobody knows.
        keeps_plans: whether it is known for certain which steps are those of one video, so that
            plans may serve later steps.
    """

    def __init__(self, num_steps: int | None, keeps_plans: bool = True):
        self.num_steps, self.keeps_plans = num_steps, keeps_plans
        # and the step that a generation has counted last
        self.step = self.counted = -1
        # plans that serve or start off later ones, with the step they were made at, by everything
        # else that they depend on
        self.kept: dict[tuple, tuple[int, AnyPlan, Memory]] = {}
        self._phase = 0
        self._passes: Counter[tuple[str, str | None]] = Counter()

    def enter(self, step: int, phase: int = 0) -> None:
        """Go to a step, or to another of the evaluations that a step has."""
        if (step, phase) != (self.step, self._phase):
            self.step, self._phase = step, phase
            self._passes.clear()

    def keeps(self, has_backward: bool) -> bool:
        """Whether a forward pass may leave plans to later ones; one that is trained may not."""
        return self.keeps_plans and not has_backward

    def take_key(self, transformer: str, name: str | None) -> PassKey:
        """The key of a forward pass that begins."""
        key = self._phase, name, self._passes[transformer, name]
        self._passes[transformer, name] += 1
        return key


class Told(Run):
    """The steps of a loop of the user's own, who says where it is."""

    def at(self, step: int) -> None:
        """Say that step number ``step``, from 0, begins.

        Raises:
            ValueError: there is no such step, or it lies behind.
        """
        first, end = max(self.step, 0), self.num_steps
        if type(step) is not int or step < first or end is not None and step >= end:
            below = "" if end is None else f" and below {end}"
            raise ValueError(
                f"step must be an integer from {first} on{below}, got {step!r}: steps only go "
                "forward, and a new video is a new generation"
            )
        self.enter(step)

    def keeps(self, has_backward: bool) -> bool:
        """Always: the user says which steps are those of one video, in training too."""
        return True


class Walk(Run):
    """The steps of a loop that was found running.

    Args:
        last: the walk through the same times before. Where the loop is at its index, with the time
            read anew, it is in the same step, or in another video of one step: nobody can tell,
            so that no plan is kept. Loops of the user's own read it anew for every pass.
    """

    def __init__(self, loop: Loop, last: Walk | None = None):
        # a part of a scheduler's times may be walked through; it begins where it is first seen
        self._first = 0 if loop.is_whole else loop.index
        stays = last is not None and last.index == loop.index
        if stays:
            self._first = last._first
        super().__init__(-(-(loop.total - self._first) // loop.order), keeps_plans=not stays)
        if stays and not loop.is_trusted:
            self.counted = last.counted
        self.index, self._time = loop.index, _remember(loop.time)

    def has(self, loop: Loop) -> bool:
        """Whether a loop is this walk, and not another through the same times."""
        if loop.index == self.index:
            return loop.time is self._time()
        return loop.index > self.index

    def follow(self, loop: Loop) -> None:
        """Go where the loop is."""
        self.index, self._time = loop.index, _remember(loop.time)
        self.enter(*divmod(loop.index - self._first, loop.order))


def _remember(time: Tensor | None) -> Callable[[], Tensor | None]:
    return (lambda: None) if time is None else weakref.ref(time)


class Count(Run):
    """Forward passes that nothing is known of: their distinct times are counted, nothing is kept.

    Passes of one step (with and without the prompt, two experts) carry the same time. A generation
    ends when a time returns or time turns around.
    """

    def __init__(self):
        super().__init__(None, keeps_plans=False)
        self._times: set[float] = set()
        self._last: float | None = None
        self._direction = 0

    def follow(self, time: float) -> None:
        """Go to the step of a time."""
        if self._last is not None and time != self._last:
            direction = 1 if time > self._last else -1
            if time in self._times or direction == -self._direction:
                self._times, self._direction, self.step = set(), 0, -1
            else:
                self._direction = direction
        self._last = time
        self._times.add(time)
        self.enter(len(self._times) - 1)


class Steps:
    """The runs of one patch, in all threads."""

    def __init__(self):
        self._local = threading.local()

    @contextmanager
    def telling(self, run: Told) -> Iterator[None]:
        """Have the forward passes of this thread belong to ``run``, in a with block."""
        before = getattr(self._local, "told", None)
        self._local.told = run
        try:
            yield
        finally:
            self._local.told = before

    def now(
        self,
        walk: Callable[[Loop], Walk],
        loop: Loop | None,
        context: tuple[int, int | None] | None,
        time: float,
    ) -> Run:
        """The run of the forward pass that begins in this thread, at its step.

        Args:
            walk: the run of a loop, in its generation.
            loop: the loop that it is in.
            context: the step and their number, as the pipeline tells diffusers' caches.
            time: its time step.

        Raises:
            RuntimeError: the user tells the steps, and has not told this one.
        """
        told = getattr(self._local, "told", None)
        if told is not None and told.step >= 0:
            return told
        if loop is not None:
            return walk(loop)
        if told is not None:
            raise RuntimeError(
                "the transformer ran in a generation whose steps are told, before the first was: "
                "call at(0) on what handle.generation() gave, then at(1), and so on"
            )
        if context is not None:
            return self._given(*context)
        if not isinstance(run := getattr(self._local, "count", None), Count):
            run = self._local.count = Count()
        run.follow(time)
        return run

    def _given(self, step: int, num_steps: int | None) -> Run:
        run = getattr(self._local, "given", None)
        if run is None or step < run.step or run.num_steps != num_steps:
            run = self._local.given = Run(num_steps)
        run.enter(step)
        return run
