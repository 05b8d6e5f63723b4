"""Accelerated models compute what they did before, and can be undone."""

import copy

import pytest
import timm
import torch
from timm.layers.halo_attn import HaloAttn
from timm.models._features_fx import create_feature_extractor
from torch.ao.quantization import quantize_dynamic
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import remove_parametrizations

from tests.kernels.attention_cases import TOLERANCE, relative_rms
from vidattn.backbones import accelerate
from vidattn.backbones.faster import windows as faster_windows
from vidattn.kernels.cpp import compiler, onednn

pytestmark = pytest.mark.skipif(compiler.find_compiler() is None, reason="needs a C++ compiler")
V1, V2, DAVIT = "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "davit_tiny"
SMALL = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}
SMALL_DAVIT = {"embed_dims": (16, 32), "depths": (1, 1), "num_heads": (2, 4)}
# name, options, size of the images
CASES = {
    "shifted": (V1, SMALL | {"window_size": 4, "img_size": 64}, (64, 64)),
    "padded": (V1, SMALL | {"window_size": 3, "img_size": 64}, (64, 64)),
    "another size": (V1, SMALL | {"window_size": 3, "strict_img_size": False}, (60, 84)),
    "smaller than a window": (V1, SMALL | {"window_size": 7, "strict_img_size": False}, (36, 20)),
    "always cut": (
        V1,
        SMALL | {"window_size": 8, "img_size": 32, "always_partition": True},
        (32, 32),
    ),
    "wide heads": (V1, SMALL | {"window_size": 4, "img_size": 64, "head_dim": 12}, (64, 64)),
    "cosines": (V2, SMALL | {"window_size": 4, "img_size": 64}, (64, 64)),
    "cosines, padded": (V2, SMALL | {"window_size": 5, "strict_img_size": False}, (60, 84)),
    "no biases": (DAVIT, SMALL_DAVIT, (60, 84)),
}
HALO = {
    "halo": {"halo_size": 2},
    "halo, strided": {"stride": 2, "dim_head": 8, "halo_size": 1},
    "halo, pooled": {"stride": 2, "avg_down": True, "scale_pos_embed": True, "qkv_bias": True},
}


def create(case):
    if case in HALO:
        model, images = HaloAttn(24, 32, num_heads=4, block_size=4, **HALO[case]), (24, 8, 12)
    else:
        name, options, size = CASES[case]
        model = timm.create_model(name, num_classes=3, drop_path_rate=0.0, **options)
        images = (3, *size)
    for key, x in model.named_parameters():
        # biases that matter, and cosines that are sharp
        if any(part in key for part in ("bias_table", "cpb_mlp", "qkv.weight", "_rel")):
            torch.nn.init.normal_(x, std=0.3)
        # around the largest allowed, log(100)
        if "logit_scale" in key:
            torch.nn.init.uniform_(x, 4, 5)
    return model, torch.randn(2, *images)


def run(model, images):
    out = model(images)
    return [out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))]


def num_calls(monkeypatch):
    """A list that grows with every call of the kernel."""
    calls = []
    for name in ("window_attention", "packed_windows"):
        own = getattr(faster_windows, name)

        def counted(*args, own=own, **options):
            calls.append(own)
            return own(*args, **options)

        monkeypatch.setattr(faster_windows, name, counted)
    return calls


@pytest.mark.parametrize("case", [*CASES, *HALO])
def test_outputs_and_gradients_stay(case, monkeypatch):
    model, images = create(case)
    exact = run(copy.deepcopy(model).double(), images.double())
    before = run(model, images)
    state, classes = model.state_dict(), [type(x) for x in model.modules()]
    calls = num_calls(monkeypatch)
    with accelerate(model) as handle:
        found = run(model, images)
        assert len(calls) == handle.num_modules > 0
        assert list(model.state_dict()) == list(state)
    for x, own, answer in zip(found, before, exact, strict=True):
        # the gradients of some weights are small differences, in timm's own code too
        limit = max(TOLERANCE[torch.float32], 2 * relative_rms(own, answer))
        assert relative_rms(x, answer) < limit
    assert [type(x) for x in model.modules()] == classes
    for x, answer in zip(run(model, images), before, strict=True):
        assert torch.equal(x, answer)
    assert len(calls) == handle.num_modules


@pytest.mark.skipif(not onednn.has_faster_linear(), reason="needs AVX-512")
def test_linear_layers_are_faster_too(monkeypatch):
    calls = []
    own = onednn.linear
    monkeypatch.setattr(onednn, "linear", lambda *args: calls.append(args) or own(*args))
    model, images = create("no biases")
    num_linear = sum(type(module) is torch.nn.Linear for module in model.modules())
    with accelerate(model):
        model(images)
        assert len(calls) == num_linear
        with torch.autocast("cpu"):
            model(images)
    model(images)
    assert len(calls) == num_linear


def test_a_copy_is_accelerated_too():
    model, images = create("shifted")
    accelerate(model)
    twin = copy.deepcopy(model)
    assert [type(x) for x in twin.modules()] == [type(x) for x in model.modules()]
    with torch.no_grad():
        torch.testing.assert_close(twin(images), model(images), rtol=0, atol=0)


def test_what_the_kernel_cannot_run_timm_does(monkeypatch):
    calls = num_calls(monkeypatch)
    model = timm.create_model(V1, img_size=32, window_size=4, attn_drop_rate=0.5, **SMALL)
    images = torch.randn(1, 3, 32, 32)
    accelerate(model)
    model(images)
    with torch.autocast("cpu"):
        model.eval()(images)
    torch.jit.trace(model, images, check_trace=False)
    model.double()(images.double())
    model.to("meta")(images.double().to("meta"))
    assert calls == []


def test_graphs_call_the_kernel(monkeypatch):
    model, images = create("shifted")
    calls = num_calls(monkeypatch)
    with torch.no_grad(), accelerate(model.eval()) as handle:
        answer = model(images)
        graph = create_feature_extractor(model, {"head": "scores"})
        torch.testing.assert_close(graph(images)["scores"], answer)
        assert len(calls) == 2 * handle.num_modules


def test_hooks_see_what_they_saw(monkeypatch):
    """On every module of the plain model, with the same input and output, and off again."""
    calls = num_calls(monkeypatch)
    for case in ("shifted", "cosines", "no biases", "halo"):
        model, images = create(case)
        seen = []
        for name, module in model.eval().named_modules():

            def look(module, inputs, output, name=name, seen=seen):
                seen.append((name, inputs[0].shape, output.shape))

            module.register_forward_hook(look)
        model(images)
        before = seen.copy()
        seen.clear()
        with accelerate(model):
            model(images)
        assert seen == before and not calls
    model, images = create("shifted")
    with accelerate(model) as handle:
        hook = model.layers[0].blocks[1].attn.register_forward_pre_hook(lambda *args: None)
        model(images)
        # only the block that is watched does without the kernel
        assert len(calls) == handle.num_modules - 1
        hook.remove()
        model(images)
        assert len(calls) == 2 * handle.num_modules - 1
        with torch.utils.module_tracker.ModuleTracker():
            model(images)
        assert len(calls) == 2 * handle.num_modules - 1


PARAMETRIZATIONS = {
    "spectral_norm": parametrizations.spectral_norm,
    "weight_norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "old weight_norm": torch.nn.utils.weight_norm,
}


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_parametrizations_come_off_in_any_order(name):
    def norm(layer):
        torch.manual_seed(0)
        PARAMETRIZATIONS[name](layer)

    model, images = create("shifted")
    model.eval()
    layers = [model.head.fc, model.layers[1].blocks[0].attn.qkv]
    plain = copy.deepcopy(model)
    for layer in (plain.head.fc, plain.layers[1].blocks[0].attn.qkv):
        norm(layer)
    answer = plain.eval()(images)
    before = model(images)
    for first in ("handle", "norm"):
        handle = accelerate(model)
        for layer in layers:
            norm(layer)
        torch.testing.assert_close(model.eval()(images), answer)
        if first == "handle":
            handle.remove()
            torch.testing.assert_close(model(images), answer)
        for layer in layers:
            if name == "old weight_norm":
                torch.nn.utils.remove_weight_norm(layer)
            else:
                remove_parametrizations(layer, "weight", leave_parametrized=True)
        if first == "norm":
            model(images)
            handle.remove()
        assert {type(layer) for layer in layers} == {torch.nn.Linear}
        assert not any("forward" in vars(x) or "_attn" in vars(x) for x in model.modules())
    assert before.shape == model(images).shape


def test_quantization_finds_its_layers():
    model, images = create("shifted")
    model.eval()

    def quantized(model):
        found = quantize_dynamic(model, {torch.nn.Linear})
        return found, sum("quantized" in type(x).__module__ for x in found.modules())

    plain, count = quantized(model)
    answer = plain(images)
    accelerate(model)
    found, same = quantized(model)
    assert same == count > 0
    torch.testing.assert_close(found(images), answer, rtol=1e-2, atol=1e-2)


def test_gradients_have_gradients():
    model, images = create("shifted")

    def penalty(model, images):
        images.requires_grad_()
        (grad,) = torch.autograd.grad(model(images).sum(), images, create_graph=True)
        (grad * 100).square().sum().backward()
        return [x.grad for x in model.parameters() if x.grad is not None]

    exact = penalty(copy.deepcopy(model).double(), images.double().detach())
    own = penalty(copy.deepcopy(model), images.clone())
    accelerate(model)
    for found, plain, answer in zip(penalty(model, images), own, exact, strict=True):
        limit = max(TOLERANCE[torch.float32], 3 * relative_rms(plain, answer))
        assert relative_rms(found, answer) < limit


@pytest.mark.parametrize("case", ["shifted", "cosines, padded", "no biases"])
def test_compiled_graphs_hold_the_kernel(case):
    model, images = create(case)
    exact = run(copy.deepcopy(model).double(), images.double())
    own = run(model, images)
    accelerate(model)
    targets = []

    def backend(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    found = run(torch.compile(model, fullgraph=True, backend=backend), images)
    assert sum("packed_windows" in target for target in targets) == accelerate_count(model)
    for x, plain, answer in zip(found, own, exact, strict=True):
        assert relative_rms(x, answer) < max(
            TOLERANCE[torch.float32], 2 * relative_rms(plain, answer)
        )


def accelerate_count(model):
    """Blocks whose windows the kernel computes."""
    return sum(
        isinstance(x, faster_windows.FasterWindows)
        for m in model.modules()
        for x in vars(m).values()
    )


def test_what_cannot_be_accelerated_is_named(monkeypatch):
    with pytest.raises(ValueError, match="ResNet has nothing to accelerate"):
        accelerate(timm.create_model("resnet10t"))
    model, _ = create("shifted")
    accelerate(model)
    with pytest.raises(ValueError, match="which is not accelerated yet"):
        accelerate(model)
    monkeypatch.setattr(faster_windows, "missing", lambda dtype: "no compiler")
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler"):
        accelerate(timm.create_model(V1, img_size=32, window_size=4, **SMALL))
