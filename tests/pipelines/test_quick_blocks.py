"""Blocks of Wan that run faster on a CPU, beside those they stand for."""

import copy

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

import vidattn
from vidattn.kernels.cpp import compiler
from vidattn.pipelines import quick_blocks
from vidattn.pipelines.quick_blocks import QuickBlock, quicken_blocks

pytestmark = pytest.mark.skipif(compiler.find_compiler() is None, reason="needs a C++ compiler")
MODELS = {
    "text": {},
    "time of every token": {},
    "no norm before text": {"cross_attn_norm": False},
    "picture": {"image_dim": 24, "added_kv_proj_dim": 64},
}


def made(name: str, dtype: torch.dtype) -> tuple[WanTransformer3DModel, dict]:
    """A small transformer and what it is called with, two clips of 3x6x4 tokens."""
    torch.manual_seed(0)
    options = {"num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4}
    options |= {"out_channels": 4, "text_dim": 16, "freq_dim": 32, "ffn_dim": 96, "num_layers": 2}
    model = WanTransformer3DModel(**options | {"cross_attn_norm": True} | MODELS[name]).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    call = {
        "hidden_states": torch.randn(2, 4, 3, 12, 8).to(dtype),
        "encoder_hidden_states": torch.randn(2, 512 if name == "picture" else 7, 16).to(dtype),
        "timestep": torch.tensor([100.0, 700.0]),
    }
    if name == "time of every token":
        call["timestep"] = torch.rand(2, 3 * 6 * 4) * 1000
    if name == "picture":
        call["encoder_hidden_states_image"] = torch.randn(2, 257, 24).to(dtype)
    return model.to(dtype), call


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_they_are_as_close_to_the_exact_result(name, dtype, monkeypatch):
    model, call = made(name, dtype)
    plain = model(**call).sample
    exact = copy.deepcopy(model).double()
    # diffusers casts to float32 inside, which is far closer than the dtype
    wanted = exact(**{k: v.double() for k, v in call.items()}).sample
    quicken_blocks(model)
    ran = []
    monkeypatch.setattr(
        quick_blocks, "add_scaled", lambda *x, add=quick_blocks.add_scaled: ran.append(0) or add(*x)
    )
    found = model(**call).sample
    assert len(ran) == 2 * len(model.blocks)
    assert error(found, wanted) <= 1.2 * error(plain, wanted) + 1e-6
    assert torch.equal(found, model(**call).sample)


@torch.no_grad()
def test_sparse_attention_meets_turned_queries_and_keys():
    model, call = made("text", torch.float32)
    quick = copy.deepcopy(model)
    quicken_blocks(quick)
    found = []
    for one in (model, quick):
        with vidattn.patch(one, "neighborhood", window=(1, 3, 3), dense_layers=0) as handle:
            found.append(one(**call).sample)
            assert handle.report().density < 1
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


def test_gradients_are_those_of_the_usual_code():
    model, call = made("text", torch.float32)
    wanted = model(**call).sample
    quicken_blocks(model)
    found = model(**call).sample
    assert found.requires_grad and torch.equal(found, wanted)


@torch.no_grad()
def test_a_processor_of_somebodys_own_gets_its_rotary_embedding():
    class Own:
        seen = []

        def __call__(self, attn, hidden_states, encoder_hidden_states=None, *rest, **named):
            rotary = named.get("rotary_emb", rest[1] if len(rest) > 1 else None)
            self.seen.append(rotary is not None)
            return WanAttnProcessor()(attn, hidden_states, encoder_hidden_states, None, rotary)

    model, call = made("text", torch.float32)
    wanted = model(**call).sample
    quicken_blocks(model)
    for block in model.blocks:
        block.attn1.processor = Own()
    torch.testing.assert_close(model(**call).sample, wanted, atol=1e-4, rtol=1e-4)
    assert Own.seen == [True, True]


@torch.no_grad()
def test_what_fails_leaves_no_turn_behind():
    model, call = made("text", torch.float32)
    quicken_blocks(model)
    wanted, block = model(**call).sample, model.blocks[0]
    assert isinstance(block.forward, QuickBlock)
    hook = block.attn1.to_out[0].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**call)
    hook.remove()
    plain = block.attn1.norm_q(torch.ones(1, 1, 64))
    torch.testing.assert_close(
        plain, torch.nn.RMSNorm.forward(block.attn1.norm_q, torch.ones(1, 1, 64))
    )
    assert torch.equal(model(**call).sample, wanted)
