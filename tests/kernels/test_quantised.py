"""Attention in low precision: the rounding is what it says, and the error is small."""

import dataclasses

import pytest
import torch

import vidattn
from tests.kernels.attention_cases import random_blocks, random_inputs, relative_rms, striped
from vidattn.attention import attend
from vidattn.grid import Grid, tile_layout
from vidattn.head_plan import HeadPlan
from vidattn.kernels import library, quantise
from vidattn.plan import Plan

GRID = Grid(3, 5, 7, text=4)
LARGEST = {"int8_qk": None, "int8": (127, 127), "int8_qk_int4_pv": (15, 7)}
# relative RMS distance to float64 attention on normal numbers
ERROR = {"int8_qk": 0.015, "int8": 0.02, "int8_qk_int4_pv": 0.25}
PLANS = {
    "blocks": random_blocks,
    "box": lambda grid: vidattn.plan("neighborhood", grid, window=(2, 3, 5), tile=(2, 3, 4)),
    "masks": lambda grid: Plan.from_rule(grid, tile_layout(grid, (1, 5, 4)), striped),
}


def by_hand(q, k, v, plan, scale, key_mask):
    """(B, H, S, D) float64 outputs and log-sum-exps, one query at a time."""
    B, H, S, D = q.shape
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))
    mean = k.mean(2, keepdim=True)
    slots, block = plan.layout.order.tolist(), plan.layout.block
    rough_q, rough_k = torch.zeros_like(q), torch.zeros_like(k)
    for begin in range(0, len(slots), block):
        tokens = [token for token in slots[begin : begin + block] if token >= 0]
        for rough, x in ((rough_q, q), (rough_k, k - mean)):
            step = x[:, :, tokens].abs().amax((2, 3), keepdim=True) / 127
            rough[:, :, tokens] = (x[:, :, tokens] / step + 0.5).floor() * step
    largest = LARGEST[plan.precision]
    if largest is not None:
        step = v.abs().amax(2, keepdim=True) / largest[1]
        v = (v / step + 0.5).floor() * step
    seen = plan.mask().expand(B, H, S, S)
    if key_mask is not None:
        seen = seen & key_mask[:, None, None]
    scores = (scale * rough_q @ rough_k.mT).masked_fill(~seen, -torch.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp().nan_to_num(0.0)
    total = weights.sum(-1, keepdim=True)
    if largest is not None:
        together = quantise.keys_together(block)
        for begin in range(0, len(slots), block):
            for first in range(begin, begin + block, together):
                last = min(first + together, begin + block)
                tokens = [token for token in slots[first:last] if token >= 0]
                if tokens:
                    group = weights[..., tokens]
                    step = group.amax(-1, keepdim=True).clamp_min(1e-30) / largest[0]
                    weights[..., tokens] = (group / step + 0.5).floor() * step
    lse = scores.logsumexp(-1) + scale * (q * mean).sum(-1)
    return weights @ v / total.clamp_min(1e-30), lse


@pytest.mark.parametrize("precision", LARGEST)
@pytest.mark.parametrize("make", PLANS)
def test_it_rounds_block_by_block(make, precision):
    plan = PLANS[make](GRID).with_precision(precision)
    q, k, v, *_ = random_inputs(GRID, key_heads=2, head_dim=24)
    k = k + 3 * torch.randn(2, 2, 1, 24)
    key_mask = torch.rand(2, GRID.num_tokens) < 0.8
    for mask in (None, key_mask):
        expected, exact_lse = by_hand(q, k, v, plan, 0.3, mask)
        out, lse = attend(q, k, v, plan, scale=0.3, key_mask=mask, return_lse=True)
        # a weight half way between two integers may go either way
        assert relative_rms(out, expected) < (1e-5 if precision == "int8_qk" else 1e-3)
        torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", LARGEST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_near_attention(precision, dtype):
    plan = PLANS["box"](GRID)
    q, k, v, *_ = random_inputs(GRID, dtype=dtype)
    # a mean that 8 bits could not hold beside the rest
    k = k + 50
    exact, lse = attend(q.double(), k.double(), v.double(), plan, return_lse=True)
    plan = plan.with_precision(precision)
    out, rough_lse = attend(q, k, v, plan, return_lse=True, backend="torch")
    assert out.dtype == dtype and rough_lse.dtype == torch.float32
    assert 1e-3 < relative_rms(out, exact) < ERROR[precision]
    torch.testing.assert_close(rough_lse, lse.float(), rtol=0, atol=0.05)
    assert attend(q, k, v, plan).equal(out)


@pytest.mark.parametrize("block", [1, 9, 16, 20, 35, 64, 96, 100, 128, 250])
def test_keys_that_share_a_scale_fit_the_integer_units(block):
    together = quantise.keys_together(block)
    assert together in (32, 64)


def test_zeros_stay_zeros():
    zeros = torch.zeros(1, 1, 8, 4)
    order = torch.arange(8, dtype=torch.int32)
    for codes, scales in (
        quantise.quantise_blocks(zeros, order, 4),
        quantise.quantise_channels(zeros, order),
    ):
        assert codes.dtype == torch.int8 and not codes.any() and scales.isfinite().all()
    weights = torch.zeros(2, 8)
    quantise.round_weights(weights, 4, 127)
    assert not weights.any()


def test_precision_goes_with_the_plan():
    plan = PLANS["blocks"](GRID).with_precision("int8")
    assert plan.precision == plan.to("cpu").precision == plan.summary()["precision"] == "int8"
    assert plan.mask().equal(plan.with_precision(None).mask())
    assert plan.with_precision(None).precision is None
    assert not vidattn.plan("dense", GRID).with_precision("int8").is_dense
    heads = HeadPlan((PLANS["box"](GRID), PLANS["masks"](GRID)), torch.tensor([0, 1, 1, 0]))
    assert {plan.precision for plan in heads.with_precision("int8_qk").plans} == {"int8_qk"}
    q, k, v, *_ = random_inputs(GRID)
    out = attend(q, k, v, heads.with_precision("int8_qk"))
    assert 1e-3 < relative_rms(out, attend(q, k, v, heads)) < ERROR["int8_qk"]


def test_compensation_is_not_rounded():
    plan = random_blocks(GRID)
    gain = torch.rand(1, 1, plan.layout.num_blocks)
    compensated = dataclasses.replace(plan, gain=gain, precision="int8_qk")
    q, k, v, *_ = random_inputs(GRID)
    plain = attend(q, k, v, plan.with_precision("int8_qk"))
    block = (plan.layout.slot_of_token // plan.layout.block).long()
    expected = plain * gain[..., block, None]
    torch.testing.assert_close(attend(q, k, v, compensated), expected)


def test_unknown_precision_is_named():
    with pytest.raises(ValueError, match="unknown precision 'int_8': did you mean 'int8'"):
        PLANS["blocks"](GRID).with_precision("int_8")


@pytest.mark.parametrize("backend", ["cpp", "flex", "reference"])
def test_other_engines_say_which_runs(backend):
    plan = PLANS["blocks"](GRID).with_precision("int8")
    with pytest.raises(ValueError, match=f"the '{backend}' engine does not.*backend=\"torch\""):
        attend(*random_inputs(GRID)[:3], plan, backend=backend)


def test_a_gradient_is_refused():
    plan = PLANS["blocks"](GRID).with_precision("int8")
    q, k, v, *_ = random_inputs(GRID)
    with pytest.raises(ValueError, match=r"'int8' has no gradient: use torch.no_grad\(\)"):
        attend(q, k.requires_grad_(), v, plan)
    with torch.no_grad():
        assert attend(q, k, v, plan).isfinite().all()


def test_operator_keeps_its_promises():
    plan = PLANS["box"](GRID).with_precision("int8")
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in random_inputs(GRID)[:3])
    given = (q, k, v, *library.flatten(plan.lists), 0.25, None, "int8")
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.vidattn.quantised_torch, given, test_utils=tests)


def test_one_graph_holds_it():
    plan = PLANS["box"](GRID).with_precision("int8")
    q, k, v, *_ = random_inputs(GRID)

    def attention(q, k, v):
        return attend(q.sin(), k, v, plan)

    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), attention(q, k, v))
