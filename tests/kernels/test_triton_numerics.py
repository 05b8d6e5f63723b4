"""The Triton engine is float64 masked attention, forward and backward, in Triton's interpreter."""

import pytest
import torch

import vidattn
from tests.kernels.attention_cases import (
    TOLERANCE,
    assert_right,
    random_inputs,
    relative_rms,
    results,
    striped,
)
from tests.kernels.triton_interpreter import interpreted  # noqa: F401
from vidattn.attention import attend
from vidattn.grid import Grid, tile_layout
from vidattn.kernels import block_sparse_triton
from vidattn.plan import Plan

pytestmark = pytest.mark.usefixtures("interpreted")
GRID = Grid(3, 5, 7, text=5)


def blocks(grid=GRID, *, batch=1, heads=2, tile=(2, 4, 4)):
    """Random blocks for every sample and head; one query block reads nothing of the video."""
    layout = tile_layout(grid, tile)
    nv = layout.num_video_blocks
    chosen = torch.rand(batch, heads, nv, nv) < 0.5
    chosen[:, :, nv // 2] = False
    return Plan.from_blocks(grid, layout, chosen)


def window(grid=GRID, *, tile=(2, 4, 4)):
    return vidattn.plan("neighborhood", grid, window=(2, 3, 5), tile=tile)


def rule(grid=GRID, *, tile=(2, 4, 4)):
    return Plan.from_rule(grid, tile_layout(grid, tile), striped)


def inputs(grid=GRID, *, batch=1, heads=2, key_heads=1, **options):
    return random_inputs(grid, batch=batch, heads=heads, key_heads=key_heads, **options)


@pytest.mark.parametrize("make", [blocks, window, rule])
def test_every_kind_of_plan(make):
    assert_right(inputs(), make(), "triton")
