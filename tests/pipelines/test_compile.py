"""torch.compile before and after patching, of the whole transformer and of its blocks."""

import dataclasses

import pytest
import torch
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

import vidattn
from tests.pipelines.tiny import TINY, WAN, build, latents

# more layers than Dynamo allows recompilations
DEEP = dataclasses.replace(TINY["WanTransformer3DModel"], config={**WAN, "num_layers": 10})
OPTIONS = {"window": 3, "dense_layers": 1}


def deep_wan():
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    return WanTransformer3DModel(**DEEP.config).eval()


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


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", ["blocks", "in place", "wrapped"])
@torch.no_grad()
def test_compiled_is_eager(how, when):
    model = deep_wan()
    dense = DEEP.call(model)
    with vidattn.patch(model, "neighborhood", **OPTIONS):
        sparse = DEEP.call(model)
    counter = CompileCounter()
    compiled = model
    if when == "before":
        compiled = compile_how(how, model, counter)
        torch.testing.assert_close(DEEP.call(compiled), dense)
    handle = vidattn.patch(compiled, "neighborhood", **OPTIONS)
    if when == "after":
        compiled = compile_how(how, model, counter)
    before = counter.frame_count
    for _ in range(2):
        torch.testing.assert_close(DEEP.call(compiled), sparse)
    # one graph, and two more where the hooks of the transformer are compiled too
    assert counter.frame_count - before <= (1 if how == "blocks" else 3)
    report = handle.report()
    assert report.num_passes == 2 and report.num_sparse == 18 and report.num_dense == 2
    assert report.layers[0].num_dense == {"layer guard": 2}
    vidattn.unpatch(compiled)
    torch.testing.assert_close(DEEP.call(compiled), dense)


@pytest.mark.parametrize("how", ["blocks", "in place"])
@torch.no_grad()
def test_a_new_resolution_and_a_new_step(how):
    model = deep_wan()
    calls = [
        {"timestep": torch.full((2,), 900.0)},
        {"timestep": torch.full((2,), 500.0)},
        {"hidden_states": latents(4, 5, 9, 8), "timestep": torch.full((2,), 300.0)},
    ]
    options = {"window": 3, "dense_layers": 0, "dense_steps": 1}
    with vidattn.patch(model, "neighborhood", **options) as handle:
        expected = [DEEP.call(model, **call) for call in calls]
        eager = handle.report()
    compile_how(how, model, "eager")
    with vidattn.patch(model, "neighborhood", **options) as handle:
        for call, out in zip(calls, expected):
            torch.testing.assert_close(DEEP.call(model, **call), out)
        compiled = handle.report()
    assert compiled.grids == eager.grids and len(compiled.grids) == 2
    assert compiled.num_steps == 3
    for one, other in zip(compiled.layers, eager.layers):
        assert (one.num_sparse, one.num_dense) == (other.num_sparse, other.num_dense)
        assert (one.num_sparse, one.num_dense) == (2, {"step guard": 1})


@pytest.mark.parametrize(
    "key",
    [
        "HunyuanVideoTransformer3DModel",
        "HunyuanVideo15Transformer3DModel",
        "LTX2VideoTransformer3DModel",
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
        model.compile_repeated_blocks(
            backend=CompileCounterWithBackend("aot_eager"), fullgraph=True
        )
        compiled = gradients()
    for one, other in zip(compiled, eager):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_inductor():
    model = deep_wan()
    dense = DEEP.call(model)
    with vidattn.patch(model, "neighborhood", **OPTIONS):
        sparse = DEEP.call(model)
    model.compile_repeated_blocks(fullgraph=True)
    with vidattn.patch(model, "neighborhood", **OPTIONS):
        torch.testing.assert_close(DEEP.call(model), sparse, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(DEEP.call(model), dense, atol=1e-5, rtol=1e-4)
