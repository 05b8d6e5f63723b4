"""Dense attention takes cuDNN's kernel where that is the faster one and nobody chose another."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import vidattn
from tests.kernels.attention_cases import random_inputs
from vidattn.attention import attend
from vidattn.grid import Grid
from vidattn.kernels.engines import dense

GRID = Grid(2, 3, 4)
USUAL = torch._C._get_sdp_priority_order()


@pytest.fixture
def seen(monkeypatch):
    """The order of kernels that each call of PyTorch's attention finds, as on a Hopper GPU."""
    orders, attention = [], F.scaled_dot_product_attention

    def record(*args, **kwargs):
        orders.append([SDPBackend(x) for x in torch._C._get_sdp_priority_order()])
        return attention(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    monkeypatch.setattr(dense, "_is_on_hopper", lambda q: q.dtype == torch.bfloat16)
    return orders


def inputs(dtype=torch.bfloat16):
    return [x.to(dtype) for x in random_inputs(GRID)[:3]]


def test_on_hopper_a_dense_plan_runs_on_cudnn(seen):
    q, k, v = inputs()
    expected = F.scaled_dot_product_attention(q, k, v)
    assert torch.equal(attend(q, k, v, vidattn.plan("dense", GRID)), expected)
    usual, first = seen
    assert usual[0] != SDPBackend.CUDNN_ATTENTION
    # the others stay, for what cuDNN cannot do
    assert first[0] == SDPBackend.CUDNN_ATTENTION and set(first) == set(usual)
    assert torch._C._get_sdp_priority_order() == USUAL


@pytest.mark.parametrize(
    "chosen",
    [
        lambda: sdpa_kernel(SDPBackend.MATH),
        lambda: sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], set_priority=True),
        None,
    ],
)
def test_what_the_user_chose_stays(chosen, seen):
    q, k, v = inputs(torch.bfloat16 if chosen else torch.float32)
    with chosen() if chosen else nullcontext():
        order = torch._C._get_sdp_priority_order()
        attend(q, k, v, vidattn.plan("dense", GRID))
    assert [int(x) for x in seen[0]] == order and order[0] != int(SDPBackend.CUDNN_ATTENTION)


def test_a_mask_leaves_the_choice_to_pytorch(seen):
    q, k, v = inputs()
    key_mask = torch.ones(q.shape[0], GRID.num_tokens, dtype=torch.bool)
    attend(q, k, v, vidattn.plan("dense", GRID), key_mask=key_mask)
    assert seen[0][0] != SDPBackend.CUDNN_ATTENTION


@pytest.mark.parametrize(
    ("capability", "wanted"), [((9, 0), True), ((8, 0), False), ((10, 0), False)]
)
def test_hopper_is_told_by_its_capability(capability, wanted, monkeypatch):
    class OnGpu:
        dtype, is_cuda, device = torch.float16, True, torch.device("cuda", 1)

    def capability_of(device):
        assert device == OnGpu.device
        return capability

    monkeypatch.setattr(torch.cuda, "get_device_capability", capability_of)
    assert dense._is_on_hopper(OnGpu()) == wanted
