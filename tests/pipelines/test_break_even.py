"""Above which density dense attention is faster, from the name of the GPU or a measurement."""

import pytest
import torch

from vidattn.pipelines.break_even import break_even, on_cpu, on_gpu
from vidattn.simulation import gpus


@pytest.fixture(autouse=True)
def forget():
    """What is known of the GPUs of other tests."""
    on_gpu.cache_clear()
    yield
    on_gpu.cache_clear()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", 0.88),
        ("NVIDIA H100 80GB HBM3", 0.70),
        ("NVIDIA B200", 0.37),
        ("NVIDIA GeForce RTX 9999", float("inf")),
    ],
)
def test_the_gpu_decides(name, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert on_gpu(torch.device("cuda", 0)) == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize(
    ("speed", "expected"), [(0.4, 0.4), (1.0, float("inf")), (2.0, float("inf")), (0, float("inf"))]
)
def test_a_cpu_is_measured(speed, expected):
    """Where ours loses at everything, it wins at less than that share of it."""
    assert on_cpu(speed) == expected


def test_nothing_is_known_of_short_calls_and_of_other_devices():
    q = torch.randn(1, 2, 32, 16)
    assert break_even(q, q, q) == break_even(*[q.to("meta")] * 3) == float("inf")


def test_every_known_gpu_is_found_by_the_name_of_its_device():
    for name in gpus.list_gpus():
        device = gpus.find_gpu(name).device
        assert gpus.find_gpu(device).name == name
