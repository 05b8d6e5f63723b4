"""Guides what a pipeline makes by the attention of its transformers, sparse or not.

Letters: B batch, H query heads, K key heads, S tokens, D head dim.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vidattn.choice import parse_choice
from vidattn.guidance import Guide, GuidedCall
from vidattn.guides import create_guide
from vidattn.guides.softpag import SoftPAG
from vidattn.pipelines.family import shape_of
from vidattn.pipelines.handle import Handle, find_handle, handle_of
from vidattn.pipelines.hooks.dual_path import WITHOUT_PROMPT
from vidattn.pipelines.hooks.intercept import Layer
from vidattn.pipelines.hooks.ring import Ring
from vidattn.pipelines.hooks.root import first_tensor, with_first
from vidattn.pipelines.models import find_transformers, unwrap
from vidattn.pipelines.patch import patch
from vidattn.pipelines.sequence import is_of_prefix
from vidattn.pipelines.site import Site
from vidattn.pipelines.steps import Run

# of diffusers' cache_context: passes without the prompt and with it in one batch
BOTH = "cond_uncond"


def guide(pipe_or_transformer: object, guide: str | Guide, **options: object) -> Guidance:
    """Guide a diffusers pipeline by its attention, until ``remove`` or the end of a with block.

    A pipeline that is patched stays as sparse as it is; patch it first. One that is not attends to
    everything. Afterwards its outputs are bit for bit what they were. Guides that run the
    transformer a second time act on passes with the prompt, so that a step of classifier-free
    guidance has three passes for two, or runs its batch twice where both passes share one; where a
    pipeline does not tell its passes apart, they act on all.

    Args:
        pipe_or_transformer: as for ``patch``.
        guide: a name, "softpag" or "broadway", also with options as the command line reads them
            ("softpag:heads=2:0,3:1"), or a guide with its options set.
        options: fields of the guide.

    Raises:
        ValueError: an unknown guide, a bad option, a model that cannot be patched or is guided
            already, or one without the layers and heads that are named.

    >>> with vidattn.patch(pipe, "radial"), vidattn.guide(pipe, "softpag", scale=0.5):
    ...     video = pipe(prompt).frames
    """
    if isinstance(guide, str):
        choice = parse_choice(guide, "guides")
        if twice := sorted(choice.options.keys() & options):
            raise ValueError(f"{guide!r} has the options {twice} already: give them once")
        guide = create_guide(choice.name, **choice.options, **options)
    elif options:
        raise ValueError(f"the options {sorted(options)} belong to a guide given by name")
    return Guidance(pipe_or_transformer, guide)


class Guidance:
    """A guided pipeline or transformer; leaving a with block ends it."""

    def __init__(self, pipe_or_transformer: object, guide: Guide):
        check_guide(pipe_or_transformer, guide)
        handle, self._own = _handle_of(pipe_or_transformer), None
        if handle is None:
            handle = self._own = patch(pipe_or_transformer, "dense")
        self.guide = guide
        self._undo: list[Callable[[], None]] = []
        try:
            for site in handle.sites:
                self._undo += _install(site, guide)
        except BaseException:
            self.remove()
            raise
        self._undo.append(handle.before_remove(self._take_off))

    def remove(self) -> None:
        """Guide no more; a second time does nothing."""
        self._take_off()
        if self._own is not None:
            self._own.remove()

    def _take_off(self) -> None:
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Guidance:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def check_guide(pipe_or_transformer: object, guide: Guide) -> None:
    """Refuse a guide that a model cannot have.

    Raises:
        ValueError: an unknown model, or one without the layers and heads that are named.
    """
    for model in find_transformers(pipe_or_transformer).values():
        shape = shape_of(model)
        guide.check(shape.layers or 0, shape.heads)


def _handle_of(pipe_or_transformer: object) -> Handle | None:
    if isinstance(pipe_or_transformer, nn.Module):
        model: Any = unwrap(pipe_or_transformer)
        return find_handle(model)
    return handle_of(pipe_or_transformer)


def _install(site: Site, guide: Guide) -> list[Callable[[], None]]:
    """Stand between the layers of a site and the site; what undoes it."""
    if any(isinstance(layer.owner, _Guided) for layer in site.layers):
        raise ValueError(f"{site.name} is guided already: remove() that guide first")
    guided = _Guided(site, guide)
    undo = [_put(layer, guided) for layer in site.layers]
    if guide.has_second_pass:
        hook = site.model.register_forward_hook(guided.after, with_kwargs=True)
        undo.append(hook.remove)
    return undo


def _put(layer: Layer, owner: Any) -> Callable[[], None]:
    before, layer.owner = layer.owner, owner

    def undo() -> None:
        layer.owner = before

    return undo


class _Guided:
    """Stands between the layers of a site and the site, and runs its second passes."""

    def __init__(self, site: Site, guide: Guide):
        self._site, self._guide = site, guide
        self._local = threading.local()
        self.skipped, self.cannot = site.skipped, site.cannot
        self.check_gradient = site.check_gradient

    def attend(
        self, layer: Layer, q: Tensor, k: Tensor, v: Tensor, mask, scale, ring: Ring | None = None
    ) -> Tensor:
        """(B, H, S, D) attention of a layer, guided where it is to be."""
        site = self._site
        current = site.passes.current()
        is_second = getattr(self._local, "is_second", False)
        is_off = is_second != self._guide.has_second_pass or is_of_prefix(site.family, current, k)
        if is_off or not self._is_at_work(current.run):
            return site.attend(layer, q, k, v, mask, scale, ring)
        if ring is not None or layer.parallel is not None:
            raise ValueError(f"{site.name} is guided: run it in one process")
        call = site.find_video(layer, current, q, k, mask, scale)

        def sequence(x: Tensor) -> Tensor:
            return x.roll(call.num_moved, 2) if call.num_moved else x

        def run(attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q = call.from_grid(q)
            return call.to_grid(attention(layer, q, sequence(k), sequence(v), mask, scale))

        guided = GuidedCall(
            layer.index,
            len(site.layers),
            q.shape[1],
            call.grid,
            call.to_grid(q),
            call.to_grid(k),
            call.to_grid(v),
            sparse=lambda *qkv: run(site.attend, *qkv),
            dense=lambda *qkv: run(_dense, *qkv),
            memory=self._memory(current),
        )
        return call.from_grid(self._guide.attend(guided))

    def after(self, model: nn.Module, args: tuple, given: dict, output: Any) -> Any:
        """Forward hook: leave the output of a second pass behind."""
        if getattr(self._local, "is_second", False):
            return None
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"{self._site.name} is guided by a second pass, which torch.compile of the whole "
                "transformer does not reach: compile its blocks (compile_repeated_blocks)"
            )
        first, context = first_tensor(output), self._site.context.now.name or ""
        run = self._site.passes.current().run
        if context.startswith(WITHOUT_PROMPT) or not self._is_at_work(run):
            return None
        if first.requires_grad:
            raise RuntimeError(f"{self._site.name} is guided, which is not for training")
        if getattr(model, "is_cache_enabled", False):
            raise RuntimeError(
                f"{self._site.name} has a step cache, which would serve both passes of a guide: "
                "disable_cache() first"
            )
        self._local.is_second = True
        try:
            second = first_tensor(model(*args, **given))
        finally:
            self._local.is_second = False
        moved = self._guide.combine(first, second)
        if context == BOTH:
            # the first half is without the prompt
            half = len(first) // 2
            moved = torch.cat([first[:half], moved[half:]])
        return with_first(output, moved)

    def _is_at_work(self, run: Run) -> bool:
        if self._guide.steps == (0.0, 1.0):
            return True
        if run.num_steps is None:
            raise ValueError(
                f"steps={self._guide.steps} of a guide are parts of the denoising steps, and "
                "nothing says how many there are: run a pipeline, or say it with "
                "handle.generation(num_steps=...) of a patch"
            )
        return self._guide.is_at_work(run.step, run.num_steps)

    def _memory(self, current: object) -> dict[str, object]:
        """What a guide keeps in this pass."""
        of, memory = getattr(self._local, "memory", (None, {}))
        if of is not current:
            memory = {}
            self._local.memory = current, memory
        return memory


def _dense(layer: Layer, q: Tensor, k: Tensor, v: Tensor, mask, scale) -> Tensor:
    return layer.dense(q, k, v, mask, scale)[0]


@dataclass(frozen=True)
class Found:
    """Heads that were perturbed together, as ``guide`` takes them, and the score that gave."""

    heads: tuple[str, ...]
    score: float


def search_heads(
    pipe: object,
    score: Callable[[], float],
    *,
    rounds: int = 2,
    keep: int = 1,
    candidates: Sequence[str] | None = None,
    guide: SoftPAG | None = None,
) -> list[Found]:
    """Find the heads whose perturbation guides best: the search of SoftPAG's authors.

    In each round every candidate is added to the heads of the rounds before, one at a time, and
    the best are kept. That is a call of ``score`` for each: a large model needs few candidates.

    Args:
        pipe: a pipeline, patched or not.
        score: runs the pipeline on some prompts, always the same with the same seeds, and says how
            good the result is; more is better.
        rounds: how often heads are added.
        keep: heads that are added in a round.
        candidates: LAYER:HEAD each, or LAYER; None for every head.
        guide: its scale, strength and steps are used.

    Returns:
        Everything that was tried, the best first.

    Raises:
        ValueError: no candidates, or no positive number of rounds or heads.

    >>> best = search_heads(pipe, lambda: sharpness(pipe(prompt, generator=seed()).frames))[0]
    >>> vidattn.guide(pipe, "softpag", heads=best.heads)
    """
    if rounds < 1 or keep < 1:
        raise ValueError(f"rounds and keep must be at least 1, got {rounds} and {keep}")
    if candidates is None:
        # experts of one pipeline are alike
        shape = shape_of(next(iter(find_transformers(pipe).values())))
        if shape.layers is None or shape.heads is None:
            raise ValueError(
                "the heads of this model are not the same in all layers: give candidates"
            )
        candidates = [f"{i}:{j}" for i in range(shape.layers) for j in range(shape.heads)]
    todo = list(candidates)
    if not todo:
        raise ValueError("there are no candidates to search")
    chosen: tuple[str, ...] = ()
    found: list[Found] = []
    for _ in range(rounds):
        tried = []
        for head in todo:
            heads = (*chosen, head)
            with Guidance(pipe, replace(guide or SoftPAG(), heads=heads)):
                tried.append(Found(heads, float(score())))
        tried.sort(key=lambda x: -x.score)
        found += tried
        best = [x.heads[-1] for x in tried[:keep]]
        chosen, todo = (*chosen, *best), [head for head in todo if head not in best]
        if not todo:
            break
    return sorted(found, key=lambda x: -x.score)
