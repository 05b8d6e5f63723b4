"""Groups of heads with plans of their own, and what stands in for what is not read."""

import dataclasses

import pytest
import torch

from tests.kernels import attention_cases as cases
from vidattn.attention import attend
from vidattn.grid import Grid, tile_layout
from vidattn.head_plan import HeadPlan
from vidattn.methods import plan
from vidattn.plan import Plan

GRID = Grid(3, 5, 7, text=4)


def head_plan() -> HeadPlan:
    """Heads 0 and 3 share a window, 2 has its own, 1 and 4 random blocks, one list each."""
    parts = (
        plan("neighborhood", GRID, window=(2, 3, 3)),
        cases.random_blocks(GRID, batch=1, heads=2),
        plan("neighborhood", GRID, window=3, tile=(3, 2, 2)),
    )
    return HeadPlan(parts, torch.tensor([0, 1, 2, 0, 1, 0]))


@pytest.mark.parametrize("key_heads", [6, 2])
@pytest.mark.parametrize("backend", ["torch", "auto", "reference"])
def test_every_head_follows_its_plan(key_heads, backend):
    made = head_plan()
    inputs = cases.random_inputs(GRID, heads=6, key_heads=key_heads)
    mask = made.mask()
    window = made.plans[0].mask()[0, 0]
    assert torch.equal(mask[0, 0], window) and torch.equal(mask[0, 5], window)
    assert torch.equal(mask[0, 4], made.plans[1].mask()[0, 1])
    q, k, v, *_ = inputs
    k, v = (x.double().repeat_interleave(6 // key_heads, 1) for x in (k, v))
    scores = (q.double() @ k.mT / 32**0.5).masked_fill(~mask, -torch.inf)
    out, lse = attend(*inputs[:3], made, backend=backend, return_lse=True)
    assert cases.relative_rms(out, scores.softmax(-1).nan_to_num(0) @ v) < 1e-5
    seen = mask.any(-1).expand(lse.shape)
    assert cases.relative_rms(lse[seen], scores.logsumexp(-1)[seen]) < 1e-5


def test_gradients_reach_every_head():
    made = head_plan()
    inputs = cases.random_inputs(GRID, heads=6, key_heads=2)
    exact = [x.double() for x in inputs[:4]] + [inputs[4]]
    expected = cases.results(exact, made, "reference")
    for a, b in zip(cases.results(inputs, made, "torch"), expected):
        assert cases.relative_rms(a, b) < 1e-5


def sample_plan() -> HeadPlan:
    """Of three heads of two samples, two follow one plan, the others their own."""
    parts = [cases.random_blocks(GRID, batch=1, heads=1) for _ in range(5)]
    return HeadPlan(tuple(parts), torch.tensor([[3, 1, 0], [4, 2, 1]]))


@pytest.mark.parametrize("key_heads", [3, 1])
def test_every_sample_follows_its_plans(key_heads):
    made = sample_plan()
    inputs = cases.random_inputs(GRID, heads=3, key_heads=key_heads)
    mask = made.mask()
    assert torch.equal(mask[1, 2], made.plans[1].mask()[0, 0]) and mask.shape[:2] == (2, 3)
    key_mask = torch.ones(2, GRID.num_tokens, dtype=torch.bool)
    key_mask[1, -3:] = False
    exact = [x.double() for x in inputs[:4]] + [inputs[4]]
    actual = cases.results(exact, made, "torch", key_mask=key_mask)
    k, v = (x.repeat_interleave(3 // key_heads, 1) for x in exact[1:3])
    scores = exact[0] @ k.mT / 32**0.5
    scores = scores.masked_fill(~(mask & key_mask[:, None, None]), -torch.inf)
    assert cases.relative_rms(actual[0], scores.softmax(-1).nan_to_num(0) @ v) < 1e-7
    for ours, right in zip(actual, cases.results(exact, made, "reference", key_mask=key_mask)):
        assert cases.relative_rms(ours, right) < 1e-7
    assert made.of_head(1) == (made.plans[1], 0)
    video = slice(0, GRID.num_video_tokens)
    assert made.density == pytest.approx(mask[..., video, video].double().mean().item())


def test_plans_of_samples_are_selected_and_joined():
    made = sample_plan()
    assert torch.equal(made.select_heads([0, 2]).mask(), made.mask()[:, [0, 2]])
    blocks = cases.random_blocks(GRID, batch=2, heads=2)
    gain = torch.rand(2, 2, blocks.layout.num_blocks)
    groups = (blocks, made, head_plan(), dataclasses.replace(blocks, gain=gain))
    heads = ([1, 9], [0, 3, 4], [2, 5, 6, 7, 10, 11], [8, 12])
    whole = HeadPlan.join(groups, heads)
    for part, mine in zip(groups, heads):
        assert torch.equal(whole.mask()[:, mine], part.mask().expand(2, -1, -1, -1))
    for sample, head in ((0, 8), (1, 12)):
        part = whole.plans[int(whole.plan_of_head[sample, head])]
        assert torch.equal(part.gain[0, 0], gain[sample, [8, 12].index(head)])


def test_figures_are_means_over_heads():
    made = head_plan()
    video = slice(0, GRID.num_video_tokens)
    assert made.density == pytest.approx(made.mask()[..., video, video].double().mean().item())
    assert made.density <= made.visited_density < 1 and not made.is_dense
    assert made.summary()["num_plans"] == 3
    assert made.of_head(3) == (made.plans[0], 1) and made.of_head(4) == (made.plans[1], 1)
    with pytest.raises(ValueError, match="from 0 to 5"):
        made.of_head(6)


def test_plans_that_do_not_match_are_refused():
    one, two = plan("neighborhood", GRID), plan("neighborhood", Grid(3, 5, 7))
    with pytest.raises(ValueError, match="one grid"):
        HeadPlan((one, two), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="do not match"):
        HeadPlan((one, one), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="do not match"):
        HeadPlan((one, cases.random_blocks(GRID, heads=2)), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="must have one list"):
        HeadPlan((cases.random_blocks(GRID, heads=2),), torch.tensor([[0, 0]]))
    q, k, v, *_ = cases.random_inputs(GRID)
    with pytest.raises(ValueError, match="6 heads, q has 4"):
        attend(q, k, v, head_plan())
    with pytest.raises(ValueError, match="2 samples, q has 1"):
        attend(q[:1, :3], k[:1, :3], v[:1, :3], sample_plan())


@pytest.mark.parametrize("key_heads", [4, 2])
def test_compensation_adds_the_means_of_what_is_not_read(key_heads):
    layout = tile_layout(GRID, (1, 4, 4))
    nv, nb = layout.num_video_blocks, layout.num_blocks
    blocks = torch.rand(2, 4, nv, nv) < 0.5
    gain, rest = torch.rand(2, 4, nb), torch.rand(2, 4, nb, nb)
    plain = Plan.from_blocks(GRID, layout, blocks)
    made = Plan.from_blocks(GRID, layout, blocks, gain=gain, rest=rest)
    q, k, v, *_ = cases.random_inputs(GRID, key_heads=key_heads)
    v.requires_grad_()
    out = attend(q, k, v, made)
    values = v.double().repeat_interleave(4 // key_heads, 1)
    expected = attend(q, k, v, plain).double().clone()
    for i, tokens in enumerate(layout.order.view(nb, -1)):
        tokens = tokens[tokens >= 0].long()
        row = gain[:, :, i, None, None] * expected[:, :, tokens]
        for j, keys in enumerate(layout.order.view(nb, -1)):
            mean = values[:, :, keys[keys >= 0].long()].mean(2)
            row = row + (rest[:, :, i, j, None] * mean)[:, :, None]
        expected = expected.index_copy(2, tokens, row)
    assert cases.relative_rms(out, expected) < 1e-5
    pull = torch.randn(out.shape)
    (grad,) = torch.autograd.grad((out * pull).sum(), v, retain_graph=True)
    (exact,) = torch.autograd.grad((expected * pull).sum(), v)
    assert cases.relative_rms(grad, exact) < 1e-5
    assert not Plan.from_blocks(GRID, layout, torch.ones_like(blocks), gain=gain).is_dense


@pytest.mark.parametrize("heads", [(0, 1, 3), (2,), (1, 4), (0, 1, 2, 3, 4, 5)])
def test_some_heads_keep_their_plans(heads):
    made = head_plan()
    chosen = made.select_heads(heads)
    assert torch.equal(chosen.mask(), made.mask()[:, list(heads)])
    inputs = cases.random_inputs(GRID, heads=len(heads), key_heads=1)[:3]
    out = attend(*inputs, chosen, backend="torch")
    assert cases.relative_rms(out, attend(*inputs, chosen, backend="reference")) < 1e-5


def test_selected_heads_keep_their_compensation():
    layout = tile_layout(GRID, (1, 2, 4))
    nv, nb = layout.num_video_blocks, layout.num_blocks
    made = Plan.from_blocks(
        GRID, layout, torch.rand(2, 3, nv, nv) < 0.5,
        gain=torch.rand(2, 3, nb), rest=torch.rand(2, 3, nb, nb),
    )  # fmt: skip
    chosen = made.select_heads((0, 2))
    assert torch.equal(chosen.mask(), made.mask()[:, [0, 2]])
    assert torch.equal(chosen.gain, made.gain[:, [0, 2]])
    assert torch.equal(chosen.rest, made.rest[:, [0, 2]])
    with pytest.raises(ValueError, match="for 3 heads, got head 3"):
        made.select_heads((0, 3))


def test_plans_of_groups_are_joined():
    first, second = head_plan(), cases.random_blocks(GRID, batch=1, heads=2)
    groups = [(0, 2, 3, 5, 6, 7), (1, 4)]
    mask = HeadPlan.join([first, second], groups).mask()
    for part, heads in zip((first, second), groups):
        assert torch.equal(mask[:, list(heads)], part.mask())


@pytest.mark.parametrize("kind", ["one plan", "by head", "by sample"])
def test_what_belongs_to_the_parts_is_put_back(kind):
    made = {"one plan": head_plan().plans[0], "by head": head_plan(), "by sample": sample_plan()}
    made, x = made[kind], torch.randn(2, 3 if kind == "by sample" else 6, 5)
    found = []
    for part, samples, heads in made.parts():
        mine = x[samples, heads]
        assert part.num_samples in (1, mine.shape[0]) and part.num_heads in (1, mine.shape[1])
        found.append(mine)
    assert torch.equal(made.put_back(found), x)
