"""How far an estimate of what is not read is trusted, against a loop and on the bundled model."""

import pytest
import torch

from tests.planning.content_cases import coherent, slow_trust, tokens_of
from tests.recorded import recorded
from vidattn.grid import Grid, tile_layout_on
from vidattn.methods import create_method
from vidattn.plan import Plan
from vidattn.planning.content import Content
from vidattn.planning.rectification import trust
from vidattn.quality.fidelity import fidelity

GRIDS = (Grid(3, 5, 7, text=5), Grid(3, 5, 7, text=5, text_first=True), Grid(2, 7, 9))


def case(grid):
    """Content with two key heads, the blocks that each query block reads, and shares of others."""
    q, k, _ = coherent(grid, heads=4)
    k, key_mask = k[:, ::2] + 1, torch.ones(2, grid.num_tokens, dtype=torch.bool)
    if grid.text:
        key_mask[1, grid.text_start + 3] = False
    content = Content(grid, tile_layout_on(grid, (1, 4, 4), q.device), q, k, 0.3, key_mask)
    blocks = torch.rand(2, 4, content.num_blocks, content.num_blocks) < 0.4
    blocks[..., 0] = True
    return content, blocks, content.shares.masked_fill(blocks, 0)


def factor(content, blocks, rest):
    video = [tokens_of(content.layout, j) for j in range(content.num_blocks)]
    means = torch.stack([content.k[:, :, tokens].mean(2) for tokens in video], 2)
    plan = Plan.from_blocks(content.grid, content.layout, blocks)
    return trust(
        content.q, content.k, plan, rest, means, scale=content.scale, key_mask=content.key_mask
    )


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_it_is_the_least_squares_fit_of_attention_of_the_keys(grid):
    content, blocks, rest = case(grid)
    mask = Plan.from_blocks(grid, content.layout, blocks).mask()
    expected = slow_trust(content, mask, rest)
    assert ((expected > 0) & (expected < 1)).sum() > expected.numel() // 2
    torch.testing.assert_close(factor(content, blocks, rest).double(), expected)


def test_one_pattern_may_serve_all_samples_and_heads():
    content, blocks, _ = case(GRIDS[0])
    blocks = blocks[:1, :1]
    rest = content.shares.masked_fill(blocks, 0)
    everywhere = blocks.expand(2, 4, -1, -1)
    torch.testing.assert_close(factor(content, blocks, rest), factor(content, everywhere, rest))


def test_an_estimate_is_trusted_where_keys_of_a_block_are_alike_and_not_where_it_is_opposite():
    grid = Grid(4, 4, 4)
    q, k = (torch.randn(1, 2, 4, 8).repeat_interleave(16, 2) for _ in range(2))
    content = Content(grid, tile_layout_on(grid, (1, 4, 4), q.device), q, k, 0.3)
    blocks = torch.eye(4, dtype=torch.bool)[None, None]
    rest = content.shares.masked_fill(blocks, 0)
    torch.testing.assert_close(factor(content, blocks, rest), torch.ones(1, 2))
    assert not factor(content, blocks, -rest).any()


def test_an_estimate_of_nothing_is_not_trusted():
    content, blocks, rest = case(GRIDS[2])
    assert not factor(content, torch.ones_like(blocks), 0 * rest).any()


@pytest.mark.parametrize("name", ["strided", "anchor"])
def test_rectified_layers_of_the_bundled_model_are_better(name):
    for sight in recorded()[1:]:
        errors = []
        for rectify in (False, True):
            method = create_method(name, density=0.25, rectify=rectify).at(sight.layer)
            plan = method.plan(sight.grid, sight.reading)
            errors.append(fidelity(sight.q, sight.k, sight.v, plan, scale=sight.scale).output_error)
        assert errors[1].mean() < errors[0].mean()
