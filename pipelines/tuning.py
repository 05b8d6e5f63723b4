"""Measures on dense runs what methods would lose in every head, and mixes them into a schedule.

Letters: B batch, H heads, S tokens, D head dim, C candidates, L layers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from vidattn.attention import attend
from vidattn.grid import Grid
from vidattn.methods import label
from vidattn.methods.dense import Dense
from vidattn.pipelines.allocation import allocate
from vidattn.pipelines.hooks.watch import Sight, watching
from vidattn.plan import AnyPlan
from vidattn.planning.method import Method
from vidattn.schedule import DenseGuard, Model, Rule, Schedule

# name of the transformer and number of the layer
LayerKey = tuple[str, int]


@dataclass(frozen=True, eq=False)
class Losses:
    """What candidates lose in the heads of the layers that are to be sparse.

    Args:
        candidates: those that can plan on the grid, dense attention last.
        layers: transformer and number of each L.
        errors: (C, L, H) squared error of a head's output over the squared output of its layer.
        recalls: (C, L, H) share of dense attention's mass that is read.
        densities: (C, L, H) of the plans.
        refusals: why other candidates cannot plan on the grid, by label.
        models: the transformers by component name.
    """

    candidates: tuple[Method, ...]
    layers: tuple[LayerKey, ...]
    errors: Tensor
    recalls: Tensor
    densities: Tensor
    refusals: dict[str, str]
    models: dict[str, Model]

    def choose(self, budget: float) -> Tensor:
        """(L, H) the candidates with the least sum of errors at a mean density.

        Raises:
            ValueError: no choice has so low a density.
        """
        flat = (x.flatten(1) for x in (self.errors, self.densities))
        return allocate(*flat, budget).view(self.errors.shape[1:])

    def mean(self, values: Tensor, choice: Tensor) -> float:
        """The mean over heads of one of the (C, L, H) tensors for an (L, H) choice."""
        return values.gather(0, choice[None]).mean().item()

    def schedule(self, choice: Tensor, guard: DenseGuard, name: str = "tuned") -> Schedule:
        """The schedule in which every head follows its candidate of an (L, H) choice."""
        layers: dict[tuple[str, int, tuple[int, ...]], list[int]] = defaultdict(list)
        for (transformer, layer), row in zip(self.layers, choice):
            for candidate in row.unique().tolist():
                heads = tuple((row == candidate).nonzero().flatten().tolist())
                layers[transformer, candidate, heads].append(layer)
        num_heads, is_one = choice.shape[1], len(self.models) == 1
        rules = tuple(
            Rule(
                self.candidates[candidate],
                layers=tuple(numbers),
                heads=None if len(heads) == num_heads else heads,
                transformer=None if is_one else transformer,
            )
            for (transformer, candidate, heads), numbers in layers.items()
            if not isinstance(self.candidates[candidate], Dense)
        )
        return Schedule(rules, guard, next(iter(self.models.values())), name)


class Probe:
    """Tries candidates on the calls of a model that runs densely.

    Args:
        methods: with the names of the options that are to stay as they are.
        densities: those that methods which can be set to a density are tried at.
        guard: layers that are left out.
        steps: the denoising steps to look at, from 0.
    """

    def __init__(
        self,
        methods: Mapping[Method, Collection[str]],
        densities: Sequence[float],
        guard: DenseGuard,
        steps: Container[int],
    ):
        self._methods, self._densities = methods, densities
        self.guard, self.steps = guard, steps
        # known with the first grid
        self.candidates: list[Method] = []
        self.refusals: dict[int, str] = {}
        self.models: dict[str, Model] = {}
        self._fixed_plan = lru_cache(maxsize=256)(lambda method, grid: method.plan(grid))
        # by layer and candidate: squared error, recall and density of each head, and calls
        self._sums: dict[tuple[LayerKey, int], Tensor] = {}
        self._sizes: dict[LayerKey, float] = defaultdict(float)

    @contextmanager
    def watching(self, pipe: object) -> Iterator[None]:
        """Look on while a pipeline runs in a with block; its outputs do not change."""
        with watching(pipe, self._look) as handle:
            self.models = {site.name: site.shape for site in handle.sites}
            yield

    @torch.no_grad()
    def _look(self, seen: Sight) -> None:
        """Try every candidate on a call of a layer."""
        is_guarded = seen.layer < self.guard.num_layers(self.models[seen.transformer].layers)
        if is_guarded or seen.step not in self.steps:
            return
        if not self.candidates:
            found = candidates_at(self._methods, self._densities, seen.grid)
            self.candidates = [*found, Dense()]
        layer = seen.transformer, seen.layer
        dense, lse = _attend(seen, Dense().plan(seen.grid))
        self._sizes[layer] += dense.float().square().sum().item()
        for number, candidate in enumerate(self.candidates):
            if number in self.refusals:
                continue
            try:
                plan = self._plan(candidate.at(seen.layer), seen)
            except ValueError as error:
                self.refusals[number] = str(error)
                continue
            out, kept = _attend(seen, plan)
            if (even := plan.unsharpened()) is not plan:
                _, kept = _attend(seen, even)
            error = (out - dense).float().square().sum((0, 2, 3))
            recall = (kept - lse).exp().mean((0, 2))
            density = _densities(plan).to(error).expand_as(error)
            figures = [error, recall, density, torch.ones_like(error)]
            found = torch.stack(figures).double().cpu()
            key = layer, number
            self._sums[key] = self._sums[key] + found if key in self._sums else found

    def _plan(self, method: Method, seen: Sight) -> AnyPlan:
        if not method.reads_content:
            return self._fixed_plan(method, seen.grid)
        return method.plan(seen.grid, seen.reading)

    def finish(self) -> Losses:
        """What was found.

        Raises:
            ValueError: nothing was looked at.
        """
        layers = sorted(self._sizes)
        if not layers:
            raise ValueError(
                "no layer attended at the steps that were to be looked at: the guards leave "
                f"nothing sparse ({self.guard}), or there are too few steps"
            )
        numbers = [i for i in range(len(self.candidates)) if i not in self.refusals]
        sums = torch.stack([torch.stack([self._sums[x, i] for x in layers]) for i in numbers])
        errors, recalls, densities, calls = sums.unbind(2)
        sizes = torch.tensor([self._sizes[x] for x in layers], dtype=torch.float64)
        return Losses(
            candidates=tuple(self.candidates[i] for i in numbers),
            layers=tuple(layers),
            errors=errors / sizes[:, None],
            recalls=recalls / calls,
            densities=densities / calls,
            refusals={label(self.candidates[i]): why for i, why in self.refusals.items()},
            models=self.models,
        )


def candidates_at(
    methods: Mapping[Method, Collection[str]], densities: Sequence[float], grid: Grid
) -> list[Method]:
    """Each method at each density that it can be set to, or as it is where it cannot.

    In a schedule some heads of a layer may be alone: what one head gets is not to depend on others.

    Args:
        methods: with the names of the options that are to stay as they are.
    """
    found: list[Method] = []
    for method, fixed in methods.items():
        alone = method.by_head()
        method = alone if _agree(alone, method, fixed) else method
        variants = [method.with_density(density, grid) for density in densities]
        found += [x for x in variants if x is not None and _agree(x, method, fixed)] or [method]
    return list(dict.fromkeys(found))


def _agree(one: Method, other: Method, options: Collection[str]) -> bool:
    return all(getattr(one, name) == getattr(other, name) for name in options)


def _densities(plan: AnyPlan) -> Tensor:
    """(H,) of the heads, or (1,) where they share one plan."""
    return torch.tensor([plan.select_heads([head]).density for head in range(plan.num_heads)])


def _attend(seen: Sight, plan: AnyPlan) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; what PyTorch attends with by itself gives none of the latter."""
    engine = "torch" if seen.q.device.type == "cpu" else "auto"
    given = {"scale": seen.scale, "key_mask": seen.key_mask}
    return attend(seen.q, seen.k, seen.v, plan, backend=engine, return_lse=True, **given)
