"""Plans and attention come out the same whatever the state of the process they are made in."""

from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from tests.planning.content_cases import coherent
from vidattn.attention import attend
from vidattn.catalog import describe
from vidattn.grid import Grid
from vidattn.methods import create_method, list_methods
from vidattn.planning.calibration import Calibrator
from vidattn.planning.reading import Reading

GRID = Grid(3, 4, 6, text=5)


@contextmanager
def restored(change, value, before):
    change(value)
    try:
        yield
    finally:
        change(before)


STATES = {
    "autocast to float16": lambda: torch.autocast("cpu", torch.float16),
    "default float64": lambda: restored(torch.set_default_dtype, torch.float64, torch.float32),
    "default float16": lambda: restored(torch.set_default_dtype, torch.float16, torch.float32),
    "default device": lambda: torch.device("meta"),
    "inference": torch.inference_mode,
    "deterministic": lambda: restored(torch.use_deterministic_algorithms, True, False),
    "other threads": lambda: restored(
        torch.set_num_threads, torch.get_num_threads() + 1, torch.get_num_threads()
    ),
}


def made(name, q, k):
    method = create_method(name)
    if "rectify" in describe(name).options:
        method = create_method(name, rectify=True)
    return method.plan_with_memory(GRID, Reading(q, k))


def tensors_of(plan, memory):
    yield from memory
    for part, samples, heads in plan.parts():
        yield from (part.layout.order, part.lists.row_start, part.lists.key_block)
        yield from (x for x in (part.gain, part.rest, samples, heads) if isinstance(x, Tensor))


@pytest.mark.parametrize("state", sorted(STATES.keys() - {"deterministic", "other threads"}))
@pytest.mark.parametrize("name", list_methods())
def test_plans_depend_on_no_state(name, state):
    q, k, v = coherent(GRID)
    expected = made(name, q, k)
    with STATES[state]():
        plan, memory = made(name, q, k)
    for ours, right in zip(tensors_of(plan, memory), tensors_of(*expected), strict=True):
        assert ours.dtype == right.dtype and ours.device == right.device
        torch.testing.assert_close(ours, right)
    # of use in training, however they were made
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = attend(q, k, v, plan, backend="torch")
    (grad,) = torch.autograd.grad(out.sum(), v)
    assert grad.isfinite().all()


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("state", [x for x in STATES if "autocast" not in x])
def test_attention_depends_on_no_state(state, backend):
    q, k, v = coherent(GRID)
    plan, _ = made("topk", q, k)
    expected = attend(q, k, v, plan, backend=backend, return_lse=True)
    with STATES[state]():
        found = attend(q, k, v, made("topk", q, k)[0], backend=backend, return_lse=True)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_what_attention_finds_out_in_inference_mode_serves_in_training(backend):
    q, k, v = coherent(GRID)
    plans = [made(name, q, k)[0] for name in ("topk", "strided", "neighborhood", "cluster")]
    with torch.inference_mode():
        for plan in plans:
            attend(q, k, v, plan, backend=backend)
    for plan in plans:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        attend(*leaves, plan, backend=backend).sum().backward()
        assert all(x.grad.isfinite().all() for x in leaves)


@pytest.mark.parametrize("name", ["dense", "neighborhood"])
def test_autocast_casts_as_pytorchs_attention_does(name):
    q, k, v = coherent(GRID)
    plan = create_method(name).plan(GRID)
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(q, k.bfloat16(), v, plan)
    assert out.dtype == torch.bfloat16
    expected = attend(*(x.bfloat16() for x in (q, k, v)), plan)
    assert torch.equal(out, expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert attend(*(x.double() for x in (q, k, v)), plan).dtype == torch.float64


def test_calibration_depends_on_no_state():
    q, k, _ = coherent(GRID)
    found = []
    for state in (torch.no_grad, *(STATES[x] for x in ("autocast to float16", "default float16"))):
        calibrator = Calibrator("x", 1, 0.4, 1, 16)
        with state():
            calibrator.add(0, 0, GRID, q, k, scale=0.3)
        found.append(calibrator.finish())
    for other in found[1:]:
        assert torch.equal(other.orders, found[0].orders)
        assert torch.equal(other.masks, found[0].masks)
