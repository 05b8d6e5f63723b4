"""Float32 products in oneDNN: exact, with gradients, and the setting never leaks."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from vidattn.kernels.cpp.onednn import fast_float32_products, has_faster_linear, linear

CPU = torch.device("cpu")


def precision():
    return torch.backends.mkldnn.matmul.fp32_precision


def test_products_stay_float32():
    a, b = torch.randn(3, 70, 130), torch.randn(3, 130, 90)
    with fast_float32_products(CPU):
        product = torch.bmm(a, b)
    exact = a.double() @ b.double()
    assert (product - exact).norm() < 1e-6 * exact.norm()


def test_the_setting_comes_back_after_nesting_and_errors():
    before = precision()
    try:
        with fast_float32_products(CPU), fast_float32_products(CPU):
            raise KeyError
    except KeyError:
        pass
    assert precision() == before


def test_the_setting_comes_back_after_many_threads():
    before = precision()

    def work(_):
        for _ in range(50):
            with fast_float32_products(CPU):
                inside = precision()
        return inside

    with ThreadPoolExecutor(8) as pool:
        seen = set(pool.map(work, range(8)))
    assert precision() == before
    assert len(seen) == 1


@pytest.mark.skipif(not has_faster_linear(), reason="needs AVX-512")
@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 5, 7), (0, 7)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_linear_layers_match_float64(shape, has_bias):
    leaves = [torch.randn(size, requires_grad=True) for size in (shape, (11, 7), (11,))]
    leaves = leaves[: 2 + has_bias]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    found, answer = linear(*leaves), F.linear(*exact)
    assert found.shape == answer.shape
    pull = torch.randn(answer.shape)
    # what follows may work in place
    grads = torch.autograd.grad(found.mul_(2), leaves, pull)
    answers = torch.autograd.grad(answer * 2, exact, pull.double())
    for x, y in zip((found, *grads), (answer * 2, *answers), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not has_faster_linear(), reason="needs AVX-512")
def test_linear_layers_of_strided_maps():
    x, weight = torch.randn(2, 5, 6, 8)[:, ::2].transpose(1, 2)[..., 1:], torch.randn(7, 9).mT
    exact = F.linear(x.double(), weight.double())
    torch.testing.assert_close(linear(x, weight).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not has_faster_linear(), reason="needs AVX-512")
def test_frozen_linear_layers_have_no_gradient():
    x, weight = torch.randn(3, 7, requires_grad=True), torch.randn(11, 7)
    out = linear(x, weight)
    (found,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(found, weight.sum(0).expand(3, 7))
    assert not linear(x.detach(), weight).requires_grad
