"""Power attention against a loop over pairs, written from the definition."""

import itertools
import math

import pytest
import torch

from tests.grids import AWKWARD, PUBLISHED
from vidattn.grid import Grid
from vidattn.methods import create_method


def reads(q, k, tile, near, axes) -> bool:
    """Whether a token reads another."""
    gaps = [abs(x // edge - y // edge) for x, y, edge in zip(q, k, tile)]
    if all(gap <= far for gap, far in zip(gaps, near)):
        return True
    moved = [gap for gap in gaps if gap]
    return len(moved) <= axes and all(math.log2(gap).is_integer() for gap in moved)


@pytest.mark.parametrize("grid", [g for g in AWKWARD if g.num_video_tokens < 150], ids=str)
@pytest.mark.parametrize(
    ("tile", "near", "axes"),
    [((1, 1, 1), (0, 0, 0), 1), ((1, 1, 2), (1, 2, 0), 2), ((2, 1, 1), (0, 3, 1), 3)],
)
def test_mask_is_the_rule_of_powers(grid, tile, near, axes):
    plan = create_method("power", tile=tile, near=near, axes=axes).plan(grid)
    expected = [[True] * grid.num_tokens for _ in range(grid.num_tokens)]
    places = list(itertools.product(*map(range, grid.size)))
    for (i, q), (j, k) in itertools.product(enumerate(places), repeat=2):
        seen = reads(q, k, tile, near, axes)
        expected[grid.video_start + i][grid.video_start + j] = seen
    assert plan.mask()[0, 0].tolist() == expected


@pytest.mark.parametrize(("axes", "hops"), [(1, 3 + 2 + 3), (3, 3)])
def test_few_layers_reach_everything(axes, hops):
    plan = create_method("power", tile=(1, 1, 1), near=0, axes=axes).plan(Grid(8, 4, 7))
    step = plan.mask()[0, 0].float()
    reached = torch.eye(len(step))
    for _ in range(hops):
        reached = ((reached @ step) > 0).float()
    assert reached.all() and not (step @ step).all()


@pytest.mark.parametrize("grid", PUBLISHED, ids=str)
def test_density_is_met(grid):
    for axes in (1, 2):
        plan = create_method("power", density=0.2, axes=axes, tile=(2, 6, 8)).plan(grid)
        assert plan.density == pytest.approx(0.2, rel=0.12)


@pytest.mark.parametrize("density", [0.1, 0.15, 0.25])
@pytest.mark.parametrize("grid", [Grid(5, 16, 16), PUBLISHED[0]], ids=str)
def test_tiles_shrink_where_the_density_asks_for_it(grid, density):
    plan = create_method("power", density=density).plan(grid)
    assert plan.density == pytest.approx(density, rel=0.06)


def test_tiles_are_as_large_as_ever_where_the_density_allows_it():
    grid = Grid(8, 32, 32)
    plans = [create_method("power", density=x).plan(grid) for x in (None, 0.4, 0.08)]
    assert [plan.layout.block for plan in plans] == [64, 64, 32]
    assert create_method("power").plan(Grid(5, 16, 16)).layout.block == 8


def test_full_budget_is_dense():
    assert create_method("power", density=1.0, tile=(1, 3, 3)).plan(Grid(5, 9, 7)).is_dense


@pytest.mark.parametrize("grid", PUBLISHED, ids=str)
def test_counts_on_published_grids(grid):
    """With all axes at once and no window, the axes multiply."""
    tile, kept = (3, 5, 8), 1.0
    for extent, edge in zip(grid.size, tile):
        tokens = [min(edge, extent - at) for at in range(0, extent, edge)]
        kept *= sum(
            a * b / extent**2
            for (i, a), (j, b) in itertools.product(enumerate(tokens), repeat=2)
            if i == j or math.log2(abs(i - j)).is_integer()
        )
    plan = create_method("power", tile=tile, near=0, axes=3).plan(grid)
    assert plan.density == pytest.approx(kept)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"near": -1}, "near must be"),
        ({"axes": 4}, "axes must be 1, 2 or 3, got 4"),
        ({"density": 1.5}, "density must be"),
        ({"tile": 0}, "tile must be"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        create_method("power", **options)


def test_unreachable_density_says_what_would_do():
    with pytest.raises(ValueError, match="out of reach: the least is .* set fewer axes"):
        create_method("power", density=0.1, axes=3, tile=(1, 4, 4)).plan(Grid(5, 9, 7))


def test_windows_that_change_nothing_are_passed_over():
    """From three to four tiles nothing changes here, the fifth brings the density nearest."""
    assert create_method("power", density=0.6).plan(Grid(11, 1, 7)).density == pytest.approx(
        0.5952, abs=1e-4
    )
