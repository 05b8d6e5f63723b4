"""One patched transformer: its layers, its forward passes, and what each layer did.

Letters: B batch, H heads, S tokens, D head dim.
"""

from __future__ import annotations

import copy
import re
import threading
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vidattn.attention import attend
from vidattn.grid import Grid, Size
from vidattn.pipelines import masks
from vidattn.pipelines.family import family_of
from vidattn.pipelines.intercept import Layer, numbered, processor_namespace
from vidattn.pipelines.root import install
from vidattn.pipelines.settings import Settings
from vidattn.pipelines.stopwatch import Stopwatch
from vidattn.pipelines.swap import is_swapped, swap_in, swap_out

LAYER_GUARD, STEP_GUARD, DENSE_METHOD = "layer guard", "step guard", "dense method"


@dataclass
class Pass:
    """One forward pass of a transformer."""

    size: Size
    num_before: int
    step: int
    dense_step: bool
    start: object
    ran: set[int] = field(default_factory=set)


@dataclass
class Tally:
    """What one layer has done in one generation."""

    num_sparse: int = 0
    density_sum: float = 0.0
    num_dense: Counter[str] = field(default_factory=Counter)
    watch: Stopwatch = field(default_factory=Stopwatch)

    @property
    def num_calls(self) -> int:
        """Calls, sparse and dense."""
        return self.num_sparse + self.num_dense.total()


class Site:
    """A transformer with our layers in it."""

    def __init__(self, name: str, model: nn.Module, settings: Settings, handle: object):
        self.name, self.model, self.settings, self.handle = name, model, settings, handle
        self.family = family_of(model)
        self.number = numbered(self)
        self.modules = [
            (path, module)
            for path, module in model.named_modules()
            if re.fullmatch(self.family.layers, path) and hasattr(module, "processor")
        ]
        if not self.modules:
            raise ValueError(
                f"{type(model).__name__} has no layer that could be patched: nothing in it is "
                f"called {self.family.layers!r}"
            )
        self.layers = [Layer(path, i, self) for i, (path, _) in enumerate(self.modules)]
        self.num_guarded = settings.guard.num_layers(len(self.layers))
        self._shared: dict[int, object] = {}
        self._passes: dict[int, Pass] = {}
        self._latest: Pass | None = None
        self.reset()
        self.swap_processors()
        self._hooks = install(self, model)

    def reset(self) -> None:
        """Forget what the layers did."""
        self.tallies = [Tally() for _ in self.layers]
        self.watch = Stopwatch()
        self.num_passes = 0
        self.grids: set[Grid] = set()
        self._finite: Tensor | None = None

    def remove(self) -> None:
        """Take our layers out again."""
        for hook in self._hooks:
            hook.remove()
        for layer, (_, module) in zip(self.layers, self.modules):
            processor = module.processor
            if not (is_swapped(processor) and processor._vidattn is layer):
                continue
            swap_out(processor)
            if layer.index in self._shared:
                module.processor = processor = self._shared[layer.index]
            if layer.dense_backend is not None:
                processor._attention_backend = layer.dense_backend

    def swap_processors(self) -> None:
        """Put our layers in, also where somebody has replaced the processor since."""
        todo = [
            (layer, module)
            for layer, (_, module) in zip(self.layers, self.modules)
            if not (is_swapped(module.processor) and module.processor._vidattn is layer)
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
            elif is_swapped(processor):
                swap_out(processor)
            layer.dense_backend = processor.__dict__.pop("_attention_backend", None)
            swap_in(processor, processor_namespace, layer)

    def begin(self, hidden_states: Tensor, timestep: Tensor, size: Size, num_before: int) -> None:
        """A forward pass begins.

        Raises:
            FloatingPointError: the latents, or what the last pass made of them, are not finite.
        """
        steps, guard = self.settings.steps, self.settings.guard
        finite = torch.isfinite(hidden_states.detach()).all()
        if self._finite is not None:
            finite = finite & self._finite.to(finite.device)
        # one wait for the device, not three
        timestep = timestep.detach().float().to(finite.device)
        ok, mean, top = torch.stack([finite.float(), timestep.mean(), timestep.max()]).tolist()
        self._finite = None
        step = steps.count(mean)
        if not ok:
            self._not_finite(step, f"(timestep {top:g})")
        total = steps.num_steps or 0
        dense_step = step < guard.num_steps(total)
        start = Stopwatch.now(hidden_states.device)
        self._latest = Pass(size, num_before, step, dense_step, start)
        self._passes[threading.get_ident()] = self._latest

    def end(self, output: Tensor) -> None:
        """A forward pass ends.

        Raises:
            RuntimeError: a layer did not run in it, and strict.
        """
        current = self._current()
        self.watch.add(current.start, output.device)
        self.num_passes += 1
        self._finite = torch.isfinite(output.detach()).all()
        if self.num_passes == 1 and not getattr(self.model, "is_cache_enabled", False):
            self.check_ran(current.ran)

    def check_finite(self) -> None:
        """Look at the output of the last forward pass.

        Raises:
            FloatingPointError: it is not finite.
        """
        finite, self._finite = self._finite, None
        if finite is not None and not bool(finite):
            self._not_finite(self._latest.step + 1, "(the last one)")

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

    def attend(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor, mask, scale) -> Tensor:
        """(B, H, S, D) attention of a layer: sparse, or dense where a guard says so."""
        current = self._current()
        current.ran.add(layer.index)
        why = self._why_dense(layer, current)
        start = Stopwatch.now(q.device)
        prepared = None
        if why is None:
            try:
                prepared = self._prepare(current, q, k, mask)
            except ValueError as error:
                why = str(error)
                self.cannot(layer, why, record=False)
        if prepared is None:
            out, density = layer.dense(q, k, v, mask, scale), None
        else:
            out, density = self._sparse(q, k, v, scale, *prepared)
        # a recomputation for the backward pass is no call of the model
        if torch._C._current_graph_task_id() == -1:
            self._record(self.tallies[layer.index], start, q.device, density, why)
        return out

    def skipped(self, layer: Layer) -> None:
        """The processor of a layer ran without attending."""
        self._current().ran.add(layer.index)
        if not self.family.may_skip:
            self.cannot(layer, "it does not use scaled_dot_product_attention")
        else:
            self.tallies[layer.index].num_dense["no scores needed"] += 1

    def cannot(self, layer: Layer, why: str, record: bool = True) -> None:
        """A call of a layer cannot be sparse.

        Raises:
            RuntimeError: strict.
        """
        if self.settings.strict and not self.settings.is_dense:
            raise RuntimeError(
                f"{self.name}.{layer.name} cannot run sparse: {why}. Unpatch the model, guard the "
                "layer with dense_layers, or patch with strict=False to let it run dense"
            )
        if record:
            self._current().ran.add(layer.index)
            self.tallies[layer.index].num_dense[why] += 1

    def _current(self) -> Pass:
        # the backward pass recomputes blocks in threads of its own
        current = self._passes.get(threading.get_ident(), self._latest)
        if current is None:
            raise RuntimeError(
                f"a layer of {self.name} ran before the transformer did: call the transformer, not "
                "its blocks"
            )
        return current

    def _why_dense(self, layer: Layer, current: Pass) -> str | None:
        if self.settings.is_dense:
            return DENSE_METHOD
        if layer.index < self.num_guarded:
            return LAYER_GUARD
        return STEP_GUARD if current.dense_step else None

    def _prepare(self, current: Pass, q: Tensor, k: Tensor, mask) -> tuple[Grid, int, Tensor]:
        """The grid of this sequence, how far to turn it, and the keys that may be read."""
        length, (t, h, w) = q.shape[2], current.size
        beside = length - t * h * w
        if beside < 0 or k.shape[2] != length:
            raise ValueError(
                f"its {length} queries and {k.shape[2]} keys do not fit the video of {t}x{h}x{w}"
            )
        before = current.num_before
        if before < 0:
            before = beside if self.family.beside == "before" else 0
        after = beside - before
        if after < 0 or after and self.family.beside == "nothing":
            raise ValueError(
                f"its sequence of {length} is not the video of {t}x{h}x{w} = {t * h * w} tokens"
            )
        keys = masks.key_mask(mask, (q.shape[0], length), self.family.paired_mask)
        # a grid has its text on one side; attention does not mind turning the sequence
        turn = before if after else 0
        grid = Grid(t, h, w, text=beside, text_first=bool(before) and not turn)
        return grid, turn, keys

    def _sparse(self, q, k, v, scale, grid: Grid, turn: int, keys: Tensor | None):
        if torch.is_autocast_enabled(q.device.type):
            dtype = torch.get_autocast_dtype(q.device.type)
            q, k, v = (x.to(dtype) for x in (q, k, v))
        if turn:
            q, k, v = (x.roll(-turn, 2) for x in (q, k, v))
            keys = None if keys is None else keys.roll(-turn, 1)
        plan = self.settings.plan(grid, q, k)
        out = attend(q, k, v, plan, scale=scale, key_mask=keys)
        self.grids.add(grid)
        return (out.roll(turn, 2) if turn else out), plan.density

    def _record(self, tally: Tally, start, device, density: float | None, why: str | None) -> None:
        tally.watch.add(start, device)
        if density is None:
            tally.num_dense[why] += 1
        else:
            tally.num_sparse += 1
            tally.density_sum += density

    def _not_finite(self, step: int, where: str) -> None:
        total = self.settings.steps.num_steps
        raise FloatingPointError(
            f"the latents turned NaN or infinite by step {step} of {total or 'unknown'} {where}: "
            "nothing after it can be right. Try a wider dtype, or a milder method or guard"
        )
