"""Exact block mass, pooled scores, and the choice of blocks, against loops."""

import itertools
import math

import pytest
import torch

from tests.kernels import attention_cases as cases
from vidattn.grid import Grid, tile_layout
from vidattn.kernels import block_mass as masses
from vidattn.kernels.pooled_scores import (
    best_scores,
    block_deviations,
    block_means,
    pooled_scores,
    select_count,
    select_mass,
    select_share,
    select_until,
)

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


def test_pooled_scores_weigh_blocks_by_their_tokens():
    q, k, key_mask = inputs()
    scores = pooled_scores(q, k, LAYOUT.order, LAYOUT.block, scale=0.3, key_mask=key_mask)
    nb = LAYOUT.num_blocks
    for b in range(2):
        readable = [[t for t in tokens_of(j) if key_mask[b, t]] for j in range(nb)]
        for h in range(4):
            keys = [k[b, h // 2, ts].double().mean(0) for ts in readable]
            for i in range(nb):
                query = q[b, h, tokens_of(i)].double().mean(0)
                row = [
                    len(ts) * math.exp(0.3 * (query @ key).item())
                    for ts, key in zip(readable, keys)
                ]
                expected = torch.tensor(row) / sum(row)
                torch.testing.assert_close(scores[b, h, i], expected, rtol=1e-4, atol=1e-6)


def test_a_block_without_tokens_gets_nothing():
    q, k, key_mask = inputs()
    key_mask[0, tokens_of(2)] = False
    means, counts = block_means(k, LAYOUT.order, LAYOUT.block, key_mask)
    assert counts[0, 0, 2] == 0 and not means[0, :, 2].any()
    scores = pooled_scores(q, k, LAYOUT.order, LAYOUT.block, scale=1.0, key_mask=key_mask)
    assert not scores[0, :, :, 2].any()
    torch.testing.assert_close(scores.sum(-1), torch.ones(2, 4, LAYOUT.num_blocks))


def test_select_count_takes_the_best_of_every_row():
    scores = torch.rand(2, 3, 5, 7)
    chosen = select_count(scores, 3)
    assert (chosen.sum(-1) == 3).all()
    worst_in = scores.masked_fill(~chosen, torch.inf).amin(-1)
    best_out = scores.masked_fill(chosen, -torch.inf).amax(-1)
    assert (worst_in > best_out).all()
    with pytest.raises(ValueError, match="from 1 to 7"):
        select_count(scores, 8)


@pytest.mark.parametrize("mass", [0.05, 0.5, 0.9, 1.0])
def test_select_mass_keeps_the_shortest_prefix_that_reaches_it(mass):
    scores = torch.rand(2, 3, 5, 11).softmax(-1)
    scores[0, 0, 0] = torch.tensor([0.5, 0.5] + [0.0] * 9)
    chosen = select_mass(scores, mass)
    for row, picked in zip(scores.view(-1, 11).tolist(), chosen.view(-1, 11)):
        total, expected = 0.0, set()
        for j in sorted(range(11), key=lambda j: -row[j]):
            # a full share takes what got nothing too: it may have been rounded to nothing
            if mass < 1 and (total >= mass * sum(row) or row[j] == 0):
                break
            total += row[j]
            expected.add(j)
        assert set(picked.nonzero().flatten().tolist()) == expected
    with pytest.raises(ValueError, match="above 0"):
        select_mass(scores, 0.0)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.77, 1.0])
def test_select_share_comes_nearest_to_a_share_of_the_tokens(share):
    scores, tokens = torch.randn(2, 3, 5, 11), torch.randint(1, 9, (11,))
    chosen = select_share(scores, tokens, share)
    for row, picked in zip(scores.view(-1, 11).tolist(), chosen.view(-1, 11)):
        ranked = sorted(range(11), key=lambda j: -row[j])
        sizes = [sum(tokens[j].item() for j in ranked[:n]) for n in range(1, 12)]
        distance = [abs(size - share * tokens.sum().item()) for size in sizes]
        count = int(picked.sum())
        assert set(picked.nonzero().flatten().tolist()) == set(ranked[:count])
        assert distance[count - 1] == min(distance)
    with pytest.raises(ValueError, match="above 0"):
        select_share(scores, tokens, 0.0)


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
    scores = pooled_scores(q, k, order, LAYOUT.block, scale=0.3, key_mask=key_mask)
    assert scores.shape == (2, 4, LAYOUT.num_blocks, LAYOUT.num_blocks) and scores.is_meta
    tokens = torch.ones(LAYOUT.num_blocks, device="meta")
    chosen = (select_count(scores, 2), select_mass(scores, 0.5), select_share(scores, tokens, 0.5))
    assert all(x.shape == scores.shape for x in chosen)
    assert block_deviations(q, order, LAYOUT.block).is_meta


@pytest.mark.parametrize("need", [0.0, 3.0, 11.5, 1e9])
def test_select_until_takes_the_best_until_a_need_is_met(need):
    scores, worth = torch.randn(2, 3, 9), torch.randint(1, 5, (9,))
    scores[0, 0, 4] = -torch.inf
    always = torch.zeros(9, dtype=torch.bool)
    always[[2, 5]] = True
    chosen = select_until(scores, worth, torch.tensor([need]), always)
    for row, picked in zip(scores.view(-1, 9).tolist(), chosen.view(-1, 9)):
        expected, held = {2, 5}, 0.0
        for j in sorted(set(range(9)) - {2, 5}, key=lambda j: -row[j]):
            if held >= need or row[j] == -torch.inf:
                break
            expected.add(j)
            held += worth[j].item()
        assert set(picked.nonzero().flatten().tolist()) == expected


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
