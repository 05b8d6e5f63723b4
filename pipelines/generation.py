"""What happens in one generation: a call of a pipeline, or all that runs outside of any."""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from torch.utils.weak import WeakIdKeyDictionary

from vidattn.pipelines.diary import Diary
from vidattn.pipelines.loop import Loop, PipelineCall
from vidattn.pipelines.steps import Run, Walk
from vidattn.pipelines.stopwatch import Stopwatch


class Generation:
    """What the transformers of a patch did in one generation, and the runs that they are in."""

    def __init__(self):
        # by name of the transformer
        self.diaries: dict[str, Diary] = defaultdict(Diary)
        self.num_steps = 0
        # of making plans
        self.plan_time = Stopwatch()
        # of a patched pipeline
        self.vae, self.text_encoder = Stopwatch(), Stopwatch()
        self.total_ms: float | None = None
        # by the times that are walked through, and thread
        self._walks: WeakIdKeyDictionary[object, dict[int, Walk]] = WeakIdKeyDictionary()

    def walk(self, loop: Loop) -> Walk:
        """The run of a loop, a new one where the loop begins anew, gone to where the loop is."""
        walks, thread = self._walks.setdefault(loop.times, {}), threading.get_ident()
        walk = walks.get(thread)
        if walk is None or not walk.has(loop):
            walk = walks[thread] = Walk(loop, walk)
        walk.follow(loop)
        return walk

    def count(self, run: Run) -> None:
        """Count the step that a run is at, once."""
        if run.counted != run.step:
            run.counted = run.step
            self.num_steps += 1

    def forget(self) -> None:
        """Forget the runs, whose plans take memory."""
        self._walks.clear()


class Generations:
    """The generations of one patch, in all threads."""

    def __init__(self):
        self._local = threading.local()
        self._calls: weakref.WeakKeyDictionary[PipelineCall, Generation] = (
            weakref.WeakKeyDictionary()
        )
        # what runs outside of pipelines
        self._alone = Generation()
        self.latest = self._alone

    @property
    def open(self) -> Generation | None:
        """The generation that was begun in this thread, None outside of one."""
        return getattr(self._local, "open", None)

    @contextmanager
    def begin(self) -> Iterator[Generation]:
        """A new generation, which what this thread does in a with block belongs to."""
        before, generation = self.open, Generation()
        self._local.open = self.latest = generation
        try:
            yield generation
        finally:
            self._local.open = before
            generation.forget()

    def now(self, call: PipelineCall | None) -> Generation:
        """The generation that a forward pass in a call of a pipeline, or in none, belongs to."""
        generation = self.open
        if generation is None:
            generation = self._alone if call is None else self._calls.get(call)
        if generation is None:
            generation = self._calls[call] = Generation()
        self.latest = generation
        return generation
