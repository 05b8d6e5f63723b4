"""One patched transformer: its layers, its forward passes, and what each layer did.

Letters: B batch, H heads, S tokens, D head dim.
"""

from __future__ import annotations

import copy
from collections import Counter
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidattn.attention import attend, engines_of
from vidattn.grid import Size
from vidattn.kernels.engines.dense import dense_attention
from vidattn.kernels.engines.exact import only_pytorch
from vidattn.pipelines.break_even import break_even
from vidattn.pipelines.family import attentions, family_of, shape_of
from vidattn.pipelines.heads import are_spread, check_apart
from vidattn.pipelines.hooks.checkpoint import tie, untie
from vidattn.pipelines.hooks.intercept import Layer, give_back, keep_choice, owner, take
from vidattn.pipelines.hooks.operators import numbered
from vidattn.pipelines.hooks.ring import Ring
from vidattn.pipelines.hooks.root import ContextOf, install
from vidattn.pipelines.hooks.swap import swap_out
from vidattn.pipelines.learned import Learned
from vidattn.pipelines.passes import Pass, Passes, is_backward
from vidattn.pipelines.plans import Plans
from vidattn.pipelines.sequence import Call, find_video, is_of_prefix
from vidattn.pipelines.settings import Settings
from vidattn.pipelines.stopwatch import Stopwatch
from vidattn.plan import AnyPlan
from vidattn.planning.learned import LearnedMethod
from vidattn.schedule import Model, Part

LAYER_GUARD, STEP_GUARD, DENSE_METHOD = "layer guard", "step guard", "dense method"
SKIPPED, FULL_PATH = "scores skipped by guidance", "full path"


class Site:
    """A transformer with our layers in it."""

    def __init__(self, name: str, model: nn.Module, settings: Settings, handle: object):
        self.name, self.model, self.settings, self.handle = name, model, settings, handle
        self.family = family = family_of(model)
        self.number = numbered(self)
        self.modules = attentions(family, model)
        if not self.modules:
            raise ValueError(
                f"{type(model).__name__} has no layer to patch: none is called {family.layers!r}"
            )
        self.layers = [Layer(path, i, self, model) for i, (path, _) in enumerate(self.modules)]
        if settings.strict and any(are_spread(module, model) for _, module in self.modules):
            for rule in settings.schedule.rules:
                check_apart(rule.method)
        self.num_guarded = settings.schedule.guard.num_layers(len(self.layers))
        self.plans = Plans(name, settings)
        self.passes = Passes(name, settings)
        self.context = ContextOf()
        # of a pass that attends to everything beside that of the patch: factor of its scale
        self.full_sharpness: float | None = None
        self._shared: dict[int, object] = {}
        self.learned = Learned(name, model, settings.schedule)
        for index, _ in self.learned.modules:
            self.layers[index].is_learned = True
        self.put_in()
        self._undo = install(self, model)

    @property
    def shape(self) -> Model:
        """What schedules compare with what they were made for."""
        return shape_of(self.model)

    def remove(self) -> None:
        """Take our layers out again."""
        for undo in self._undo:
            undo()
        self.learned.remove()
        untie(self.model, self.passes)
        for layer, (_, module) in zip(self.layers, self.modules):
            processor = module.processor
            if owner(processor) is not layer:
                continue
            give_back(processor, layer)
            if layer.index in self._shared:
                module.processor = self._shared[layer.index]
                keep_choice(module.processor, layer)

    def put_in(self) -> None:
        """Put our layers in, also where somebody has replaced the processor since."""
        if torch.is_grad_enabled():
            tie(self.model, self.passes)
        todo = [
            (layer, module)
            for layer, (_, module) in zip(self.layers, self.modules)
            if owner(module.processor) is not layer
        ]
        if not todo:
            return
        everywhere = (getattr(module, "processor", None) for module in self.model.modules())
        users = Counter(id(processor) for processor in everywhere)
        for layer, module in todo:
            processor = module.processor
            self._shared.pop(layer.index, None)
            if users[id(processor)] > 1:
                # one object serves several layers; each needs its own to know which it is
                self._shared[layer.index] = processor
                processor = module.processor = copy.copy(processor)
            elif (other := owner(processor)) is not None:
                swap_out(processor, other)
            take(processor, layer)

    def begin(self, hidden_states: Tensor, timestep: Tensor, size: Size, num_before: int) -> None:
        """A forward pass begins (see ``Passes.begin``)."""
        self.passes.begin(hidden_states, timestep, size, num_before, self.context.now)

    def end(self, output: Tensor) -> None:
        """A forward pass ends.

        Raises:
            RuntimeError: a layer did not run in it, and strict.
        """
        is_first = self.passes.end(output)
        if is_first and not getattr(self.model, "is_cache_enabled", False):
            self.check_ran(self.passes.current().ran)

    def check_ran(self, ran: set[int]) -> None:
        """Compare the layers that ran with those there are.

        Raises:
            RuntimeError: one is missing, and strict.
        """
        missing = [layer.name for layer in self.layers if layer.index not in ran]
        if missing and self.settings.strict:
            raise RuntimeError(
                f"{len(missing)} of {len(self.layers)} layers of {self.name} never attended, "
                f"{missing[0]} the first: something replaced them after patching. Patch again, or "
                "patch with strict=False and see report()"
            )

    def attend(
        self, layer: Layer, q: Tensor, k: Tensor, v: Tensor, mask, scale, ring: Ring | None = None
    ) -> Tensor:
        """(B, H, S, D) attention of a layer: sparse, or dense where a guard says so.

        Args:
            ring: says of which queries the outputs are wanted; None for all.
        """
        current = self.passes.current()
        current.ran.add(layer.index)
        if is_of_prefix(self.family, current, k):
            return dense_attention(q, k, v, mask=mask, scale=scale)
        why, call, parts = self._why_dense(layer, current), None, ()
        plans: list[AnyPlan] = []
        if why is None:
            try:
                call = self.find_video(layer, current, q, k, mask, scale)
            except ValueError as error:
                why = str(error)
                self.cannot(layer, why, record=False)
        if call is not None:
            plans, parts = self._plan(layer, current, call, q, k)
            limit = torch.inf if layer.is_learned else break_even(q, k, v)
            if limit < call.visited_density(plans):
                why, plans = f"dense is faster above density {limit:.2f} here", []
        if self.full_sharpness is not None:
            scale = (q.shape[-1] ** -0.5 if scale is None else scale) * self.full_sharpness
        start = Stopwatch.now(q.device)
        with only_pytorch() if self.settings.only_pytorch else nullcontext():
            if plans:
                out, engines = self._sparse(layer, q, k, v, plans, parts, call, ring)
            else:
                out, *engines = _dense(layer, q, k, v, mask, scale, ring)
        # what is run again for the backward pass is no call of the model
        if not is_backward():
            density = call.density(plans) if call and plans else None
            tally = current.diary.tallies[layer.index]
            tally.add(start, q.device, density, why, parts, engines)
        return out

    def find_video(
        self, layer: Layer, current: Pass, q: Tensor, k: Tensor, mask: Tensor | None, scale
    ) -> Call:
        """What a call of a layer is about (see ``sequence``)."""
        module = self.modules[layer.index][1]
        return find_video(self.family, module, current, q, k, mask, scale, self.model)

    def skipped(self, layer: Layer, allowed: bool) -> None:
        """A layer ran without attending."""
        if not (allowed or self.family.may_skip):
            self.cannot(layer, _why_not_caught())
        else:
            self._note(layer, SKIPPED)

    def cannot(self, layer: Layer, why: str, record: bool = True) -> None:
        """A call of a layer cannot be sparse.

        Raises:
            RuntimeError: strict.
        """
        if self.settings.strict and self._why_dense(layer, self.passes.current()) is None:
            raise RuntimeError(
                f"{self.name}.{layer.name} cannot run sparse: {why}. Unpatch the model, guard the "
                "layer with dense_layers, or patch with strict=False to let it run dense"
            )
        if record:
            self._note(layer, why)

    def check_gradient(self, layer: Layer) -> None:
        """Refuse a gradient that is not that of what ran.

        Raises:
            RuntimeError: the call was sparse.
        """
        if self._why_dense(layer, self.passes.current()) is None:
            raise RuntimeError(
                f"{self.name}.{layer.name} has no gradient of sparse attention: diffusers' context "
                "parallelism, compiled, attends densely in the backward pass. Run without "
                "torch.compile, or under torch.no_grad()"
            )

    def _note(self, layer: Layer, why: str) -> None:
        """Count a dense call that takes no time of ours."""
        current = self.passes.current()
        current.ran.add(layer.index)
        current.diary.tallies[layer.index].num_dense[why] += 1

    def _why_dense(self, layer: Layer, current: Pass) -> str | None:
        if self.full_sharpness is not None:
            return FULL_PATH
        if self.settings.schedule.is_dense:
            return DENSE_METHOD
        if layer.index < self.num_guarded:
            return LAYER_GUARD
        if current.dense_step:
            return STEP_GUARD
        at = self._place(layer, current)
        return None if self.settings.schedule.is_sparse_at(*at) else DENSE_METHOD

    def _place(self, layer: Layer, current: Pass) -> tuple[str, int, int, int | None]:
        """Where a schedule finds a layer."""
        return self.name, layer.index, current.step, current.num_steps

    def _plan(
        self, layer: Layer, current: Pass, call: Call, q: Tensor, k: Tensor
    ) -> tuple[list[AnyPlan], tuple[Part, ...]]:
        """The plan of each turn of a layer, and the methods they are made of."""
        current.diary.grids.add(call.grid)
        at = self._place(layer, current)
        parts = call.heads.parts(self.settings.schedule.parts(*at, num_heads=call.heads.total))
        turns = call.turns()
        return [self.plans.plan(parts, layer.index, current, x, q, k) for x in turns], parts

    def _sparse(
        self, layer: Layer, q: Tensor, k: Tensor, v: Tensor, plans, parts, call: Call, ring
    ) -> tuple[Tensor, tuple[str, ...]]:
        """Attention by a plan for each turn of a call, and the engines that it ran on."""
        if torch.is_autocast_enabled(q.device.type):
            dtype = torch.get_autocast_dtype(q.device.type)
            q, k, v = (x.to(dtype) for x in (q, k, v))
        if ring is not None:
            call.check_shared()
            plans = [ring.share(plan, call) for plan in plans]
        outs, engines = [], set()
        for turn, plan in zip(call.turns(), plans):
            own = tuple(turn.to_grid(x) for x in (q, k, v))
            given = {"scale": turn.scale, "key_mask": turn.keys, "key_weight": turn.weight}
            out = attend(*own, plan, **given)
            engines.update(engines_of(*own, plan, **given))
            if isinstance(method := parts[0].method, LearnedMethod):
                hidden = layer.hidden[:, : own[0].shape[2]]
                out = self.learned.add(out, method, layer.index, hidden, *own, plan, turn)
            outs.append(turn.from_grid(turn.with_beside(out, *own)))
        out = outs[0] if len(outs) == 1 else torch.cat(outs, 2)
        return out, tuple(sorted(engines))


def _dense(layer: Layer, q: Tensor, k: Tensor, v: Tensor, mask, scale, ring) -> tuple[Tensor, str]:
    if ring is None:
        return layer.dense(q, k, v, mask, scale)
    ring.deal(ring.home[None, None])
    rows = (ring.home == ring.rank).nonzero()[:, 0]
    out, engine = layer.dense(q[:, :, rows], k, v, mask, scale)
    return torch.zeros_like(q).index_copy(2, rows, out), engine


def _why_not_caught() -> str:
    """Why the attention of a layer did not arrive here."""
    function = F.scaled_dot_product_attention
    if function is torch._C._nn.scaled_dot_product_attention:
        return "it does not use scaled_dot_product_attention"
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return (
        "torch.nn.functional.scaled_dot_product_attention was replaced by "
        f"{getattr(function, '__module__', '?')}.{name}, which attends in its place; put back the "
        "function of PyTorch"
    )
