"""Radial attention against a loop over blocks, written from the definition."""

import math

import pytest
import torch

from tests.grids import PUBLISHED
from vidattn.grid import Grid
from vidattn.methods import create_method
from vidattn.planning.visible import visible_keys


def oracle(
    plan, grid: Grid, decay: float, window: str, near: int, sink: bool, by_density: bool = False
) -> torch.Tensor:
    """(nv, nv) bool, one pair of blocks at a time.

    Args:
        by_density: whether windows and gaps between frames are the paper's, in tokens, in place of
            those of its code, in blocks.
    """
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
            every = math.ceil(1 / width) if by_density else round(block / width)
            if distance % max(every, 1):
                continue
            width = width if by_density else max(width, block)
            if window == "raster":
                keep[i, j] = abs((yi - yj) * grid.w + xi - xj) <= width
            else:
                rows = math.sqrt(width / 2 * grid.h / grid.w)
                columns = math.sqrt(width / 2 * grid.w / grid.h)
                keep[i, j] = abs(yi - yj) <= rows + 1e-4 and abs(xi - xj) <= columns + 1e-4
    return keep


def listed(plan) -> torch.Tensor:
    """(nb, nb) bool, the blocks that a plan lists."""
    blocks = torch.zeros(plan.layout.num_blocks, plan.layout.num_blocks, dtype=torch.bool)
    blocks[plan.lists.row_of_entry, plan.lists.key_block.long()] = True
    return blocks


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
    nv, blocks = plan.layout.num_video_blocks, listed(plan)
    assert torch.equal(blocks[:nv, :nv], oracle(plan, grid, decay, window, near, sink))
    assert blocks[nv:].all() and blocks[:, nv:].all()


@pytest.mark.parametrize("window", ["tile", "raster"])
@pytest.mark.parametrize(
    ("density", "near", "sink"),
    [(0.5, 1, True), (0.3, 0, False), (0.21, 0, False), (0.1, -1, False)],
)
def test_a_density_is_met_by_windows_of_the_definition(window, density, near, sink):
    """The blocks lie between those of one factor and those of a slightly larger one."""
    grid = Grid(9, 11, 13)
    given = {} if near < 0 else {"near": near, "sink": sink}
    plan = create_method("radial", density=density, window=window, tile=(1, 3, 4), **given).plan(
        grid
    )
    assert plan.density == pytest.approx(density, rel=0.05)
    nv, low, high = plan.layout.num_video_blocks, 2.0**-14, 2.0**8
    blocks, tokens = listed(plan)[:nv, :nv], plan.layout.tokens_per_block[:nv].double()

    def of(decay):
        return oracle(plan, grid, decay, window, near, sink, by_density=True)

    while high / low > 1.005:
        middle = (low * high) ** 0.5
        kept = tokens @ of(middle).double() @ tokens / grid.num_video_tokens**2
        low, high = (middle, high) if kept <= plan.density else (low, middle)
    assert not (of(low / 1.02) & ~blocks).any() and not (blocks & ~of(high * 1.02)).any()


@pytest.mark.parametrize("window", ["tile", "raster"])
@pytest.mark.parametrize("density", [0.1, 0.3])
def test_every_token_reads_its_place_in_every_frame(density, window):
    grid = Grid(21, 30, 52)
    plan = create_method("radial", density=density, window=window).plan(grid)
    tokens = torch.tensor([0, 10 * 1560 + 15 * 52 + 26, 13 * 1560 + 7 * 52 + 51, 32759])
    seen = visible_keys(plan, tokens)[0, 0].view(len(tokens), grid.t, -1)
    for token, frames in zip(tokens.tolist(), seen):
        assert frames[:, token % 1560].all()
        # windows do not grow with the distance
        sizes = frames.sum(-1)[token // 1560 :]
        assert (sizes.diff() <= 0).all()


@pytest.mark.parametrize("grid", PUBLISHED, ids=str)
@pytest.mark.parametrize("window", ["tile", "raster"])
@pytest.mark.parametrize("density", [0.05, 0.2, 0.3, 0.5])
def test_density_is_met(grid, window, density):
    plan = create_method("radial", density=density, window=window).plan(grid)
    assert plan.density == pytest.approx(density, rel=0.06)


@pytest.mark.parametrize("frames", [1, 5, 9, 17])
@pytest.mark.parametrize("density", [0.05, 0.1, 0.3, 0.6, 1.0])
def test_a_density_decides_what_is_read_whole(frames, density):
    method, grid = create_method("radial", density=density), Grid(frames, 16, 16)
    assert method.plan(grid).density == pytest.approx(density, rel=0.2, abs=0.02)


def test_what_is_given_is_read_whole():
    grid = Grid(9, 16, 16)
    mask = create_method("radial", density=0.5, near=2, sink=False).plan(grid).mask()[0, 0]
    frames = mask.view(9, 256, 9, 256).all(3).all(1)
    gap = (torch.arange(9)[:, None] - torch.arange(9)).abs()
    assert torch.equal(frames, gap <= 2)


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


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        (
            {"near": 2, "sink": True},
            r"near=2 apart and the first frame .* lower near, set sink=False",
        ),
        (
            {"near": 0, "sink": False},
            "near=0 apart are read whole, .* keeps 0.111; leave out near, or",
        ),
        ({"sink": True}, "the first frame are read whole, .*; set sink=False, or ask for more"),
        (
            {"tile": (1, 16, 16)},
            "every block reads itself, .* 0.111; set a smaller tile, or ask for",
        ),
    ],
    ids=str,
)
def test_unreachable_density_says_what_would_do(options, advice):
    grid = Grid(9, 16, 16)
    with pytest.raises(ValueError, match=f"cannot go down to density 0.05 .* {advice}"):
        create_method("radial", density=0.05, **options).plan(grid)
    assert create_method("radial", density=0.05).plan(grid).density == pytest.approx(0.05, rel=0.05)


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
