"""The Triton kernel of block masses agrees with its PyTorch twin, in Triton's interpreter."""

import math

import pytest
import torch

from tests.kernels.attention_cases import TOLERANCE, random_inputs, relative_rms
from tests.kernels.triton_interpreter import interpreted  # noqa: F401
from vidattn.grid import Grid, tile_layout
from vidattn.kernels.scoring import block_mass_triton
from vidattn.kernels.scoring.block_mass import block_mass, dense_mass

pytestmark = pytest.mark.usefixtures("interpreted")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [16, 32])
@pytest.mark.parametrize("padded", [False, True])
def test_it_sums_the_weights_of_every_pair(dtype, rows, padded, monkeypatch):
    small = block_mass_triton.Tile(rows=rows, columns=48 - rows, warps=1, stages=1)
    monkeypatch.setattr(block_mass_triton, "tile", lambda *_: small)
    grid = Grid(2, 5, 3, text=3)
    layout = tile_layout(grid, (2, 4, 4))
    q, k, *_ = random_inputs(grid, heads=2, key_heads=1, head_dim=24, dtype=dtype)
    lse = torch.randn(2, 2, grid.num_tokens) + 4
    lse[:, :, 3] = -math.inf if padded else 0.0
    key_mask = torch.rand(2, grid.num_tokens) < 0.7 if padded else None
    given = (layout.order, layout.block)
    options = {"scale": 0.3, "key_mask": key_mask}
    actual = block_mass_triton.block_mass(q, k, lse, *given, **options)
    expected = block_mass(q, k, lse, *given, **options)
    assert relative_rms(actual, expected) < TOLERANCE[torch.float32]


def test_operator_keeps_its_promises():
    grid = Grid(1, 4, 5)
    layout = tile_layout(grid, (1, 4, 4))
    q, k, *_ = random_inputs(grid, batch=1, heads=2, key_heads=1)
    given = (q, k, q[..., 0].contiguous(), layout.order, layout.block, 0.3, None)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.vidattn.block_mass_triton, given, test_utils=tests)


def test_it_finds_the_sums_of_dense_attention(monkeypatch):
    small = block_mass_triton.Tile(rows=16, columns=32, warps=1, stages=1)
    monkeypatch.setattr(block_mass_triton, "tile", lambda *_: small)
    grid = Grid(2, 5, 3, text=3)
    layout = tile_layout(grid, (2, 4, 4))
    q, k, *_ = random_inputs(grid, heads=2, key_heads=1, head_dim=24)
    key_mask = torch.rand(2, grid.num_tokens) < 0.7
    given, options = (q, k, layout.order, layout.block), {"scale": 0.3, "key_mask": key_mask}
    for actual, expected in zip(
        block_mass_triton.dense_mass(*given, **options), dense_mass(*given, **options)
    ):
        assert relative_rms(actual, expected) < TOLERANCE[torch.float32]


def test_meta_tensors_give_shapes():
    q, k, *_ = (x.to("meta") for x in random_inputs(Grid(2, 5, 3)))
    order = torch.arange(32, device="meta", dtype=torch.int32)
    mass = block_mass_triton.block_mass(q, k, q[..., 0], order, 8, scale=0.3)
    assert mass.shape == (2, 4, 4, 4) and mass.is_meta


def test_what_it_cannot_do_is_named():
    q, k, *_ = (x.double() for x in random_inputs(Grid(2, 5, 3)))
    assert "take float16, bfloat16 and float32" in block_mass_triton.obstacle(q, k, scale=0.3)
    assert block_mass_triton.obstacle(q.float(), k.float(), scale=0.3) is None
