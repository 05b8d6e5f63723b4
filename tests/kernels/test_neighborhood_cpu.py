"""Neighborhood attention in C++ is float64 masked attention on every instruction set."""

import pytest
import torch

import vidattn
from tests.kernels.attention_cases import assert_right, by_blocks, random_inputs, results
from vidattn.grid import Grid
from vidattn.kernels.cpp import compiler, processor
from vidattn.kernels.engines import block_sparse_cpu
from vidattn.kernels.windows import neighborhood_cpu
from vidattn.kernels.windows.neighborhood_cpu import windows_of

pytestmark = pytest.mark.skipif(compiler.find_compiler() is None, reason="needs a C++ compiler")
SETS = tuple(processor.SETS)
CASES = {
    "ragged": (Grid(3, 13, 9, text=17), {"window": (2, 5, 5)}),
    "dilated, causal": (
        Grid(5, 11, 14),
        {"window": (2, 3, 5), "dilation": (1, 2, 2), "causal": (True, False, False)},
    ),
    "strided, text first": (
        Grid(3, 13, 9, text=19, text_first=True),
        {"window": (3, 5, 4), "stride": (1, 2, 3)},
    ),
    "line, in pieces": (Grid(1, 1, 700), {"window": (1, 1, 381)}),
    "picture": (Grid(1, 19, 23), {"window": (1, 7, 7)}),
    "smaller than a tile": (Grid(1, 2, 3, text=1), {"window": (1, 2, 2)}),
}


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """Walk over windows however little the blocks waste."""
    monkeypatch.setattr(neighborhood_cpu, "LEAST_WASTE", 0.0)


def dtype_of(name):
    return torch.bfloat16 if "bf16" in name else torch.float32


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("case", CASES)
def test_every_instruction_set(case, name, use):
    use(name)
    grid, options = CASES[case]
    plan = vidattn.plan("neighborhood", grid, **options)
    assert windows_of(plan.lists) is not None
    inputs = random_inputs(grid, key_heads=2, head_dim=33, dtype=dtype_of(name))
    assert_right(inputs, plan, "cpp")


@pytest.mark.parametrize("dtype", block_sparse_cpu.DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 24, 64, 80, 128])
def test_any_head_dim_and_type(head_dim, dtype):
    grid, options = CASES["ragged"]
    inputs = random_inputs(grid, batch=1, heads=2, key_heads=1, head_dim=head_dim, dtype=dtype)
    assert_right(inputs, vidattn.plan("neighborhood", grid, **options), "cpp")


@pytest.mark.parametrize("name", SETS)
def test_masked_keys(name, use):
    use(name)
    grid, options = CASES["ragged"]
    plan = vidattn.plan("neighborhood", grid, **options)
    inputs = random_inputs(grid, dtype=dtype_of(name))
    key_mask = torch.rand(2, grid.num_tokens) < 0.6
    # no key is left in the window of the first token
    key_mask[1, :60] = key_mask[1, grid.text_start :] = False
    inputs[1][1, :, :60] = inputs[2][1, :, :60] = float("nan")
    clean = [torch.nan_to_num(x) for x in inputs]
    assert_right(clean, plan, "cpp", key_mask=key_mask)
    for actual, expected in zip(
        results(inputs, plan, "cpp", key_mask=key_mask),
        results(clean, plan, "cpp", key_mask=key_mask),
    ):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", SETS)
def test_scores_that_grow(name, use):
    use(name)
    grid, options = CASES["line, in pieces"]
    inputs = random_inputs(grid, batch=1, heads=1, key_heads=1, head_dim=8, dtype=dtype_of(name))
    inputs[0] *= 30
    assert_right(inputs, vidattn.plan("neighborhood", grid, **options), "cpp")


@pytest.mark.parametrize("layout", ["heads first", "heads last", "strided"])
def test_rows_where_they_lie_or_packed(layout):
    grid = Grid(2, 9, 11)
    plan = vidattn.plan("neighborhood", grid, window=(2, 5, 5))
    inputs = random_inputs(grid, head_dim=64)
    if layout == "heads last":
        inputs[:4] = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs[:4]]
    elif layout == "strided":
        inputs[:4] = [torch.cat([x, x], -1)[..., 64:] for x in inputs[:4]]
    assert_right(inputs, plan, "cpp")


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (4, 2)], ids=str)
def test_threads_share_heads(heads, monkeypatch):
    grid, options = CASES["ragged"]
    plan = vidattn.plan("neighborhood", grid, **options)
    inputs = random_inputs(grid, batch=1, heads=heads[0], key_heads=heads[1], head_dim=64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert_right(inputs, plan, "cpp")
    again = zip(results(inputs, plan, "cpp"), results(inputs, plan, "cpp"))
    assert all(torch.equal(a, b) for a, b in again)


def test_windows_that_blocks_would_waste(monkeypatch):
    monkeypatch.undo()
    grid = Grid(1, 1, 1024)
    narrow, wide = (vidattn.plan("neighborhood", grid, window=x) for x in (9, 601))
    assert neighborhood_cpu.is_faster(narrow.lists)
    assert not neighborhood_cpu.is_faster(wide.lists)
    assert not neighborhood_cpu.is_faster(by_blocks(narrow).lists)
    for plan in (narrow, wide):
        assert windows_of(plan.lists).num_pairs == plan.mask().sum()


def test_other_lists_are_run_as_they_are():
    grid, options = CASES["ragged"]
    plan = vidattn.plan("neighborhood", grid, **options)
    some = plan.of_queries(lambda layout: torch.arange(grid.num_tokens) < 40)
    for changed in (some, by_blocks(plan)):
        assert windows_of(changed.lists) is None
        assert_right(random_inputs(grid), changed, "cpp")
