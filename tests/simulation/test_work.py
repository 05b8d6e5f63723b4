"""The work of plans, counted by hand."""

import pytest
import torch

from vidattn.grid import Grid, raster_layout
from vidattn.methods import plan
from vidattn.plan import Plan
from vidattn.simulation.work import speedup_bound, visited_share


def test_work_and_bound_count_visited_blocks():
    grid = Grid(1, 8, 16, text=32)
    layout = raster_layout(grid, 32)
    blocks = torch.eye(4, dtype=torch.bool)[None, None]
    half = Plan.from_blocks(grid, layout, blocks)
    pairs = 4 * 32 * 32 + 2 * 32 * 128 + 32 * 32
    assert visited_share(half) == pytest.approx(pairs / 160**2)
    assert speedup_bound(half) == pytest.approx(160**2 / pairs)
    assert speedup_bound(half, 0.5) == pytest.approx(1 / (0.5 + 0.5 * pairs / 160**2))
    assert speedup_bound(plan("dense", grid), 0.7) == pytest.approx(1)


@pytest.mark.parametrize("share", [0, -0.1, 1.5])
def test_a_share_is_above_0_and_at_most_1(share):
    with pytest.raises(ValueError, match="attention_share"):
        speedup_bound(plan("dense", Grid(1, 2, 3)), share)
