"""Keys of other tokens than the queries, and keys that stand for many: right on every engine."""

import math

import pytest
import torch
import torch.nn.functional as F

import vidattn
from tests.kernels.attention_cases import (
    TOLERANCE,
    assert_right,
    random_blocks,
    random_inputs,
    relative_rms,
)
from tests.kernels.other_keys_cases import CACHE, CHUNK, PLANS, TILE, blocks, merging, weights_of
from vidattn.attention import attend, engines_of
from vidattn.draw import draw
from vidattn.grid import Grid, raster_layout, tile_layout
from vidattn.head_plan import HeadPlan
from vidattn.kernels import library
from vidattn.kernels.cpp import compiler
from vidattn.plan import Plan
from vidattn.planning.visible import visible_keys
from vidattn.simulation.simulate import count

ENGINES = [
    pytest.param("cpp", marks=pytest.mark.skipif(not compiler.find_compiler(), reason="compiler")),
    "torch",
    "auto",
]
SQUARE = Grid(2, 7, 5, text=6)


def inputs_of(plan, **options):
    return random_inputs(plan.grid, plan.key_grid.num_tokens, key_heads=2, **options)


@pytest.mark.parametrize("backend", [*ENGINES, "reference"])
@pytest.mark.parametrize(
    "options", [{"head_dim": 128}, {"heads": 3, "key_heads": 1, "queries": 131, "keys": 7}]
)
def test_a_key_may_stand_for_its_equals(backend, options):
    for name, (whole, merged) in merging(backend, torch.float32, **options).items():
        assert relative_rms(merged, whole) < 1e-5, name


@pytest.mark.parametrize("backend", ENGINES)
def test_a_key_may_stand_for_its_equals_in_half_precision(backend):
    for name, (whole, merged) in merging(backend, torch.bfloat16, block=64).items():
        # both sides are rounded
        assert relative_rms(merged, whole) < 2 * TOLERANCE[torch.bfloat16], name


@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("name", PLANS)
def test_every_kind_of_plan_reads_other_keys(name, backend):
    plan = PLANS[name]()
    key_mask = torch.rand(2, plan.key_grid.num_tokens) < 0.8
    inputs, weights = inputs_of(plan), weights_of(plan)
    for options in (
        {},
        {"key_mask": key_mask},
        {"key_weight": weights},
        {"key_weight": weights[:1, :1], "key_mask": key_mask, "scale": -0.2},
    ):
        assert_right(inputs, plan, backend, **options)


@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_other_keys_in_half_precision(dtype, backend):
    plan = blocks()
    # large weights, which half precision does not hold the logarithms of
    weights = weights_of(plan) * 1e4
    assert_right(inputs_of(plan, dtype=dtype), plan, backend, key_weight=weights)


def test_small_weights_do_not_make_large_scores_precise():
    """The torch engine rounds scores near 0 to bfloat16, not those that a weight brings there."""
    plan = Plan.dense(CHUNK, CACHE)
    q, *others = inputs_of(plan, dtype=torch.bfloat16)
    # the largest score of each row is about 22, base 2
    q = F.normalize(q, dim=-1) * 6 * q.shape[-1] ** 0.5
    weights = torch.full((1, 1, CACHE.num_tokens), 2.0**-22)
    assert_right([q, *others], plan, "torch", key_weight=weights)


def test_the_reference_is_masked_attention():
    plan = blocks()
    q, k, v, *_ = inputs_of(plan, dtype=torch.float64)
    weights = weights_of(plan).double()
    out, lse = attend(q, k, v, plan, key_weight=weights, backend="reference", return_lse=True)
    bias = weights.repeat_interleave(2, 1).log()[:, :, None].masked_fill(~plan.mask(), -torch.inf)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)
    torch.testing.assert_close(out, expected)
    scores = q @ k.repeat_interleave(2, 1).mT * q.shape[-1] ** -0.5 + bias
    torch.testing.assert_close(lse, scores.logsumexp(-1).float())
    assert plan.mask().shape == (2, 4, CHUNK.num_tokens, CACHE.num_tokens)


@pytest.mark.parametrize("dtype", [*TOLERANCE], ids=str)
def test_a_dense_plan_weighs_keys_in_pytorchs_attention(dtype):
    plan = Plan.dense(CHUNK, CACHE)
    assert plan.is_dense
    q, k, v, *_ = inputs_of(plan, dtype=dtype)
    # half precision does not hold their logarithms
    weights = weights_of(plan) * 1e4 * torch.rand(2, 2, CACHE.num_tokens)
    options = {
        "key_weight": weights,
        "key_mask": torch.rand(2, CACHE.num_tokens) > 0.3,
    }
    assert engines_of(q, k, v, plan, **options) == ("pytorch",)
    out = attend(q, k, v, plan, **options)
    exact = [x.double() for x in (q, k, v)]
    expected = attend(*exact, plan, backend="reference", **options)
    assert relative_rms(out, expected) < TOLERANCE[dtype]
    # nobody reads the keys of the last head
    assert not out[1, 2:].any()


@pytest.mark.parametrize("backend", [*ENGINES, "reference"])
@pytest.mark.parametrize("plan", [blocks(), Plan.dense(CHUNK, CACHE)], ids=["blocks", "dense"])
def test_keys_of_no_weight_give_0(plan, backend):
    q, k, v, d_out, _ = inputs_of(plan)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    weight = torch.zeros(1, 1, CACHE.num_tokens)
    for lse in (False, True):
        found = attend(*leaves, plan, key_weight=weight, backend=backend, return_lse=lse)
        out = found[0] if lse else found
        assert not out.any() and (not lse or (found[1] == -torch.inf).all())
        grads = torch.autograd.grad(out, leaves, d_out)
        assert not any(x.any() for x in grads)


def test_a_weight_says_what_a_mask_says():
    plan = random_blocks(SQUARE)
    q, k, v, *_ = random_inputs(SQUARE)
    key_mask = torch.rand(2, SQUARE.num_tokens) < 0.6
    weight = key_mask[:, None].float()
    for backend in ("auto", "torch", "reference"):
        masked, weighed = (
            attend(q, k, v, plan, backend=backend, **x)
            for x in ({"key_mask": key_mask}, {"key_weight": weight})
        )
        torch.testing.assert_close(weighed, masked)


def test_heads_of_several_plans_have_their_own_weights():
    window = vidattn.plan("neighborhood", SQUARE, window=(2, 3, 3))
    by_head = HeadPlan.join([random_blocks(SQUARE, heads=2), window], [(0, 3), (1, 2)])
    rows = tuple(random_blocks(SQUARE, batch=4, heads=1) for _ in range(2))
    by_sample = HeadPlan(rows, torch.tensor([[0, 1, 1, 0], [1, 0, 1, 0]]))
    others = HeadPlan.join([blocks(heads=2), PLANS["rule"]()], [(0, 3), (1, 2)])
    for plan in (by_head, by_sample, others):
        weights = weights_of(plan)
        for backend in ("auto", "torch"):
            assert_right(inputs_of(plan), plan, backend, key_weight=weights)
            assert_right(inputs_of(plan), plan, backend, key_weight=weights[:1, :1])


def test_one_graph_takes_new_weights():
    plan = blocks()
    q, k, v, *_ = inputs_of(plan)

    def loss(q, weight):
        return attend(q.sin(), k, v, plan, key_weight=weight, backend="torch").square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        weight, grads = weights_of(plan), []
        for function in (loss, compiled):
            leaf = q.clone().requires_grad_()
            function(leaf, weight).backward()
            grads.append(leaf.grad)
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", PLANS)
def test_operator_keeps_its_promises(name):
    plan = PLANS[name]()
    q, k, v = (x.requires_grad_() for x in inputs_of(plan, head_dim=16)[:3])
    bias = weights_of(plan, 4).clamp_min(1).log()
    inputs = (q, k, v, *library.flatten(plan.lists), 0.25, None, bias)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.vidattn.block_sparse_torch, inputs, test_utils=tests)


def test_an_exported_program_and_meta_tensors_know_the_shapes():
    plan = blocks()
    weight = weights_of(plan)

    class Model(torch.nn.Module):
        def forward(self, q, k, v, weight):
            return attend(q, k, v, plan, key_weight=weight, backend="torch")

    given = (*inputs_of(plan)[:3], weight)
    program = torch.export.export(Model(), given)
    torch.testing.assert_close(program.module()(*given), Model()(*given))
    q, *others = (x.to("meta") for x in given)
    out, lse = attend(q, *others[:2], plan, key_weight=others[2], backend="torch", return_lse=True)
    assert out.is_meta and out.shape == q.shape and lse.shape == q.shape[:3]


def test_autocast_casts_all_but_the_weights():
    plan = blocks()
    q, k, v, *_ = inputs_of(plan)
    weight = weights_of(plan) * 1e4
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(q, k, v, plan, key_weight=weight)
    assert out.dtype == torch.bfloat16
    expected = attend(q, k, v, plan, key_weight=weight, backend="reference")
    assert relative_rms(out, expected) < 2 * TOLERANCE[torch.bfloat16]


def given(**change):
    """What ``attend`` takes, with some of it replaced."""
    q, k, v = random_inputs(CHUNK, CACHE.num_tokens, key_heads=2)[:3]
    return {"q": q, "k": k, "v": v, "plan": blocks(), **change}


def weight(**options):
    return torch.ones(2, 2, CACHE.num_tokens, **options)


WRONG = {
    "a list": (lambda: {"key_weight": [1.0]}, "key_weight must be a tensor, got list"),
    "query heads": (lambda: {"key_weight": weight().repeat(1, 2, 1)}, r"\(1 or 2, 1 or 2, 181\)"),
    "two axes": (lambda: {"key_weight": weight()[0]}, r"got torch.float32 \(2, 181\)"),
    "one key": (lambda: {"key_weight": weight()[..., :1]}, "1 or key heads, keys"),
    "integers": (lambda: {"key_weight": weight(dtype=torch.long)}, "must be floating point"),
    "another device": (lambda: {"key_weight": weight(device="meta")}, "is on meta, q on cpu"),
    "a gradient": (lambda: {"key_weight": weight().requires_grad_()}, "give key_weight.detach"),
    "below 0": (lambda: {"key_weight": weight() - 2}, "not negative, got numbers from -1"),
    "no number": (lambda: {"key_weight": weight() * math.nan}, "must be finite"),
    "endless": (lambda: {"key_weight": weight() * math.inf}, "must be finite"),
    "keys of the queries": (
        lambda: dict(zip("kv", random_inputs(CHUNK, key_heads=2)[1:3])),
        r"k \(2, 2, 73, 32\) has 73 tokens but the plan reads 181 keys",
    ),
    "a square plan": (lambda: {"plan": random_blocks(CHUNK)}, r"such as Plan.dense\(grid, keys\)"),
    "a mask of queries": (
        lambda: {"key_mask": torch.ones(2, CHUNK.num_tokens, dtype=torch.bool)},
        r"\(batch, tokens\) = \(2, 181\)",
    ),
    "an engine without": (lambda: {"backend": "flash"}, "'flash' engine takes neither weights"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_named(case):
    change, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        attend(**given(**change()))


@pytest.mark.parametrize("name", ["int8", "gain", "rest"])
def test_a_plan_that_does_more_takes_no_weights(name):
    plan = random_blocks(SQUARE)
    nb = plan.layout.num_blocks
    if name == "int8":
        plan = plan.with_precision("int8")
    else:
        shape = (1, 1, nb) if name == "gain" else (1, 1, nb, nb)
        nv = plan.layout.num_video_blocks
        table = torch.ones(1, 1, nv, nv, dtype=torch.bool)
        plan = Plan.from_blocks(SQUARE, plan.layout, table, **{name: torch.ones(shape)})
    q, k, v, *_ = random_inputs(SQUARE)
    with pytest.raises(ValueError, match="leave key_weight out"):
        attend(q, k, v, plan, key_weight=torch.ones(1, 1, SQUARE.num_tokens))


def test_figures_of_a_plan_count_its_own_pairs():
    for make in PLANS.values():
        plan = make()
        video = [
            slice(x.video_start, x.video_start + x.num_video_tokens)
            for x in (plan.grid, plan.key_grid)
        ]
        kept = plan.mask()[:, :, video[0], video[1]].double()
        assert plan.density == pytest.approx(kept.mean().item())
        figures = plan.summary()
        assert figures["num_tokens"] == plan.grid.num_tokens
        assert figures["num_keys"] == plan.key_grid.num_tokens
        nv, nvk = plan.layout.num_video_blocks, plan.key_layout.num_video_blocks
        assert plan.read_share.shape[-2:] == (nv, nvk)
        queries = torch.tensor([0, 5, plan.grid.num_tokens - 1])
        assert torch.equal(visible_keys(plan, queries), plan.mask()[:, :, queries])


def test_parts_of_a_plan_read_the_same_keys():
    plan = blocks()
    mask = plan.mask()
    assert torch.equal(plan.select_heads([1, 3]).mask(), mask[:, [1, 3]])
    assert torch.equal(plan.of_row(1, 2).mask(), mask[1:, 2:3])
    some = torch.zeros(CHUNK.num_tokens, dtype=torch.bool)
    some[:9] = True
    few = plan.of_queries(lambda layout: some).mask()
    assert torch.equal(few[:, :, :9], mask[:, :, :9]) and not few[:, :, -1].any()
    moved = plan.to("meta")
    assert moved.lists.key_order.is_meta and moved.key_layout.order is moved.lists.key_order


def test_what_has_no_meaning_for_other_keys_is_refused():
    plan, square = blocks(), random_blocks(CHUNK)
    with pytest.raises(ValueError, match="must be for one grid, got .*keys of Grid"):
        HeadPlan.join([plan.select_heads([0]), square.select_heads([0])], [(0,), (1,)])
    with pytest.raises(ValueError, match="other tokens than the queries .* precision"):
        plan.with_precision("int8")
    for use in (count, lambda x: draw({"plan": x})):
        with pytest.raises(ValueError, match="keys are other tokens than the queries"):
            use(plan)
    layout, keys = tile_layout(CHUNK, TILE), raster_layout(CACHE, 8)
    shape = (1, 1, layout.num_video_blocks, keys.num_video_blocks)
    with pytest.raises(ValueError, match="must be equally long, got 16 and 8"):
        Plan.from_blocks(CHUNK, layout, torch.ones(shape, dtype=torch.bool), keys=(CACHE, keys))
    with pytest.raises(ValueError, match=r"shape \(batch, heads, 8, 20\)"):
        keys = tile_layout(CACHE, TILE)
        Plan.from_blocks(CHUNK, layout, torch.ones(1, 1, 8, 8).bool(), keys=(CACHE, keys))
    with pytest.raises(ValueError, match="the lists are of another layout"):
        Plan(CHUNK, plan.layout, plan.lists)


def test_as_many_keys_as_are_said():
    plan = Plan.dense(CHUNK, 9)
    assert plan.mask().shape == (1, 1, CHUNK.num_tokens, 9) and plan.mask().all()
    assert torch.equal(Plan.dense(SQUARE).mask(), vidattn.plan("dense", SQUARE).mask())
    with pytest.raises(ValueError, match="must be an integer of at least 1, got 0"):
        Plan.dense(CHUNK, 0)
