"""A patched transformer through everything that people do with transformers."""

import copy
import gc
import io
import weakref

import accelerate
import diffusers
import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from torch import nn

import vidattn
from tests.pipelines.sparse import COGVIDEOX, WAN, check, outputs, patch
from tests.pipelines.tiny import TINY, build
from tests.pipelines.tiny_inputs import latents
from vidattn.grid import Grid
from vidattn.pipelines.patch import find_handle


@pytest.fixture
def wan():
    return build(WAN)


@torch.no_grad()
def test_grid_follows_the_resolution(wan):
    with patch(wan) as handle:
        for frames, height, width in ((3, 11, 15), (1, 4, 6), (5, 9, 8)):
            TINY[WAN].call(wan, hidden_states=latents(4, frames, height, width))
    assert handle.report().grids == (
        Grid(1, 2, 3),
        Grid(3, 5, 7),
        Grid(5, 4, 4),
    )


@torch.no_grad()
def test_arguments_may_be_positional(wan):
    inputs = TINY[WAN].inputs()
    dense = wan(*inputs.values(), return_dict=False)[0]
    with patch(wan) as handle:
        sparse = wan(*inputs.values()).sample
    assert handle.report().num_sparse == 2 and not torch.equal(sparse, dense)


@torch.no_grad()
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("key", [WAN, COGVIDEOX])
def test_fused_projections(key, when):
    model = build(key)
    dense, sparse = outputs(key, model)
    if when == "before":
        model.fuse_qkv_projections()
    handle = patch(model)
    if when == "after":
        model.fuse_qkv_projections()
    torch.testing.assert_close(TINY[key].call(model), sparse)
    layers = handle.report().layers
    assert [layer.num_sparse for layer in layers] == [1, 1]
    model.unfuse_qkv_projections()
    torch.testing.assert_close(TINY[key].call(model), sparse)
    handle.remove()
    torch.testing.assert_close(TINY[key].call(model), dense)


@torch.no_grad()
def test_replaced_processors(wan):
    dense, sparse = outputs(WAN, wan)
    patch(wan)
    wan.set_attn_processor(diffusers.models.transformers.transformer_wan.WanAttnProcessor())
    # one processor now serves self- and cross-attention of all layers
    check(WAN, wan, dense, sparse)
    assert len({id(processor) for processor in wan.attn_processors.values()}) == 1


@torch.no_grad()
@pytest.mark.parametrize("key", [WAN, "CosmosTransformer3DModel", COGVIDEOX])
def test_chosen_backends_serve_dense_calls(key):
    model = build(key)
    choice = AttentionBackendName._NATIVE_MATH
    _, sparse = outputs(key, model)
    with attention_backend(choice):
        expected = TINY[key].call(model)
        with vidattn.patch(model, "dense"):
            assert torch.equal(TINY[key].call(model), expected)
        with patch(model):
            torch.testing.assert_close(TINY[key].call(model), sparse)


@torch.no_grad()
@pytest.mark.usefixtures("backend_of_diffusers")
def test_a_backend_set_on_the_model_is_kept(wan):
    _, sparse = outputs(WAN, wan)
    processor = wan.blocks[0].attn1.processor
    handle = patch(wan)
    wan.set_attention_backend("_native_math")
    torch.testing.assert_close(TINY[WAN].call(wan), sparse)
    handle.remove()
    assert processor._attention_backend == "_native_math"
    expected = TINY[WAN].call(wan)
    with vidattn.patch(wan, "dense"):
        assert torch.equal(TINY[WAN].call(wan), expected)
    assert processor._attention_backend == "_native_math"


@torch.no_grad()
def test_guidance_that_skips_scores():
    # perturbed attention guidance: values instead of attention, in the layers that it names
    from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode

    model = build("EasyAnimateTransformer3DModel")
    with AttentionScoreSkipFunctionMode():
        expected = TINY["EasyAnimateTransformer3DModel"].call(model)
        with patch(model) as handle:
            assert torch.equal(TINY["EasyAnimateTransformer3DModel"].call(model), expected)
    dense = handle.report().layers[0].num_dense
    assert dense == {"scores skipped by guidance": 1}


@torch.no_grad()
@pytest.mark.parametrize("when", ["before", "after"])
def test_lora(wan, when):
    from peft import LoraConfig

    dense, sparse = outputs(WAN, wan)
    config = LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False)
    if when == "before":
        wan.add_adapter(config)
    handle = patch(wan)
    if when == "after":
        wan.add_adapter(config)
    with_lora = TINY[WAN].call(wan)
    assert not torch.equal(with_lora, sparse)
    assert handle.report().num_sparse == 2
    wan.disable_adapters()
    check(WAN, wan, dense, sparse)


@torch.no_grad()
@pytest.mark.parametrize("when", ["before", "after"])
def test_offload_hooks(wan, when):
    # what enable_model_cpu_offload adds, and removes and adds again after every generation
    dense, sparse = outputs(WAN, wan)
    cpu = torch.device("cpu")
    if when == "before":
        accelerate.cpu_offload_with_hook(wan, cpu)
    patch(wan)
    if when == "after":
        accelerate.cpu_offload_with_hook(wan, cpu)
    assert torch.equal(TINY[WAN].call(wan), sparse)
    accelerate.hooks.remove_hook_from_module(wan, recurse=True)
    assert torch.equal(TINY[WAN].call(wan), sparse)
    accelerate.cpu_offload_with_hook(wan, cpu)
    check(WAN, wan, dense, sparse)


@torch.no_grad()
@pytest.mark.parametrize("when", ["before", "after"])
def test_sequential_offload(wan, when):
    # every submodule loads its own weights
    dense, sparse = outputs(WAN, wan)
    cpu = torch.device("cpu")
    if when == "before":
        accelerate.cpu_offload(wan, cpu)
    patch(wan)
    if when == "after":
        accelerate.cpu_offload(wan, cpu)
    check(WAN, wan, dense, sparse)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offload(wan, kind):
    dense, sparse = outputs(WAN, wan)
    cpu = torch.device("cpu")
    patch(wan)
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    wan.enable_group_offload(cpu, cpu, offload_type=kind, **blocks)
    check(WAN, wan, dense, sparse)


@torch.no_grad()
def test_layerwise_casting(wan):
    wan.enable_layerwise_casting(torch.bfloat16, torch.float32)
    dense, sparse = outputs(WAN, wan)
    patch(wan)
    check(WAN, wan, dense, sparse)


@torch.no_grad()
def test_first_block_cache(wan):
    dense, sparse = outputs(WAN, wan)
    with patch(wan) as handle:
        wan.enable_cache(FirstBlockCacheConfig(threshold=1e9))
        with wan.cache_context("cond"):
            torch.testing.assert_close(TINY[WAN].call(wan), sparse)
            TINY[WAN].call(wan)
        wan.disable_cache()
    first, second = handle.report().layers
    assert (first.num_sparse, second.num_sparse) == (2, 1)


@torch.no_grad()
def test_pyramid_attention_broadcast(wan):
    with patch(wan) as handle:
        config = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(100, 800),
            current_timestep_callback=lambda: 500,
            spatial_attention_block_identifiers=("blocks.*attn1",),
        )
        wan.enable_cache(config)
        for _ in range(4):
            TINY[WAN].call(wan)
        wan.disable_cache()
    assert [layer.num_sparse for layer in handle.report().layers] == [2, 2]


@torch.no_grad()
def test_a_copy_is_not_patched(wan):
    dense, sparse = outputs(WAN, wan)
    patch(wan)
    twin = copy.deepcopy(wan)
    assert find_handle(twin) is None
    assert torch.equal(TINY[WAN].call(twin), dense)
    nn.init.zeros_(twin.proj_out.weight)
    patch(twin)
    assert not torch.equal(TINY[WAN].call(twin), sparse)
    check(WAN, wan, dense, sparse)


@torch.no_grad()
def test_nothing_is_kept_alive():
    model = build(WAN)
    patch(model)
    TINY[WAN].call(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@torch.no_grad()
def test_save_and_load(wan, tmp_path):
    dense, sparse = outputs(WAN, wan)
    patch(wan)
    buffer = io.BytesIO()
    torch.save(wan, buffer)
    buffer.seek(0)
    assert torch.equal(TINY[WAN].call(torch.load(buffer, weights_only=False)), dense)
    wan.save_pretrained(tmp_path)
    loaded = type(wan).from_pretrained(tmp_path).eval()
    assert torch.equal(TINY[WAN].call(loaded), dense)
    check(WAN, wan, dense, sparse)
