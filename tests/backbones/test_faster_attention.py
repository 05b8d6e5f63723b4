"""Vision transformers attend on the faster engine, in training too, and give what they gave."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F

from tests.kernels.attention_cases import relative_rms
from vidattn.backbones import accelerate
from vidattn.backbones.faster import attention
from vidattn.kernels.cpp import compiler
from vidattn.kernels.engines import exact

pytestmark = pytest.mark.skipif(compiler.find_compiler() is None, reason="needs a C++ compiler")
VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 192, "num_classes": 3}
MODELS = {
    "vit": ("vit_tiny_patch16_224", VIT),
    "rotary": ("eva02_tiny_patch14_224", VIT | {"img_size": 168}),
    "norms": ("vit_tiny_patch16_224", VIT | {"qk_norm": True}),
}


@pytest.fixture
def faster(monkeypatch):
    """Ours is the faster engine; the calls that it got."""
    calls, own = [], exact.exact_attention
    monkeypatch.setattr(exact, "LEAST_FLOPS", 0)
    monkeypatch.setattr(exact, "speed_of", lambda kind: 2.0)
    monkeypatch.setattr(
        attention, "exact_attention", lambda *x, **given: calls.append(x) or own(*x, **given)
    )
    return calls


def create(case):
    name, options = MODELS[case]
    model = timm.create_model(name, **options)
    return model, torch.randn(2, 3, options["img_size"], options["img_size"])


def run(model, images):
    out = model(images)
    return [out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))]


@pytest.mark.parametrize("case", MODELS)
def test_outputs_and_gradients_stay(case, faster):
    model, images = create(case)
    exactly = run(copy.deepcopy(model).double(), images.double())
    before = run(model, images)
    with accelerate(model) as handle:
        found = run(model, images)
        assert len(faster) == handle.num_modules == 2
    for x, own, answer in zip(found, before, exactly, strict=True):
        assert relative_rms(x, answer) < max(1e-5, 2 * relative_rms(own, answer))
    for x, own in zip(run(model, images), before, strict=True):
        assert torch.equal(x, own)
    assert len(faster) == 2


def test_bfloat16_and_autocast_are_served(faster):
    model, images = create("vit")
    with torch.no_grad(), accelerate(model.eval()):
        with torch.autocast("cpu", torch.bfloat16):
            model(images)
        model.bfloat16()(images.bfloat16())
    assert len(faster) == 4


def test_slower_calls_stay_pytorchs_to_the_bit(faster, monkeypatch):
    monkeypatch.setattr(exact, "speed_of", lambda kind: 0.9)
    model, images = create("vit")
    model.bfloat16(), (images := images.bfloat16())
    before = model(images)
    with accelerate(model):
        assert torch.equal(model(images), before)
    assert not faster


@pytest.mark.parametrize(
    ("given", "is_ours"),
    [
        ({}, True),
        ({"attn_mask": torch.rand(1, 1, 1, 140) < 0.5}, True),
        ({"attn_mask": torch.rand(140, 140) < 0.5}, False),
        ({"attn_mask": torch.rand(1, 1, 1, 140)}, False),
        ({"is_causal": True}, False),
        ({"dropout_p": 0.5}, False),
        ({"scale": 0.1}, True),
    ],
)
def test_what_is_asked_of_it_is_given(given, is_ours, faster):
    q, k, v = torch.randn(3, 2, 3, 140, 16)
    torch.manual_seed(0)
    expected = F.scaled_dot_product_attention(q, k, v, **given)
    torch.manual_seed(0)
    with attention._OnTheFaster():
        found = F.scaled_dot_product_attention(q, k, v, **given)
    assert relative_rms(found, expected) < 1e-5 and len(faster) == is_ours


def test_compiled_and_exported_graphs_have_timms_own_code(faster):
    model, images = create("vit")
    model.eval()
    with torch.no_grad(), accelerate(model):
        torch.compile(model, backend="eager")(images)
        torch.export.export(model, (images,))
        torch.jit.trace(model, images, check_trace=False)
    assert not faster
