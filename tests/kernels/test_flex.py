"""The flex engine agrees with float64 masked attention, and says what it cannot do."""

import shutil

import pytest
import torch

import vidattn
from tests.kernels import other_keys_cases
from tests.kernels.attention_cases import (
    TOLERANCE,
    assert_right,
    random_blocks,
    random_inputs,
    relative_rms,
    striped,
)
from vidattn.attention import attend
from vidattn.grid import Grid, tile_layout
from vidattn.plan import Plan

GRID = Grid(3, 13, 9, text=17)
compiled = pytest.mark.skipif(
    shutil.which("g++") is None, reason="FlexAttention on a CPU needs a C++ compiler"
)


def window(grid):
    return vidattn.plan("neighborhood", grid, window=(3, 5, 5))


def rule(grid):
    return Plan.from_rule(grid, tile_layout(grid, (1, 4, 4)), striped)


def assert_forward_right(plan, dtype, *, padded=False, key_heads=4):
    q, k, v = random_inputs(GRID, key_heads=key_heads, dtype=dtype)[:3]
    key_mask = None
    if padded:
        key_mask = torch.ones(2, GRID.num_tokens, dtype=torch.bool)
        key_mask[1, -9:] = False
    with torch.no_grad():
        out = attend(q, k, v, plan, backend="flex", key_mask=key_mask)
    exact = [x.double() for x in (q, k, v)]
    expected = attend(*exact, plan, backend="reference", key_mask=key_mask)
    assert relative_rms(out, expected) < TOLERANCE[dtype]


@compiled
def test_a_window_with_padded_text():
    assert_forward_right(window(GRID), torch.float32, padded=True)


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make", [window, rule, random_blocks])
def test_every_kind_of_plan(make, dtype):
    assert_forward_right(make(GRID), dtype)
    assert_forward_right(make(GRID), dtype, padded=True, key_heads=2)


@compiled
@pytest.mark.parametrize("name", ["blocks", pytest.param("dense", marks=pytest.mark.slow)])
def test_other_keys_and_their_weights(name):
    plan = other_keys_cases.PLANS[name]()
    q, k, v = random_inputs(plan.grid, plan.key_grid.num_tokens, key_heads=2)[:3]
    for _ in range(2):
        options = {"key_weight": other_keys_cases.weights_of(plan)}
        with torch.no_grad():
            out = attend(q, k, v, plan, backend="flex", **options)
        exact = [x.double() for x in (q, k, v)]
        expected = attend(*exact, plan, backend="reference", **options)
        assert relative_rms(out, expected) < TOLERANCE[torch.float32]
        # nobody reads the keys of the last head
        assert not out[1, 2:].any()


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda x: x.requires_grad_(), {}, "no backward on a CPU"),
        (lambda x: x, {"return_lse": True}, "no log-sum-exp on a CPU"),
        (lambda x: x.double(), {}, "takes float32, bfloat16 and float16, got torch.float64: use"),
    ],
)
def test_what_it_cannot_do_is_an_error(change, options, message):
    q, k, v = (change(x) for x in random_inputs(GRID)[:3])
    with pytest.raises(ValueError, match=message):
        attend(q, k, v, window(GRID), backend="flex", **options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make", [window, rule, random_blocks])
def test_on_a_gpu(make, dtype):
    inputs = [x.cuda() for x in random_inputs(GRID, dtype=dtype)]
    assert_right(inputs, make(GRID), backend="flex")
