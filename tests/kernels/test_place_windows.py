"""Tiles of windows hold every place once, and no choice of them reads fewer keys."""

import itertools
import math

import pytest
import torch

import vidattn
from tests.grids import AWKWARD
from vidattn.grid import Grid
from vidattn.kernels.windows.place_windows import PlaceWindows

OPTIONS = [
    {"window": (2, 3, 5)},
    {"window": (3, 3, 2), "dilation": (1, 2, 3)},
    {"window": (3, 4, 4), "stride": (1, 3, 2), "causal": (True, False, False)},
    {"window": (99, 7, 1)},
]


def windows(grid, options) -> PlaceWindows:
    return vidattn.plan("neighborhood", grid, **options).lists.cache["windows"]


@pytest.mark.parametrize("grid", AWKWARD, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_windows_are_the_mask(grid, options):
    found = windows(grid, options)
    places = list(itertools.product(*map(range, found.size)))
    mask = torch.zeros(grid.num_tokens, grid.num_tokens, dtype=torch.bool)
    for query, place in zip(found.token.tolist(), places):
        box = [
            range(first[x], last[x] + 1) for first, last, x in zip(found.first, found.last, place)
        ]
        inside = [all(x in axis for axis, x in zip(box, key)) for key in places]
        mask[query, found.token[: len(places)].long()] = torch.tensor(inside)
    beside = found.token[len(places) :].long()
    mask[beside] = mask[:, beside] = True
    assert sorted(found.token.tolist()) == list(range(grid.num_tokens))
    expected = vidattn.plan("neighborhood", grid, **options).mask()[0, 0]
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("queries", [4, 8, 16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_tiles_hold_every_place_once(queries, options):
    grid = Grid(5, 11, 14)
    found = windows(grid, options)
    tiles = found.tiles(queries, 4)
    assert math.prod(tiles.edge) == queries and math.prod(tiles.group) == 4
    assert all(edge % group == 0 for edge, group in zip(tiles.edge, tiles.group))
    for cuts, edge, extent in zip(tiles.cuts, tiles.edge, found.size):
        lengths = [end - begin for begin, end in itertools.pairwise(cuts)]
        assert cuts[0] == 0 and cuts[-1] == extent and all(0 < x <= edge for x in lengths)


def test_tiles_do_not_cross_dilation_groups():
    found = windows(Grid(1, 1, 23), {"window": 5, "dilation": (1, 1, 3)})
    assert {8, 16} <= set(found.tiles(4, 4).cuts[2])


def test_tiles_are_flat_where_a_short_window_slides():
    # two frames more for every tile of two would be two fifths more keys
    found = windows(Grid(32, 32, 32), {"window": (3, 9, 9)})
    assert found.tiles(16, 4).edge == (1, 4, 4) and found.tiles(16, 4).group[0] == 1
    # every frame reads all
    found = windows(Grid(4, 32, 32), {"window": (4, 9, 9)})
    assert found.tiles(16, 4).edge == (4, 2, 2)
