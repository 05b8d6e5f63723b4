"""How often planning waits for a GPU, counted on a CPU: the work between two waits is in line."""

import pytest
import torch

import vidattn
from tests.waits import Waits
from vidattn.attention import attend
from vidattn.grid import Grid
from vidattn.kernels.engines.block_segments import segments
from vidattn.listing import BLOCKS_AT_ONCE
from vidattn.methods import create_method
from vidattn.planning.reading import Reading

# more rows of lists than are taken together on a CPU
GRID, HEADS = Grid(7, 24, 40), 8


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setitem(BLOCKS_AT_ONCE, "cpu", BLOCKS_AT_ONCE["cuda"])


def prepare(plan):
    """What a Triton kernel needs of a plan beside its tensors."""
    assert not plan.is_dense and 0 < plan.density <= plan.visited_density
    plan.lists.check(plan.grid.num_tokens)
    segments(plan.lists)


def test_a_search_waits_less_than_ten_times():
    q, k = torch.randn(2, 1, HEADS, GRID.num_tokens, 8)
    method = create_method("topk", density=0.3)
    method.plan(GRID, Reading(q, k))
    with Waits() as waits, torch.no_grad():
        plan = method.plan(GRID, Reading(q, k))
        prepare(plan)
    assert 0 < waits.count < 10, waits.found


def test_a_fixed_plan_never_waits_again():
    plan = vidattn.plan("radial", GRID)
    prepare(plan)
    with Waits() as waits:
        prepare(plan)
    assert not waits.count, waits.found


def test_a_plan_of_another_device_is_moved_once():
    plan = vidattn.plan("radial", GRID)
    q, k, v = torch.randn(3, 1, 2, GRID.num_tokens, 16, device="meta")
    attend(q, k, v, plan, backend="triton")
    moved = plan.to("meta")
    with Waits() as waits:
        attend(q, k, v, plan, backend="triton")
    assert not waits.count, waits.found
    assert plan.to("meta") is moved and plan.to("cpu") is plan
    assert moved.layout.to("meta") is moved.layout and moved.lists.to("meta") is moved.lists


def test_a_wait_is_counted():
    x = torch.rand(4)
    with Waits() as waits:
        x[x > 0.5].sum().item()
        x.repeat_interleave(torch.ones(4).long()).to("meta")
    assert waits.count == 4
