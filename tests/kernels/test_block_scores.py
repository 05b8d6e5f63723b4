"""Exact block mass, means and best scores of blocks, against loops."""

import itertools
import math

import pytest
import torch

from tests.kernels import attention_cases as cases
from vidattn.grid import Grid, tile_layout
from vidattn.kernels.scoring import block_mass as masses
from vidattn.kernels.scoring.pooling import best_scores, block_deviations, block_means

GRID = Grid(3, 5, 7, text=5)
LAYOUT = tile_layout(GRID, (1, 4, 4))


def inputs(dtype=torch.float32):
    q, k, *_ = cases.random_inputs(GRID, key_heads=2, head_dim=16, dtype=dtype)
    key_mask = torch.ones(2, GRID.num_tokens, dtype=torch.bool)
    key_mask[1, -3:] = False
    return q, k, key_mask


def tokens_of(block: int) -> list[int]:
    slots = LAYOUT.order.view(-1, LAYOUT.block)[block].tolist()
    return [token for token in slots if token >= 0]


def exact_mass(q, k, lse, key_mask, scale):
    k = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    weights = (scale * q.double() @ k.mT - lse.double()[..., None]).exp()
    weights = weights * key_mask[:, None, None]
    nb = LAYOUT.num_blocks
    expected = torch.empty(*q.shape[:2], nb, nb, dtype=torch.float64)
    for i in range(nb):
        for j in range(nb):
            expected[:, :, i, j] = weights[:, :, tokens_of(i)][..., tokens_of(j)].sum((-1, -2))
    return expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("budget", [1, 1 << 30])
def test_block_mass_sums_the_weights_of_every_pair(dtype, budget, monkeypatch):
    monkeypatch.setattr(masses, "BUDGET", budget)
    monkeypatch.setattr(masses, "ROWS", 32)
    q, k, key_mask = inputs(dtype)
    lse = torch.randn(2, 4, GRID.num_tokens) + 4
    mass = masses.block_mass(q, k, lse, LAYOUT.order, LAYOUT.block, scale=0.3, key_mask=key_mask)
    assert cases.relative_rms(mass, exact_mass(q, k, lse, key_mask, 0.3)) < 1e-5


@pytest.mark.parametrize("budget", [1, 1 << 30])
def test_dense_mass_finds_the_sums_itself(budget, monkeypatch):
    monkeypatch.setattr(masses, "BUDGET", budget)
    monkeypatch.setattr(masses, "ROWS", 32)
    q, k, key_mask = inputs()
    key_mask[0] = False
    given = (LAYOUT.order, LAYOUT.block)
    mass, lse = masses.dense_mass(q, k, *given, scale=0.3, key_mask=key_mask)
    scores = 0.3 * q.double() @ k.double().repeat_interleave(2, 1).mT
    expected = scores.masked_fill(~key_mask[:, None, None], -math.inf).logsumexp(-1)
    torch.testing.assert_close(lse.double(), expected, rtol=1e-6, atol=1e-5)
    # a query without keys has no mass, with sums that are given neither
    assert not mass[0].any()
    again = masses.block_mass(q, k, lse, *given, scale=0.3, key_mask=key_mask)
    torch.testing.assert_close(again, mass)
    assert cases.relative_rms(mass[1:], exact_mass(q, k, expected, key_mask, 0.3)[1:]) < 1e-5


def test_block_mass_of_dense_attention_counts_the_queries():
    q, k, _ = inputs()
    scores = 0.3 * q @ k.repeat_interleave(2, 1).mT
    mass = masses.block_mass(q, k, scores.logsumexp(-1), LAYOUT.order, LAYOUT.block, scale=0.3)
    counts = LAYOUT.tokens_per_block.float().expand(2, 4, -1)
    torch.testing.assert_close(mass.sum(-1), counts, rtol=1e-5, atol=1e-5)


def test_means_are_over_true_tokens():
    _, k, key_mask = inputs()
    key_mask[0, tokens_of(2)] = False
    means, counts = block_means(k, LAYOUT.order, LAYOUT.block, key_mask)
    for b, j in itertools.product(range(2), range(LAYOUT.num_blocks)):
        tokens = [t for t in tokens_of(j) if key_mask[b, t]]
        expected = k[b][:, tokens].double().mean(1) if tokens else torch.zeros(2, k.shape[-1])
        torch.testing.assert_close(means[b, :, j].double(), expected.double())
        assert counts[b, 0, j] == len(tokens)


def test_deviations_are_over_true_tokens():
    q, k, key_mask = inputs()
    found = block_deviations(k, LAYOUT.order, LAYOUT.block, key_mask)
    for b in range(2):
        for j in range(LAYOUT.num_blocks):
            rows = k[b][:, [t for t in tokens_of(j) if key_mask[b, t]]].double()
            expected = (rows - rows.mean(1, keepdim=True)).abs().mean(1)
            torch.testing.assert_close(found[b, :, j].double(), expected, rtol=1e-5, atol=1e-6)


def test_nothing_depends_on_what_only_the_device_knows():
    q, k, key_mask = (x.to("meta") for x in inputs())
    order = LAYOUT.order.to("meta")
    means, counts = block_means(k, order, LAYOUT.block, key_mask)
    assert means.shape == (2, 2, LAYOUT.num_blocks, k.shape[-1]) and means.is_meta
    assert counts.is_meta and best_scores(q, k, order, LAYOUT.block, scale=0.3).is_meta
    assert block_deviations(q, order, LAYOUT.block).is_meta


@pytest.mark.parametrize("key_heads", [2, 1])
def test_best_scores_are_those_of_single_keys(key_heads):
    q, k, key_mask = inputs()
    k = k[:, :key_heads]
    key_mask[0, tokens_of(2)] = False
    queries = q[:, :, :5].double()
    order, block = LAYOUT.order, LAYOUT.block
    best = best_scores(queries, k, order, block, scale=0.3, key_mask=key_mask)
    for b, h, j in itertools.product(range(2), range(4), range(LAYOUT.num_blocks)):
        keys = k[b, h * key_heads // 4, [t for t in tokens_of(j) if key_mask[b, t]]].double()
        expected = (0.3 * queries[b, h] @ keys.mT).amax(-1) if len(keys) else -torch.inf
        torch.testing.assert_close(best[b, h, :, j], torch.as_tensor(expected).expand(5).double())
