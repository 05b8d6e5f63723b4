"""Patterns of the grid, and the estimate of what they do not read."""

import pytest
import torch

from tests.planning.content_cases import coherent, dense_weights, slow_trust, tokens_of
from tests.recorded import recorded
from vidattn.attention import attend
from vidattn.grid import Grid
from vidattn.methods import create_method, list_methods, method_class
from vidattn.planning.content import Content
from vidattn.planning.pattern import PatternMethod
from vidattn.planning.reading import Reading
from vidattn.quality.fidelity import fidelity

GRIDS = (Grid(3, 5, 7, text=5), Grid(2, 7, 9, text=3, text_first=True), Grid(7, 3, 4))
# a quarter of the pairs of 9x16x16 tokens, or what comes near it
QUARTER = {
    "freeswim": {"window": (8, 8), "sharpen": False},
    "lvsa": {"density": 0.3},
    "neighborhood": {"window": (5, 10, 10)},
    "power": {"density": 0.25},
    "radial": {"density": 0.25, "near": 0, "sink": False},
    "sliding_tile": {"density": 0.25},
}
SMALL = {
    "freeswim": {"window": (2, 3), "tile": (2, 2, 2)},
    "lvsa": {"near": 0, "anchors": 1, "tile": (1, 1, 2)},
    "neighborhood": {"window": (2, 3, 3), "tile": (2, 2, 2)},
    "power": {"near": 0, "axes": 1, "tile": (1, 1, 2)},
    "radial": {"near": 0, "sink": False, "decay": 0.3, "tile": (1, 2, 2)},
    "sliding_tile": {"window": 2, "tile": (1, 2, 2)},
}
# a new pattern is tested by what tests all methods until it has options here
NAMES = sorted(SMALL)


def test_what_is_tested_is_a_pattern():
    patterns = {x for x in list_methods() if issubclass(method_class(x), PatternMethod)}
    assert NAMES == sorted(QUARTER) and set(NAMES) <= patterns


@pytest.mark.parametrize("name", NAMES)
def test_a_pattern_reads_content_for_an_estimate_alone(name):
    plain, rectified = (create_method(name, **SMALL[name], rectify=x) for x in (False, True))
    assert not plain.reads_content and rectified.reads_content
    assert plain.plan(GRIDS[0]).rest is None
    with pytest.raises(ValueError, match="give q and k"):
        rectified.plan(GRIDS[0])
    q, k, _ = coherent(Grid(3, 5, 7))
    with pytest.raises(ValueError, match="has 105 tokens but the plan is for 110"):
        rectified.plan(GRIDS[0], Reading(q, k))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_rectified_pattern_adds_what_it_does_not_read(name, grid):
    q, k, v = coherent(grid, heads=4)
    k, v = k[:, ::2] + 1, v[:, ::2]
    key_mask = torch.ones(2, grid.num_tokens, dtype=torch.bool)
    key_mask[1, grid.video_start + 4] = False
    if grid.text:
        key_mask[1, grid.text_start + 2] = False
    given = {"scale": 0.3, "key_mask": key_mask}
    method = create_method(name, **SMALL[name], rectify=True)
    plan = method.plan(grid, Reading(q, k, **given))
    pattern = create_method(name, **SMALL[name]).plan(grid)
    assert (plan.mask() == pattern.mask()).all() and plan.sharpness == pattern.sharpness
    assert plan.density == pattern.density

    scale = 0.3 * pattern.sharpness
    content, mask = Content(grid, pattern.layout, q, k, scale, key_mask), pattern.mask()[0, 0]
    video = [tokens_of(pattern.layout, j) for j in range(content.num_blocks)]
    rest = torch.zeros_like(content.shares)
    for i, queries in enumerate(video):
        for j, keys in enumerate(video):
            unread = 1 - mask[queries][:, keys].double().mean().item()
            rest[:, :, i, j] = unread * content.shares[:, :, i, j] * content.is_coherent[:, :, i, j]
    assert rest.any()
    rest = rest * slow_trust(content, mask[None, None], rest)[..., None, None]

    out = attend(q, k, v, plan, **given).double()
    weights = dense_weights(q, k, scale, key_mask) * mask
    values = v.double().repeat_interleave(2, 1)
    expected = weights / weights.sum(-1, keepdim=True) @ values
    for b in range(2):
        # means are over the keys that may be read
        readable = [[x for x in keys if key_mask[b, x]] for keys in video]
        means = torch.stack([values[b][:, keys].mean(1) for keys in readable], 1).nan_to_num()
        for i, queries in enumerate(video):
            gain = 1 - rest[b, :, i].sum(-1)
            added = torch.einsum("hj,hjd->hd", rest[b, :, i], means)
            expected[b][:, queries] = expected[b][:, queries] * gain[:, None, None] + added[:, None]
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_is_estimated_alone(name):
    grid = GRIDS[0]
    q, k, _ = coherent(grid)
    method = create_method(name, **SMALL[name], rectify=True)
    together = method.plan(grid, Reading(q, k))
    for b in range(2):
        alone = method.plan(grid, Reading(q[b : b + 1], k[b : b + 1]))
        torch.testing.assert_close(alone.rest[0], together.rest[b])
        torch.testing.assert_close(alone.gain[0], together.gain[b])


@pytest.mark.parametrize("name", NAMES)
def test_an_estimate_reduces_the_error_on_the_bundled_model(name):
    for seen in recorded()[1::3]:
        queries, found = torch.arange(2, seen.grid.num_tokens, 11), []
        for rectify in (False, True):
            method = create_method(name, **QUARTER[name], rectify=rectify)
            plan = method.plan(seen.grid, seen.reading)
            given = {"scale": seen.scale, "queries": queries}
            found.append(fidelity(seen.q, seen.k, seen.v, plan, **given))
        assert found[1].output_error.mean() < found[0].output_error.mean()
