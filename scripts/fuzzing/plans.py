"""The plan of a case: that of a method, or one made by hand of blocks, of a rule, or by head."""

from dataclasses import replace
from random import Random

import torch
from fuzzing.cases import Case, Refused
from fuzzing.inputs import Inputs

from vidattn.grid import Grid, frame_layout, raster_layout, tile_layout
from vidattn.head_plan import HeadPlan
from vidattn.methods import create_method
from vidattn.plan import AnyPlan, Plan
from vidattn.planning.method import Method
from vidattn.planning.reading import Reading

MADE = ("blocks", "rule", "by head", "by sample")
# what a method says when a density cannot be had on a grid
OUT_OF_REACH = ("out of reach", "cannot go down to density")


def method_of(case: Case) -> Method:
    """The method with its options, as the layer and step use it that are drawn with them."""
    options = dict(case.options)
    layer, step = options.pop("layer", 0), options.pop("step", 0)
    return create_method(case.method, **options).at(layer).in_step(step)


def make_plan(case: Case, inputs: Inputs) -> AnyPlan:
    """The plan of a case.

    Raises:
        Refused: the method cannot serve the density that is asked for.
    """
    if case.method in MADE:
        return _MAKERS[case.method](case)
    method = method_of(case)
    try:
        if not method.reads_content:
            return method.plan(case.grid)
        reading = Reading(inputs.q, inputs.k, case.scale, inputs.key_mask)
        plan, memory = method.plan_with_memory(case.grid, reading)
        return method.plan(case.grid, replace(reading, last=memory)) if case.again else plan
    except ValueError as error:
        if case.options.get("density") and any(x in str(error) for x in OUT_OF_REACH):
            raise Refused(str(error)) from None
        raise


def _blocks(case: Case, rng: Random | None = None, heads: int | None = None) -> Plan:
    """Random blocks for every sample and head, or for all of them; some rows are empty."""
    rng, grid = rng or Random(case.seed), case.grid
    layout = _layout(rng, grid)
    batch = rng.choice((1, case.batch or 1)) if heads is None else 1
    heads = rng.choice((1, case.heads)) if heads is None else heads
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    nv = layout.num_video_blocks
    blocks = torch.rand(batch, heads, nv, nv, generator=generator) < rng.choice((0.1, 0.4, 1.0))
    if rng.random() < 0.5:
        blocks[:, :, rng.randrange(nv)] = False
    return Plan.from_blocks(grid, layout, blocks)


def _layout(rng: Random, grid: Grid):
    tile = tuple(rng.randint(1, 4) for _ in range(3))
    return rng.choice((
        lambda: tile_layout(grid, tile),
        lambda: tile_layout(grid, tile, dilation=(1, 2, 3)),
        lambda: raster_layout(grid, rng.choice((1, 5, 16, 33, 128)), rng.sample((0, 1, 2), 3)),
        lambda: frame_layout(grid, rng.choice((3, 8, 64))),
    ))()  # fmt: skip


def _rule(case: Case) -> Plan:
    """A rule that is no box."""
    rng = Random(case.seed)
    return Plan.from_rule(case.grid, _layout(rng, case.grid), striped)


def striped(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Whether the distance of two positions along the axes adds up to a multiple of 3."""
    return (query - key).abs().sum(-1) % 3 == 0


def _by_head(case: Case) -> HeadPlan:
    """Two plans, each for some of the heads."""
    rng = Random(case.seed)
    heads = list(range(case.heads))
    mine = sorted(rng.sample(heads, rng.randint(0, len(heads))))
    groups = [x for x in (mine, [head for head in heads if head not in mine]) if x]
    return HeadPlan.join([_for_heads(rng, case, len(group)) for group in groups], groups)


def _for_heads(rng: Random, case: Case, count: int) -> Plan:
    """A plan for so many heads."""
    kind = rng.choice(("freeswim", "neighborhood", "blocks"))
    if kind == "blocks":
        return _blocks(case, rng, count)
    options = {"window": (2, 3)} if kind == "freeswim" else {"window": 3, "dilation": 2}
    return create_method(kind, **options).plan(case.grid)


def _by_sample(case: Case) -> HeadPlan:
    """A plan to each head of each sample."""
    rng = Random(case.seed)
    rows = max(case.batch * case.heads, 1)
    plans = [_blocks(case, rng, 1) for _ in range(rows)]
    if case.batch == 0:
        raise Refused("no samples, no plans of theirs")
    return HeadPlan(tuple(plans), torch.arange(rows).view(case.batch, case.heads))


_MAKERS = {"blocks": _blocks, "rule": _rule, "by head": _by_head, "by sample": _by_sample}
