"""A patched transformer through everything that people do with transformers."""

import copy
import gc
import io
import threading
import weakref
from dataclasses import dataclass
from typing import ClassVar

import accelerate
import diffusers
import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from torch import nn

import vidattn
from tests.pipelines.tiny import TINY, build, latents
from vidattn.grid import raster_layout
from vidattn.method import Method
from vidattn.pipelines.patch import find_handle
from vidattn.pipelines.site import Site
from vidattn.plan import Plan

WAN, COGVIDEOX = "WanTransformer3DModel", "CogVideoXTransformer3DModel"
OPTIONS = {"window": 3, "dense_layers": 0}


def patch(model, **options):
    return vidattn.patch(model, "neighborhood", **{**OPTIONS, **options})


@pytest.fixture
def wan():
    return build(WAN)


def outputs(key, model, **changes):
    """What a transformer gives as it is and patched."""
    with torch.no_grad():
        dense = TINY[key].call(model, **changes)
        with patch(model):
            return dense, TINY[key].call(model, **changes)


@torch.no_grad()
def check(key, model, dense, sparse):
    """The patched ``model`` gives ``sparse``, and once unpatched ``dense``."""
    assert torch.equal(TINY[key].call(model), sparse)
    vidattn.unpatch(model)
    assert torch.equal(TINY[key].call(model), dense)


@torch.no_grad()
def test_grid_follows_the_resolution(wan):
    with patch(wan) as handle:
        for frames, height, width in ((3, 11, 15), (1, 4, 6), (5, 9, 8)):
            TINY[WAN].call(wan, hidden_states=latents(4, frames, height, width))
    assert handle.report().grids == (
        "Grid(t=1, h=2, w=3, text=0, text_first=False)",
        "Grid(t=3, h=5, w=7, text=0, text_first=False)",
        "Grid(t=5, h=4, w=4, text=0, text_first=False)",
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
def test_a_backend_set_on_the_model_is_kept(wan):
    _, sparse = outputs(WAN, wan)
    processor = wan.blocks[0].attn1.processor
    try:
        handle = patch(wan)
        wan.set_attention_backend("_native_math")
        torch.testing.assert_close(TINY[WAN].call(wan), sparse)
        handle.remove()
        assert processor._attention_backend == "_native_math"
        expected = TINY[WAN].call(wan)
        with vidattn.patch(wan, "dense"):
            assert torch.equal(TINY[WAN].call(wan), expected)
        assert processor._attention_backend == "_native_math"
    finally:
        # diffusers leaves the choice behind for the whole process
        registry = diffusers.models.attention_dispatch._AttentionBackendRegistry
        registry.set_active_backend(AttentionBackendName.NATIVE)


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


@torch.no_grad()
def test_bfloat16():
    model = build(WAN).to(torch.bfloat16)
    inputs = {
        name: value.bfloat16() if torch.is_tensor(value) else value
        for name, value in TINY[WAN].inputs().items()
    }
    dense = model(**inputs, return_dict=False)[0]
    with patch(model):
        sparse = model(**inputs, return_dict=False)[0]
    assert sparse.dtype == torch.bfloat16 and not torch.equal(sparse, dense)
    assert torch.equal(model(**inputs, return_dict=False)[0], dense)


@torch.no_grad()
def test_three_threads():
    # one transformer at two resolutions, and another beside it
    shared, own = build(WAN), build("MochiTransformer3DModel")
    small = {"hidden_states": latents(4, 5, 9, 8)}
    expected = [
        outputs(WAN, shared)[1],
        outputs(WAN, shared, **small)[1],
        outputs("MochiTransformer3DModel", own)[1],
    ]
    patch(shared)
    patch(own)
    got = [[], [], []]
    # the random inputs of the cases come from one generator for the process
    inputs = [TINY[WAN].inputs(), TINY[WAN].inputs() | small]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        inputs = [TINY[WAN].inputs()] * 2
        torch.manual_seed(1)
        inputs.append(TINY["MochiTransformer3DModel"].inputs())
    inputs[1] = inputs[1] | small

    def work(i, model):
        with torch.no_grad():
            for _ in range(5):
                got[i].append(model(**inputs[i], return_dict=False)[0])

    threads = [
        threading.Thread(target=work, args=(i, model))
        for i, model in enumerate([shared, shared, own])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(3):
        assert len(got[i]) == 5
        for out in got[i]:
            torch.testing.assert_close(out, expected[i], atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_steps_of_a_bare_transformer(wan):
    with patch(wan, dense_steps=2) as handle:
        for _ in range(2):
            for step in (900.0, 900.0, 600.0, 600.0, 300.0, 300.0):
                TINY[WAN].call(wan, timestep=torch.full((2,), step))
        report = handle.report()
    assert report.num_steps == 3 and report.num_passes == 12
    assert [layer.num_sparse for layer in report.layers] == [4, 4]
    assert [layer.num_dense for layer in report.layers] == [{"step guard": 8}] * 2


@torch.no_grad()
def test_pairs_of_masks_are_not_written_out(monkeypatch):
    model, seen = build("HunyuanVideo15Transformer3DModel"), []
    attend = Site.attend

    def spy(site, layer, q, k, v, mask, scale):
        seen.append(mask)
        return attend(site, layer, q, k, v, mask, scale)

    monkeypatch.setattr(Site, "attend", spy)
    with patch(model):
        TINY["HunyuanVideo15Transformer3DModel"].call(model)
    assert len(seen) == 2
    assert all(mask.untyped_storage().nbytes() == mask.shape[0] * mask.shape[-1] for mask in seen)


@dataclass(frozen=True)
class Nearest(Method):
    """Every block of queries reads the half of the blocks whose keys are most like it."""

    reads_content: ClassVar[bool] = True

    def plan(self, grid, q=None, k=None):
        layout = raster_layout(grid, 8)
        tokens = layout.order.long().clamp_min(0)[: layout.num_video_blocks * 8]
        q, k = (x[:, :, tokens].unflatten(2, (-1, 8)).mean(3) for x in (q, k))
        scores = q @ k.mT
        return Plan.from_blocks(grid, layout, scores >= scores.median(-1, keepdim=True).values)


@pytest.mark.parametrize("key", [WAN, COGVIDEOX, "HunyuanVideoFramepackTransformer3DModel"])
@torch.no_grad()
def test_a_method_that_reads_content(key):
    model, case = build(key), TINY[key]
    dense = case.call(model)
    with vidattn.patch(model, Nearest(), dense_layers=0) as handle:
        case.call(model)
        sites = handle._sites[0]
        report = handle.report()
    assert sites.settings._fixed_plan.cache_info().currsize == 0
    assert 0.4 < report.density < 0.7 and report.num_dense == 0
    assert torch.equal(case.call(model), dense)


@torch.no_grad()
def test_plans_are_made_once():
    model = build(WAN)
    with patch(model) as handle:
        for _ in range(3):
            TINY[WAN].call(model)
        info = handle._sites[0].settings._fixed_plan.cache_info()
    assert (info.misses, info.hits) == (1, 5)


@torch.no_grad()
def test_layer_guards():
    model = build("WanVACETransformer3DModel")
    with patch(model, dense_layers=0.5) as handle:
        TINY["WanVACETransformer3DModel"].call(model)
    dense = {layer.name: layer.num_dense for layer in handle.report().layers}
    assert dense == {
        "transformer.blocks.0.attn1": {"layer guard": 1},
        "transformer.blocks.1.attn1": {"layer guard": 1},
        "transformer.blocks.2.attn1": {"layer guard": 1},
        "transformer.vace_blocks.0.attn1": {},
        "transformer.vace_blocks.1.attn1": {},
    }
