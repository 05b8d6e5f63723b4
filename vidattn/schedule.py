"""Which method serves which heads of which layers at which denoising steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from vidattn.methods import label
from vidattn.methods.dense import Dense
from vidattn.methods.exact import Exact
from vidattn.planning.method import Method
from vidattn.support.registry import unknown


def _check_place(name: str, value: object) -> None:
    """Raise ValueError unless ``value`` is a count or a fraction."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(
            f"{name} must be a count such as 2 or a fraction such as 0.1, got {value!r}"
        )
    if not 0 <= value < math.inf or isinstance(value, float) and value > 1:
        raise ValueError(
            f"{name} must be a count of at least 0, or a fraction between 0.0 and 1.0, got "
            f"{value!r}"
        )


def _count(value: int | float, total: int) -> int:
    # 0.1 * 30 and its like must not be rounded up to one more
    return value if isinstance(value, int) else math.ceil(value * total - 1e-9)


@dataclass(frozen=True)
class DenseGuard:
    """The first layers and the first denoising steps, which keep full attention.

    Early layers and early steps decide the layout of a video and suffer most from missing pairs.

    Args:
        layers: how many of the first layers of a transformer: a count, or a fraction of them.
        steps: how many of the first denoising steps: a count, or a fraction of them.

    Raises:
        ValueError: a negative count, a fraction outside 0 to 1, or something that is no number.

    >>> DenseGuard(layers=0.1, steps=3).num_layers(25)
    3
    """

    layers: int | float = 1
    steps: int | float = 0

    def __post_init__(self):
        for name in ("layers", "steps"):
            _check_place(f"dense_{name}", getattr(self, name))

    @property
    def needs_num_steps(self) -> bool:
        """Whether the steps are a fraction, which only the number of steps turns into a count."""
        return isinstance(self.steps, float) and self.steps > 0

    def num_layers(self, total: int) -> int:
        """Guarded layers among ``total``; a fraction is rounded up."""
        return _count(self.layers, total)

    def num_steps(self, total: int | None) -> int:
        """Guarded steps among ``total``, which a count does without; a fraction is rounded up."""
        return _count(self.steps, total or 0)


@dataclass(frozen=True)
class Model:
    """The transformer that a schedule was made for.

    Args:
        transformer: name of its class.
        layers: how many self-attentions over the video it has; None for any number.
        heads: of each of them; None for any number.
    """

    transformer: str
    layers: int | None = None
    heads: int | None = None


@dataclass(frozen=True)
class Rule:
    """A method, and where it serves: everywhere but for the limits that are given.

    Args:
        method: with its options.
        layers: numbers of layers, from 0.
        heads: numbers of heads, from 0.
        steps: the first denoising step, and the first that is none any more, None for the end;
            each a count or a fraction of the steps.
        transformer: name of the component of the pipeline, such as "transformer_2".

    Raises:
        ValueError: a limit that nothing can be within.
    """

    method: Method
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    steps: tuple[int | float, int | float | None] | None = None
    transformer: str | None = None

    def __post_init__(self):
        for name in ("layers", "heads"):
            numbers = getattr(self, name)
            if numbers is not None and (not numbers or min(numbers) < 0):
                raise ValueError(f"{name} must be numbers from 0 on, got {numbers}")
        first, end = self.steps or (0, None)
        _check_place("the first of steps", first)
        if end is not None:
            _check_place("the end of steps", end)
            if type(first) is type(end) and not first < end:
                raise ValueError(f"steps must end after they begin, got {[first, end]}")

    @property
    def needs_num_steps(self) -> bool:
        """Whether its steps are fractions, which only the number of steps turns into counts."""
        return any(isinstance(place, float) and place > 0 for place in self.steps or ())

    def covers(self, transformer: str, layer: int, step: int, num_steps: int | None) -> bool:
        """Whether some heads of a layer follow it at a step."""
        first, end = self.steps or (0, None)
        return (
            (self.transformer is None or self.transformer == transformer)
            and (self.layers is None or layer in self.layers)
            and _count(first, num_steps or 0) <= step
            and (end is None or step < _count(end, num_steps or 0))
        )


@dataclass(frozen=True)
class Part:
    """A method and the heads of a layer that follow it, None for all of them."""

    method: Method
    heads: tuple[int, ...] | None = None

    @property
    def label(self) -> str:
        """What reports call it."""
        if self.heads is None:
            return label(self.method)
        word = "head" if len(self.heads) == 1 else "heads"
        return f"{label(self.method)} on {word} {show_numbers(self.heads)}"


@dataclass(frozen=True)
class Schedule:
    """Rules read from the top: a head follows the first that covers it, and is dense if none does.

    Args:
        rules: from the special to the general.
        guard: layers and steps that stay dense whatever the rules say.
        model: what it was made for; None for any.
        name: where it comes from.

    >>> rules = Rule(create_method("radial"), heads=(0, 2)), Rule(create_method("neighborhood"))
    >>> [part.heads for part in Schedule(rules).parts("transformer", 5, num_heads=4)]
    [(0, 2), (1, 3)]
    """

    rules: tuple[Rule, ...]
    guard: DenseGuard = DenseGuard()
    model: Model | None = None
    name: str = "schedule"

    @property
    def is_dense(self) -> bool:
        """Whether nothing is ever sparse."""
        return all(isinstance(rule.method, Dense) for rule in self.rules)

    @property
    def is_yardstick(self) -> bool:
        """Whether it is what others are compared with: PyTorch's own attention everywhere."""
        return self.is_dense and not any(isinstance(rule.method, Exact) for rule in self.rules)

    @property
    def needs_num_steps(self) -> bool:
        """Whether something in it is a fraction of the steps."""
        return self.guard.needs_num_steps or any(rule.needs_num_steps for rule in self.rules)

    def with_guard(
        self, dense_layers: int | float | None, dense_steps: int | float | None
    ) -> Schedule:
        """The same schedule with the guards that are given."""
        layers = self.guard.layers if dense_layers is None else dense_layers
        steps = self.guard.steps if dense_steps is None else dense_steps
        return replace(self, guard=DenseGuard(layers, steps))

    def is_sparse_at(
        self, transformer: str, layer: int, step: int = 0, num_steps: int | None = None
    ) -> bool:
        """Whether a rule makes some heads of a layer sparse at a step."""
        rules = self._covering(transformer, layer, step, num_steps)
        return any(not isinstance(rule.method, Dense) for rule in rules)

    def parts(
        self,
        transformer: str,
        layer: int,
        step: int = 0,
        num_steps: int | None = None,
        *,
        num_heads: int,
    ) -> tuple[Part, ...]:
        """The methods of a layer at a step, each with its heads; every head is in one of them."""
        left = list(range(num_heads))
        found: dict[Method, list[int]] = {}
        for rule in [*self._covering(transformer, layer, step, num_steps), Rule(Dense())]:
            mine = [head for head in left if rule.heads is None or head in rule.heads]
            left = [head for head in left if head not in mine]
            if mine:
                found.setdefault(rule.method.at(layer).in_step(step), []).extend(mine)
        if len(found) == 1:
            return (Part(next(iter(found))),)
        return tuple(Part(method, tuple(sorted(heads))) for method, heads in found.items())

    def check(self, models: Mapping[str, Model]) -> None:
        """Compare with the transformers, by component name, that it is to serve.

        Raises:
            ValueError: it was made for another model, or names a transformer, a layer or a head
                that is not there.
        """
        for name, model in models.items():
            self._check_model(name, model)
        for number, rule in enumerate(self.rules, 1):
            if rule.transformer is not None and rule.transformer not in models:
                raise unknown(
                    f"transformer in rule {number} of {self.name}", rule.transformer, models
                )
            mine = [models[rule.transformer]] if rule.transformer else list(models.values())
            for model in mine:
                if why := rule.method.misfit(model.transformer, model.layers, model.heads):
                    raise ValueError(why)
            for limit in ("layers", "heads"):
                # a rule for all transformers may name a layer that only one of them has
                totals = [getattr(model, limit) for model in mine]
                named = getattr(rule, limit)
                if named is not None and None not in totals and max(named) >= max(totals):
                    raise ValueError(
                        f"rule {number} of {self.name} names {limit[:-1]} {max(named)}, the model "
                        f"has {max(totals)}, numbered from 0: is the schedule for another model?"
                    )

    def _check_model(self, name: str, found: Model) -> None:
        for what in ("transformer", "layers", "heads") if self.model else ():
            wanted, here = getattr(self.model, what), getattr(found, what)
            if None not in (wanted, here) and wanted != here:
                raise ValueError(
                    f"{self.name} is for another model: it was made for {what} {wanted}, and the "
                    f"{name} here has {what} {here}"
                )

    def _covering(
        self, transformer: str, layer: int, step: int, num_steps: int | None
    ) -> Iterator[Rule]:
        """The rules for a layer at a step, down to the first that leaves no head to others."""
        for rule in self.rules:
            if rule.covers(transformer, layer, step, num_steps):
                yield rule
                if rule.heads is None:
                    return


def show_numbers(numbers: Iterable[int]) -> str:
    """Numbers with their runs as ranges.

    >>> show_numbers([0, 4, 5, 6])
    '0, 4-6'
    """
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
