"""Blocks of frames that wait for each other, as SkyReels-V2 has them in diffusion forcing."""

import pytest
import torch
from torch.testing import assert_close

import vidattn
from tests.pipelines.tiny import TINY, build
from tests.pipelines.tiny_inputs import latents

KEY = "SkyReelsV2Transformer3DModel/blocks of frames"
CASE = TINY[KEY]
READERS = {
    "topk": {"density": 0.3, "tile": (1, 2, 4)},
    "rectified": {"density": 0.3, "tile": (2, 2, 4)},
    "svg": {"density": 0.5},
    "vmoba": {"granularity": "query"},
    "neighborhood": {"window": (5, 3, 3), "dilation": (2, 1, 1)},
}


@pytest.fixture(scope="module")
def model():
    return build(KEY)


@pytest.mark.parametrize("method", READERS)
@torch.no_grad()
def test_no_frame_sees_a_later_chunk(model, method):
    """Neither by its keys, nor by what a method makes of them."""
    hidden = latents(frames=6)
    other = hidden.clone()
    other[:, :, 4:] += torch.randn(2, 4, 2, 11, 15)
    with vidattn.patch(model, method, dense_layers=0, **READERS[method]) as handle:
        one, two = (CASE.call(model, hidden_states=x) for x in (hidden, other))
    assert handle.report().num_sparse == 4
    assert_close(one[:, :, :4], two[:, :, :4], rtol=0, atol=0)
    assert (one[:, :, 4:] - two[:, :, 4:]).abs().max() > 0.1


@pytest.mark.parametrize("frames", [2, 4, 6])
@pytest.mark.parametrize("method", ["exact", "topk"])
def test_a_full_budget_is_the_model_with_its_gradient(model, method, frames):
    options = {"density": 1.0} if method == "topk" else {}
    found = []
    for patched in (False, True):
        torch.manual_seed(0)
        hidden = latents(frames=frames, height=10, width=14).requires_grad_()
        if patched:
            vidattn.patch(model, method, dense_layers=0, **options)
        out = CASE.call(model, hidden_states=hidden)
        (grad,) = torch.autograd.grad(out.square().sum(), hidden)
        found.append((out.detach(), grad))
        vidattn.unpatch(model) if patched else None
    for one, other in zip(*found):
        assert_close(one, other, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_shows_calls_has_no_word_for_turns(model):
    from vidattn.pipelines.hooks.watch import watching

    with pytest.raises(ValueError, match="chunks of 2 frames"), watching(model, print):
        CASE.call(model)


@torch.no_grad()
def test_a_mask_of_something_else_is_refused(model):
    with vidattn.patch(model, "radial", dense_layers=0) as handle:
        model.register_to_config(num_frame_per_block=3)
        try:
            assert CASE.call(model).isfinite().all()
            model.blocks[0].register_forward_pre_hook(lambda block, args: (*args[:4], None))
            with pytest.raises(RuntimeError, match="in chunks of 3 have .* has None"):
                CASE.call(model)
        finally:
            model.blocks[0]._forward_pre_hooks.clear()
            model.register_to_config(num_frame_per_block=2)
    assert handle.report().num_sparse == 2
