"""Plans: the block lists say exactly what the rule said."""

from dataclasses import replace

import pytest
import torch

from tests.grids import AWKWARD
from vidattn.grid import Grid, raster_layout, tile_layout
from vidattn.kernels.box import check_packable
from vidattn.methods import create_method
from vidattn.plan import Plan


def banded(query, key):
    """A rule that is no box: the three distances together."""
    return (query - key).abs().sum(-1) <= 3


def pairwise(grid: Grid, rule) -> torch.Tensor:
    """(S, S) bool by asking for every pair; text reads, and is read by, everything."""
    coords = grid.coords()
    text = coords[:, 0] < 0
    return rule(coords[:, None], coords) | text[:, None] | text


@pytest.mark.parametrize("grid", AWKWARD, ids=str)
def test_rule_is_kept_to_the_pair(grid):
    plan = Plan.from_rule(grid, tile_layout(grid, (2, 2, 2)), banded)
    assert torch.equal(plan.mask()[0, 0], pairwise(grid, banded))


@pytest.mark.parametrize("grid", AWKWARD, ids=str)
def test_density_counts_video_pairs(grid):
    plan = Plan.from_rule(grid, tile_layout(grid, (2, 2, 2)), banded)
    video = slice(grid.video_start, grid.video_start + grid.num_video_tokens)
    kept = plan.mask()[0, 0, video, video].double().mean().item()
    assert plan.density == pytest.approx(kept)
    assert plan.visited_density >= plan.density


def plans(grid: Grid) -> list[Plan]:
    """A plan by a rule, one by windows, and one of whole blocks for two samples of three heads."""
    layout = tile_layout(grid, (2, 2, 2))
    nv = layout.num_video_blocks
    window = create_method("neighborhood", window=3, dilation=(1, 2, 1), tile=(2, 2, 2))
    blocks = torch.rand(2, 3, nv, nv) < 0.5
    rule = Plan.from_rule(grid, layout, banded)
    return [rule, window.plan(grid), Plan.from_blocks(grid, layout, blocks)]


@pytest.mark.parametrize("grid", [g for g in AWKWARD if g.num_video_tokens < 150], ids=str)
def test_the_share_that_is_read_of_a_block_is_counted_in_pairs_of_tokens(grid):
    for plan in plans(grid):
        mask, layout = plan.mask().double(), plan.layout
        slots = layout.order.view(-1, layout.block)[: layout.num_video_blocks].tolist()
        video = [[token for token in row if token >= 0] for row in slots]
        for i, queries in enumerate(video):
            for j, keys in list(enumerate(video))[:: 1 + len(video) // 8]:
                share = mask[:, :, queries][..., keys].mean((-1, -2))
                torch.testing.assert_close(plan.read_share[:, :, i, j].double(), share)


def test_blocks_differ_by_sample_and_head():
    grid = Grid(3, 4, 5, text=3)
    layout = raster_layout(grid, 8)
    nv = layout.num_video_blocks
    blocks = torch.rand(2, 3, nv, nv) < 0.4
    plan = Plan.from_blocks(grid, layout, blocks)
    block_of = layout.slot_of_token[: grid.num_video_tokens] // layout.block
    expected = torch.ones(2, 3, grid.num_tokens, grid.num_tokens, dtype=torch.bool)
    video = slice(0, grid.num_video_tokens)
    expected[:, :, video, video] = blocks[:, :, block_of[:, None], block_of]
    assert torch.equal(plan.mask(), expected)
    assert plan.density == pytest.approx(expected[:, :, video, video].double().mean().item())


def test_whole_blocks_stand_first():
    plan = create_method("neighborhood", window=(3, 5, 5)).plan(Grid(5, 9, 11, text=3))
    lists = plan.lists
    for row in range(lists.num_rows):
        partial = lists.is_partial[lists.row_start[row] : lists.row_start[row + 1]].tolist()
        assert partial == sorted(partial)
        assert partial.count(False) == lists.num_full[row]


@pytest.mark.parametrize("shape", [(3, 3), (1, 1, 2, 3), (1, 1, 4, 4)])
def test_blocks_of_the_wrong_shape_are_named(shape):
    grid = Grid(2, 3, 4)
    with pytest.raises(ValueError, match=r"blocks must be bool of shape \(batch, heads, 3, 3\)"):
        Plan.from_blocks(grid, raster_layout(grid, 8), torch.ones(shape, dtype=torch.bool))


def test_grid_too_long_to_pack_is_refused():
    with pytest.raises(ValueError, match="needs 33 bits to pack a position, 31 are there"):
        check_packable((2**11, 2**10, 2**9))


def test_a_million_tokens_plan_in_little_memory():
    plan = create_method("neighborhood").plan(Grid(64, 128, 128))
    assert plan.grid.num_tokens == 2**20
    assert plan.summary()["memory_mib"] < 300


def test_dense_plan_knows_itself():
    assert create_method("dense").plan(Grid(3, 5, 7, text=2)).is_dense
    assert not create_method("neighborhood", window=3).plan(Grid(3, 5, 7)).is_dense
    # a window that covers the grid needs no predicate anywhere
    assert create_method("neighborhood", window=7).plan(Grid(3, 5, 7)).is_dense


def test_plan_moves_between_devices():
    plan = create_method("neighborhood", window=3).plan(Grid(3, 5, 7))
    meta = plan.to("meta")
    assert meta.layout.order.device.type == meta.lists.box.key.device.type == "meta"


def test_lists_of_another_layout_are_refused():
    grid = Grid(2, 4, 4)
    plan = create_method("dense").plan(grid)
    layout = replace(plan.layout, order=plan.layout.order.flip(0))
    with pytest.raises(ValueError, match="lists are of another layout"):
        Plan(grid, layout, plan.lists)
    with pytest.raises(ValueError, match="lists are of another layout"):
        Plan(grid, plan.layout, replace(plan.lists, block=plan.layout.block // 2))


def test_density_counts_the_pairs_of_queries_that_are_left():
    grid = Grid(4, 5, 7, text=3)
    wanted = torch.zeros(grid.num_tokens, dtype=torch.bool)
    wanted[:20] = True
    video = slice(grid.num_video_tokens)
    for plan in plans(grid):
        some = plan.of_queries(lambda layout: wanted)
        kept = some.mask()[:, :, video, video].double().mean().item()
        assert 0 < some.density == pytest.approx(kept)
        # blocks have others beside those that are wanted
        alone = plan.mask()[:, :, video, video].double() * wanted[video][:, None]
        assert plan.density_of(wanted) == some.density_of(wanted)
        assert plan.density_of(wanted) == pytest.approx(alone.mean().item())
