"""Neighborhood attention against a loop over pairs, written from the window rule."""

import itertools
import math

import pytest
import torch

from tests.grids import AWKWARD, PUBLISHED
from vidattn.grid import Grid
from vidattn.methods import create_method


def sees(x, y, extent, window, stride, dilation, causal) -> bool:
    """Whether position x of an axis reads position y."""
    group, p = x % dilation, x // dilation
    n = math.ceil((extent - group) / dilation)
    k = min(window, n)
    if causal:
        leader = min((p // stride) * stride + stride - 1, n - 1)
        start, end = max(leader - k + 1, 0), p + 1
    else:
        leader = min((p // stride) * stride + stride // 2, n - 1)
        start = min(max(leader - k // 2, 0), n - k)
        end = start + k
    return y % dilation == group and start <= y // dilation < end


def oracle(grid: Grid, window, stride, dilation, causal) -> torch.Tensor:
    """(S, S) bool, one pair of tokens at a time."""
    mask = torch.ones(grid.num_tokens, grid.num_tokens, dtype=torch.bool)
    axes = [
        [[sees(x, y, *axis) for y in range(axis[0])] for x in range(axis[0])]
        for axis in zip(grid.size, window, stride, dilation, causal)
    ]
    places = list(itertools.product(*map(range, grid.size)))
    for i, q in enumerate(places):
        for j, k in enumerate(places):
            seen = all(axis[a][b] for axis, a, b in zip(axes, q, k))
            mask[grid.video_start + i, grid.video_start + j] = seen
    return mask


OPTIONS = [
    ((3, 3, 3), (1, 1, 1), (1, 1, 1), (False,) * 3),
    ((2, 4, 5), (1, 3, 2), (1, 1, 1), (False,) * 3),
    ((3, 3, 2), (1, 1, 1), (1, 2, 3), (False,) * 3),
    ((2, 3, 4), (2, 3, 4), (1, 1, 1), (False,) * 3),
    ((3, 3, 3), (1, 2, 3), (2, 1, 2), (True, False, True)),
    ((1, 1, 1), (1, 1, 1), (1, 1, 1), (True, True, False)),
    ((99, 2, 99), (5, 2, 1), (1, 1, 4), (True, False, False)),
]


@pytest.mark.parametrize("grid", [g for g in AWKWARD if g.num_video_tokens < 300], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_mask_is_the_window_rule(options, grid):
    window, stride, dilation, causal = options
    method = create_method(
        "neighborhood", window=window, stride=stride, dilation=dilation, causal=causal
    )
    assert torch.equal(method.plan(grid).mask()[0, 0], oracle(grid, *options))


@pytest.mark.parametrize("tile", [(1, 1, 4), (2, 3, 5), (4, 4, 4), (1, 8, 8)])
def test_tile_changes_the_blocks_and_not_the_mask(tile):
    grid, options = Grid(5, 6, 7, text=4), OPTIONS[4]
    method = create_method(
        "neighborhood",
        window=options[0],
        stride=options[1],
        dilation=options[2],
        causal=options[3],
        tile=tile,
    )
    assert torch.equal(method.plan(grid).mask()[0, 0], oracle(grid, *options))


@pytest.mark.parametrize("grid", PUBLISHED, ids=str)
@pytest.mark.parametrize("dilation", [1, (1, 2, 3)])
def test_every_query_keeps_its_whole_window(grid, dilation):
    plan = create_method("neighborhood", window=(5, 9, 11), dilation=dilation).plan(grid)
    assert plan.density == pytest.approx(5 * 9 * 11 / grid.num_video_tokens)


def test_one_value_stands_for_every_axis():
    grid = Grid(4, 5, 6)
    one = create_method("neighborhood", window=3, causal=True).plan(grid)
    three = create_method("neighborhood", window=(3, 3, 3), causal=(True, True, True)).plan(grid)
    assert torch.equal(one.mask(), three.mask())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window must be one integer or a"),
        ({"window": (1, 2)}, r"window must be .* got \(1, 2\)"),
        ({"dilation": -1}, "dilation must be"),
        ({"window": 3, "stride": 4}, "stride must not exceed window"),
        ({"causal": "yes"}, "causal of method .neighborhood. must be true or false or t,h,w"),
        ({"tile": (0, 1, 1)}, "tile must be"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        create_method("neighborhood", **options)
