"""Above which density dense attention is faster, from the name of the GPU."""

import pytest
import torch

from vidattn.pipelines.break_even import break_even
from vidattn.simulation import gpus


@pytest.fixture(autouse=True)
def forget():
    """What is known of the GPUs of other tests."""
    break_even.cache_clear()
    yield
    break_even.cache_clear()


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
    assert break_even(torch.device("cuda", 0)) == pytest.approx(expected, abs=0.005)


def test_a_cpu_has_none():
    assert break_even(torch.device("cpu")) == float("inf")


def test_every_known_gpu_is_found_by_the_name_of_its_device():
    for name in gpus.list_gpus():
        device = gpus.find_gpu(name).device
        assert gpus.find_gpu(device).name == name
