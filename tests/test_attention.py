"""attend(): engines agree, and bad input is named."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

import vidattn
from tests.kernels.attention_cases import (
    random_blocks,
    random_inputs,
    relative_rms,
    striped,
    with_order,
)
from vidattn.attention import attend
from vidattn.grid import Grid, tile_layout
from vidattn.head_plan import HeadPlan
from vidattn.kernels.box import Box
from vidattn.methods import create_method
from vidattn.plan import Plan
from vidattn.planning.reading import Reading

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
        "has 9 tokens but the plan is for 76",
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
    "no samples": (
        lambda x: other(x, **{name: x[name][:0] for name in "qkv"}),
        r"must hold at least one sample and one head, got q \(0, 4, 76, 32\)",
    ),
    "no heads": (lambda x: other(x, q=x["q"][:, :0]), "at least one sample and one head"),
    "no key heads": (
        lambda x: other(x, k=x["k"][:, :0], v=x["v"][:, :0]),
        "at least one sample and one head",
    ),
    "no channels": (
        lambda x: other(x, **{name: x[name][..., :0] for name in "qkv"}),
        "must hold at least",
    ),
    "a mask in a list": (lambda x: other(x, key_mask=[[True] * 76] * 2), "got list"),
    "a scale in words": (lambda x: other(x, scale="0.3"), "scale must be a number, got '0.3'"),
    "nothing for q": (lambda x: other(x, q=None), "must be tensors, got NoneType, Tensor, Tensor"),
    "nothing for v": (lambda x: other(x, v=None), "must be tensors, got Tensor, Tensor, NoneType"),
    "no plan": (lambda x: other(x, plan="radial"), "plan must be one, .* got str"),
    "an unknown backend": (lambda x: other(x, backend="torhc"), "did you mean 'torch'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_named(case):
    change, message = WRONG[case]
    q, k, v = random_inputs(GRID)[:3]
    inputs = {"q": q, "k": k, "v": v}
    for plan in (
        random_blocks(GRID),
        HeadPlan.join([random_blocks(GRID, heads=2)] * 2, [(0, 2), (1, 3)]),
    ):
        if "a plan" in case and isinstance(plan, HeadPlan):
            continue
        with pytest.raises(ValueError, match=message):
            attend(**change(inputs | {"plan": plan}))


@pytest.mark.parametrize("name", ["topk", "paro", "radial", "cluster", "adaspa", "vertical_slash"])
@pytest.mark.parametrize("case", WRONG)
def test_planning_names_bad_input_as_attention_does(case, name):
    change, message = WRONG[case]
    q, k = random_inputs(GRID)[:2]
    given = change({"q": q, "k": k, "v": k, "plan": None, "scale": None, "key_mask": None})
    if any(x in case for x in ("plan", "backend", " v", "values", "mixed")):
        pytest.skip("is no matter of planning")
    method = create_method(name, **({"rectify": True} if name == "radial" else {}))
    given = {key: given[key] for key in ("q", "k", "scale", "key_mask")}
    if given["q"] is None:
        message = "give q and k"
    with pytest.raises(ValueError, match=message.replace(", Tensor", "", 1)):
        method.plan(GRID, Reading(**given))


@pytest.mark.parametrize("backend", ["auto", "torch", "cpp", "reference"])
@pytest.mark.parametrize("linear", [True, False])
def test_a_gradient_has_no_wrong_gradient(backend, linear):
    """A gradient penalty, also of a critic that is linear in what attention gives."""
    plan = vidattn.plan("neighborhood", GRID, window=(1, 3, 3))
    dtype = torch.float64 if backend == "reference" else torch.float32
    x = torch.randn(1, 1, GRID.num_tokens, 8, dtype=dtype)
    w, u = torch.randn(2, 8, 8, dtype=dtype)

    def penalty(attention):
        z, weight = x.clone().requires_grad_(), w.clone().requires_grad_()
        y = z + attention(z @ weight) @ u
        (slope,) = torch.autograd.grad((y if linear else y.tanh()).sum(), z, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), weight)[0]

    def ours(z):
        return attend(z, z, z, plan, backend=backend)

    def plain(z):
        scores = (z @ z.mT * 8**-0.5).masked_fill(~plan.mask(), -torch.inf)
        return scores.softmax(-1) @ z

    if backend == "reference":
        torch.testing.assert_close(penalty(ours), penalty(plain))
    else:
        with pytest.raises(RuntimeError, match="has no gradient of its own .* backend=.reference"):
            penalty(ours)


TRANSFORMS = {
    "vmap": lambda f, q: torch.vmap(f)(q[None]),
    "grad": lambda f, q: torch.func.grad(lambda x: f(x).sum())(q),
    "jvp": lambda f, q: torch.func.jvp(f, (q,), (q,)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_refused_in_words(name):
    plan = vidattn.plan("neighborhood", GRID, window=(1, 3, 3))
    q, k, v = random_inputs(GRID)[:3]
    with pytest.raises(ValueError, match="knows none of torch.func's transforms"):
        TRANSFORMS[name](lambda x: attend(x, k, v, plan), q)


def test_a_forward_derivative_is_refused_in_words():
    plan = vidattn.plan("neighborhood", GRID, window=(1, 3, 3))
    q, k, v = random_inputs(GRID)[:3]
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="has no forward derivative"):
        attend(forward_ad.make_dual(q, q), k, v, plan)


@pytest.mark.parametrize(
    ("name", "backend", "dtype"),
    [
        *itertools.product(
            ("topk", "cluster", "strided"), ("auto", "torch", "reference"), (torch.float32,)
        ),
        ("neighborhood", "reference", torch.float32),
        ("topk", "torch", torch.bfloat16),
    ],
)
def test_attention_is_one_graph(name, backend, dtype):
    q, k, v = random_inputs(GRID, dtype=dtype)[:3]
    plan = vidattn.plan(name, GRID, q, k)

    def run(q, k, v):
        return attend(q, k, v, plan, backend=backend)

    # the cases share the code of ``attend``, which a compiler compiles anew a few times only
    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)(q, k, v)
    torch.testing.assert_close(compiled, run(q, k, v))


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_a_change_in_place_before_the_gradient_is_noticed(backend):
    q, k, v = (x.requires_grad_() for x in random_inputs(GRID)[:3])
    values = v * 1
    out = attend(q, k, values, random_blocks(GRID), backend=backend)
    values.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


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
        lambda p: with_order(p, p.layout.order + 1),
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
