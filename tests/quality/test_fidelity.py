"""Rows of masks against whole masks; recall and output error against float64 attention."""

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from vidattn.grid import Grid, raster_layout, tile_layout
from vidattn.head_plan import HeadPlan
from vidattn.methods import list_methods, plan
from vidattn.plan import Plan
from vidattn.planning.visible import visible_keys
from vidattn.quality.fidelity import fidelity, recall

GRIDS = [Grid(5, 3, 3), Grid(1, 5, 4, text=3), Grid(3, 5, 7, text=4, text_first=True)]


def per_head(grid, batch=2, heads=3):
    layout = tile_layout(grid, (2, 2, 2))
    nv = layout.num_video_blocks
    blocks = torch.rand(batch, heads, nv, nv) < 0.4
    return Plan.from_blocks(grid, layout, blocks | torch.eye(nv, dtype=torch.bool))


def by_rule(grid):
    return Plan.from_rule(
        grid, tile_layout(grid, (2, 2, 2)), lambda q, k: ((q - k).abs().sum(-1) % 3) < 2
    )


def by_window(grid):
    return plan("neighborhood", grid, window=(3, 3, 1), dilation=(1, 2, 1), tile=(2, 2, 2))


def compensated(grid):
    made = per_head(grid)
    nb = made.layout.num_blocks
    gain, rest = torch.rand(2, 3, nb), torch.rand(2, 3, nb, nb) / nb
    return Plan(made.grid, made.layout, made.lists, gain, rest)


def sharpened(grid):
    return dataclasses.replace(by_window(grid), sharpness=1.3)


def of_heads(grid):
    return HeadPlan((by_window(grid), per_head(grid, heads=2)), torch.tensor([1, 0, 1]))


def of_samples(grid):
    plans = (by_window(grid), per_head(grid, 1, 1), per_head(grid, 1, 1))
    return HeadPlan(plans, torch.tensor([[1, 0, 0], [2, 1, 0]]))


def expected(q, k, v, made, key_mask):
    """Recall and output error, (B, H) each, by whole masks in float64."""
    k, v = (x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q.double() @ k.mT * 0.7
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None], -torch.inf)
    weights = scores.softmax(-1)
    kept = weights * made.mask()
    sparse = (scores * getattr(made, "sharpness", 1)).masked_fill(~made.mask(), -torch.inf)
    out = sparse.softmax(-1) @ v
    if getattr(made, "gain", None) is not None:
        layout = made.layout
        for token in range(made.grid.num_tokens):
            block = int(layout.slot_of_token[token]) // layout.block
            row = out[:, :, token] * made.gain[:, :, block, None]
            for key in range(layout.num_blocks):
                inside = layout.order.view(-1, layout.block)[key].long()
                inside = inside[inside >= 0]
                row = row + made.rest[:, :, block, key, None] * v[:, :, inside].mean(2)
            out[:, :, token] = row
    dense = weights @ v
    error = (out - dense).square().sum((2, 3)) / dense.square().sum((2, 3))
    return kept.sum(-1).mean(-1), error.sqrt()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("make", [per_head, by_rule, by_window])
def test_visible_keys_are_rows_of_the_mask(make, grid):
    made = make(grid)
    queries = torch.randperm(grid.num_tokens)[:13]
    assert_close(visible_keys(made, queries), made.mask()[:, :, queries])


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("make", [per_head, by_rule, compensated, sharpened, of_heads, of_samples])
def test_fidelity_is_its_definition(make, grid, monkeypatch):
    # several pieces
    monkeypatch.setattr("vidattn.quality.fidelity.BUDGET", 2 * 3 * grid.num_tokens * 11)
    made = make(grid)
    q = torch.randn(2, 3, grid.num_tokens, 8)
    k, v = torch.randn(2, 2, 1, grid.num_tokens, 8).unbind()
    found = fidelity(q, k, v, made, scale=0.7)
    kept, error = expected(q, k, v, made, None)
    assert_close(found.recall.double(), kept, rtol=1e-4, atol=1e-6)
    some = torch.arange(grid.num_tokens)
    assert_close(recall(q, k, made, some, scale=0.7).double(), kept, rtol=1e-4, atol=1e-6)
    assert_close(found.output_error.double(), error, rtol=1e-4, atol=1e-6)
    assert 0 < found.recall.max() < 0.99


@pytest.mark.parametrize("make", [per_head, of_samples])
def test_masked_keys_do_not_count(make):
    grid = Grid(3, 5, 2, text=6)
    q, k, v = torch.randn(3, 2, 3, grid.num_tokens, 8).unbind()
    key_mask = torch.ones(2, grid.num_tokens, dtype=torch.bool)
    key_mask[1, -4:] = False
    made = make(grid)
    found = fidelity(q, k, v, made, scale=0.7, key_mask=key_mask)
    kept, error = expected(q, k, v, made, key_mask)
    assert_close(found.recall.double(), kept, rtol=1e-4, atol=1e-6)
    some = torch.arange(grid.num_tokens)
    again = recall(q, k, made, some, scale=0.7, key_mask=key_mask)
    assert_close(again.double(), kept, rtol=1e-4, atol=1e-6)
    assert_close(found.output_error.double(), error, rtol=1e-4, atol=1e-6)


def test_a_sample_looks_at_its_queries_only():
    grid = Grid(1, 4, 4)
    blocks = torch.tensor([[True, True], [False, True]])[None, None]
    made = Plan.from_blocks(grid, raster_layout(grid, 8), blocks)
    q, k, v = torch.randn(3, 1, 1, 16, 8).unbind()
    whole = fidelity(q, k, v, made, queries=torch.arange(8))
    assert_close(whole.recall, torch.ones(1, 1))
    assert_close(whole.output_error, torch.zeros(1, 1), atol=1e-6, rtol=0)
    second = fidelity(q, k, v, made, queries=torch.arange(8, 16)).recall
    assert second < 0.99
    assert_close(recall(q, k, made, torch.arange(8, 16)), second)


# options that leave pairs out even on small grids
SPARSE = {
    "radial": {"near": 0, "sink": False, "decay": 0.2, "tile": (1, 2, 2)},
    "neighborhood": {"window": (3, 3, 1)},
}


@pytest.mark.parametrize("name", list_methods())
@pytest.mark.parametrize("grid", [Grid(5, 7, 3), Grid(3, 5, 7, text=4, text_first=True)])
def test_recall_is_the_softmax_mass_on_the_kept_pairs(name, grid):
    q, k = torch.randn(2, 2, 2, grid.num_tokens, 8).unbind()
    made = plan(name, grid, q, k, **SPARSE.get(name, {}))
    weights = (q.double() @ k.double().mT / 8**0.5).softmax(-1)
    expected = (weights * made.mask()).sum(-1).mean().item()
    found = recall(q, k, made, torch.arange(grid.num_tokens)).mean().item()
    assert found == pytest.approx(expected, rel=1e-5)
    if name in SPARSE:
        assert expected < 0.99
