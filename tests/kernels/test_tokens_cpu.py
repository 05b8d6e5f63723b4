"""What surrounds attention in a block, beside PyTorch's operators in float64."""

import pytest
import torch
import torch.nn.functional as F

from vidattn.kernels import tokens_cpu
from vidattn.kernels.cpp import compiler
from vidattn.kernels.cpp.processor import SETS, instruction_sets
from vidattn.kernels.tokens_cpu import add_scaled, can_run, gelu, layer_norm, rms_norm

pytestmark = pytest.mark.skipif(compiler.find_compiler() is None, reason="needs a C++ compiler")
# (B, S, C) and D
SHAPES = [(2, 77, 96, 32), (1, 130, 256, 128), (3, 1, 16, 16), (1, 5000, 48, 16)]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=instruction_sets())
def a_set(request, monkeypatch):
    """Every instruction set of this processor in turn; float32 has none with bfloat16 products."""
    flags = SETS[request.param.replace("amx_bf16", "avx512_bf16")]

    def library(dtype):
        plain = dtype == torch.float32 and "bf16" in request.param
        return compiler.load(tokens_cpu.SOURCE, SETS["avx512"] if plain else flags)

    monkeypatch.setattr(tokens_cpu, "_library", library)


def check(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype and found.shape == wanted.shape
    # one rounding of the result, and those of float32 before it
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 4e-6
    least = 1e-6 * wanted.abs().max()
    assert ((found.double() - wanted).abs() <= rounding * wanted.abs() + 4 * least).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norms_with_what_follows(a_set, shape, dtype):
    B, S, C, _ = shape
    torch.manual_seed(0)
    # a mean far from 0 loses nothing
    x = (torch.randn(B, S, C) + 3).to(dtype)
    scales = [torch.randn(B, 1, C), torch.randn(B, S, C), torch.randn(C)]
    plain = F.layer_norm(x.double(), (C,), eps=1e-5)
    for scale in scales:
        shift = torch.randn(B, 6, C)[:, 2:3]
        found = layer_norm(x, scale=scale, shift=shift, plus=1.0, eps=1e-5)
        check(found, plain * (1 + scale.double()) + shift.double(), dtype)
    check(layer_norm(x, eps=1e-5), plain, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norms_with_rotary_embeddings(a_set, shape, dtype):
    B, S, C, D = shape
    torch.manual_seed(0)
    x, weight = torch.randn(B, S, C).to(dtype), torch.randn(C)
    cosine, sine = torch.randn(2, 1, S, 1, D)
    wanted = F.rms_norm(x.double(), (C,), weight.double(), 1e-6)
    check(rms_norm(x, weight, eps=1e-6), wanted, dtype)
    first, second = wanted.unflatten(2, (-1, D // 2, 2)).unbind(-1)
    c, s = cosine[..., 0::2].double(), sine[..., 1::2].double()
    turned = torch.stack([first * c - second * s, first * s + second * c], -1).flatten(2)
    check(rms_norm(x, weight, eps=1e-6, rotary=(cosine, sine)), turned, dtype)
    check(rms_norm(x, eps=1e-6), F.rms_norm(x.double(), (C,), eps=1e-6), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gated_sums_and_gelu(a_set, shape, dtype):
    B, S, C, _ = shape
    torch.manual_seed(0)
    x, y = (3 * torch.randn(2, B, S, C)).to(dtype)
    x[0, 0, :6] = torch.tensor([1e4, -1e4, 60.0, -60.0, 0.0, float("nan")])
    check(gelu(x).nan_to_num(7), F.gelu(x.double(), approximate="tanh").nan_to_num(7), dtype)
    x = x.nan_to_num()
    for scale in (torch.randn(B, 1, C), torch.randn(B, S, C)):
        check(add_scaled(x, y, scale), x.double() + y.double() * scale.double(), dtype)


def test_rows_need_not_lie_side_by_side(a_set):
    wide = torch.randn(2, 9, 64)
    found = gelu(wide[:, ::2, 16:48])
    torch.testing.assert_close(found, gelu(wide)[:, ::2, 16:48])


def test_what_is_served():
    x = torch.zeros(1, 4, 32)
    with torch.no_grad():
        assert can_run(x) and can_run(x.bfloat16())
        others = [x.half(), x.double(), x[0], torch.zeros(1, 4, 24), x.mT, x.to("meta")]
        assert not any(map(can_run, others))
    assert not can_run(x)
