"""Radial attention against a loop over blocks, written from the definition."""

import math

import pytest
import torch

from tests.grids import PUBLISHED
from vidattn.grid import Grid
from vidattn.methods import create_method


def oracle(plan, grid: Grid, decay: float, window: str, near: int, sink: bool) -> torch.Tensor:
    """(nv, nv) bool, one pair of blocks at a time."""
    block, nv = plan.layout.block, plan.layout.num_video_blocks
    coords = grid.coords().double()
    centers = [
        coords[ids[ids >= 0].long()].mean(0).tolist()
        for ids in plan.layout.order[: nv * block].view(nv, block)
    ]
    keep = torch.zeros(nv, nv, dtype=torch.bool)
    for i, (ti, yi, xi) in enumerate(centers):
        for j, (tj, yj, xj) in enumerate(centers):
            distance = round(abs(ti - tj))
            width = 2.0 ** (grid.h * grid.w).bit_length() / 2.0 ** distance.bit_length() * decay
            if distance <= near or (sink and tj == 0):
                keep[i, j] = True
                continue
            if width < block and distance % max(round(block / width), 1):
                continue
            width = max(width, block)
            if window == "raster":
                keep[i, j] = abs((yi - yj) * grid.w + xi - xj) <= width
            else:
                rows = math.sqrt(width / 2 * grid.h / grid.w)
                columns = math.sqrt(width / 2 * grid.w / grid.h)
                keep[i, j] = abs(yi - yj) <= rows + 1e-4 and abs(xi - xj) <= columns + 1e-4
    return keep


@pytest.mark.parametrize(
    "grid", [Grid(9, 11, 13), Grid(6, 33, 34, text=5, text_first=True)], ids=str
)
@pytest.mark.parametrize("window", ["tile", "raster"])
@pytest.mark.parametrize(
    ("decay", "near", "sink"), [(1.0, 1, True), (0.3, 1, False), (0.05, 0, False), (0.01, 2, True)]
)
def test_blocks_follow_the_definition(grid, window, decay, near, sink):
    method = create_method("radial", decay=decay, window=window, near=near, sink=sink)
    plan = method.plan(grid)
    expected = oracle(plan, grid, decay, window, near, sink)
    nb, nv = plan.layout.num_blocks, plan.layout.num_video_blocks
    blocks = torch.zeros(nb, nb, dtype=torch.bool)
    blocks[plan.lists.row_of_entry, plan.lists.key_block.long()] = True
    assert torch.equal(blocks[:nv, :nv], expected)
    assert blocks[nv:].all() and blocks[:, nv:].all()


@pytest.mark.parametrize("grid", PUBLISHED, ids=str)
@pytest.mark.parametrize("window", ["tile", "raster"])
@pytest.mark.parametrize("density", [0.2, 0.3, 0.5])
def test_density_is_met(grid, window, density):
    plan = create_method("radial", density=density, window=window).plan(grid)
    assert plan.density == pytest.approx(density, rel=0.06)


def test_cost_grows_as_n_log_n():
    """Each doubling of the frames adds the same number of keys to a query, and doubles no cost."""
    frames = [16, 32, 64, 128, 256]
    keys = [create_method("radial").plan(Grid(t, 32, 32)).density * t for t in frames]
    added = [later - earlier for earlier, later in zip(keys, keys[1:])]
    assert all(0 < later <= 1.15 * earlier for earlier, later in zip(added, added[1:]))
    assert math.log2(keys[-1] / keys[-2]) < 0.3


def test_first_frame_is_read_by_all_frames():
    grid = Grid(12, 16, 16)
    sink = create_method("radial", decay=0.01).plan(grid).mask()[0, 0]
    none = create_method("radial", decay=0.01, sink=False).plan(grid).mask()[0, 0]
    assert sink[:, :256].all() and not none[:, :256].all()


def test_unreachable_density_says_what_would_do():
    with pytest.raises(ValueError, match="cannot go down to density 0.1 .* lower near"):
        create_method("radial", density=0.1).plan(Grid(9, 16, 16))
    assert (
        create_method("radial", density=0.14, near=0, sink=False).plan(Grid(9, 16, 16)).density
        < 0.2
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0}, "density must be above 0 and at most 1, got 0"),
        ({"density": 1.5}, "density must be above 0"),
        ({"decay": 0}, "decay must be positive"),
        ({"window": "tiel"}, "did you mean 'tile'"),
        ({"near": -1}, "near must be a number of frames"),
        ({"tile": (2, 8, 8)}, "tile must be one frame deep"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        create_method("radial", **options)
