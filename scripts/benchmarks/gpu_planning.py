"""What scripts/bench_gpu.py times of planning: everything a layer does beside attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from time import perf_counter

import torch
from benchmarks.gpu_times import Row, Sizes

from vidattn.attention import attend
from vidattn.kernels.engines.block_segments import segments
from vidattn.kernels.timing import synchronize
from vidattn.methods import create_method
from vidattn.plan import AnyPlan
from vidattn.planning.reading import Reading
from vidattn.planning.sampled import sample
from vidattn.quality.fidelity import recall

METHODS = {"topk": {}, "svg": {}, "vmoba": {}, "adaspa": {}, "topk, rectified": {"rectify": True}}


def planning(sizes: Sizes) -> Iterator[Row]:
    """What a layer spends in a step beside attention, part by part, in ms."""
    for name, options in METHODS.items():
        options = {"density": sizes.density} | options
        yield name, partial(_planned, sizes, name.partition(",")[0], options)


@torch.no_grad()
def _planned(sizes: Sizes, name: str, options: dict) -> dict:
    q, k, v = sizes.inputs(heads=sizes.planning_heads)
    some = sizes.grid.video_start + sample(sizes.grid.num_video_tokens, 8).to(sizes.device)
    method, took = create_method(name, **options), {}

    def time(what: str, call: Callable, *args: object, **named: object) -> object:
        synchronize()
        begin = perf_counter()
        made = call(*args, **named)
        synchronize()
        took[f"{what}_ms"] = round(1e3 * (perf_counter() - begin), 2)
        return made

    # the second time stays: in the first kernels are compiled and memory is taken
    for _ in range(2):
        plan = time("plan", method.plan, sizes.grid, Reading(q, k))
        time("recall", recall, q, k, plan, some)
        time("visited", getattr, plan, "visited_density")
        time("segments", _prepare, plan)
        time("attend", attend, q, k, v, plan, backend=sizes.engine)
    if sizes.device == "cuda":
        took["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    return took


def _prepare(plan: AnyPlan) -> None:
    """What a kernel needs of a plan once."""
    for part, *_ in plan.parts():
        part.lists.check(plan.grid.num_tokens)
        segments(part.lists)
