"""The engines as operators: what compilers, exporters and meta tensors see of them."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import vidattn
from tests.kernels import attention_cases as cases
from vidattn.attention import attend
from vidattn.grid import Grid
from vidattn.kernels import library
from vidattn.kernels.block_lists import BlockLists
from vidattn.kernels.engines import block_sparse_torch
from vidattn.plan import Plan

GRID = Grid(2, 5, 7, text=3)
PLANS = {
    "blocks": lambda: cases.random_blocks(GRID),
    "box": lambda: vidattn.plan("neighborhood", GRID, window=(2, 3, 3)),
    "masks": lambda: Plan.from_rule(GRID, cases.random_blocks(GRID).layout, cases.striped),
}


def leaves(strided=False):
    """q, k and v that want gradients; laid out as (B, S, H, D) where strided."""
    q, k, v, *_ = cases.random_inputs(GRID, key_heads=2, head_dim=16)
    if strided:
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    return [x.detach().requires_grad_() for x in (q, k, v)]


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("strided", [False, True])
def test_operator_keeps_its_promises(name, strided):
    plan = PLANS[name]()
    inputs = (*leaves(strided), *library.flatten(plan.lists), 0.25, None, None)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.vidattn.block_sparse_torch, inputs, test_utils=tests)


def test_one_graph_holds_attention_and_its_gradient():
    plan = PLANS["box"]()
    assert not plan.is_dense

    def loss(q, k, v):
        return attend(q.sin(), k, v, plan, backend="torch").square().sum()

    expected = leaves()
    actual = [x.detach().clone().requires_grad_() for x in expected]
    loss(*expected).backward()
    torch.compile(loss, backend="aot_eager", fullgraph=True)(*actual).backward()
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a.grad, b.grad)


def test_a_graph_looks_at_the_lists_of_a_plan_once(monkeypatch):
    looked = []
    check = BlockLists._check_bounds
    monkeypatch.setattr(
        BlockLists, "_check_bounds", lambda lists, *n: (looked.append(n), check(lists, *n))
    )
    q, k, v = (x.detach() for x in leaves())
    run = torch.compile(partial(attend, backend="torch"), backend="aot_eager", fullgraph=True)
    plan = PLANS["box"]()
    for _ in range(3):
        run(q, k, v, plan=plan)
    assert len(looked) == 1


def test_lists_that_share_tensors_are_told_apart():
    plan = PLANS["masks"]()
    turned = replace(plan, lists=replace(plan.lists, masks=~plan.lists.masks))
    q, k, v = (x.detach() for x in leaves())
    run = torch.compile(partial(attend, backend="torch"), backend="aot_eager", fullgraph=True)
    for _ in range(2):
        for one in (plan, turned):
            expected = attend(q, k, v, one, backend="reference")
            assert cases.relative_rms(attend(q, k, v, one, backend="torch"), expected) < 1e-5
            assert cases.relative_rms(run(q, k, v, plan=plan), run(q, k, v, plan=turned)) > 0.1
            assert cases.relative_rms(run(q, k, v, plan=one), expected) < 1e-5


def test_exported_program_attends():
    plan = PLANS["blocks"]()

    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return attend(q, k, v, plan, backend="torch")

    q, k, v = (x.detach() for x in leaves())
    program = torch.export.export(Model(), (q, k, v))
    torch.testing.assert_close(program.module()(q, k, v), Model()(q, k, v))


def test_meta_tensors_give_shapes():
    plan = PLANS["box"]().to("meta")
    q, k, v = (x.detach().to("meta") for x in leaves())
    out, lse = block_sparse_torch.attention(q, k, v, plan.lists, scale=0.25)
    assert out.shape == q.shape and out.is_meta
    assert lse.shape == q.shape[:3] and lse.dtype == torch.float32


@pytest.mark.parametrize("per_head", [False, True])
def test_key_bias_is_added_to_the_scores(per_head):
    plan = PLANS["blocks"]()
    q, k, v = (x.detach() for x in leaves())
    bias = torch.randn(2, 4 if per_head else 1, GRID.num_tokens).requires_grad_()
    out, lse = block_sparse_torch.attention(q, k, v, plan.lists, scale=0.3, key_bias=bias)
    scores = 0.3 * q.double() @ k.double().repeat_interleave(2, 1).mT + bias[:, :, None]
    scores = scores.masked_fill(~plan.mask(), -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    expected = weights @ v.double().repeat_interleave(2, 1)
    assert cases.relative_rms(out, expected) < 1e-5
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)
    pull = torch.randn(out.shape)
    (grad,) = torch.autograd.grad((out * pull).sum(), bias)
    (exact,) = torch.autograd.grad((expected * pull).sum(), bias)
    assert cases.relative_rms(grad, exact) < 1e-5


class Log(TorchDispatchMode):
    """The names of our operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names += [x for x in (str(function),) if x.startswith("vidattn.")]
        return function(*args, **kwargs or {})


OPERATORS = ["vidattn.block_sparse_torch.default", "vidattn.block_sparse_torch_backward.default"]


def test_who_looks_at_operators_sees_them_and_the_same_numbers():
    plan, alone = PLANS["box"](), leaves()
    watched, profiled = ([x.detach().clone().requires_grad_() for x in alone] for _ in range(2))

    def run(tensors):
        out = attend(*tensors, plan, backend="torch")
        out.square().sum().backward()
        return out

    expected = run(alone)
    with Log() as log:
        seen = run(watched)
    with torch.profiler.profile() as profile:
        run(profiled)
    assert log.names == OPERATORS
    names = {event.name for event in profile.events()}
    assert {"vidattn::block_sparse_torch", "vidattn::block_sparse_torch_backward"} <= names
    assert torch.equal(seen, expected)
    for a, b, c in zip(alone, watched, profiled):
        assert torch.equal(a.grad, b.grad) and torch.equal(a.grad, c.grad)


@pytest.mark.filterwarnings("ignore")  # of what is constant in a trace
def test_a_trace_holds_the_operator():
    plan, (q, k, v) = PLANS["box"](), (x.detach() for x in leaves())
    traced = torch.jit.trace(lambda *x: attend(*x, plan, backend="torch"), (q, k, v))
    assert "vidattn::block_sparse_torch" in str(traced.graph)
    torch.testing.assert_close(traced(2 * q, k, v), attend(2 * q, k, v, plan, backend="torch"))


def test_what_nobody_looks_at_is_called_without_the_dispatcher(monkeypatch):
    calls = []
    operator = block_sparse_torch._attention
    monkeypatch.setattr(operator, "_forward", lambda *x: calls.append(x))
    attend(*leaves(), PLANS["box"](), backend="torch")
    assert not calls


def test_a_forward_derivative_is_refused_where_gradients_are_off():
    q, k, v = (x.detach() for x in leaves())
    with forward_ad.dual_level(), torch.no_grad():
        dual = forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(RuntimeError, match="forward (derivative|AD)"):
            attend(dual, k, v, PLANS["blocks"](), backend="torch")
