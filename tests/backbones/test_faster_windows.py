"""Accelerated models compute what they did before, and can be undone."""

import copy

import pytest
import timm
import torch
from timm.layers.halo_attn import HaloAttn
from timm.models._features_fx import create_feature_extractor

from tests.kernels.attention_cases import TOLERANCE, relative_rms
from vidattn.backbones import accelerate, faster_windows
from vidattn.kernels import compiler, onednn

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
    for name in ("window_attention", "packed_window_attention"):
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


def test_what_cannot_be_accelerated_is_named(monkeypatch):
    with pytest.raises(ValueError, match="ResNet has nothing to accelerate"):
        accelerate(timm.create_model("resnet10t"))
    model, _ = create("shifted")
    accelerate(model)
    with pytest.raises(ValueError, match="which is not accelerated yet"):
        accelerate(model)
    monkeypatch.setattr(faster_windows, "is_available", lambda dtype: False)
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler"):
        accelerate(timm.create_model(V1, img_size=32, window_size=4, **SMALL))
