"""Grids and layouts: every token has one slot, whatever the size."""

import math

import pytest
import torch

from tests.grids import AWKWARD, PUBLISHED
from vidattn.grid import Grid, dilation_order, frame_layout, raster_layout, tile_layout
from vidattn.planning.tile_size import fit_tile

LAYOUTS = {
    "raster": lambda grid: raster_layout(grid, 16),
    "frame": lambda grid: frame_layout(grid, 16),
    "tile": lambda grid: tile_layout(grid, (2, 2, 4)),
    "dilated": lambda grid: tile_layout(grid, (2, 2, 4), (2, 3, 5)),
    "chunked": lambda grid: tile_layout(grid, (2, 2, 4), chunk=(3, 1, 5)),
}


@pytest.mark.parametrize("grid", AWKWARD, ids=str)
@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_layout_gives_every_token_one_slot(make, grid):
    layout = make(grid)
    tokens = layout.order[layout.live]
    assert sorted(tokens.tolist()) == list(range(grid.num_tokens))
    assert layout.order[layout.slot_of_token].tolist() == list(range(grid.num_tokens))
    assert layout.tokens_per_block.sum() == grid.num_tokens
    video = layout.order[: layout.num_video_blocks * layout.block]
    inside = (video >= grid.video_start) & (video < grid.video_start + grid.num_video_tokens)
    assert inside[video >= 0].all()
    assert layout.num_blocks - layout.num_video_blocks == -(-grid.text // layout.block)


def test_tiles_hold_neighbors():
    grid = Grid(3, 5, 7)
    layout = tile_layout(grid, (2, 2, 4))
    coords = grid.coords()
    for block in layout.order.view(-1, layout.block):
        cell = coords[block[block >= 0].long()] // torch.tensor([2, 2, 4])
        assert (cell == cell[0]).all()


def test_tiles_stay_in_their_chunk():
    grid = Grid(4, 5, 7, text=3)
    layout = tile_layout(grid, (2, 2, 2), chunk=(4, 3, 2))
    coords, chunks = grid.coords(), set()
    for block in layout.order.view(-1, layout.block)[: layout.num_video_blocks]:
        if (cells := coords[block[block >= 0].long()] // torch.tensor([4, 3, 2])).numel():
            assert (cells == cells[0]).all()
            chunks.add(tuple(cells[0].tolist()))
    assert len(chunks) == 2 * 4


def test_frame_blocks_hold_one_frame():
    grid = Grid(4, 3, 7, text=2, text_first=True)
    for block in frame_layout(grid, 8).order.view(-1, 8)[:-1]:
        frames = grid.coords()[block[block >= 0].long()][:, 0]
        assert (frames == frames[0]).all()


def test_coords_stand_where_the_text_leaves_room():
    grid = Grid(2, 1, 2, text=1, text_first=True)
    assert grid.coords().tolist() == [[-1] * 3, [0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 1]]
    assert Grid(1, 1, 2, text=1).coords().tolist() == [[0, 0, 0], [0, 0, 1], [-1] * 3]


def test_dilation_order_sorts_by_group():
    assert dilation_order(7, 3).tolist() == [0, 3, 6, 1, 4, 2, 5]
    assert dilation_order(2, 5).tolist() == [0, 1]


@pytest.mark.parametrize("grid", AWKWARD + PUBLISHED, ids=str)
@pytest.mark.parametrize("tile", [(4, 4, 4), (1, 8, 16), (2, 8, 8)])
def test_fit_tile_keeps_the_block_and_never_wastes_more(grid, tile):
    def slots(edges):
        return math.prod(-(-extent // edge) * edge for extent, edge in zip(grid.size, edges))

    fitted = fit_tile(grid.size, tile)
    assert math.prod(fitted) == math.prod(tile)
    assert slots(fitted) <= slots(tile)


def test_fit_tile_leaves_other_edges_alone():
    assert fit_tile((1, 8, 8), (3, 5, 4)) == (3, 5, 4)


@pytest.mark.parametrize("sizes", [(0, 2, 2), (2, -1, 2), (2, 2, 1.5), (2, 2, True)])
def test_bad_size_is_named(sizes):
    with pytest.raises(ValueError, match="must be an integer of at least 1, got"):
        Grid(*sizes)


def test_negative_text_is_named():
    with pytest.raises(ValueError, match="Grid.text must be an integer of at least 0, got -1"):
        Grid(1, 1, 1, text=-1)


def test_where_the_text_stands_is_true_or_false():
    with pytest.raises(ValueError, match="Grid.text_first must be true or false, got 'no'"):
        Grid(1, 1, 1, text=1, text_first="no")


def test_equal_grids_are_one_cache_key():
    assert len({Grid(1, 2, 3), Grid(1, 2, 3), Grid(1, 2, 3, text=1)}) == 2
