"""The Triton kernels in low precision agree with their PyTorch twin, in Triton's interpreter."""

import pytest
import torch

import vidattn
from tests.kernels.attention_cases import TOLERANCE, random_inputs, relative_rms, striped
from tests.kernels.triton_interpreter import interpreted  # noqa: F401
from vidattn.attention import attend
from vidattn.grid import Grid, tile_layout
from vidattn.kernels import library, quantise
from vidattn.kernels.engines import block_segments, quantised_triton
from vidattn.kernels.triton.configs import ARCHITECTURES, Tile, tile
from vidattn.plan import Plan

pytestmark = pytest.mark.usefixtures("interpreted")
GRID = Grid(3, 5, 4, text=5)
TILE = (2, 4, 4)


def blocks(grid=GRID, edges=TILE):
    """Random blocks for every sample and head; one query block reads nothing of the video."""
    layout = tile_layout(grid, edges)
    nv = layout.num_video_blocks
    chosen = torch.rand(1, 2, nv, nv) < 0.5
    chosen[:, :, nv // 2] = False
    return Plan.from_blocks(grid, layout, chosen)


def window(grid=GRID, edges=TILE):
    return vidattn.plan("neighborhood", grid, window=(2, 3, 5), tile=edges)


def rule(grid=GRID, edges=TILE):
    return Plan.from_rule(grid, tile_layout(grid, edges), striped)


@pytest.fixture
def exact(monkeypatch):
    """Values and outputs that are not rounded to 16 bits, to see what the integers do."""
    monkeypatch.setattr(quantised_triton, "DTYPES", (torch.float32,))


def both(plan, *, dtype=torch.float32, batch=1, key_heads=1, key_mask=None):
    """Outputs and log-sum-exps of the two engines."""
    sizes = {"batch": batch, "heads": 2, "key_heads": key_heads, "head_dim": 24}
    q, k, v, *_ = random_inputs(plan.grid, **sizes)
    k = k + 3 * torch.randn(k.shape[:2] + (1, 24))
    q, k, v = (x.to(dtype) for x in (q, k, v))
    options = {"scale": 0.3, "key_mask": key_mask, "return_lse": True}
    return [attend(q, k, v, plan, backend=name, **options) for name in ("triton", "torch")]


def assert_equal(plan, **options):
    (out, lse), (expected, expected_lse) = both(plan, **options)
    # a weight half way between two integers may go either way
    limit = {"int8_qk": 1e-5, "int8": 5e-4}[plan.precision]
    assert relative_rms(out, expected) < max(limit, TOLERANCE[out.dtype])
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("precision", ["int8_qk", "int8"])
@pytest.mark.parametrize("make", [blocks, window, rule])
def test_every_kind_of_plan(make, precision):
    assert_equal(make().with_precision(precision))


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("precision", ["int8_qk", "int8"])
def test_padded_keys_and_blocks_of_several_tiles(precision, monkeypatch):
    small = Tile(rows=16, columns=32, warps=1, stages=1)
    monkeypatch.setattr(quantised_triton, "tile", lambda *_, **__: small)
    grid = Grid(2, 5, 3, text=13)
    key_mask = torch.ones(2, grid.num_tokens, dtype=torch.bool)
    key_mask[1, -9:] = False
    # blocks of 80 slots are padded to 96
    plan = window(grid, (2, 5, 8)).with_precision(precision)
    assert_equal(plan, key_mask=key_mask, batch=2, key_heads=2)


@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.float16, "int8"), (torch.bfloat16, "int8_qk")]
)
def test_half_precision(dtype, precision):
    assert_equal(window().with_precision(precision), dtype=dtype)


def assert_same_integers(codes, expected):
    """Padded with zeros; a number half way between two may go either way."""
    assert not codes[..., 24:].any()
    difference = (codes[..., :24].int() - expected.int()).abs()
    assert difference.max() <= 1 and difference.sum() <= 1e-3 * difference.numel(), difference.sum()


def test_integers_are_those_of_the_twin():
    plan = window()
    rows = block_segments.segments(plan.lists, smallest_tile=32)
    x = torch.randn(2, 2, GRID.num_tokens, 24).half()
    mean = x.mean(2, dtype=torch.float32)
    for shared, along in ((mean, None), (mean[:, :1].contiguous(), torch.empty(x.shape[:3]))):
        codes, scales = quantised_triton._in_blocks(x, rows, shared, along)
        subtracted = shared if along is None else None
        expected = quantise.quantise_blocks(x, rows.order, rows.block, subtracted)
        assert_same_integers(codes, expected[0])
        torch.testing.assert_close(scales, expected[1])
    torch.testing.assert_close(along, (x.float() * shared[:, :, None]).sum(-1))
    codes, scales = quantised_triton._in_channels(x, rows)
    expected = quantise.quantise_channels(x, rows.order)
    assert_same_integers(codes.mT, expected[0])
    torch.testing.assert_close(scales, expected[1])


@pytest.mark.parametrize("block", [16, 24, 64, 96, 100, 128, 250])
def test_one_tile_of_keys_shares_a_scale_on_every_gpu(block):
    even = block_segments.even_block(block, quantise.SMALLEST_TILE)
    for arch in ARCHITECTURES:
        for head_dim in (16, 64, 128, 200):
            shipped = tile("int8", arch, 2, head_dim, even)
            assert shipped.columns == quantise.keys_together(block)


def test_operator_keeps_its_promises():
    plan = window().with_precision("int8")
    q, k, v = (x.half() for x in random_inputs(GRID, heads=2, key_heads=1)[:3])
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    given = (q, k, v, *library.flatten(plan.lists), 0.25, None, "int8")
    torch.library.opcheck(
        torch.ops.vidattn.quantised_triton, given, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize(
    ("dtype", "precision", "message"),
    [
        (torch.float32, "int8", "take float16 and bfloat16, got torch.float32"),
        (torch.float16, "int8_qk_int4_pv", "have no precision 'int8_qk_int4_pv'"),
        (torch.float64, "int8", "take float16, bfloat16 and float32, got torch.float64"),
    ],
)
def test_what_it_cannot_do_is_an_error(dtype, precision, message):
    q, k, v = (x.to(dtype) for x in random_inputs(GRID)[:3])
    with pytest.raises(ValueError, match=message + '.*use backend="torch"'):
        attend(q, k, v, window().with_precision(precision), backend="triton")
