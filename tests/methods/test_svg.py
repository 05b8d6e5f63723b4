"""Sparse VideoGen against a loop over its definition, and against the bands of the original."""

import math

import pytest
import torch

from tests.planning.content_cases import by_tokens, dense_weights, rows_of, tokens_of
from tests.recorded import recorded
from vidattn.grid import Grid
from vidattn.methods.svg import Svg
from vidattn.planning.reading import Reading
from vidattn.quality.fidelity import recall

GRIDS = [Grid(5, 9, 4, text=11), Grid(1, 6, 10, text=3, text_first=True), Grid(7, 5, 13)]
TILE = (1, 4, 4)


def two_kinds(grid, dim=16):
    """q and k (2, 2, S, D): one head attends within frames, one along time, others in sample 1."""
    t, h, w = (grid.coords().double() / torch.tensor(grid.size)).clamp_min(0).unbind(-1)
    frames, places = (
        torch.stack([f(2 * math.pi * n * x) for x in axes for f in (torch.sin, torch.cos)], -1)
        for n, axes in ((1, (t,)), (1, (h, w)))
    )
    features = [torch.nn.functional.pad(x, (0, dim - x.shape[-1])) for x in (frames, places)]
    x = torch.stack([torch.stack(features), torch.stack(features[::-1])])
    x = 6 * x.float() + 0.3 * torch.randn(x.shape)
    return x, x.clone()


def nearest_first(grid, layout, way, density, sink):
    """The key blocks of every query block, slowly."""
    _, nh, nw = (-(-extent // edge) for extent, edge in zip(grid.size, TILE))
    places = [(j // (nh * nw), j // nw % nh, j % nw) for j in range(layout.num_video_blocks)]
    sizes = [len(tokens_of(layout, j)) for j in range(len(places))]
    rows = []
    for own, (t, y, x) in enumerate(places):
        keys = []
        for frame, row, column in places:
            dt, dy, dx = abs(frame - t), abs(row - y), abs(column - x)
            key = {
                "frames": (dt, dy**2 + dx**2),
                "places": (dy**2 + dx**2, dt),
                "rows": (dy, dx, dt),
                "columns": (dx, dy, dt),
            }[way]
            keys.append((-1,) if sink and frame == 0 else key)
        rank = sorted(range(len(places)), key=lambda j: keys[j])
        scores = [-float(rank.index(j)) for j in range(len(places))]
        rows.append(by_tokens(scores, sizes, density, own))
    return rows


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("sink", [False, True, None])
def test_every_head_reads_its_best_blocks(grid, sink):
    q, k = two_kinds(grid)
    plan = Svg(tile=TILE, density=0.4, sink=sink, rows=10**6).plan(grid, Reading(q, k))
    rows, weights = rows_of(plan), dense_weights(q, k, 0.25)
    sinks = [False, True] if sink is None else [sink]
    patterns = [
        nearest_first(grid, plan.layout, way, 0.4, x)
        for way in ("frames", "places", "rows", "columns")
        for x in sinks
    ]
    tokens = [tokens_of(plan.layout, j) for j in range(plan.layout.num_video_blocks)]
    for b in range(2):
        for h in range(2):
            kept = [
                sum(
                    weights[b, h][tokens[i]][:, [t for j in chosen for t in tokens[j]]].sum().item()
                    for i, chosen in enumerate(pattern)
                )
                for pattern in patterns
            ]
            found = [set(row.nonzero().flatten().tolist()) for row in rows[b, h]]
            # patterns may be alike on a small grid
            assert kept[patterns.index(found)] == pytest.approx(max(kept), rel=1e-5)


def test_heads_are_told_apart_sample_by_sample():
    grid = Grid(8, 16, 16)
    q, k = two_kinds(grid)
    kinds = []
    for rows in (16, 10**6):
        plan = Svg(rows=rows).plan(grid, Reading(q, k))
        kinds.append(rows_of(plan)[:, :, 0])
    assert torch.equal(*kinds)
    assert not torch.equal(kinds[0][0, 0], kinds[0][0, 1])
    assert torch.equal(kinds[0][0], kinds[0][1].flip(0))


def test_random_numbers_stay_where_they_are():
    grid = GRIDS[0]
    q, k = two_kinds(grid)
    before = torch.get_rng_state()
    Svg().plan(grid, Reading(q, k))
    assert torch.equal(torch.get_rng_state(), before)


def bands(grid, share, sink):
    """(2, S, S) bool, the published patterns: bands over frame after frame, and place after place.

    Args:
        share: of all pairs in the band.
        sink: whether the first tokens of either order are read by all.
    """
    N, frame = grid.num_video_tokens, grid.h * grid.w
    raster = torch.arange(N)
    by_place = raster.view(grid.t, frame).T.flatten().argsort()
    found = []
    for place in (raster, by_place):
        band = (place[:, None] - place).abs() <= N * (1 - (1 - share) ** 0.5)
        found.append(band | (place < frame) if sink else band)
    return torch.stack(found)


@pytest.mark.parametrize("share", [0.12, 0.25])
@pytest.mark.parametrize("sink", [False, True])
def test_recall_is_that_of_the_bands_or_more(share, sink):
    ours, theirs = [], []
    for seen in recorded():
        grid, queries = seen.grid, torch.arange(2, seen.grid.num_tokens, 9)
        masks = bands(grid, share, sink)[:, queries].double()
        weights = dense_weights(seen.q[:, :, queries], seen.k, seen.scale)[0]
        # the better of the two for every head, whatever their profile would have found
        theirs.append(torch.einsum("hrs,prs->ph", weights, masks).amax(0) / len(queries))
        density = bands(grid, share, sink)[0].double().mean().item()
        plan = Svg(density=density).plan(grid, seen.reading)
        assert plan.density == pytest.approx(density, abs=0.01)
        ours.append(recall(seen.q, seen.k, plan, queries, scale=seen.scale)[0])
    ours, theirs = (torch.stack(x).double().mean(-1) for x in (ours, theirs))
    assert ours.mean() > theirs.mean() + 0.01
    # bands are cut to the token, tiles are not: that shows where nothing else is at stake
    assert (ours - theirs).min() > (0 if sink else -0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ways_that_rounding_alone_parts(dtype):
    """Queries of zero keep as much in every way, and a head is planned alone as beside others."""
    method, found = Svg(density=0.4, rows=1, tile=(1, 3, 2)), []
    for heads in range(1, 7):
        content = Reading(*torch.zeros(2, 1, heads, 99, 8, dtype=dtype))
        found.append(method.plan(Grid(11, 3, 3), content).mask().expand(1, heads, -1, -1))
    for masks in found:
        assert torch.equal(masks, found[0].expand_as(masks))


@pytest.mark.parametrize("options", [{"density": 0.0}, {"rows": 0}], ids=str)
def test_bad_options(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        Svg(**options)
