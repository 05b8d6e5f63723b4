"""Float32 products in oneDNN: exact, and the setting never leaks."""

from concurrent.futures import ThreadPoolExecutor

import torch

from vidattn.kernels.onednn import fast_float32_products

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
