"""The Triton engine is float64 masked attention, forward and backward, in Triton's interpreter."""

import math

import pytest
import torch
from torch import Tensor

import vidattn
from tests.kernels import other_keys_cases
from tests.kernels.attention_cases import (
    TOLERANCE,
    assert_right,
    random_inputs,
    relative_rms,
    results,
    striped,
)
from tests.kernels.triton_interpreter import interpreted  # noqa: F401
from tests.waits import Waits
from vidattn.attention import attend
from vidattn.grid import Grid, tile_layout
from vidattn.kernels import library
from vidattn.kernels.engines import block_segments, block_sparse_triton
from vidattn.plan import Plan

pytestmark = pytest.mark.usefixtures("interpreted")
GRID = Grid(3, 7, 4, text=5)
TILE = (2, 4, 4)


def blocks(grid=GRID, *, batch=1, heads=2, tile=TILE):
    """Random blocks for every sample and head; one query block reads nothing of the video."""
    layout = tile_layout(grid, tile)
    nv = layout.num_video_blocks
    chosen = torch.rand(batch, heads, nv, nv) < 0.5
    chosen[:, :, nv // 2] = False
    return Plan.from_blocks(grid, layout, chosen)


def window(grid=GRID, *, tile=TILE):
    return vidattn.plan("neighborhood", grid, window=(2, 3, 5), tile=tile)


def rule(grid=GRID, *, tile=TILE):
    return Plan.from_rule(grid, tile_layout(grid, tile), striped)


def inputs(grid=GRID, *, batch=1, heads=2, key_heads=1, **options):
    return random_inputs(grid, batch=batch, heads=heads, key_heads=key_heads, **options)


def run(plan, q, k, v, **options):
    """The engine itself, for what attend does not offer."""
    options = {"scale": 0.3} | options
    return block_sparse_triton.attention(q, k, v, plan.lists, **options)


@pytest.mark.parametrize("make", [blocks, window, rule])
def test_every_kind_of_plan(make):
    assert_right(inputs(), make(), "triton")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype):
    assert_right(inputs(key_heads=2, dtype=dtype), window(), "triton")


@pytest.mark.parametrize("shared", ["batch", "heads", "neither"])
def test_plans_of_samples_and_heads(shared):
    grid = Grid(1, 7, 5)
    batch, heads = (1 if shared == name else 2 for name in ("batch", "heads"))
    plan = blocks(grid, batch=batch, heads=heads, tile=(1, 4, 4))
    assert_right(inputs(grid, batch=2, key_heads=2), plan, "triton")


@pytest.mark.parametrize("make", [blocks, window])
def test_padded_keys(make):
    grid = Grid(2, 5, 3, text=13)
    key_mask = torch.ones(2, grid.num_tokens, dtype=torch.bool)
    key_mask[1, -9:] = False
    assert_right(inputs(grid, batch=2), make(grid), "triton", key_mask=key_mask)


@pytest.mark.parametrize(
    ("make", "tile", "head_dim"), [(window, (1, 3, 3), 24), (rule, (3, 3, 2), 80)]
)
def test_blocks_and_head_dims_that_are_no_power_of_two(make, tile, head_dim):
    grid = Grid(3, 4, 5)
    assert_right(inputs(grid, heads=1, head_dim=head_dim), make(grid, tile=tile), "triton")


@pytest.mark.parametrize("make", [window, rule])
def test_blocks_of_several_tiles(make, monkeypatch):
    small = block_sparse_triton.Tile(rows=16, columns=16, warps=1, stages=1)
    monkeypatch.setattr(block_sparse_triton, "tile", lambda *_, **__: small)
    grid = Grid(3, 3, 4, text=3)
    assert_right(inputs(grid, heads=1), make(grid, tile=(4, 4, 2)), "triton")


def test_any_strides():
    q, k, v, d_out, d_lse = inputs(key_heads=2)
    q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    v, d_out = torch.cat([v, v], -1)[..., :32], d_out.mT.contiguous().mT
    plan, strided = blocks(), (q, k, v, d_out, d_lse)
    for actual, expected in zip(results(strided, plan, "triton"), results(strided, plan, "torch")):
        assert relative_rms(actual, expected) < TOLERANCE[torch.float32]


def test_key_bias_and_its_gradient():
    plan, grid = window(), GRID
    q, k, v, d_out, d_lse = inputs()
    key_mask = torch.ones(1, grid.num_tokens, dtype=torch.bool)
    key_mask[0, ::7] = False
    for heads in (1, 2):
        bias = torch.randn(1, heads, grid.num_tokens)
        actual = pull(run, plan, (q, k, v, bias), (d_out, d_lse), key_mask)
        exact = [x.double() for x in (q, k, v, bias)]
        expected = pull(biased_reference, plan, exact, (d_out.double(), d_lse), key_mask)
        for a, e in zip(actual, expected):
            assert relative_rms(a, e) < TOLERANCE[torch.float32]


def pull(attention, plan, tensors, pulls, key_mask) -> list[Tensor]:
    """Output, log-sum-exp and the gradients of q, k, v and the bias."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    *qkv, bias = leaves
    out, lse = attention(plan, *qkv, key_bias=bias, key_mask=key_mask)
    total = (out * pulls[0]).sum() + (lse * pulls[1]).sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(total, leaves)]


def biased_reference(plan, q, k, v, *, key_bias, key_mask):
    """Dense attention in float64, with the scale of ``run``."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.mT * 0.3 + key_bias[:, :, None]
    scores = scores.masked_fill(~(plan.mask() & key_mask[:, None, None]), -math.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def test_a_rule_that_hides_nothing():
    grid = Grid(2, 3, 5)
    plan = Plan.from_rule(grid, tile_layout(grid, TILE), lambda q, k: (q - k).abs().sum(-1) >= 0)
    assert len(plan.lists.masks) == 0
    assert_right(inputs(grid), plan, "triton")


def test_a_query_without_keys_spreads_no_nan():
    plan = blocks(Grid(2, 5, 4))
    q, k, v, *_ = inputs(plan.grid)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = attend(*leaves, plan, backend="triton", return_lse=True)
    assert lse.isinf().any()
    total = out.sum() + torch.where(lse.isinf(), math.nan, 0.0).mul(lse).sum()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(total, leaves))


def test_equal_inputs_give_equal_bits():
    plan = window(Grid(2, 3, 5, text=2))
    given = inputs(plan.grid)
    assert all(map(torch.equal, results(given, plan, "triton"), results(given, plan, "triton")))


def test_operator_keeps_its_promises():
    plan = window(Grid(2, 3, 5, text=2))
    leaves = [x.requires_grad_() for x in inputs(plan.grid)[:3]]
    arguments = (*leaves, *library.flatten(plan.lists), 0.25, None, None)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.vidattn.block_sparse_triton, arguments, test_utils=tests)


def test_operator_that_compensates_keeps_its_promises():
    plan = blocks(Grid(1, 4, 5))
    q, k, v, *_ = inputs(plan.grid)
    gain, shift = torch.rand(1, 1, plan.layout.num_blocks), None
    arguments = (q, k, v, gain, shift, *library.flatten(plan.lists), 0.25, None, None)
    operator = torch.ops.vidattn.block_sparse_triton_compensated
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_one_graph_holds_attention_and_its_gradient():
    plan = window(Grid(2, 3, 5, text=2))

    def loss(q, k, v):
        return attend(q.sin(), k, v, plan, backend="triton").square().sum()

    expected = [x.requires_grad_() for x in inputs(plan.grid)[:3]]
    actual = [x.detach().clone().requires_grad_() for x in expected]
    loss(*expected).backward()
    torch.compile(loss, backend="aot_eager", fullgraph=True)(*actual).backward()
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a.grad, b.grad)


def test_a_block_outside_the_layout_is_caught():
    plan = blocks()
    plan.lists.key_block[3] = plan.layout.num_blocks
    with pytest.raises(ValueError, match="lists blocks 0 to 5; 0 to 4 fit its layout"):
        attend(*inputs()[:3], plan, backend="triton")


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda x: x.double(), {}, "take float16, bfloat16 and float32, got torch.float64"),
        (lambda x: x.repeat(1, 1, 1, 9), {}, "head dims up to 256, got 288"),
        (lambda x: x, {"scale": -1.0}, "need a scale above 0, got -1.0"),
    ],
)
def test_what_it_cannot_do_is_an_error(change, options, message):
    tensors = [change(x) for x in inputs()[:3]]
    with pytest.raises(ValueError, match=message + '.*use backend="torch"'):
        attend(*tensors, blocks(), backend="triton", **options)


def test_without_a_gpu_it_says_which_engine_runs(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match='the tensors are on cpu: use backend="torch"'):
        attend(*inputs()[:3], blocks(), backend="triton")


def test_without_triton_it_says_which_engine_runs(monkeypatch):
    monkeypatch.setattr(block_sparse_triton.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match='need Triton, which is not installed: use backend="torch"'
    ):
        attend(*inputs()[:3], blocks(), backend="triton")


def test_meta_tensors_give_shapes():
    plan = window().to("meta")
    q, k, v = (x.to("meta") for x in inputs()[:3])
    out, lse = run(plan, q, k, v)
    assert out.shape == q.shape and out.is_meta
    assert lse.shape == q.shape[:3] and lse.dtype == torch.float32


@pytest.mark.parametrize("block", [1, 16, 18, 27, 60, 64, 96, 100, 112, 128, 250])
def test_blocks_are_padded_to_whole_tiles(block):
    even = block_segments.even_block(block)
    assert even % 16 == 0 and even >= block
    assert even <= max(16, 1.25 * block, 16 * -(-block // 16))


@pytest.mark.parametrize(("block", "slow"), [(80, True), (64, False), (100, False), (24, False)])
def test_blocks_that_run_in_small_tiles_are_told_once(block, slow, caplog):
    block_segments._warn_of_small_tiles.cache_clear()
    plan = vidattn.plan("neighborhood", Grid(1, 1, 3 * block), window=(1, 1, 9), tile=(1, 1, block))
    for transposed in (False, True):
        block_segments.segments(plan.lists, transposed=transposed)
    assert caplog.text.count(f"blocks of {block} tokens run in tiles of 32") == slow


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("parts", ["both", "gain", "shift"])
def test_gain_and_shift_of_query_blocks(parts, heads):
    plan = blocks(heads=1)
    q, k, v, d_out, _ = inputs()
    num_blocks, block = plan.layout.num_blocks, plan.layout.block
    gain = torch.rand(1, heads, num_blocks) if parts != "shift" else None
    shift = torch.randn(1, heads, num_blocks, 32) if parts != "gain" else None
    plain = results((q, k, v, d_out, d_out[..., 0]), plan, "reference")[0]
    expected = torch.zeros_like(plain)
    for token, slot in enumerate(plan.layout.slot_of_token.tolist()):
        factor = 1 if gain is None else gain[:, :, slot // block, None]
        extra = 0 if shift is None else shift[:, :, slot // block]
        expected[:, :, token] = factor * plain[:, :, token] + extra
    options = {"scale": 32**-0.5, "gain": gain, "shift": shift}
    fused, _ = run(plan, q, k, v, **options)
    assert relative_rms(fused, expected) < TOLERANCE[torch.float32]
    pulled, _ = run(plan, q.clone().requires_grad_(), k, v, **options)
    assert relative_rms(pulled, expected) < TOLERANCE[torch.float32] and pulled.requires_grad


SMALL = Grid(1, 5, 4, text=3), Grid(2, 5, 4, text=2, text_first=True)
OTHER_KEYS = {
    "dense": lambda: other_keys_cases.dense(*SMALL),
    "blocks": lambda: other_keys_cases.blocks(*SMALL, batch=1, heads=2),
    "rule": lambda: other_keys_cases.rule(*SMALL),
    "box": lambda: other_keys_cases.box(4, 3),
}


@pytest.mark.parametrize("name", OTHER_KEYS)
def test_other_keys_and_their_weights(name):
    plan = OTHER_KEYS[name]()
    sizes = {"batch": 1, "heads": 2, "key_heads": 2, "head_dim": 16}
    given = random_inputs(plan.grid, plan.key_grid.num_tokens, **sizes)
    key_mask = torch.rand(1, plan.key_grid.num_tokens) < 0.8
    weights = other_keys_cases.weights_of(plan, batch=1)
    assert_right(given, plan, "triton", key_weight=weights, key_mask=key_mask)


@pytest.mark.parametrize("queries", [None, 2])
def test_other_keys_without_empty_slots(queries):
    """Slots are full on one side, so that tiles need no test there."""
    grid, keys = Grid(1, 2, 16), Grid(1, 1, 27)
    if queries is not None:
        grid, keys = keys, grid
    plan = Plan.dense(grid, keys, block=16)
    given = random_inputs(grid, keys.num_tokens, batch=1, heads=2, head_dim=16, key_heads=1)
    assert_right(given, plan, "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_key_may_stand_for_its_equals(dtype):
    sizes = {"queries": 19, "keys": 11, "heads": 2, "key_heads": 1}
    for name, (whole, merged) in other_keys_cases.merging("triton", dtype, **sizes).items():
        assert relative_rms(merged, whole) < 2 * TOLERANCE[dtype], name


def test_new_weights_wait_for_nothing():
    plan = other_keys_cases.blocks()
    q, k, v, *_ = random_inputs(plan.grid, plan.key_grid.num_tokens, key_heads=2)
    q, k, v, weight = (x.to("meta") for x in (q, k, v, other_keys_cases.weights_of(plan)))
    plan = plan.to("meta")
    for _ in range(2):
        with Waits() as waits:
            attend(q, k, v, plan, key_weight=weight, backend="triton")
    assert not waits.count, waits.found
