"""FreeSwim's window against a loop over tokens, and its scale against dense masked attention."""

import itertools
import math

import pytest
import torch

from tests.grids import AWKWARD
from tests.kernels import attention_cases as cases
from vidattn.attention import attend
from vidattn.grid import Grid
from vidattn.head_plan import HeadPlan
from vidattn.methods import create_method, plan
from vidattn.methods.freeswim import sharpness
from vidattn.quality.fidelity import fidelity


def oracle(grid: Grid, window: tuple[int, int]) -> torch.Tensor:
    """(S, S) bool, one pair of tokens at a time."""
    spans = []
    for extent, size in zip((grid.h, grid.w), window):
        size = min(size, extent)
        starts = [max(0, min(x - size // 2, extent - size)) for x in range(extent)]
        spans.append([range(start, start + size) for start in starts])
    places = list(itertools.product(range(grid.h), range(grid.w)))
    frame = [[hk in spans[0][hq] and wk in spans[1][wq] for hk, wk in places] for hq, wq in places]
    mask = torch.ones(grid.num_tokens, grid.num_tokens, dtype=torch.bool)
    video = slice(grid.video_start, grid.video_start + grid.num_video_tokens)
    # the same for every pair of frames
    mask[video, video] = torch.tensor(frame).repeat(grid.t, grid.t)
    return mask


@pytest.mark.parametrize("grid", AWKWARD, ids=str)
@pytest.mark.parametrize("window", [(1, 3), (4, 2), (3, 50)], ids=str)
def test_the_window_is_the_field_of_training(grid, window):
    assert torch.equal(plan("freeswim", grid, window=window).mask()[0, 0], oracle(grid, window))


def test_every_query_has_as_many_keys_as_at_training():
    grid = Grid(21, 68, 120)
    made = plan("freeswim", grid)
    assert made.density == pytest.approx(30 * 52 / (68 * 120))
    # of all blocks, those that are read: 0.481 in raster order
    assert made.visited_density < 0.32


@pytest.mark.parametrize("backend", ["torch", "auto", "reference"])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_scores_are_sharpened_above_the_window(backend, scale):
    grid = Grid(3, 5, 7, text=4)
    made = plan("freeswim", grid, window=(4, 3)).to("cpu")
    q, k, v = cases.random_inputs(grid, heads=2, key_heads=1)[:3]
    factor = (q.shape[-1] ** -0.5 if scale is None else scale) * math.sqrt(math.log(24, 12))
    scores = (factor * q.double() @ k.double().mT).masked_fill(~made.mask(), -torch.inf)
    out = attend(q, k, v, made, scale=scale, backend=backend)
    assert cases.relative_rms(out, scores.softmax(-1) @ v.double()) < 1e-5


def test_a_training_resolution_is_dense_attention():
    grid = Grid(3, 5, 7)
    made = plan("freeswim", grid, window=(5, 7))
    assert made.is_dense and made.sharpness == 1
    assert plan("freeswim", grid, window=(5, 6), sharpen=False).sharpness == 1


def test_recall_is_that_of_the_pairs():
    grid = Grid(3, 5, 7)
    q, k, v = cases.random_inputs(grid, heads=2, key_heads=2)[:3]
    sharp, plain = (plan("freeswim", grid, window=(4, 3), sharpen=x) for x in (True, False))
    both = HeadPlan((sharp, plain), torch.tensor([0, 1]))
    expected = fidelity(q, k, v, plain).recall
    for made in (sharp, both, both.unsharpened()):
        torch.testing.assert_close(fidelity(q, k, v, made).recall, expected)
    assert both.select_heads((0,)).plans[0].sharpness == sharp.sharpness
    assert [x.sharpness for x in both.unsharpened().plans] == [1, 1]
    assert plain.unsharpened() is plain


def test_sharpness():
    assert sharpness(30 * 52) == pytest.approx(1.0461, abs=1e-4)
    assert sharpness(1) == 1


@pytest.mark.parametrize(
    ("window", "message"),
    [
        ((0, 3), "window must be the"),
        ((3,), r"window must be a list of 2 integers, got \(3,\)"),
        ((2.5, 3), "window must be a list of 2 integers"),
    ],
)
def test_bad_windows_are_named(window, message):
    with pytest.raises(ValueError, match=message):
        create_method("freeswim", window=window)
