"""Engines: one face, chosen in one place, and another one is added by a file and a name."""

import importlib.util
import inspect
from types import SimpleNamespace

import pytest
import torch

from tests.kernels.attention_cases import random_blocks, random_inputs, relative_rms
from vidattn import attention, engines
from vidattn.attention import attend, engines_of
from vidattn.engines import ENGINES, MASSES, QUANTISED, choose
from vidattn.grid import Grid
from vidattn.kernels.engines import block_sparse_triton, flash

GRID = Grid(2, 7, 5, text=6)


def test_the_engine_is_asked_for_the_device_of_the_tensors(monkeypatch):
    """Not for the GPU that happens to be the current one."""
    asked = []
    monkeypatch.setattr(block_sparse_triton, "missing", lambda x: asked.append(x) or "are not here")
    monkeypatch.setattr(flash, "missing", lambda x: asked.append(x) or "is not here")
    device = torch.device("cuda", 1)
    q = SimpleNamespace(device=device, dtype=torch.float16, shape=(1, 1, 16, 64))
    lists, options = SimpleNamespace(block=16), {"scale": 1.0, "key_mask": None}
    plain = options | {"need_lse": True, "gain": None, "shift": None}
    rounded = options | {"precision": "int8"}
    assert choose("attention", ENGINES, (q, q, q, lists), plain) == "flex"
    assert choose("rounded", QUANTISED, (q, q, q, lists), rounded) == "torch"
    assert choose("masses", MASSES, (q, q), options) == "torch"
    assert asked == [device] * 4


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_what_was_chosen_is_told_once(backend, caplog):
    q, k, v = random_inputs(GRID)[:3]
    plan = random_blocks(GRID)
    (engine,) = engines_of(q, k, v, plan)
    engines._told.cache_clear()
    with caplog.at_level("INFO", logger="vidattn"):
        for _ in range(2):
            attend(q, k, v, plan, backend=backend)
    told = [record.message for record in caplog.records if "runs on" in record.message]
    expected = [f"attention in torch.float32 on cpu runs on the {engine!r} engine"]
    assert told == (expected if backend == "auto" else [])


@pytest.mark.parametrize("table", [ENGINES, QUANTISED], ids=["attention", "rounded"])
def test_engines_have_one_face(table):
    for engine in table.values():
        taken = inspect.signature(engine.attention).parameters.values()
        assert set(engine.TAKES) <= {x.name for x in taken if x.kind is x.KEYWORD_ONLY}, engine
        told = inspect.signature(engine.obstacle).parameters.values()
        assert any(x.kind is x.VAR_KEYWORD for x in told), engine


ENGINE = """
from vidattn.kernels.engines import block_sparse_torch

TAKES = ("scale", "key_mask")


def attention(q, k, v, lists, *, scale, key_mask=None):
    return block_sparse_torch.attention(q, k, v, lists, scale=scale, key_mask=key_mask)


def obstacle(q, *others, **options):
    return 'one head only: use backend="torch"' if q.shape[1] > 1 else None
"""


def test_an_engine_is_a_file_and_a_name(tmp_path, monkeypatch):
    """What kernels/README.md says."""
    (tmp_path / "mine.py").write_text(ENGINE)
    spec = importlib.util.spec_from_file_location("mine", tmp_path / "mine.py")
    mine = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mine)
    monkeypatch.setitem(ENGINES, "mine", mine)
    monkeypatch.setattr(attention, "BACKENDS", ("auto", *ENGINES))
    monkeypatch.setattr(engines, "ON_CPU", ("mine", *engines.ON_CPU))
    q, k, v = (x[:, :1] for x in random_inputs(GRID)[:3])
    plan = random_blocks(GRID, heads=1)
    assert engines_of(q, k, v, plan) == ("mine",)
    expected = attend(q, k, v, plan, backend="reference")
    for backend in ("auto", "mine"):
        assert relative_rms(attend(q, k, v, plan, backend=backend), expected) < 1e-5
    many, plan = random_inputs(GRID)[:3], random_blocks(GRID)
    assert "mine" not in engines_of(*many, plan)
    with pytest.raises(ValueError, match="one head only"):
        attend(*many, plan, backend="mine")
