"""Windows that move from step to step, against a loop over pairs of tokens."""

import itertools

import pytest
import torch

from tests.grids import AWKWARD
from vidattn.grid import Grid
from vidattn.methods import create_method
from vidattn.planning.reading import Reading


def oracle(grid: Grid, windows: tuple[int, int], share: float) -> torch.Tensor:
    """(S, S) bool, one pair of tokens at a time.

    Args:
        share: of a window, by which it lies off the corner.
    """
    numbers = []
    for extent, count in zip((grid.h, grid.w), windows):
        edge = -(-extent // count)
        numbers.append([(x - int(edge * share)) % extent // edge for x in range(extent)])
    window = list(itertools.product(*numbers)) * grid.t
    mask = torch.ones(grid.num_tokens, grid.num_tokens, dtype=torch.bool)
    video = slice(grid.video_start, grid.video_start + grid.num_video_tokens)
    mask[video, video] = torch.tensor([[q == k for k in window] for q in window])
    return mask


@pytest.mark.parametrize("grid", AWKWARD, ids=str)
@pytest.mark.parametrize("windows", [(2, 2), (1, 3), (20, 1)], ids=str)
@pytest.mark.parametrize("tile", [None, (2, 2, 2)])
def test_a_token_reads_its_window(grid, windows, tile):
    method = create_method("msw_msa", windows=windows, tile=tile)
    for step in range(5):
        plan = method.at(3).in_step(step).plan(grid)
        assert torch.equal(plan.mask()[0, 0], oracle(grid, windows, step % 4 / 4))
        assert plan.lists.num_partial == 0


def test_steps_move_the_windows_as_hidiffusion_does():
    """Rolled back and cut in two, as its code does with an even frame."""
    grid = Grid(1, 8, 16)
    method = create_method("msw_msa")
    for step in range(4):
        places = torch.arange(128).view(8, 16).roll((-step, -2 * step), (0, 1))
        cut = places.view(2, 4, 2, 8).permute(0, 2, 1, 3).reshape(4, 32)
        mask = method.in_step(step).plan(grid).mask()[0, 0]
        assert all(mask[window[:, None], window].all() for window in cut)
        assert mask.sum() == 4 * 32**2
    assert method.in_step(4) == method.in_step(0) == method
    assert create_method("msw_msa", shifts=1).in_step(3).step == 0


@pytest.mark.parametrize("grid", [Grid(1, 64, 64), Grid(1, 33, 47), Grid(5, 16, 28)], ids=str)
@pytest.mark.parametrize("density", [0.1, 0.25, 0.35, 0.5, 1.0])
def test_a_density_sets_the_windows(grid, density):
    found = create_method("msw_msa").with_density(density, grid)
    assert found.plan(grid).density == pytest.approx(density, rel=0.3)
    h, w = found.window_of(grid)[1:]
    assert max(h / w, w / h) < 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"windows": (0, 2)}, "windows must be two counts"),
        ({"windows": 2}, "windows must be a list of 2 integers"),
        ({"shifts": 0}, "shifts must be an integer of at least 1"),
        ({"step": 1}, "step"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        create_method("msw_msa", **options)


def test_an_estimate_is_of_what_other_windows_hold():
    grid = Grid(1, 9, 14, text=3, text_first=True)
    q, k = torch.randn(2, 1, 2, grid.num_tokens, 8)
    method = create_method("msw_msa", rectify=True).in_step(2)
    plan = method.plan(grid, Reading(q, k))
    assert plan.rest is not None and (plan.mask() == oracle(grid, (2, 2), 0.5)).all()
