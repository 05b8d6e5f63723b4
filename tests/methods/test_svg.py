"""Sparse VideoGen against a loop over its definition, and against the bands of the original."""

import math

import pytest
import torch

from tests.content_cases import by_tokens, dense_weights, recall_of, rows_of, tokens_of
from vidattn.content import tiles
from vidattn.grid import Grid, raster_layout
from vidattn.methods.svg import Svg, nearest
from vidattn.plan import Plan

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


def nearest_first(grid, layout, temporal, density, sink):
    """The key blocks of every query block, slowly."""
    _, nh, nw = (-(-extent // edge) for extent, edge in zip(grid.size, TILE))
    places = [(j // (nh * nw), j // nw % nh, j % nw) for j in range(layout.num_video_blocks)]
    sizes = [len(tokens_of(layout, j)) for j in range(len(places))]
    rows = []
    for t, y, x in places:
        keys = []
        for frame, row, column in places:
            apart = (4 * (row - y)) ** 2 + (4 * (column - x)) ** 2
            key = (apart, abs(frame - t)) if temporal else (abs(frame - t), apart)
            keys.append((-1, 0) if sink and frame == 0 else key)
        rank = sorted(range(len(places)), key=lambda j: keys[j])
        scores = [-float(rank.index(j)) for j in range(len(places))]
        rows.append(by_tokens(scores, sizes, density))
    return rows


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("sink", [False, True])
def test_every_head_reads_its_nearest_blocks(grid, sink):
    q, k = two_kinds(grid)
    plan = Svg(tile=TILE, density=0.4, sink=sink, rows=10**6).plan(grid, q, k)
    rows, weights = rows_of(plan), dense_weights(q, k, 0.25)
    kinds = [nearest_first(grid, plan.layout, x, 0.4, sink) for x in (False, True)]
    tokens = [tokens_of(plan.layout, j) for j in range(plan.layout.num_video_blocks)]
    for b in range(2):
        for h in range(2):
            kept = [
                sum(
                    weights[b, h][tokens[i]][:, [t for j in chosen for t in tokens[j]]].sum()
                    for i, chosen in enumerate(kind)
                )
                for kind in kinds
            ]
            found = [set(row.nonzero().flatten().tolist()) for row in rows[b, h]]
            assert found == kinds[int(kept[1] > kept[0])]


def test_heads_are_told_apart_sample_by_sample():
    grid = Grid(8, 16, 16)
    q, k = two_kinds(grid)
    kinds = []
    for rows in (16, 10**6):
        plan = Svg(rows=rows).plan(grid, q, k)
        kinds.append(rows_of(plan)[:, :, 0])
    assert torch.equal(*kinds)
    assert not torch.equal(kinds[0][0, 0], kinds[0][0, 1])
    assert torch.equal(kinds[0][0], kinds[0][1].flip(0))


def test_random_numbers_stay_where_they_are():
    grid = GRIDS[0]
    q, k = two_kinds(grid)
    before = torch.get_rng_state()
    Svg().plan(grid, q, k)
    assert torch.equal(torch.get_rng_state(), before)


def test_recall_is_that_of_the_bands_or_more():
    # enough tiles for a window of them: attention along time that reaches far in the picture
    grid = Grid(3, 20, 28)
    places = grid.coords().float() / 4
    apart = (places[:, None, 1:] - places[:, 1:]).square().sum(-1)
    weights, n, block = (-apart / 2).softmax(-1)[None, None].double(), grid.num_video_tokens, 16
    tile, density = (1, 4, 4), 0.25
    device = torch.device("cpu")
    ours = Plan.from_blocks(
        grid,
        tiles(grid, tile, device),
        nearest(grid, tile, True, density, False, device)[None, None],
    )
    # the band of that area over the frames of one place after the other
    order = torch.arange(n).view(grid.size).permute(1, 2, 0).flatten()
    center = torch.arange(-(-n // block)) * block
    near = (center[:, None] - center).abs() <= n * (1 - math.sqrt(1 - density))
    band = Plan.from_blocks(grid, raster_layout(grid, block), near[None, None])
    place = order.argsort()
    theirs = (weights * band.mask()[..., place[:, None], place]).sum().item() / n
    assert abs(band.density - ours.density) < 0.02
    assert recall_of(ours, weights) > theirs


@pytest.mark.parametrize("options", [{"density": 0.0}, {"rows": 0}], ids=str)
def test_bad_options(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        Svg(**options)
