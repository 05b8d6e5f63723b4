"""Is the plan right: patterns by their definition, plans from content by what they promise.

Letters: B batch, H query heads, S tokens, N video tokens, nv video blocks.
"""

import dataclasses
import math
from random import Random

import torch
from fuzzing import definitions, rectifying, selections
from fuzzing.attending import check_mask, check_results
from fuzzing.cases import Case, Wrong
from fuzzing.inputs import Inputs, make_inputs
from fuzzing.oracle import Truth, read_plan
from fuzzing.plans import make_plan, method_of
from fuzzing.radial import Radial
from fuzzing.states import within
from torch import Tensor

from vidattn.plan import Plan


def check_pattern(case: Case) -> None:
    """A method that reads no content does what its definition says, token by token."""
    inputs = make_inputs(case)
    with within(case.states):
        plan = make_plan(case, inputs)
    truth = read_plan(plan, case.batch, case.heads)
    check_mask(plan, truth)
    _check_defined(case, plan, truth)
    if "rectify" in case.options:
        rectifying.check_estimate(case, inputs, plan, truth)
    check_results(case, inputs, plan, truth)


def _check_defined(case: Case, plan: Plan, truth: Truth) -> None:
    grid, method = case.grid, method_of(case)
    video = slice(grid.video_start, grid.video_start + grid.num_video_tokens)
    seen = truth.mask[..., video, video]
    if case.method == "strided":
        _check_strided(case, method, seen)
        return
    for one in seen.flatten(0, 1):
        _DEFINITIONS[case.method](case, method, one)
    if case.method == "freeswim":
        window = method.window
        above = method.sharpen and (grid.h > window[0] or grid.w > window[1])
        M = torch.tensor(float(window[0] * window[1]), dtype=torch.float64)
        wanted = ((2 * M).log() / M.log()).sqrt().item() if above and M > 1 else 1.0
        if abs(plan.sharpness - wanted) > 1e-12:
            raise Wrong("freeswim sharpens by another factor", f"{plan.sharpness}, not {wanted}")


def _same(seen: Tensor, wanted: Tensor) -> None:
    if not torch.equal(seen, wanted):
        raise Wrong("a pattern differs from its definition", f"{(seen != wanted).sum()} pairs")


def _dense(case, method, seen) -> None:
    _same(seen, torch.ones_like(seen))


def _neighborhood(case, method, seen) -> None:
    rule = (method.window, method.stride, method.dilation, method.causal)
    _same(seen, definitions.neighborhood(case.size, *rule))


def _freeswim(case, method, seen) -> None:
    _same(seen, definitions.neighborhood(case.size, (case.size[0], *method.window)))


def _sliding_tile(case, method, seen) -> None:
    tile = method.tile_of(case.grid)
    if method.density is None:
        window = definitions.triple(method.window)
        _same(seen, definitions.sliding_tile(case.size, tile, window))
        return
    boxes = definitions.boxes(case.size, tile, first=1)
    made = {box: definitions.sliding_tile(case.size, tile, box) for box in boxes}
    definitions.nearest_box(seen, method.density, made)


def _lvsa(case, method, seen) -> None:
    num_frames = case.size[0]
    if method.density is None:
        choice = method.near, math.ceil(num_frames / method.anchors)
        _same(seen, definitions.anchored_frames(case.size, *choice, method.step))
        return
    kept = [
        definitions.anchored_frames(case.size, round(n / 8), math.ceil(num_frames / n), method.step)
        for n in range(1, num_frames + 1)
    ]
    nearest = min(kept, key=lambda x: abs(x.double().mean().item() - method.density))
    found = seen.double().mean().item()
    wanted = nearest.double().mean().item()
    if abs(abs(found - method.density) - abs(wanted - method.density)) > 1e-9:
        raise Wrong(f"density {found} for {method.density}, where {wanted} is nearer")
    if not any(torch.equal(seen, x) for x in kept):
        raise Wrong("lvsa keeps what no choice of near frames and anchors does")


def _msw_msa(case, method, seen) -> None:
    axes = []
    for extent, count in zip(case.size[1:], method.windows):
        edge = -(-extent // count)
        places = torch.arange(extent) - edge * method.step // method.shifts
        axes.append(places % extent // edge)
    _same(seen, definitions.parted(torch.zeros(case.size[0]), *axes))


def _tesa(case, method, seen) -> None:
    window = definitions.triple(method.window)
    numbers = []
    for extent, edge in zip(case.size, window):
        shift = edge // 2 if method.layer and edge < extent else 0
        numbers.append((torch.arange(extent) + shift) // edge)
    _same(seen, definitions.parted(*numbers))


def _power(case, method, seen) -> None:
    tile = method.tile_of(case.grid)
    if method.density is None:
        near = definitions.triple(method.near)
        _same(seen, definitions.power(case.size, tile, near, method.axes))
        return
    boxes = definitions.boxes(case.size, tile)
    made = {box: definitions.power(case.size, tile, box, method.axes) for box in boxes}
    definitions.nearest_box(seen, method.density, made)


def _radial(case, method, seen) -> None:
    tile, density = method.tile_of(case.grid), method.density
    defined = Radial(case.size, tile, method.window, density is not None)
    if density is None:
        near = 1 if method.near is None else method.near
        defined.check_decay(seen, method.decay, near, method.sink in (None, True))
        return
    nears = (1, 0, -1) if method.near is None else (method.near,)
    sinks = (True, False) if method.sink is None else (method.sink,)
    defined.check_density(seen, density, nears, sinks)


_DEFINITIONS = {
    "dense": _dense,
    "freeswim": _freeswim,
    "lvsa": _lvsa,
    "msw_msa": _msw_msa,
    "neighborhood": _neighborhood,
    "power": _power,
    "radial": _radial,
    "sliding_tile": _sliding_tile,
    "tesa": _tesa,
}
PATTERNS = (*_DEFINITIONS, "strided")


def _check_strided(case: Case, method, seen: Tensor) -> None:
    """A window around every tile, and for every head one share of the tiles, the same for all."""
    size, tile, stride = case.size, method.tile_of(case.grid), method.strides
    counts, place = definitions.tiles_of(size, tile)
    number = (place[:, 0] * counts[1] + place[:, 1]) * counts[2] + place[:, 2]
    first = torch.tensor([(number == i).nonzero()[0].item() for i in range(int(number.max()) + 1)])
    tiles = seen[:, :, first][..., first]
    if not torch.equal(tiles[:, :, number][..., number], seen):
        raise Wrong("strided cuts a tile")
    gaps, candidates = definitions.tile_gaps(size, tile), [definitions.triple(method.near)]
    if method.density is not None:
        candidates = list(definitions.boxes(size, tile))
    if not any(_is_strided(case, stride, tiles[0], gaps, near) for near in candidates):
        raise Wrong("strided is not a window and shares of the tiles", f"stride {stride}")


def _is_strided(case: Case, stride: int, tiles: Tensor, gaps: Tensor, near: tuple) -> bool:
    window = (gaps <= torch.tensor(near)).all(-1)
    shares: list[set[int] | None] = [None] * stride
    layer = case.options.get("layer", 0)
    if not tiles[:, window].all():
        return False
    for head, read in enumerate(tiles):
        # a tile that nobody outside of its window can tell about may be in any share
        outside = ~window
        mine = (read | ~outside).all(0) & outside.any(0)
        if not torch.equal(read & outside, mine & outside):
            return False
        share = (layer * case.heads + head) % stride
        told = set(mine.nonzero().flatten().tolist())
        if shares[share] not in (None, told):
            return False
        shares[share] = told
    hidden = {j for j in range(len(window)) if window[:, j].all()}
    tile = method_of(case).tile_of(case.grid)
    return definitions.strided_shares(case.size, tile, stride, shares, hidden)


def check_content(case: Case) -> None:
    """What a plan from content promises, whatever the method."""
    inputs = make_inputs(case)
    with within(case.states):
        plan = make_plan(case, inputs)
    truth = read_plan(plan, case.batch, case.heads)
    check_mask(plan, truth)
    mask = truth.mask.expand(case.batch, case.heads, -1, -1)
    if case.options.get("density") == 1.0 and case.options.get("select") != "topk":
        readable = True if inputs.key_mask is None else inputs.key_mask[:, None, None]
        if left := (~mask & readable).sum():
            raise Wrong("a full budget leaves something out", f"{left} pairs")
    if case.states:
        _check_same(case, make_plan(case, inputs), plan, truth, "planning depends on the state")
    _check_alone(case, inputs, mask)
    selections.check_selection(case, inputs, plan, mask)
    if "rectify" in case.options or case.method == "rectified":
        rectifying.check_estimate(case, inputs, plan, truth)
    check_results(case, inputs, plan, truth)
    if not mask.diagonal(dim1=2, dim2=3).all():
        raise Wrong("a query does not read its own block")


def _check_same(case, other, plan, truth: Truth, what: str) -> None:
    again = read_plan(other, case.batch, case.heads)
    if not torch.equal(again.mask, truth.mask):
        raise Wrong(what, f"{(again.mask != truth.mask).sum()} pairs differ")
    for name in ("gain", "rest"):
        a, b = getattr(again, name), getattr(truth, name)
        if (a is None) != (b is None):
            raise Wrong(what, f"only one has {name}")
        if a is not None and (a.shape != b.shape or ((a - b).abs() > 1e-4).any()):
            raise Wrong(what, f"{name} differs")


def _check_alone(case: Case, inputs: Inputs, mask: Tensor) -> None:
    """A sample, and where heads share nothing a head, is planned as if it were alone."""
    if case.batch == 0:
        return
    # heads that share a density
    together = getattr(method_of(case), "recall", None) is not None
    rng = Random(case.seed)
    b, key_head, heads = rng.randrange(case.batch), rng.randrange(case.key_heads), slice(None)
    one, alone = inputs.of_sample(b), dataclasses.replace(case, batch=1)
    if not together:
        heads = slice(key_head * case.group, (key_head + 1) * case.group)
        one.q, one.k = one.q[:, heads], one.k[:, key_head : key_head + 1]
        alone = dataclasses.replace(alone, key_heads=1)
    if alone == case:
        return
    found = read_plan(make_plan(alone, one), 1, alone.heads).mask.expand(1, alone.heads, -1, -1)
    if not torch.equal(found[0], mask[b, heads]):
        differ = (found[0] != mask[b, heads]).sum()
        raise Wrong("a sample is planned otherwise alone", f"{differ} pairs of sample {b}")
