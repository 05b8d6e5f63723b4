"""One generation above the size that the model was trained at."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vidattn.choice import Choice
from vidattn.pipelines.freeswim import FreeSwimPipeline
from vidattn.pipelines.report import Report
from vidattn.runs.clip import Clip, pipeline_arguments, timed_clip
from vidattn.runs.request import Request


@dataclass(frozen=True)
class Large:
    """Videos of a (height, width) in pixels; the request has that of training.

    Args:
        strength: share of the steps that the enlarged clip goes through again; None for the usual.
    """

    target: tuple[int, int]
    strength: float | None = None

    choice = Choice("freeswim")

    def check(self, pipe: object, request: Request) -> None:
        """Refuse what FreeSwim cannot make of a request.

        Raises:
            ValueError: another pipeline, or a target that is not above the trained size.
        """
        self._of(pipe, request).check((request.num_frames, *self.target))

    def make_clip(self, pipe: object, request: Request) -> Clip:
        """Run a pipeline at its own size, and then at the target."""
        large = self._of(pipe, request)
        arguments = pipeline_arguments(request, "pt")
        del arguments["height"], arguments["width"]
        pipe.set_progress_bar_config(desc=self.choice.label)

        def make() -> tuple[Tensor, Report]:
            height, width = self.target
            made = large(height=height, width=width, **arguments)
            return made.frames[0], made.report

        return timed_clip(pipe, self.choice.label, make)

    def _of(self, pipe: object, request: Request) -> FreeSwimPipeline:
        options = {} if self.strength is None else {"strength": self.strength}
        return FreeSwimPipeline(pipe, trained=(request.height, request.width), **options)
