"""Windows that odd layers move, against a loop over pairs of tokens."""

import pytest
import torch

from tests.grids import AWKWARD
from vidattn.grid import Grid
from vidattn.methods import create_method
from vidattn.planning.reading import Reading


def oracle(grid: Grid, window: tuple[int, int, int], is_odd: bool) -> torch.Tensor:
    """(S, S) bool, one pair of tokens at a time."""
    shifts = [edge // 2 if is_odd and edge < n else 0 for edge, n in zip(window, grid.size)]
    numbers = [
        tuple((x + shift) // edge for x, shift, edge in zip((i, j, k), shifts, window))
        for i in range(grid.t)
        for j in range(grid.h)
        for k in range(grid.w)
    ]
    mask = torch.ones(grid.num_tokens, grid.num_tokens, dtype=torch.bool)
    video = slice(grid.video_start, grid.video_start + grid.num_video_tokens)
    mask[video, video] = torch.tensor([[q == k for k in numbers] for q in numbers])
    return mask


@pytest.mark.parametrize("grid", AWKWARD, ids=str)
@pytest.mark.parametrize("window", [(4, 2, 2), (3, 1, 5), (16, 4, 4)], ids=str)
@pytest.mark.parametrize("tile", [None, (2, 2, 2)])
def test_a_token_reads_its_window(grid, window, tile):
    method = create_method("tesa", window=window, tile=tile)
    for layer in range(4):
        plan = method.in_step(1).at(layer).plan(grid)
        assert torch.equal(plan.mask()[0, 0], oracle(grid, window, layer % 2 == 1))
    assert method.at(2) == method


def test_no_block_of_the_usual_windows_is_read_in_part():
    for layer in range(2):
        plan = create_method("tesa").at(layer).plan(Grid(32, 16, 24))
        assert plan.lists.num_partial == 0 and plan.visited_density == plan.density


@pytest.mark.parametrize(
    "grid", [Grid(21, 30, 52), Grid(33, 5, 7), Grid(4, 64, 64), Grid(9, 16, 16)], ids=str
)
@pytest.mark.parametrize("density", [0.05, 0.25, 0.5, 1.0])
def test_a_density_sets_the_windows(grid, density):
    found = create_method("tesa").with_density(density, grid)
    both = [found.at(layer).plan(grid).density for layer in range(2)]
    assert sum(both) / 2 == pytest.approx(density, rel=0.3)


def test_two_layers_join_windows():
    grid = Grid(8, 8, 8)
    method = create_method("tesa", window=4)
    first, second = (method.at(layer).plan(grid).mask()[0, 0].float() for layer in range(2))
    assert first.sum(1).max() == 64 and ((second @ first) > 0).sum(1).max() == 512


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window": 0}, "window must be one integer or a .t, h, w. tuple"),
        ({"window": (2, 2)}, "window must be"),
        ({"layer": 1}, "layer"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        create_method("tesa", **options)


def test_an_estimate_is_of_what_other_windows_hold():
    grid = Grid(6, 5, 7, text=3, text_first=True)
    q, k = torch.randn(2, 1, 2, grid.num_tokens, 8)
    method = create_method("tesa", window=(4, 2, 2), rectify=True).at(1)
    plan = method.plan(grid, Reading(q, k))
    assert plan.rest is not None and (plan.mask() == oracle(grid, (4, 2, 2), True)).all()
