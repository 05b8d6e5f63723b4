"""Every ContentMethod by the same rules; a new file is tested as it is."""

import dataclasses

import pytest
import torch

from tests.content_cases import coherent, dense_weights
from vidattn.attention import attend
from vidattn.content import ContentMethod
from vidattn.grid import Grid
from vidattn.methods import create_method, list_methods, method_class

NAMES = [name for name in list_methods() if issubclass(method_class(name), ContentMethod)]
GRIDS = [Grid(5, 9, 4, text=11), Grid(1, 6, 10, text=3, text_first=True), Grid(7, 3, 13)]


def options_of(name: str) -> set[str]:
    return {field.name for field in dataclasses.fields(method_class(name))}


def method(name: str, **options):
    """A method with those of the options that it has."""
    known = options_of(name)
    return create_method(name, **{key: x for key, x in options.items() if key in known})


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_samples_and_heads_are_planned_on_their_own(name, grid):
    q, k, v = coherent(grid)
    # heads that may share a density are told not to
    this = method(name, density=0.4, rectify=True, recall=None)
    plan = this.plan(grid, q, k)
    mask, out = plan.mask().expand(2, 3, -1, -1), attend(q, k, v, plan)
    for b, h in ((0, 2), (1, 0)):
        one = [x[b : b + 1, h : h + 1] for x in (q, k, v)]
        alone = this.plan(grid, *one[:2])
        assert torch.equal(alone.mask()[0, 0], mask[b, h])
        torch.testing.assert_close(attend(*one, alone)[0, 0], out[b, h], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_padded_keys_change_nothing(name):
    grid = GRIDS[0]
    q, k, v = coherent(grid)
    key_mask = torch.ones(2, grid.num_tokens, dtype=torch.bool)
    key_mask[1, -4:] = False
    outs = []
    for value in (0.0, 9.0):
        k, v = (x.masked_fill(~key_mask[:, None, :, None], value) for x in (k, v))
        plan = method(name, rectify=True).plan(grid, q, k, key_mask=key_mask)
        outs.append(attend(q, k, v, plan, key_mask=key_mask))
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rectify", [False, True])
@pytest.mark.parametrize("name", [n for n in NAMES if "density" in options_of(n)])
def test_a_full_budget_is_dense_attention(name, rectify):
    grid = GRIDS[0]
    q, k, v = coherent(grid)
    plan = method(name, density=1.0, rectify=rectify).plan(grid, q, k[:, :1], scale=0.2)
    assert plan.mask().all()
    expected = dense_weights(q, k[:, :1], 0.2) @ v.double()
    out = attend(q, k[:, :1].expand_as(v), v, plan, scale=0.2)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in NAMES if "density" in options_of(n)])
def test_a_density_is_met(name):
    grid = Grid(11, 13, 17)
    q, k, _ = coherent(grid, batch=1, heads=2)
    assert method(name, density=0.4).plan(grid, q, k).density == pytest.approx(0.4, abs=0.05)


@pytest.mark.parametrize("name", [n for n in NAMES if "rectify" in options_of(n)])
def test_rectification_reduces_the_error(name):
    grid = Grid(5, 9, 10, text=3)
    q, k, v = coherent(grid, batch=1, heads=4, noise=0.1, waves=1.0)
    expected = dense_weights(q, k, 0.25) @ v.double()
    error, density = {}, {}
    for rectify in (False, True):
        plan = method(name, density=0.25, tile=(1, 2, 2), rectify=rectify).plan(grid, q, k)
        out = attend(q, k, v, plan).double()
        error[rectify], density[rectify] = (out - expected).square().mean().sqrt(), plan.density
    assert density[True] == density[False] < 0.9
    assert error[True] < 0.9 * error[False]
