"""The C++ engine is float64 masked attention on every instruction set, forward and backward."""

import copy
import multiprocessing
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

import vidattn
from tests.grids import AWKWARD
from tests.kernels.attention_cases import (
    TOLERANCE,
    assert_right,
    by_blocks,
    random_blocks,
    random_inputs,
    relative_rms,
    results,
    striped,
    with_order,
)
from vidattn.attention import attend
from vidattn.grid import Grid, tile_layout
from vidattn.kernels.cpp import compiler, processor
from vidattn.kernels.engines import block_sparse_cpu
from vidattn.plan import Plan

pytestmark = pytest.mark.skipif(compiler.find_compiler() is None, reason="needs a C++ compiler")
RAGGED = Grid(3, 13, 9, text=17)
DTYPES = block_sparse_cpu.DTYPES
SETS = tuple(processor.SETS)


def run(inputs, plan, scale=None, key_mask=None, key_bias=None):
    """Output, log-sum-exp and the gradients of q, k, v and key_bias, in float64 without the plan's
    engine when the inputs are float64."""
    q, k, v, d_out, d_lse = inputs
    leaves = [x.clone().requires_grad_() for x in (q, k, v, key_bias) if x is not None]
    engine = dense if q.dtype == torch.float64 else sparse
    out, lse = engine(plan, q.shape[-1] ** -0.5 if scale is None else scale, key_mask, *leaves)
    lse = torch.where(lse.isinf(), 0.0, lse)
    pulled = (out * d_out).sum(dtype=torch.float64) + (lse * d_lse).sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(pulled, leaves)]


def sparse(plan, scale, key_mask, q, k, v, key_bias=None):
    options = {"scale": scale, "key_mask": key_mask, "key_bias": key_bias}
    return block_sparse_cpu.attention(q, k, v, plan.lists, **options)


def dense(plan, scale, key_mask, q, k, v, key_bias=None):
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    mask = plan.mask() if key_mask is None else plan.mask() & key_mask[:, None, None]
    scores = q @ k.mT * scale
    if key_bias is not None:
        scores = scores + key_bias[:, :, None]
    scores = scores.masked_fill(~mask, float("-inf"))
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - torch.where(lse.isinf(), 0.0, lse)[..., None])
    return weights @ v, lse


def check(inputs, plan, **options):
    bias = options.pop("key_bias", None)
    exact = [x.double() for x in inputs]
    expected = run(exact, plan, key_bias=None if bias is None else bias.double(), **options)
    actual = run(inputs, plan, key_bias=bias, **options)
    errors = dict(
        zip(("out", "lse", "dq", "dk", "dv", "dbias"), map(relative_rms, actual, expected))
    )
    assert all(error < TOLERANCE[inputs[0].dtype] for error in errors.values()), errors


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_on_whole_blocks(name, dtype, use):
    use(name)
    if "bf16" in name and dtype != torch.bfloat16:
        pytest.skip("this set is chosen for bfloat16 alone")
    check(random_inputs(RAGGED, key_heads=2, head_dim=40, dtype=dtype), random_blocks(RAGGED))


@pytest.mark.parametrize("name", SETS)
def test_every_instruction_set_on_windows_and_tables(name, use):
    use(name)
    dtype = torch.bfloat16 if "bf16" in name else torch.float32
    inputs = random_inputs(RAGGED, heads=2, key_heads=2, head_dim=33, dtype=dtype)
    plan = vidattn.plan("neighborhood", RAGGED, window=(2, 5, 5), tile=(4, 4, 4))
    check(inputs, by_blocks(plan))
    check(inputs, Plan.from_rule(RAGGED, tile_layout(RAGGED, (2, 3, 3)), striped))


@pytest.mark.parametrize("name", SETS)
def test_every_instruction_set_on_scores_that_grow_within_a_block(name, use):
    use(name)
    dtype = torch.bfloat16 if "bf16" in name else torch.float32
    inputs = random_inputs(RAGGED, heads=2, key_heads=2, head_dim=8, dtype=dtype)
    inputs[0] *= 30
    check(inputs, vidattn.plan("dense", RAGGED))


@pytest.mark.parametrize("grid", AWKWARD, ids=str)
@pytest.mark.parametrize("method", vidattn.list_methods())
def test_every_method_is_run_right(method, grid):
    inputs = random_inputs(grid)
    plan = vidattn.plan(method, grid, q=inputs[0], k=inputs[1])
    assert_right(inputs, plan, "cpp")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shared", ["batch", "heads", "both", "neither"])
def test_plans_shared_or_not(dtype, shared):
    batch = 1 if shared in ("batch", "both") else 2
    heads = 1 if shared in ("heads", "both") else 4
    plan = random_blocks(RAGGED, batch=batch, heads=heads)
    assert_right(random_inputs(RAGGED, dtype=dtype), plan, "cpp")


@pytest.mark.parametrize("tile", [(1, 1, 3), (2, 3, 3), (3, 5, 7), (2, 8, 8), (3, 8, 7)], ids=str)
def test_any_block_size(tile):
    grid = Grid(5, 11, 14)
    window = {"window": (2, 3, 5), "dilation": (1, 2, 2), "causal": (True, False, False)}
    inputs = random_inputs(grid, batch=1, heads=2, key_heads=1)
    check(inputs, by_blocks(vidattn.plan("neighborhood", grid, tile=tile, **window)))
    check(inputs, Plan.from_rule(grid, tile_layout(grid, tile), striped))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [(4, 2), (6, 1), (3, 3)], ids=str)
def test_grouped_queries(heads, dtype):
    inputs = random_inputs(RAGGED, heads=heads[0], key_heads=heads[1], dtype=dtype)
    check(inputs, random_blocks(RAGGED, heads=heads[0]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 24, 80, 128, 256])
def test_any_head_dim(head_dim, dtype):
    inputs = random_inputs(RAGGED, batch=1, heads=2, key_heads=2, head_dim=head_dim, dtype=dtype)
    check(inputs, random_blocks(RAGGED, batch=1, heads=1))


@pytest.mark.parametrize("shape", [(2, 4), (1, 4), (2, 1), (1, 1)], ids=str)
def test_a_bias_for_every_key(shape):
    bias = torch.randn(*shape, RAGGED.num_tokens)
    inputs = random_inputs(RAGGED, key_heads=2)
    key_mask = torch.rand(2, RAGGED.num_tokens) < 0.8
    check(inputs, random_blocks(RAGGED), key_bias=bias, key_mask=key_mask, scale=-0.2)


def test_a_query_without_keys_gives_nothing():
    plan = random_blocks(RAGGED)
    q, k, v = (x.requires_grad_() for x in random_inputs(RAGGED)[:3])
    key_mask = torch.ones(2, RAGGED.num_tokens, dtype=torch.bool)
    key_mask[0, RAGGED.text_start :] = False
    key_mask[1] = False
    out, lse = attend(q, k, v, plan, backend="cpp", key_mask=key_mask, return_lse=True)
    grads = torch.autograd.grad(out.square().sum() + lse[0].exp().sum(), (q, k, v))
    blind = ~(plan.mask() & key_mask[:, None, None]).any(-1)
    assert blind[0].any() and blind[1].all()
    assert torch.equal(lse.isneginf(), blind)
    assert out[blind].eq(0).all() and grads[0][blind].eq(0).all()
    assert all(x.isfinite().all() for x in (out, *grads))


def test_what_is_not_read_does_no_harm():
    grid = Grid(4, 4, 4)
    plan = Plan.from_blocks(grid, tile_layout(grid, (1, 4, 4)), torch.eye(4).bool()[None, None])
    q, k, v = random_inputs(grid)[:3]
    clean = attend(q, k, v, plan, backend="cpp")
    for x in (q, k, v):
        x[:, :, :16] = float("nan")
    out = attend(q, k, v, plan, backend="cpp")
    assert torch.equal(out[:, :, 16:], clean[:, :, 16:]) and out[:, :, :16].isnan().all()


def test_a_token_in_no_slot_gives_nothing():
    grid = Grid(2, 4, 4)
    plan = vidattn.plan("dense", grid)
    plan = with_order(plan, torch.where(plan.layout.order == 5, -1, plan.layout.order))
    q, k, v = (x.requires_grad_() for x in random_inputs(grid)[:3])
    out, lse = attend(q, k, v, plan, backend="cpp", return_lse=True)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(x[:, :, 5].eq(0).all() for x in (out, *grads))
    assert lse[:, :, 5].isneginf().all() and lse.isneginf().sum() == lse[:, :, 5].numel()


LAYOUTS = {
    "tokens before heads": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "head dim outermost": lambda x: x.mT.contiguous().mT,
    "cut from wider rows": lambda x: torch.cat([x, x[..., :1]], -1)[..., :-1],
    "part of one projection": lambda x: torch.stack([x, x], 3)[:, :, :, 1],
    "one head for all": lambda x: x[:, :1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout):
    q, k, v, d_out, d_lse = random_inputs(RAGGED)
    plan = random_blocks(RAGGED)
    strided = [LAYOUTS[layout](x).detach() for x in (q, k, v, d_out)]
    plain = [x.contiguous() for x in strided]
    expected = results((*plain, d_lse), plan, "cpp")
    leaves = [x.requires_grad_() for x in strided[:3]]
    out, lse = attend(*leaves, plan, backend="cpp", return_lse=True)
    lse = torch.where(lse.isinf(), 0.0, lse)
    grads = torch.autograd.grad((out, lse), leaves, (strided[3], d_lse))
    for actual, wanted in zip((out, lse, *grads), expected):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_every_time_and_in_every_thread(dtype):
    plan = random_blocks(RAGGED)
    inputs = random_inputs(RAGGED, dtype=dtype)
    first = results(inputs, plan, "cpp")
    with ThreadPoolExecutor(4) as pool:
        many = [pool.submit(results, inputs, plan, "cpp") for _ in range(12)]
    for again in many:
        assert all(map(torch.equal, first, again.result()))


@pytest.mark.parametrize("count", [1, 3])
def test_any_number_of_threads_gives_the_result(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        grid = Grid(4, 16, 16, text=3)
        for heads in (1, 3):
            inputs = random_inputs(grid, batch=1, heads=heads, key_heads=heads)
            check(inputs, vidattn.plan("neighborhood", grid, window=(3, 7, 7)))
            check(inputs, random_blocks(grid, batch=1, heads=heads))
    finally:
        torch.set_num_threads(before)


def _in_a_child(q, k, v, plan, expected):
    # PyTorch's own threads do not survive a fork: no gradients, nothing that it would share out
    with torch.no_grad():
        os._exit(0 if torch.equal(attend(q, k, v, plan, backend="cpp"), expected) else 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_can_call_it():
    inputs = random_inputs(RAGGED, batch=1, heads=2, key_heads=2)[:3]
    plan = random_blocks(RAGGED, batch=1, heads=2)
    expected = attend(*inputs, plan, backend="cpp")
    fork = multiprocessing.get_context("fork")
    child = fork.Process(target=_in_a_child, args=(*inputs, plan, expected))
    child.start()
    child.join(60)
    assert child.exitcode == 0


def test_one_graph_under_the_compiler_and_fake_tensors():
    plan = random_blocks(RAGGED)
    q, k, v, d_out, _ = random_inputs(RAGGED, key_heads=2)

    def model(q, k, v):
        return attend(q * 2, k, v, plan, backend="cpp") * 3

    traced = torch.compile(model, fullgraph=True, backend="aot_eager")
    grads = []
    for function in (model, traced):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        grads.append(torch.autograd.grad(function(*leaves), leaves, d_out))
    assert all(map(torch.equal, *grads))
    meta = [x.to("meta") for x in (q, k, v)]
    assert sparse(plan, 1.0, None, *meta)[0].shape == q.shape


def test_bad_lists_are_caught():
    plan = random_blocks(RAGGED)
    q, k, v = random_inputs(RAGGED)[:3]
    lists = plan.lists
    outside = plan.layout.num_blocks
    wrong = {
        "lists blocks": replace(lists, key_block=torch.full_like(lists.key_block, outside)),
        "row_start does not fit": replace(lists, row_start=lists.row_start[:-1]),
        "neither box nor masks": replace(lists, num_full=torch.zeros_like(lists.num_full)),
    }
    for message, bad in wrong.items():
        with pytest.raises(ValueError, match=message):
            attend(q, k, v, Plan(plan.grid, plan.layout, bad), backend="cpp")
    with pytest.raises(ValueError, match="holds tokens"):
        attend(q, k, v, with_order(plan, plan.layout.order + 1), backend="cpp")
    with pytest.raises(ValueError, match="key_bias must be of shape"):
        sparse(plan, 1.0, None, q, k, v, torch.zeros(2, 3, RAGGED.num_tokens))


def test_float64_is_left_to_the_torch_engine():
    plan = random_blocks(RAGGED)
    q, k, v = (x.double() for x in random_inputs(RAGGED)[:3])
    with pytest.raises(ValueError, match='float64 on cpu: use backend="torch"'):
        attend(q, k, v, plan, backend="cpp")
    assert torch.equal(attend(q, k, v, plan), attend(q, k, v, plan, backend="torch"))


def test_auto_runs_it():
    plan = random_blocks(RAGGED)
    q, k, v = random_inputs(RAGGED)[:3]
    assert torch.equal(attend(q, k, v, plan), attend(q, k, v, plan, backend="cpp"))


@pytest.fixture
def nothing_loaded(tmp_path, monkeypatch):
    """No library was loaded yet, and the cache is empty."""
    monkeypatch.setenv("VIDATTN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compiler.tempfile, "gettempdir", lambda: str(tmp_path))
    for function in (compiler._load, block_sparse_cpu.missing):
        function.cache_clear()
    yield tmp_path
    for function in (compiler._load, block_sparse_cpu.missing):
        function.cache_clear()


def test_without_a_compiler_auto_says_so_and_uses_torch(nothing_loaded, monkeypatch, caplog):
    monkeypatch.setattr(compiler, "find_compiler", lambda: None)
    plan = random_blocks(RAGGED)
    q, k, v = random_inputs(RAGGED)[:3]
    with caplog.at_level("WARNING", logger="vidattn"):
        assert torch.equal(attend(q, k, v, plan), attend(q, k, v, plan, backend="torch"))
        attend(q, k, v, plan)
    assert len(caplog.records) == 1 and "no C++ compiler" in caplog.text
    with pytest.raises(ValueError, match='no C\\+\\+ compiler.*use backend="torch"'):
        attend(q, k, v, plan, backend="cpp")


def test_importing_compiles_nothing(tmp_path):
    code = "import vidattn, vidattn.kernels.engines.block_sparse_cpu"
    env = os.environ | {"VIDATTN_CACHE": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=120)
    assert not (tmp_path / "cache").exists()


def test_a_plan_that_was_used_serves_as_a_copy_and_where_its_memory_moved():
    grid = Grid(2, 5, 7)
    q = torch.randn(1, 2, grid.num_tokens, 16)
    plan = vidattn.plan("topk", grid, q[:, :1], q[:, :1], density=0.5)
    expected = attend(q, q, q, plan, backend="cpp")
    copied, pickled = copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))
    before = plan.lists.key_block.data_ptr()
    plan.lists.key_block.share_memory_()
    assert plan.lists.key_block.data_ptr() != before
    for other in (plan, copied, pickled):
        assert torch.equal(attend(q, q, q, other, backend="cpp"), expected)
    del plan
    _, numbers = block_sparse_cpu._fields_of(copied.lists)
    assert all(type(x) is int and x < 10**6 for x in numbers.values())  # no address
