"""Gradients through a patched transformer."""

import functools

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.utils.checkpoint import checkpoint

import vidattn
from tests.pipelines.masked_softmax import MaskedSoftmax
from tests.pipelines.sparse import COGVIDEOX, WAN, patch
from tests.pipelines.test_site import Rarely
from tests.pipelines.tiny import TINY, build
from tests.pipelines.tiny_inputs import latents
from vidattn.pipelines.hooks.checkpoint import Tied


@pytest.fixture
def wan():
    return build(WAN)


def gradients(key, model, checkpointing=False, autocast=False):
    model.train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        TINY[key].call(model).float().square().mean().backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize("key", [WAN, "HunyuanVideoTransformer3DModel", COGVIDEOX])
def test_training(key):
    model, case = build(key), TINY[key]
    plan = vidattn.plan("neighborhood", vidattn.Grid(*case.size), window=3)
    with MaskedSoftmax(case, {case.num_video: plan.mask()[0, 0]}):
        expected = gradients(key, model)
    dense = gradients(key, model)
    with patch(model) as handle:
        sparse = gradients(key, model)
        calls = handle.report().num_sparse
        again = gradients(key, model, checkpointing=True)
        # the recomputation of a block is no call
        assert handle.report().num_sparse == 2 * calls
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(sparse[name], gradient, atol=1e-5 * scale, rtol=1e-4)
        torch.testing.assert_close(again[name], sparse[name], atol=1e-6 * scale, rtol=1e-5)
    assert max((sparse[name] - dense[name]).abs().max() for name in dense) > 1e-3 * scale


def test_training_under_autocast(wan):
    dense = gradients(WAN, wan, autocast=True)
    with patch(wan):
        sparse = gradients(WAN, wan, autocast=True)
    assert all(gradient.isfinite().all() for gradient in sparse.values())
    assert any(not torch.equal(sparse[name], dense[name]) for name in dense)


REENTRANT = functools.partial(checkpoint, use_reentrant=True)


def two_steps(model, method, run=lambda model, **inputs: model(**inputs, return_dict=False)[0]):
    """Gradients of two clips at two told steps, and how often plans were searched."""
    found = []
    with vidattn.patch(model, method, dense_layers=0) as handle:
        with handle.generation(num_steps=2) as generation:
            for step in range(2):
                generation.at(step)
                torch.manual_seed(step)
                model.zero_grad()
                run(model, **TINY[WAN].inputs()).square().mean().backward()
                gradients = (x.grad.flatten() for x in model.parameters() if x.grad is not None)
                found.append(torch.cat(list(gradients)))
        return found, [layer.num_searches for layer in handle.report().layers]


@pytest.mark.parametrize("method", ["topk", "adaspa", "cluster", "paro"])
@pytest.mark.parametrize("kind", ["blocks", "reentrant", "whole"])
def test_what_is_run_again_sees_what_the_forward_pass_saw(method, kind, wan):
    expected, searches = two_steps(wan.train(), method)

    def whole(model, **inputs):
        inputs["hidden_states"].requires_grad_()
        return checkpoint(model, **inputs, return_dict=False, use_reentrant=False)[0]

    if kind == "whole":
        found = two_steps(wan, method, whole)
    else:
        wan.enable_gradient_checkpointing(REENTRANT if kind == "reentrant" else None)
        if kind == "reentrant":
            # such a block needs an input with a gradient
            wan.patch_embedding.register_forward_hook(lambda *given: given[-1].requires_grad_())
        found = two_steps(wan, method)
    assert found[1] == searches
    for one, other in zip(found[0], expected):
        torch.testing.assert_close(one, other, atol=1e-7, rtol=1e-5)


def test_two_forward_passes_before_one_goes_back(wan):
    sizes = [{"hidden_states": latents(4, 3, 11, 15)}, {"hidden_states": latents(4, 2, 9, 8)}]

    def gradient(order=(0, 1)):
        with vidattn.patch(wan.train(), "topk", density=0.3, dense_layers=0):
            wan.zero_grad()
            losses = [TINY[WAN].call(wan, **sizes[i]).square().mean() for i in (0, 1)]
            for i in order:
                losses[i].backward()
        return torch.cat([x.grad.flatten() for x in wan.parameters() if x.grad is not None])

    expected = gradient()
    wan.enable_gradient_checkpointing()
    for order in ((0, 1), (1, 0)):
        torch.testing.assert_close(gradient(order), expected, atol=1e-7, rtol=1e-5)
    assert not any(isinstance(x, Tied) for x in vars(wan).values())
    wan.disable_gradient_checkpointing()
    for i, block in enumerate(wan.blocks):
        wan.blocks[i] = CheckpointWrapper(block)
    # nothing tells which of the two it is
    with pytest.raises(RuntimeError, match="several forward passes it belongs to is not known"):
        gradient()


@pytest.mark.parametrize("method", ["topk", Rarely()])
def test_compiled_training_reads_content_once(method, wan):
    expected, _ = two_steps(wan.train(), method)
    wan.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    if method == "topk":
        for one, other in zip(two_steps(wan, method)[0], expected):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
    else:
        found, _ = two_steps(wan, method)
        for one, other in zip(found, expected):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_compiled_training_of_dense_layers(wan):
    with vidattn.patch(wan, "neighborhood", window=3, dense_layers=1):
        expected = gradients(WAN, wan)
        wan.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
        found = gradients(WAN, wan)
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-4)


def test_a_gradient_that_is_lost_is_refused(wan, monkeypatch):
    """As compiled context parallelism loses it, unless the call is dense."""
    name = "vidattn.pipelines.hooks.intercept.context_parallel"
    monkeypatch.setattr(name, lambda *given: object())
    wan.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    with vidattn.patch(wan, "neighborhood", window=3, dense_layers=2):
        TINY[WAN].call(wan).sum().backward()
    with vidattn.patch(wan, "neighborhood", window=3, dense_layers=0):
        with pytest.raises(RuntimeError, match="attn1 has no gradient of sparse attention"):
            TINY[WAN].call(wan)
