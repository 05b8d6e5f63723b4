"""AdaSpa against loops over its definition: masses, densities of heads, cached sums."""

import pytest
import torch

from tests.planning.content_cases import by_tokens, coherent, dense_weights, rows_of, tokens_of
from vidattn.grid import Grid
from vidattn.methods.adaspa import AdaSpa, spread_density
from vidattn.methods.topk import TopK
from vidattn.planning.reading import Reading
from vidattn.quality.fidelity import recall

GRIDS = [Grid(5, 9, 4, text=11), Grid(1, 6, 10, text=3, text_first=True), Grid(7, 3, 13)]
TILE = (2, 4, 4)


def masses_of_row(weights, layout, i):
    """The attention of a query block to every block of the video, slowly."""
    rows = weights[tokens_of(layout, i)]
    return [rows[:, tokens_of(layout, j)].sum().item() for j in range(layout.num_video_blocks)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_rows_hold_the_blocks_with_most_attention(grid):
    q, k, _ = coherent(grid)
    key_mask = torch.ones(2, grid.num_tokens, dtype=torch.bool)
    if grid.text:
        key_mask[1, grid.text_start + grid.text - 2 : grid.text_start + grid.text] = False
    method = AdaSpa(tile=TILE, density=0.3, recall=None)
    plan, memory = method.plan_with_memory(grid, Reading(q, k, key_mask=key_mask))
    weights, rows = dense_weights(q, k, 0.25, key_mask), rows_of(plan)
    sizes = [len(tokens_of(plan.layout, j)) for j in range(plan.layout.num_video_blocks)]
    for b in range(2):
        for h in range(3):
            for i in range(len(sizes)):
                masses = masses_of_row(weights[b, h], plan.layout, i)
                found = set(rows[b, h, i].nonzero().flatten().tolist())
                assert found == by_tokens(masses, sizes, 0.3, i)
    lse = (0.25 * q.double() @ k.double().mT).masked_fill(~key_mask[:, None, None], -torch.inf)
    torch.testing.assert_close(torch.cat(memory).double(), lse.logsumexp(-1), rtol=1e-5, atol=1e-5)


def test_a_later_search_takes_over_the_sums_of_the_one_before():
    grid = GRIDS[0]
    q, k, _ = coherent(grid)
    method = AdaSpa(tile=TILE, density=0.3, recall=None)
    first, memory = method.plan_with_memory(grid, Reading(q, k))
    moved = q + 0.3 * torch.randn_like(q)
    second, later = method.plan_with_memory(grid, Reading(moved, k, last=memory))
    assert torch.equal(torch.cat(later), torch.cat(memory))
    weights = (0.25 * moved.double() @ k.double().mT - torch.cat(memory)[..., None]).exp()
    sizes = [len(tokens_of(first.layout, j)) for j in range(first.layout.num_video_blocks)]
    for i in range(len(sizes)):
        masses = masses_of_row(weights[1, 2], first.layout, i)
        found = set(rows_of(second)[1, 2, i].nonzero().flatten().tolist())
        assert found == by_tokens(masses, sizes, 0.3, i)
    # of another batch there is nothing to take over
    _, other = method.plan_with_memory(grid, Reading(moved[:1], k[:1], last=memory))
    assert other[0].shape[0] == 1


@pytest.mark.parametrize(("density", "moved"), [(0.2, 0.1), (0.8, 0.2)])
def test_heads_that_keep_enough_give_to_those_that_keep_least(density, moved):
    recall = torch.tensor([[0.95, 0.2, 0.85, 0.6, 0.5], [0.9, 0.95, 0.99, 0.85, 0.1]])
    found = spread_density(recall, density, 0.8)
    give, same, take = density - moved, density, density + moved
    # two of the first sample, and of the second only as many as there are others
    expected = torch.tensor([[give, take, give, same, take], [same, give, give, take, take]])
    torch.testing.assert_close(found, expected)


def test_spreading_keeps_the_density_and_helps_the_worst_head():
    grid = Grid(6, 9, 10)
    q, k, _ = coherent(grid, heads=6, noise=0.2)
    # from flat heads to sharp ones
    q = q * torch.linspace(0.1, 2.0, 6)[:, None, None]
    # 90 tiles, of which a tenth, a fifth and three tenths are whole numbers
    options = {"density": 0.2, "tile": (2, 3, 1)}
    methods = AdaSpa(**options, recall=0.5), AdaSpa(**options, recall=None), TopK(**options)
    spread, even, pooled = (method.plan(grid, Reading(q, k)) for method in methods)
    assert spread.density == pytest.approx(0.2) and even.density == pytest.approx(0.2)
    rows = rows_of(spread).double().mean((0, 2, 3))
    assert rows.min() < 0.15 and rows.max() > 0.25
    every = torch.arange(grid.num_tokens)
    worst = [recall(q, k, plan, every).mean(0).min() for plan in (spread, even)]
    assert worst[0] > worst[1] + 0.02
    assert recall(q, k, even, every).mean() > recall(q, k, pooled, every).mean()


def test_searches_fall_on_the_published_steps():
    assert AdaSpa().keeps(5, 29, 50) and not AdaSpa().keeps(5, 30, 50)
    method, made, searches = AdaSpa(every=0.4), 10, [10]
    for step in range(11, 50):
        if not method.keeps(made, step, 50):
            made = step
            searches.append(step)
    assert searches == [10, 30]


@pytest.mark.parametrize("option", ["density", "recall", "every"])
def test_bad_options(option):
    with pytest.raises(ValueError, match=f"{option} must be"):
        AdaSpa(**{option: 1.5})
