"""The sparse attention of a training run: what holds at a noise level, and at a step of the run."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn
from video_training.settings import Attention

import vidattn
from vidattn.grid import Grid, Size
from vidattn.methods import create_method, label
from vidattn.methods.dense import Dense
from vidattn.pipelines.learned import Learned
from vidattn.pipelines.patch import Handle
from vidattn.planning.learned import LearnedMethod
from vidattn.planning.method import Method
from vidattn.schedule import DenseGuard, Rule, Schedule
from vidattn.schedule_file import load_schedule, save_schedule


@dataclass(frozen=True)
class Span:
    """Noise levels [low, high) that one expert serves with one attention.

    Args:
        schedule: without limits to steps; None for dense attention.
    """

    low: float
    high: float
    expert: str
    schedule: Schedule | None


def chosen_schedule(given: Attention) -> Schedule:
    """The schedule that the settings name.

    Raises:
        ValueError: neither a method nor a schedule, both, or one that is not understood.
    """
    if (given.method is None) == (given.schedule is None):
        raise ValueError(
            "attention takes a method or a schedule, got "
            f"method={given.method!r} and schedule={given.schedule!r}; 'dense' is a method too"
        )
    if given.schedule is not None:
        if given.options:
            raise ValueError("attention.options belong to a method; set them in the schedule")
        return load_schedule(given.schedule).with_guard(given.dense_layers, given.dense_steps)
    try:
        method = create_method(given.method, **given.options)
    except TypeError as error:
        raise ValueError(f"attention.options: {error}") from error
    # what vidattn.patch does for a pipeline
    schedule = Schedule((Rule(method),), DenseGuard(1, 0.1), name=label(method))
    return schedule.with_guard(given.dense_layers, given.dense_steps)


def schedule_text(schedule: Schedule) -> str:
    """A schedule as its file would read."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "schedule.yaml"
        save_schedule(schedule, path)
        return path.read_text(encoding="utf-8")


class Sparse:
    """Gives transformers the attention of a step; they are patched anew only when it changes.

    Args:
        given: the settings.

    Raises:
        ValueError: settings that are not understood, or a ramp for a method without a density.
    """

    def __init__(self, given: Attention):
        self.given, self.schedule = given, chosen_schedule(given)
        self._patched: dict[nn.Module, tuple[Schedule, Handle]] = {}
        if given.ramp:
            for rule in self.schedule.rules:
                if not isinstance(rule.method, Dense) and _density(rule.method) is None:
                    raise ValueError(
                        f"attention.ramp needs methods with a density, {label(rule.method)} has "
                        "none: set its density, or leave the ramp out"
                    )

    def attach(self, name: str, model: nn.Module) -> Learned:
        """Put what learned methods have in every layer into a transformer, for good.

        Args:
            name: of the transformer in its pipeline.
        """
        return Learned(name, model, self.schedule)

    @property
    def is_learned(self) -> bool:
        """Whether a method has parameters of its own."""
        return any(isinstance(rule.method, LearnedMethod) for rule in self.schedule.rules)

    def spans(self, experts: Mapping[str, tuple[float, float]], step: int) -> list[Span]:
        """What holds at each noise level.

        Args:
            experts: the levels [low, high) that each of them serves.
            step: of the training run, for the ramp.
        """
        limits = [self.schedule.guard.steps]
        limits += [place for rule in self.schedule.rules for place in rule.steps or () if place]
        edges = {1 - self._share(place) for place in limits}
        found = []
        for expert, (low, high) in experts.items():
            inner = sorted({low, high, *(edge for edge in edges if low < edge < high)})
            for start, end in zip(inner, inner[1:]):
                schedule = self._at(1 - (start + end) / 2, expert, step)
                found.append(Span(start, end, expert, schedule))
        return found

    def _share(self, place: int | float) -> float:
        """A place among the denoising steps as a share of them."""
        return place if isinstance(place, float) else min(place / self.given.sampler_steps, 1.0)

    def _at(self, share: float, expert: str, step: int) -> Schedule | None:
        """The rules that hold behind a share of the denoising steps."""
        guard = self.schedule.guard
        if share < self._share(guard.steps):
            return None
        rules = []
        for rule in self.schedule.rules:
            first, end = rule.steps or (0, None)
            inside = self._share(first) <= share and (end is None or share < self._share(end))
            if inside and rule.transformer in (None, expert):
                method = self._ramped(rule.method, step)
                rules.append(replace(rule, method=method, steps=None, transformer=None))
        held = replace(self.schedule, rules=tuple(rules), guard=DenseGuard(guard.layers, 0))
        return None if held.is_dense else held

    def _ramped(self, method: Method, step: int) -> Method:
        ramp = self.given.ramp
        if ramp is None or isinstance(method, Dense):
            return method
        share = min(1.0, step // ramp.every * ramp.every / ramp.steps)
        density = ramp.start + (_density(method) - ramp.start) * share
        return Dense() if density >= 1 else replace(method, density=density)

    def check(self, sizes: Mapping[str, Size]) -> None:
        """Ask the methods whether they serve every grid that will come.

        Args:
            sizes: (t, h, w) of each, by what it is called in an error.

        Raises:
            ValueError: a method cannot serve one of them.
        """
        for what, size in sizes.items():
            for rule in self.schedule.rules if size[0] > 1 else ():
                try:
                    rule.method.check(Grid(*size))
                except ValueError as error:
                    raise ValueError(f"{what}: {error}") from error

    def apply(self, model: nn.Module, schedule: Schedule | None) -> None:
        """Give a transformer an attention, None for dense."""
        held, handle = self._patched.pop(model, (None, None))
        if handle is not None and held != schedule:
            handle.remove()
            handle = None
        if handle is None and schedule is not None:
            handle = vidattn.patch(model, schedule=schedule)
        if handle is not None:
            self._patched[model] = schedule, handle

    def handle_of(self, model: nn.Module) -> Handle | None:
        """The handle of a transformer while its attention is sparse."""
        return self._patched.get(model, (None, None))[1]

    def remove(self) -> None:
        """Leave every transformer as it was."""
        for model in list(self._patched):
            self.apply(model, None)


def _density(method: Method) -> float | None:
    return method.density if "density" in method.options() else None
