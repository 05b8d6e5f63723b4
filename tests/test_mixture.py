"""Merging two attentions is attention over the keys of both."""

import pytest
import torch

from tests.kernels.attention_cases import random_inputs, relative_rms, striped
from vidattn.attention import attend
from vidattn.grid import Grid, tile_layout
from vidattn.mixture import merge
from vidattn.plan import Plan

GRID = Grid(3, 5, 7)


def halves():
    """Two plans without a pair in common, and the one that has the pairs of both."""
    layout = tile_layout(GRID, (1, 4, 4))

    def near(query, key):
        return (query - key).abs().amax(-1) <= 1

    rules = (
        lambda q, k: striped(q, k) & near(q, k),
        lambda q, k: striped(q, k) & ~near(q, k),
        striped,
    )
    return [Plan.from_rule(GRID, layout, rule) for rule in rules]


def pulled(out, lse, d_out, d_lse, leaves):
    """Output and log-sum-exp with their gradients."""
    total = (out * d_out).sum() + (lse * d_lse).sum()
    return [out, lse, *torch.autograd.grad(total, leaves)]


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_merged_is_whole(backend):
    q, k, v, d_out, d_lse = random_inputs(GRID, dtype=torch.float64, head_dim=8)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    a, b, both = (attend(q, k, v, x, backend=backend, return_lse=True) for x in halves())
    found = pulled(*merge(*a, *b), d_out, d_lse, leaves)
    expected = pulled(*both, d_out, d_lse, leaves)
    for x, y in zip(found, expected):
        assert relative_rms(x.detach(), y.detach()) < 1e-6


def test_gradients():
    torch.manual_seed(1)
    out_a, out_b = (torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in "ab")
    lse_a, lse_b = (torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in "ab")
    assert torch.autograd.gradcheck(merge, (out_a, lse_a, out_b, lse_b))


def test_a_query_without_keys():
    lse_a = torch.tensor([0.5, -torch.inf, -torch.inf], requires_grad=True)
    lse_b = torch.tensor([-torch.inf, 800.0, -torch.inf], requires_grad=True)
    out_a, out_b = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    out, lse = merge(out_a, lse_a, out_b, lse_b)
    torch.testing.assert_close(out, torch.stack([out_a[0], out_b[1], torch.zeros(4)]))
    torch.testing.assert_close(lse, torch.tensor([0.5, 800.0, -torch.inf]))
    grads = torch.autograd.grad(out.sum() + lse[:2].sum(), (out_a, lse_a, out_b, lse_b))
    assert all(x.isfinite().all() for x in grads)


def test_the_first_dtype_is_kept():
    out = torch.ones(2, 3, dtype=torch.bfloat16)
    merged, lse = merge(out, torch.zeros(2), out.float(), torch.zeros(2))
    assert merged.dtype == torch.bfloat16 and lse.dtype == torch.float32
    torch.testing.assert_close(lse, torch.full((2,), 2.0).log())


@pytest.mark.parametrize("change", [lambda x: x[..., :2], lambda x: x[:, :1]])
def test_shapes_are_checked(change):
    out, lse = torch.ones(2, 3, 4), torch.ones(2, 3)
    with pytest.raises(ValueError, match="two outputs"):
        merge(out, lse, change(out), lse)
    with pytest.raises(ValueError, match="two outputs"):
        merge(out, lse, out, change(lse))
