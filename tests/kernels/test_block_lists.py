"""Block lists seen from the keys."""

import pytest
import torch

from vidattn.grid import Grid, tile_layout
from vidattn.kernels.block_lists import BlockLists
from vidattn.plan import Plan


def entries(lists: BlockLists, transpose: bool) -> dict[tuple[int, int, int], tuple[bool, int]]:
    """(group, query block, key block) -> whether it is partial, and its mask."""
    num_blocks = lists.num_rows // (lists.batch * lists.heads)
    found = {}
    for e, row in enumerate(lists.row_of_entry.tolist()):
        pair = [row % num_blocks, int(lists.key_block[e])]
        mask = -1 if lists.mask_id is None else int(lists.mask_id[e])
        key = (row // num_blocks, *(pair[::-1] if transpose else pair))
        found[key] = (bool(lists.is_partial[e]), mask)
    return found


@pytest.mark.parametrize("kind", ["blocks", "windows", "rule"])
def test_transposed_lists_hold_the_same_blocks(kind):
    grid = Grid(3, 5, 7, text=5)
    layout = tile_layout(grid, (1, 4, 4))
    if kind == "blocks":
        nv = layout.num_video_blocks
        torch.manual_seed(0)
        plan = Plan.from_blocks(grid, layout, torch.rand(2, 3, nv, nv) < 0.4)
    elif kind == "windows":
        extents = [torch.arange(n) for n in grid.size]
        windows = [((x - 1).clamp_min(0), (x + 2).clamp_max(len(x) - 1)) for x in extents]
        plan = Plan.from_windows(grid, tuple(windows), tile=(1, 4, 4), dilation=(1, 1, 1))
    else:
        plan = Plan.from_rule(grid, layout, lambda q, k: (q - k).abs().sum(-1) <= 4)
    lists, turned = plan.lists, plan.lists.transposed()
    assert entries(turned, True) == entries(lists, False)
    assert turned.counts.sum() == lists.counts.sum()
    assert (turned.num_full <= turned.counts).all()
    assert lists.transposed() is turned
