"""Parameters and multiply-adds of every variant are those of the paper and the released code."""

import math
import pkgutil

import pytest
import timm
import torch
from torch import nn

import vidattn.backbones
from vidattn.backbones.biformer import FullAttention
from vidattn.backbones.inline import InLineAttention
from vidattn.backbones.layers.aggregated_attention import AggregatedAttention, CosineAttention
from vidattn.backbones.layers.bilevel_routing import BiLevelRoutingAttention
from vidattn.backbones.layers.factorized_attention import CoarseGroup, FineGroup
from vidattn.backbones.layers.linear_attention import LinearAttention
from vidattn.backbones.layers.neighborhood_attention import NeighborhoodAttention2d
from vidattn.backbones.layers.window_attention import WindowAttention

# parameters, and 10 ** 9 multiply-adds as their authors count them, if they do
FACTS = {
    "nat_mini": (19_984_174, 2.71),
    "nat_tiny": (27_901_582, 4.32),
    "nat_small": (50_743_297, 7.81),
    "nat_base": (89_769_652, 13.73),
    "dinat_mini": (19_984_174, 2.71),
    "dinat_tiny": (27_901_582, 4.32),
    "dinat_small": (50_719_681, 7.81),
    "dinat_base": (89_769_652, 13.73),
    "dinat_large": (200_943_514, 30.53),
    "dinat_large_384": (200_943_514, 89.73),
    "dinat_large_384_11x11": (201_144_250, 92.35),
    "dinat_s_tiny": (28_288_354, 4.51),
    "dinat_s_small": (49_606_258, 8.77),
    "dinat_s_base": (87_768_224, 15.47),
    "dinat_s_large": (196_532_476, 34.54),
    "dinat_s_large_384": (196_532_476, 101.50),
    "nat_iso_small": (21_999_736, 4.32),
    "nat_iso_base": (86_465_800, 16.96),
    "dinat_iso_small": (21_999_736, 4.32),
    "dinat_iso_base": (86_465_800, 16.96),
    "vitrpb_small": (22_080_376, 4.59),
    "vitrpb_base": (86_627_080, 17.5),
    "biformer_tiny": (13_142_760, 2.2),
    "biformer_small": (25_536_232, 4.5),
    "biformer_base": (56_804_968, 9.8),
    "biformer_stl": (28_372_552, 4.6),
    "inline_swin_tiny": (29_223_544, 4.5),
    "moh_vit_tiny": (28_351_552, 5.7),
    "moh_vit_small_75": (49_910_548, 10.3),
    "moh_vit_small_80": (49_910_548, 10.3),
    "l2vit_tiny": (28_596_781, 4.7),
    "favit_b0": (3_427_704, 0.6),
    "favit_b1": (12_958_568, 2.4),
    "favit_b2": (24_919_896, 4.5),
    "favit_b3": (48_746_440, 8.5),
    # added up by hand: these sizes have no released code
    "vsa_swin_tiny": (28_755_952, None),
    "gated_swinrmt_retention_tiny": (13_328_680, None),
    "gated_swinrmt_swat_tiny": (13_335_592, None),
    # torchvision has the same parameters
    "video_swin_tiny": (28_158_070, 88),
    "video_swin_small": (49_816_678, 166),
    "video_swin_base": (88_048_984, 282),
    # the released code has 576 more, in a norm that it does not use
    "swift": (4_314_925, None),
}
# what the paper counts for, where that is no image
VOLUMES = {"video": (3, 32, 224, 224)}
# building them takes long
LARGE = [name for name in FACTS if "base" in name or "large" in name or name == "video_swin_small"]
# published with two or three digits
ROUNDED = {name: 0.1 for name in FACTS if not name.startswith(("nat", "dinat", "vitrpb"))}
ROUNDED |= {name: 0.5 for name in FACTS if name.startswith("video_swin")}


def multiply_adds(model, size):
    """Products of every layer for one input, from the shapes that pass through it.

    Of the blocks of a stage that print alike, one is run and counts for all.
    """
    total = 0
    times = {}
    for stage in model.stages:
        kinds = {}
        for block in stage.blocks:
            kinds.setdefault(repr(block), []).append(block)
        stage.blocks = nn.Sequential(*(alike[0] for alike in kinds.values()))
        for alike in kinds.values():
            times |= dict.fromkeys(alike[0].modules(), len(alike))

    def products(module, output):
        if isinstance(module, nn.Linear):
            return output.numel() * module.in_features
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return output.numel() * module.weight[0].numel()
        if isinstance(module, nn.LayerNorm):
            return 5 * output.numel()
        if isinstance(module, NeighborhoodAttention2d):
            cells, channels = output[..., 0].numel(), output.shape[-1]
            return cells * module.window**2 * (2 * channels + module.num_heads)
        if isinstance(module, BiLevelRoutingAttention):
            cells, regions = output[..., 0].numel(), module.side**2
            keys = cells * module.topk / regions
            return 2 * output.numel() * keys + regions**2 * output.shape[-1]
        if isinstance(module, WindowAttention):
            return 2 * output.numel() * math.prod(module.window)
        if isinstance(module, InLineAttention | LinearAttention):
            return output.numel() * 2 * (output.shape[-1] // module.num_heads)
        if isinstance(module, AggregatedAttention):
            cells = output[..., 0].numel()
            return output.numel() * (3 * module.window**2 + 2 * cells // module.stride**2)
        if isinstance(module, CoarseGroup):
            return 2 * output.numel() * output[..., 0].numel() // module.stride**2
        if isinstance(module, FineGroup):
            return 2 * output.numel() * module.window**2
        if isinstance(module, FullAttention | CosineAttention):
            return 2 * output.numel() * output[..., 0].numel()
        return 0

    def count(module, inputs, output):
        nonlocal total
        total += times.get(module, 1) * products(module, output)

    for module in model.modules():
        module.register_forward_hook(count)
    model(torch.empty(1, *size, device="meta"))
    return total / 1e9


def test_every_model_is_here():
    modules = [module.name for module in pkgutil.iter_modules(vidattn.backbones.__path__)]
    assert {name for module in modules for name in timm.list_models(module=module)} == set(FACTS)


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[pytest.mark.slow] * (x in LARGE)) for x in FACTS]
)
def test_size_of(name):
    num_parameters, giga = FACTS[name]
    model = timm.create_model(name, drop_path_rate=0.0, device="meta").eval()
    assert sum(x.numel() for x in model.parameters()) == num_parameters
    if giga is None:
        return
    size = VOLUMES.get(name.split("_")[0], model.default_cfg["input_size"])
    found = multiply_adds(model, size)
    if name in ROUNDED:
        assert found == pytest.approx(giga, abs=ROUNDED[name])
    else:
        assert found == pytest.approx(giga, rel=5e-3)
