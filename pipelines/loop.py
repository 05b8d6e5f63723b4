"""Finds the denoising loop that a transformer runs in, among the frames of its thread.

The pipelines of diffusers, and its modular blocks, all walk through a tensor of times: ``for i, t
in enumerate(timesteps)``. An entry of a tensor lies in the tensor's memory, so that the entry that
a loop is at can be read: nothing is counted, no time compared, and no device waited for. Strength,
sections of a long video, schedulers that evaluate a step twice, frames at times of their own,
copies of a pipeline and threads all are loops of this kind.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import NamedTuple

from diffusers import DiffusionPipeline
from diffusers.modular_pipelines import ModularPipeline, ModularPipelineBlocks
from torch import Tensor

PIPELINES = (DiffusionPipeline, ModularPipeline)
_CALL = "_vidattn_call"
# what the loops call the entry that they are at
_ENTRIES = {"t", "sigma"}
# pipelines that walk through all times of their scheduler but the last
_LEAVES_LAST = ("LTXI2VLongMultiPromptPipeline",)


class Loop(NamedTuple):
    """A denoising loop in the middle of a step.

    Args:
        times: what it walks through, one entry for each evaluation of the scheduler, or what holds
            it: the state of a block, or the scheduler of a walk in stages.
        time: the entry that it is at, one for every walk; None where walks share entries.
        index: the number of that entry.
        total: of entries.
        order: evaluations that make a step.
        is_whole: whether it walks through all of ``times``, which may be a scheduler's.
        is_trusted: whether a pipeline runs it; else ``time`` may be left from a loop that is over.
    """

    times: object
    time: Tensor | None
    index: int
    total: int
    order: int = 1
    is_whole: bool = True
    is_trusted: bool = True


class PipelineCall:
    """Stands for one call of a pipeline, and is gone when that is over."""


def find_loop() -> tuple[Loop | None, PipelineCall | None]:
    """The loop that this thread is in, and the call of a pipeline; None where there is none."""
    loop, outermost, frame = None, None, sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if "self" in code.co_varnames[:1] and isinstance(_self(frame), PIPELINES):
            outermost = frame
        if loop is None and not _ENTRIES.isdisjoint((*code.co_varnames, *code.co_names)):
            loop = _loop(frame.f_locals)
        frame = frame.f_back
    return loop, None if outermost is None else _call(outermost)


def _self(frame: FrameType) -> object:
    return frame.f_locals.get("self")


def _call(frame: FrameType) -> PipelineCall:
    """What stands for the call that a frame belongs to: names added to a frame go with it."""
    return frame.f_locals.setdefault(_CALL, PipelineCall())


def _loop(names: Mapping[str, object]) -> Loop | None:
    time, owner = names.get("t"), names.get("self")
    for times, is_whole in _candidates(names):
        index = _index(time, times)
        if index is not None:
            total = len(times) - any(x.__name__ in _LEAVES_LAST for x in type(owner).__mro__)
            order = getattr(_scheduler(names), "order", 1)
            is_trusted = isinstance(owner, (*PIPELINES, ModularPipelineBlocks))
            loop = Loop(times, time, index, total, order, is_whole, is_trusted)
            return _through_all_stages(loop, names)
    return _loop_over_sigmas(names)


def _through_all_stages(loop: Loop, names: Mapping[str, object]) -> Loop:
    """The one walk that the stages of Helios are, each a loop over times of its own."""
    counts, stage = names.get("pyramid_num_inference_steps_list"), names.get("stage_idx")
    if not isinstance(counts, list) or type(stage) is not int:
        return loop
    # all stages of a chunk may be longer than they are listed, by the same factor
    factor = loop.total // counts[stage]
    index, total = (factor * sum(x) for x in (counts[:stage], counts))
    return loop._replace(times=_scheduler(names), index=index + loop.index, total=total)


def _loop_over_sigmas(names: Mapping[str, object]) -> Loop | None:
    """The loop of Echo, which has no scheduler: over numbers, of which the last ends it."""
    state, index = names.get("block_state"), names.get("i")
    sigmas = getattr(state, "sigmas", None)
    if type(index) is not int or not isinstance(sigmas, list) or index >= len(sigmas) - 1:
        return None
    is_there = sigmas[index] is names.get("sigma")
    return Loop(state, None, index, len(sigmas) - 1) if is_there else None


def _candidates(names: Mapping[str, object]) -> Iterator[tuple[object, bool]]:
    """What a loop may walk through, and whether from its first entry to its last."""
    yield names.get("timesteps"), True
    yield names.get("step_matrix"), True
    yield getattr(names.get("block_state"), "timesteps", None), True
    yield getattr(_scheduler(names), "timesteps", None), False


def _scheduler(names: Mapping[str, object]) -> object:
    if "scheduler" in names:
        return names["scheduler"]
    holders = (names.get(name) for name in ("self", "components", "pipe", "pipeline"))
    return next((found for x in holders if (found := getattr(x, "scheduler", None))), None)


def _index(time: object, times: object) -> int | None:
    """Where ``time`` lies in the memory of ``times``, None if it does not."""
    if not (isinstance(time, Tensor) and isinstance(times, Tensor)):
        return None
    if not times.dim() or time.shape != times.shape[1:] or time.dtype != times.dtype:
        return None
    if time.device != times.device or time.device.type == "meta" or not len(times):
        return None
    if time.untyped_storage().data_ptr() != times.untyped_storage().data_ptr():
        return None
    stride = times.stride(0) * times.element_size()
    index, rest = divmod(time.data_ptr() - times.data_ptr(), stride or 1)
    return index if not rest and 0 <= index < len(times) else None
