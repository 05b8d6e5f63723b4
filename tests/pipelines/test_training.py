"""Gradients through a patched transformer."""

import pytest
import torch

import vidattn
from tests.pipelines.sparse import COGVIDEOX, WAN, patch
from tests.pipelines.tiny import TINY, build


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
    from tests.pipelines.test_families import MaskedSoftmax

    model, case = build(key), TINY[key]
    plan = vidattn.plan("neighborhood", vidattn.Grid(*case.size), window=3)
    with MaskedSoftmax(case, plan.mask()[0, 0]):
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
