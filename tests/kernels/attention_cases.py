"""Plans, inputs and the float64 answer that engines are compared with."""

from dataclasses import replace

import torch

from vidattn.attention import attend
from vidattn.grid import Grid, tile_layout
from vidattn.plan import Plan

# relative RMS, outputs and gradients alike
TOLERANCE = {
    torch.float64: 1e-7,  # the log-sum-exp is float32
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2,
}


def random_inputs(
    grid: Grid, num_keys=None, *, batch=2, heads=4, key_heads=4, head_dim=32, dtype=torch.float32
):
    """q, k, v and what their output and log-sum-exp are pulled by; as many keys as queries, or
    ``num_keys``."""
    S = grid.num_tokens
    Sk = S if num_keys is None else num_keys
    shapes = [(batch, heads, S, head_dim)] + 2 * [(batch, key_heads, Sk, head_dim)]
    tensors = [torch.randn(shape) for shape in (*shapes, shapes[0], shapes[0][:3])]
    return [x.to(dtype) for x in tensors[:4]] + [tensors[4]]


def random_blocks(grid: Grid, *, batch=2, heads=4, share=0.4) -> Plan:
    """Another random choice of blocks for every sample and head; one query block reads nothing."""
    layout = tile_layout(grid, (1, 4, 4))
    nv = layout.num_video_blocks
    blocks = torch.rand(batch, heads, nv, nv) < share
    blocks[:, :, nv // 2] = False
    return Plan.from_blocks(grid, layout, blocks)


def with_order(plan: Plan, order: torch.Tensor) -> Plan:
    """The plan with other tokens in its slots."""
    layout, lists = replace(plan.layout, order=order), replace(plan.lists, order=order)
    return replace(plan, layout=layout, lists=lists)


def by_blocks(plan: Plan) -> Plan:
    """The plan without what engines know of it beside its lists."""
    return replace(plan, lists=replace(plan.lists))


def striped(query, key):
    """A rule that is no box."""
    return (query - key).abs().sum(-1) % 3 == 0


def results(inputs, plan, backend, **options):
    """Output, log-sum-exp with 0 for no keys, and the gradients of q, k and v through both."""
    q, k, v, d_out, d_lse = inputs
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = attend(*leaves, plan, backend=backend, return_lse=True, **options)
    lse = torch.where(lse.isinf(), 0.0, lse)
    pulled = (out * d_out).sum(dtype=torch.float64) + (lse * d_lse).sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(pulled, leaves)]


def relative_rms(actual, expected) -> float:
    """Norm of the difference over the norm of the expected tensor."""
    difference = (actual.double() - expected.double()).norm()
    return (difference / expected.double().norm().clamp_min(1e-30)).item()


def assert_right(inputs, plan, backend="torch", **options):
    """The engine agrees with float64 masked attention, gradients included."""
    exact = [x.double() for x in inputs[:4]] + [inputs[4]]
    expected = results(exact, plan, "reference", **options)
    actual = results(inputs, plan, backend, **options)
    errors = [relative_rms(a, e) for a, e in zip(actual, expected)]
    named = dict(zip(("out", "lse", "dq", "dk", "dv"), errors))
    # not max(): it would pass a NaN on only by chance
    assert all(error < TOLERANCE[inputs[0].dtype] for error in errors), named
