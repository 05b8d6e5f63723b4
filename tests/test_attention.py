"""attend(): engines agree, and bad input is named."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import vidattn
from tests.kernels.attention_cases import random_blocks, random_inputs, relative_rms, striped
from vidattn import attention
from vidattn.attention import attend
from vidattn.grid import Grid, tile_layout
from vidattn.kernels.block_lists import Box
from vidattn.plan import Plan

GRID = Grid(2, 7, 5, text=6)


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_engines_agree(backend):
    q, k, v = random_inputs(GRID, key_heads=2)[:3]
    plan = random_blocks(GRID)
    out, lse = attend(q, k, v, plan, backend=backend, return_lse=True, scale=0.3)
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    mask = plan.mask()
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)
    scores = (q @ k.mT * 0.3).masked_fill(~mask, float("-inf"))
    assert relative_rms(out, expected) < 1e-5
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    assert lse.shape == q.shape[:3] and lse.dtype == torch.float32


def test_a_dense_plan_is_pytorchs_own_attention():
    q, k, v = random_inputs(GRID, key_heads=2)[:3]
    key_mask = torch.ones(2, GRID.num_tokens, dtype=torch.bool)
    key_mask[0, -3:] = False
    plan = vidattn.plan("dense", GRID)
    expected = F.scaled_dot_product_attention(
        q, k, v, attn_mask=key_mask[:, None, None], enable_gqa=True
    )
    assert torch.equal(attend(q, k, v, plan, key_mask=key_mask), expected)


def other(x, **change):
    """The inputs with one of them replaced."""
    return {**x, **change}


WRONG = {
    "three axes": (lambda x: other(x, q=x["q"][0]), r"must be \(batch, heads, tokens, head dim\)"),
    "another batch": (lambda x: other(x, k=x["k"][:1], v=x["v"][:1]), "must agree in batch"),
    "heads no multiple": (lambda x: other(x, k=x["k"][:, :3], v=x["v"][:, :3]), "multiple"),
    "values of another size": (lambda x: other(x, v=x["v"][..., :3]), "got q"),
    "another length": (
        lambda x: other(x, **{name: x[name][:, :, :9] for name in "qkv"}),
        "q has 9 tokens but the plan is for 76",
    ),
    "integers": (
        lambda x: other(x, **{name: x[name].long() for name in "qkv"}),
        "must be floating point, got torch.int64",
    ),
    "mixed dtypes": (lambda x: other(x, k=x["k"].double()), "share one dtype"),
    "a plan for other heads": (
        lambda x: other(x, plan=random_blocks(GRID, heads=3)),
        "the plan is for 2 samples and 3 heads",
    ),
    "a plan for other samples": (
        lambda x: other(x, plan=random_blocks(GRID, batch=5)),
        "the plan is for 5 samples",
    ),
    "a float mask": (lambda x: other(x, key_mask=torch.ones(2, 76)), "key_mask must be bool"),
    "a mask of another shape": (
        lambda x: other(x, key_mask=torch.ones(76, dtype=torch.bool)),
        r"key_mask must be bool of shape \(batch, tokens\)",
    ),
    "an unknown backend": (lambda x: other(x, backend="torhc"), "did you mean 'torch'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_named(case):
    change, message = WRONG[case]
    q, k, v = random_inputs(GRID)[:3]
    arguments = change({"q": q, "k": k, "v": v, "plan": random_blocks(GRID)})
    with pytest.raises(ValueError, match=message):
        attend(**arguments)


def changed(plan, **lists):
    """The plan with other lists."""
    return replace(plan, lists=replace(plan.lists, **lists))


HAND_MADE = {
    "a block outside": (
        lambda p: changed(p, key_block=p.lists.key_block + 1),
        r"lists blocks 1 to (\d+); 0 to",
    ),
    "a block below": (lambda p: changed(p, key_block=p.lists.key_block - 1), "lists blocks -1 to"),
    "a token outside": (
        lambda p: replace(p, layout=replace(p.layout, order=p.layout.order + 1)),
        "holds tokens 0 to 76; -1 to 75 fit its grid",
    ),
    "a mask outside": (lambda p: changed(p, mask_id=p.lists.mask_id + 9**4), "names masks"),
    "rows backwards": (
        lambda p: changed(p, row_start=p.lists.row_start.flip(0)),
        "has rows of length -",
    ),
    "rows beyond the lists": (
        lambda p: changed(p, row_start=p.lists.row_start + 5),
        "begins rows at 5 to",
    ),
    "too many whole blocks": (
        lambda p: changed(p, num_full=p.lists.num_full + 99),
        "has partial blocks -",
    ),
    "masks of another size": (
        lambda p: changed(p, masks=p.lists.masks[:, 1:, 1:]),
        "box or masks are not for [0-9]+ blocks of 16",
    ),
    "a box of another layout": (
        lambda p: changed(p, box=Box(*(torch.zeros(32, dtype=torch.int32) for _ in range(3)), 1)),
        "box or masks are not for",
    ),
    "no rule": (lambda p: changed(p, mask_id=None, masks=None), "neither box nor masks"),
    "rows of another layout": (
        lambda p: changed(p, num_full=p.lists.num_full[1:]),
        "has [0-9]+ rows of lists",
    ),
}


@pytest.mark.parametrize("backend", ["torch", "reference", "flex", "int8"])
@pytest.mark.parametrize("case", HAND_MADE)
def test_a_plan_that_points_outside_is_caught(case, backend):
    change, message = HAND_MADE[case]
    plan = Plan.from_rule(GRID, tile_layout(GRID, (1, 4, 4)), striped)
    q, k, v = random_inputs(GRID)[:3]
    attend(q, k, v, plan, backend="torch")
    bad = change(plan)
    if backend == "int8":
        bad, backend = bad.with_precision("int8"), "auto"
    with pytest.raises(ValueError, match=message):
        attend(q, k, v, bad, backend=backend)


@pytest.mark.parametrize("precision", [None, "int8_qk", "int8"])
@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_a_query_without_keys_gives_0(backend, precision):
    grid = Grid(2, 7, 5)
    plan = random_blocks(grid)
    if precision is not None:
        plan, backend = plan.with_precision(precision), "torch"
    q, k, v = random_inputs(grid)[:3]
    key_mask = torch.ones(2, grid.num_tokens, dtype=torch.bool)
    key_mask[1] = False
    empty = ~(plan.mask() & key_mask[:, None, None]).any(-1)
    assert empty[1].all() and empty[0].any() and not empty[0].all()
    out, lse = attend(q, k, v, plan, backend=backend, key_mask=key_mask, return_lse=True)
    assert not out[empty].any() and (lse[empty] == -torch.inf).all()
    assert out[~empty].isfinite().all() and lse[~empty].isfinite().all()


def test_a_sample_without_keys_gives_0_in_dense_attention():
    q, k, v = (x.requires_grad_() for x in random_inputs(GRID)[:3])
    key_mask = torch.ones(2, GRID.num_tokens, dtype=torch.bool)
    key_mask[1] = False
    out = attend(q, k, v, vidattn.plan("dense", GRID), key_mask=key_mask)
    assert not out[1].any() and out[0].isfinite().all()
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), (q, k, v)))


def test_the_engine_is_asked_for_the_device_of_the_tensors(monkeypatch):
    """Not for the GPU that happens to be the current one."""
    asked = []

    def is_available(device):
        asked.append(device)
        return False

    monkeypatch.setattr(attention.block_sparse_triton, "is_available", is_available)
    attention._auto_engine.cache_clear()
    attention._auto_quantised.cache_clear()
    device = torch.device("cuda", 1)
    assert attention._auto_engine(device, torch.float16) == "flex"
    assert attention._auto_quantised(device, torch.float16, "int8") == "torch"
    assert asked == [device, device]
    attention._auto_engine.cache_clear()
    attention._auto_quantised.cache_clear()
