"""Strided attention against a loop over pairs, written from the definition."""

import itertools

import pytest
import torch

from tests.grids import AWKWARD, PUBLISHED
from tests.planning.content_cases import coherent
from vidattn.grid import Grid
from vidattn.methods import create_method
from vidattn.methods.strided import share_of_tile
from vidattn.planning.reading import Reading
from vidattn.planning.tiles import tile_counts


def plan_of(grid: Grid, heads: int, *, layer: int = 0, **options):
    """The plan of a layer; of q and k only the shape is read."""
    q = torch.zeros(1, heads, grid.num_tokens, 1)
    return create_method("strided", **options).at(layer).plan(grid, Reading(q, q))


@pytest.mark.parametrize("grid", [g for g in AWKWARD if g.num_video_tokens < 150], ids=str)
@pytest.mark.parametrize(("tile", "near"), [((1, 1, 2), (0, 0, 0)), ((2, 2, 1), (1, 0, 2))])
def test_mask_is_a_window_and_the_share_of_the_head(grid, tile, near):
    heads, stride, layer = 3, 5, 4
    plan = plan_of(grid, heads, layer=layer, stride=stride, near=near, tile=tile)
    counts = tile_counts(grid.size, tile)
    shares = share_of_tile(counts, stride).view(counts).tolist()
    S, start = grid.num_tokens, grid.video_start
    expected = [[[True] * S for _ in range(S)] for _ in range(heads)]
    places = list(itertools.product(*map(range, grid.size)))
    for (i, q), (j, k) in itertools.product(enumerate(places), repeat=2):
        a, b = ([x // edge for x, edge in zip(place, tile)] for place in (q, k))
        local = all(abs(x - y) <= far for x, y, far in zip(a, b, near))
        for head in range(heads):
            mine = shares[b[0]][b[1]][b[2]] == (layer * heads + head) % stride
            expected[head][start + i][start + j] = local or mine
    assert plan.mask()[0].tolist() == expected


@pytest.mark.parametrize("stride", [1, 2, 4, 6, 8, 12])
def test_shares_are_even_along_every_axis(stride):
    shares = share_of_tile((stride, stride, stride), stride).view(stride, stride, stride)
    for line in (shares[:, 0, 0], shares[0, :, 0], shares[0, 0]):
        assert line.sort().values.tolist() == list(range(stride))


@pytest.mark.parametrize(("heads", "layers"), [(8, 1), (12, 1), (3, 3)])
def test_heads_together_read_everything(heads, layers):
    grid = Grid(5, 9, 7, text=4)
    masks = [
        plan_of(grid, heads, layer=layer, near=0, tile=(1, 3, 1)).mask() for layer in range(layers)
    ]
    assert torch.cat(masks).any(0).any(0).all() and not masks[0][0, 0].all()


@pytest.mark.parametrize("grid", PUBLISHED, ids=str)
def test_density_is_met(grid):
    tile, heads = (3, 8, 8), 8
    plan = plan_of(grid, heads, density=0.25, tile=tile)
    assert plan.density == pytest.approx(0.25, rel=0.06)


@pytest.mark.parametrize("density", [0.1, 0.15, 0.4])
@pytest.mark.parametrize("grid", [Grid(9, 16, 16), PUBLISHED[0]], ids=str)
def test_strides_follow_the_density(grid, density):
    # as many heads as shares: of 160 tiles, cut at the edges, one share may hold more than another
    plan = plan_of(grid, create_method("strided", density=density).strides, density=density)
    assert plan.density == pytest.approx(density, rel=0.1)


def test_half_of_the_density_is_for_strides_unless_they_are_given():
    for options, strides in (({}, 8), ({"density": 0.1}, 20), ({"density": 0.1, "stride": 12}, 12)):
        assert create_method("strided", **options).strides == strides


def test_full_budget_is_dense():
    assert plan_of(Grid(5, 9, 7), 3, density=1.0).is_dense
    assert plan_of(Grid(5, 9, 7), 3, stride=1, tile=(1, 3, 3)).is_dense


def test_one_plan_serves_all_steps_unless_content_is_read():
    assert create_method("strided").keeps(0, 40, None)
    assert not create_method("strided", rectify=True, every=3).keeps(0, 3, None)


def test_rectification_estimates_what_is_not_read():
    grid = Grid(3, 5, 7)
    q, k, _ = coherent(grid)
    plan = create_method("strided", near=0, tile=(1, 2, 2), rectify=True).plan(grid, Reading(q, k))
    assert plan.rest.sum() > 0 and plan.gain.shape[:2] == (2, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 0}, "stride must be an integer of at least 1, got 0"),
        ({"near": -1}, "near must be"),
        ({"density": 0}, "density must be"),
        ({"every": 0}, "every must be"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        create_method("strided", **options)


def test_unreachable_density_says_what_would_do():
    with pytest.raises(ValueError, match="out of reach: the least is .* set a larger stride"):
        plan_of(Grid(5, 9, 7), 4, density=0.05, stride=4, tile=(1, 3, 3))
