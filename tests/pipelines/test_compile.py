"""torch.compile before and after patching, of the whole transformer and of its blocks."""

import diffusers
import pytest
import torch
from torch._dynamo.testing import CompileCounter

import vidattn
from tests.pipelines.tiny import TINY, build
from tests.pipelines.tiny_inputs import latents

WAN = TINY["WanTransformer3DModel"]
OPTIONS = {"window": 3, "dense_layers": 1}


def wan(num_layers):
    """Ten layers are more than Dynamo allows recompilations."""
    torch.manual_seed(0)
    config = {**WAN.config, "num_layers": num_layers}
    return diffusers.WanTransformer3DModel(**config).eval()


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compile_how(how, model, counter):
    options = {"backend": counter, "fullgraph": True}
    if how == "blocks":
        model.compile_repeated_blocks(**options)
    elif how == "in place":
        model.compile(**options)
    else:
        return torch.compile(model, **options)
    return model


@pytest.mark.parametrize(
    ("how", "when"),
    [
        ("blocks", "before"),
        pytest.param("blocks", "after", marks=pytest.mark.slow),
        pytest.param("in place", "before", marks=pytest.mark.slow),
        pytest.param("in place", "after", marks=pytest.mark.slow),
        pytest.param("wrapped", "before", marks=pytest.mark.slow),
        ("wrapped", "after"),
    ],
)
@torch.no_grad()
def test_compiled_is_eager(how, when):
    # the whole transformer is one graph, its blocks share one
    num_layers = 10 if how == "blocks" else 2
    model = wan(num_layers)
    dense = WAN.call(model)
    with vidattn.patch(model, "neighborhood", **OPTIONS):
        sparse = WAN.call(model)
    counter = CompileCounter()
    compiled = model
    if when == "before":
        compiled = compile_how(how, model, counter)
        torch.testing.assert_close(WAN.call(compiled), dense)
    handle = vidattn.patch(compiled, "neighborhood", **OPTIONS)
    if when == "after":
        compiled = compile_how(how, model, counter)
    before = counter.frame_count
    for _ in range(2):
        torch.testing.assert_close(WAN.call(compiled), sparse)
    # one graph, and two more where the hooks of the transformer are compiled too
    assert counter.frame_count - before <= (1 if how == "blocks" else 3)
    report = handle.report()
    assert report.num_passes == 2
    assert report.num_sparse == 2 * (num_layers - 1) and report.num_dense == 2
    assert report.layers[0].num_dense == {"layer guard": 2}
    vidattn.unpatch(compiled)
    torch.testing.assert_close(WAN.call(compiled), dense)


@pytest.mark.parametrize("how", ["blocks", pytest.param("in place", marks=pytest.mark.slow)])
@torch.no_grad()
def test_a_new_resolution_and_a_new_step(how):
    model = wan(2)
    calls = [
        {"timestep": torch.full((2,), 900.0)},
        {"timestep": torch.full((2,), 500.0)},
        {"hidden_states": latents(4, 5, 9, 8), "timestep": torch.full((2,), 300.0)},
    ]
    options = {"window": 3, "dense_layers": 0, "dense_steps": 1}
    with vidattn.patch(model, "neighborhood", **options) as handle:
        expected = [WAN.call(model, **call) for call in calls]
        eager = handle.report()
    compile_how(how, model, "eager")
    with vidattn.patch(model, "neighborhood", **options) as handle:
        for call, out in zip(calls, expected):
            torch.testing.assert_close(WAN.call(model, **call), out)
        compiled = handle.report()
    assert compiled.grids == eager.grids and len(compiled.grids) == 2
    assert compiled.num_steps == 3
    for one, other in zip(compiled.layers, eager.layers):
        assert (one.num_sparse, one.num_dense) == (other.num_sparse, other.num_dense)
        assert (one.num_sparse, one.num_dense) == (2, {"step guard": 1})


@pytest.mark.parametrize(
    "key",
    [
        "HunyuanVideo15Transformer3DModel",
        pytest.param("HunyuanVideoTransformer3DModel", marks=pytest.mark.slow),
        pytest.param("LTX2VideoTransformer3DModel", marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_blocks_of_joint_models(key):
    model = build(key)
    with vidattn.patch(model, "neighborhood", window=3, dense_layers=0) as handle:
        expected = TINY[key].call(model)
        calls = handle.report().num_sparse
    model.compile_repeated_blocks(backend="eager", fullgraph=True)
    with vidattn.patch(model, "neighborhood", window=3, dense_layers=0) as handle:
        torch.testing.assert_close(TINY[key].call(model), expected)
        assert handle.report().num_sparse == calls


def test_training():
    model = build("WanTransformer3DModel")
    case = TINY["WanTransformer3DModel"]

    def gradients():
        model.zero_grad()
        case.call(model).square().mean().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    with vidattn.patch(model, "neighborhood", window=3, dense_layers=0):
        eager = gradients()
        model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
        compiled = gradients()
    for one, other in zip(compiled, eager):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_inductor():
    model = wan(2)
    dense = WAN.call(model)
    with vidattn.patch(model, "neighborhood", **OPTIONS):
        sparse = WAN.call(model)
    model.compile_repeated_blocks(fullgraph=True)
    with vidattn.patch(model, "neighborhood", **OPTIONS):
        torch.testing.assert_close(WAN.call(model), sparse, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(WAN.call(model), dense, atol=1e-5, rtol=1e-4)
