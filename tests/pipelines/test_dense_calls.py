"""Dense layers, steps and heads run on the faster engine; the method dense stays PyTorch's."""

import pytest
import torch

import vidattn
from tests.kernels.attention_cases import relative_rms
from tests.pipelines.sparse import COGVIDEOX, WAN
from tests.pipelines.tiny import TINY, build
from vidattn.kernels.engines import exact
from vidattn.methods import create_method
from vidattn.schedule import DenseGuard, Rule, Schedule

# one with keys that are padding, and pairs of them
MASKED = "HunyuanVideo15Transformer3DModel"


@pytest.fixture(autouse=True)
def faster(monkeypatch):
    """Ours is the faster engine, also in the shortest calls."""
    monkeypatch.setattr(exact, "LEAST_FLOPS", 0)
    monkeypatch.setattr(exact, "LEAST_TOKENS", 1)
    monkeypatch.setattr(exact, "speed_of", lambda kind: 2.0)


def run(key, model, *method, **options):
    with torch.no_grad(), vidattn.patch(model, *method, **options) as handle:
        return TINY[key].call(model), handle.report()


@pytest.mark.parametrize("key", [WAN, COGVIDEOX, MASKED])
def test_exact_is_dense_up_to_rounding(key):
    model = build(key)
    with torch.no_grad():
        dense = TINY[key].call(model)
    out, report = run(key, model, "exact")
    assert report.num_sparse == 0 and set(report.dense_engines) == {"cpp"}
    assert 0 < relative_rms(out, dense) < 1e-5
    assert ", dense on cpp" in str(report)


@pytest.mark.parametrize("options", [{"method": "dense"}, {"dense_backend": "pytorch"}])
def test_what_is_pytorchs_is_so_to_the_bit(options):
    model = build(WAN)
    with torch.no_grad():
        dense = TINY[WAN].call(model)
    out, report = run(WAN, model, **{"method": "exact"} | options)
    assert torch.equal(out, dense) and set(report.dense_engines) == {"pytorch"}


def test_an_unknown_backend_of_dense_calls_is_named():
    with pytest.raises(ValueError, match="unknown dense_backend 'torch': did you mean 'pytorch'"):
        vidattn.patch(build(WAN), "exact", dense_backend="torch")


def test_guards_and_dense_heads_take_it_beside_sparse_ones():
    model = build(WAN)
    out, report = run(WAN, model, "neighborhood", window=3, dense_layers=1)
    assert [x.dense_engines for x in report.layers] == [{"cpp": 1}, {}]
    plain, told = run(WAN, model, "neighborhood", window=3, dense_layers=1, dense_backend="pytorch")
    assert [x.dense_engines for x in told.layers] == [{"pytorch": 1}, {}]
    assert 0 < relative_rms(out, plain) < 1e-5
    rules = (Rule(create_method("neighborhood", window=3), heads=(1,)),)
    out, report = run(WAN, model, schedule=Schedule(rules, DenseGuard(0)))
    assert report.engines == {"cpp": 2}
    plain, told = run(WAN, model, schedule=Schedule(rules, DenseGuard(0)), dense_backend="pytorch")
    assert told.engines == {"cpp+pytorch": 2}
    assert 0 < relative_rms(out, plain) < 1e-5


@pytest.mark.usefixtures("backend_of_diffusers")
def test_a_backend_of_diffusers_that_was_chosen_stays():
    model = build(WAN)
    model.set_attention_backend("_native_math")
    _, report = run(WAN, model, "exact")
    assert set(report.dense_engines) == {"_native_math"}


def test_gradients_of_dense_calls_are_those_of_dense_attention():
    model, found = build(WAN), []
    for options in ({"method": "dense"}, {"method": "exact"}):
        model.zero_grad()
        with vidattn.patch(model, **options):
            TINY[WAN].call(model).square().sum().backward()
        found.append([x.grad.clone() for x in model.parameters() if x.grad is not None])
    for exactly, plainly in zip(*reversed(found)):
        assert relative_rms(exactly, plainly) < 1e-4
