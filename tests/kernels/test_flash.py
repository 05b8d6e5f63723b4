"""FlashAttention-4 through FlexAttention: when it is chosen, and what it says if it cannot run."""

import pytest
import torch

import vidattn
from tests.kernels.attention_cases import random_inputs
from vidattn import engines
from vidattn.attention import attend
from vidattn.grid import Grid
from vidattn.kernels.engines import block_sparse_triton, flash, flex

GRID = Grid(2, 8, 16)
PLAN = vidattn.plan("neighborhood", GRID, window=(1, 5, 5), tile=(1, 8, 16))


@pytest.fixture
def hopper(monkeypatch):
    """A GPU on which FlashAttention-4 is installed, as far as this engine can see."""
    monkeypatch.setattr(flash, "missing", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    flash._measures_faster.cache_clear()
    monkeypatch.setattr(flash, "TIMED_BLOCKS", 2)
    yield
    flash._measures_faster.cache_clear()


def fakes(monkeypatch, *, flash_ms=1.0, wrong=0.0):
    """Engines that give the same, or not, and the times they are said to take."""
    calls = []

    def run(name, difference=0.0):
        def attend(q, *_, **__):
            calls.append(name)
            return q + difference, None

        return attend

    monkeypatch.setattr(flash, "attention", run("flash", wrong))
    monkeypatch.setattr(block_sparse_triton, "attention", run("triton"))
    monkeypatch.setattr(block_sparse_triton, "missing", lambda device: None)
    monkeypatch.setattr(engines, "ON_CPU", engines.ON_OTHERS)
    times = {"flash": flash_ms, "triton": 2.0}
    monkeypatch.setattr(flash, "interleaved_ms", lambda functions, device: times)
    return calls


def given(**options):
    return random_inputs(GRID, head_dim=64, dtype=torch.float16, **options)[:3]


@pytest.mark.parametrize(
    ("options", "expected"), [({}, True), ({"flash_ms": 3.0}, False), ({"wrong": 1.0}, False)]
)
def test_it_is_chosen_where_it_is_faster_and_right(options, expected, hopper, monkeypatch):
    calls = fakes(monkeypatch, **options)
    for _ in range(2):
        attend(*given(), PLAN)
    chosen = "flash" if expected else "triton"
    # timed once, then only what was chosen
    assert calls == ["flash", "triton", chosen, chosen]


def test_an_engine_that_fails_is_not_chosen(hopper, monkeypatch, caplog):
    fakes(monkeypatch)
    monkeypatch.setattr(flash, "attention", lambda *_, **__: 1 / 0)
    assert not flash.is_faster(*given(), PLAN.lists, scale=1.0)
    assert "is left out: division by zero" in caplog.text


def test_what_it_does_worse_is_left_to_triton(hopper, monkeypatch):
    calls = fakes(monkeypatch)
    q, k, v = given()
    key_mask = torch.ones(2, GRID.num_tokens, dtype=torch.bool)
    attend(q, k, v, PLAN, key_mask=key_mask)
    attend(q.clone().requires_grad_(), k, v, PLAN)
    attend(q.float(), k.float(), v.float(), PLAN)
    assert calls == ["triton"] * 3


def test_it_asks_flexattention_for_its_kernels(hopper, monkeypatch):
    asked = []
    monkeypatch.setattr(flex, "attention", lambda q, *_, **options: (q, asked.append(options)))
    attend(*given(), PLAN, backend="flash")
    assert asked[0]["kernel_options"] == {"BACKEND": "FLASH"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x, 'needs an NVIDIA GPU, the tensors are on cpu: use backend="triton" or'),
        (lambda x: x.float(), "takes float16 and bfloat16, got torch.float32"),
        (lambda x: x[..., :40], "takes head dims 64 and 128, got 40"),
    ],
)
def test_what_it_cannot_do_is_an_error(change, message):
    with pytest.raises(ValueError, match=message):
        attend(*map(change, given()), PLAN, backend="flash")


@pytest.mark.parametrize(
    ("capability", "block", "fits"),
    [((9, 0), 64, True), ((9, 0), 256, False), ((10, 0), 64, False), ((10, 3), 256, True)],
)
def test_blocks_that_it_has_no_tiles_for_are_an_error(capability, block, fits, hopper, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    wrong = flash._unfit_block(torch.device("cuda"), block)
    assert (wrong is None) == fits
    if not fits:
        assert f"on this GPU, got {block}" in wrong


@pytest.mark.parametrize(
    ("capability", "installed", "message"),
    [((8, 0), True, "this GPU has 8.0"), ((9, 0), False, "flash-attn-4, which is not installed")],
)
def test_what_is_missing_is_named(capability, installed, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(flash, "_is_installed", lambda: installed)
    flash.missing.cache_clear()
    assert message in flash.missing("cuda")
    flash.missing.cache_clear()


def test_random_lists_hold_what_is_timed():
    for has_box in (False, True):
        lists = flash._random_lists(128, has_box)
        assert lists.num_rows == flash.TIMED_BLOCKS and (lists.box is not None) == has_box
        assert bool(lists.is_partial.any()) == has_box and not lists.is_partial.all()
        assert 0 < lists.key_block.numel() < flash.TIMED_BLOCKS**2 / 2
