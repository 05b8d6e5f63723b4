"""Sliding tile attention against a loop over pairs, written from the definition."""

import itertools
import math

import pytest
import torch

from tests.grids import AWKWARD, PUBLISHED
from vidattn.grid import Grid
from vidattn.methods import create_method


def oracle(grid: Grid, window, tile) -> torch.Tensor:
    """(S, S) bool, one pair of tokens at a time."""
    mask = [[True] * grid.num_tokens for _ in range(grid.num_tokens)]
    places = list(itertools.product(*map(range, grid.size)))
    for (i, q), (j, k) in itertools.product(enumerate(places), repeat=2):
        seen = True
        for x, y, extent, reads, edge in zip(q, k, grid.size, window, tile):
            n = math.ceil(extent / edge)
            reads = min(reads, n)
            start = min(max(x // edge - reads // 2, 0), n - reads)
            seen &= start <= y // edge < start + reads
        mask[grid.video_start + i][grid.video_start + j] = seen
    return torch.tensor(mask)


@pytest.mark.parametrize("grid", [g for g in AWKWARD if g.num_video_tokens < 150], ids=str)
@pytest.mark.parametrize(
    ("window", "tile"),
    [
        ((3, 3, 3), (1, 2, 2)),
        ((2, 1, 4), (2, 3, 1)),
        ((1, 2, 3), (3, 2, 4)),
        ((9, 1, 1), (5, 5, 5)),
    ],
)
def test_mask_is_the_rule_of_tiles(grid, window, tile):
    plan = create_method("sliding_tile", window=window, tile=tile).plan(grid)
    assert torch.equal(plan.mask()[0, 0], oracle(grid, window, tile))
    assert plan.summary()["num_partial_blocks"] == 0


def test_a_large_tile_is_cut_into_blocks():
    grid = Grid(7, 5, 11, text=5)
    plan = create_method("sliding_tile", window=(1, 3, 1), tile=(6, 4, 9)).plan(grid)
    assert plan.layout.block <= 128 and plan.summary()["num_partial_blocks"] == 0
    assert torch.equal(plan.mask()[0, 0], oracle(grid, (1, 3, 1), (6, 4, 9)))


def test_odd_windows_are_neighborhood_attention_with_the_stride_of_a_tile():
    grid, tile = Grid(6, 8, 12), (2, 4, 3)
    sliding = create_method("sliding_tile", window=(3, 1, 3), tile=tile).plan(grid)
    window = create_method("neighborhood", window=(6, 4, 9), stride=tile).plan(grid)
    assert torch.equal(sliding.mask(), window.mask())


def test_the_density_of_the_paper():
    plan = create_method("sliding_tile").plan(Grid(30, 48, 80))
    assert plan.density == pytest.approx(0.09) == plan.visited_density


@pytest.mark.parametrize("grid", PUBLISHED, ids=str)
@pytest.mark.parametrize("window", [(3, 3, 3), (1, 5, 2)])
def test_counts_on_published_grids(grid, window):
    kept = 1.0
    for extent, reads, edge in zip(grid.size, window, (6, 8, 8)):
        n = math.ceil(extent / edge)
        tokens = [min(edge, extent - edge * i) for i in range(n)]
        starts = [min(max(i - reads // 2, 0), n - min(reads, n)) for i in range(n)]
        kept *= sum(c * sum(tokens[s : s + reads]) for c, s in zip(tokens, starts)) / extent**2
    assert create_method("sliding_tile", window=window).plan(grid).density == pytest.approx(kept)


@pytest.mark.parametrize("grid", [*PUBLISHED, Grid(17, 16, 16)], ids=str)
def test_density_is_met(grid):
    plan = create_method("sliding_tile", density=0.25).plan(grid)
    assert plan.density == pytest.approx(0.25, rel=0.12)


def test_full_budget_is_dense():
    assert create_method("sliding_tile", density=1.0).plan(Grid(5, 9, 7)).is_dense


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window must be"),
        ({"density": 0}, "density must be above 0"),
        ({"tile": (0, 1, 1)}, "tile must be"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        create_method("sliding_tile", **options)


def test_unreachable_density_says_what_would_do():
    with pytest.raises(ValueError, match="out of reach: the least is .* set a smaller tile"):
        create_method("sliding_tile", density=0.001).plan(Grid(5, 9, 7))
