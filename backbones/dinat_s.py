"""DiNAT_s: the layout of Swin with dilated neighborhood attention in its blocks.

Hassani and Shi, "Dilated Neighborhood Attention Transformer", arXiv:2209.15001.
"""

from __future__ import annotations

from functools import partial

from timm.models import generate_default_cfgs, register_model
from timm.models.swin_transformer import PatchMerging

from vidattn.backbones.dinat import AT_224, AT_384, IN1K, IN22K
from vidattn.backbones.layers.patchify import patchify
from vidattn.backbones.nat import NeighborhoodTransformer, create
from vidattn.backbones.pyramids.pyramid import pretrained_cfg

TINY = {
    "embed_dim": 96,
    "depths": (2, 2, 6, 2),
    "num_heads": (3, 6, 12, 24),
    "dilations": AT_224,
    "mlp_ratio": 4.0,
    "drop_path_rate": 0.2,
    "stem_layer": partial(patchify, 4),
    "downsample_layer": PatchMerging,
}
SMALL = TINY | {"depths": (2, 2, 18, 2), "drop_path_rate": 0.3}
LARGE = SMALL | {"embed_dim": 192, "num_heads": (6, 12, 24, 48), "drop_path_rate": 0.35}


def weights(url: str = "", **fields) -> dict:
    """timm's description of released weights."""
    return pretrained_cfg("stem.proj", url=url, license="mit", **fields)


default_cfgs = generate_default_cfgs(
    {
        f"dinat_s_{size}.shi_in1k": weights(f"{IN1K}s_{size}_in1k_224.pth")
        for size in ("tiny", "small", "base")
    }
    | {
        "dinat_s_large.shi_in22k_ft_in1k": weights(f"{IN1K}s_large_in1k_224.pth"),
        "dinat_s_large.shi_in22k": weights(f"{IN22K}s_large_in22k_224.pth", num_classes=21841),
        "dinat_s_large_384.shi_in22k_ft_in1k": weights(f"{IN1K}s_large_in1k_384.pth", size=384),
    }
)


@register_model
def dinat_s_tiny(pretrained: bool = False, **options) -> NeighborhoodTransformer:
    """28 M parameters, 4.5 G multiply-adds."""
    return create("dinat_s_tiny", pretrained, **TINY | options)


@register_model
def dinat_s_small(pretrained: bool = False, **options) -> NeighborhoodTransformer:
    """50 M parameters, 8.8 G multiply-adds."""
    return create("dinat_s_small", pretrained, **SMALL | options)


@register_model
def dinat_s_base(pretrained: bool = False, **options) -> NeighborhoodTransformer:
    """88 M parameters, 15.5 G multiply-adds."""
    wide = {"embed_dim": 128, "num_heads": (4, 8, 16, 32), "drop_path_rate": 0.5}
    return create("dinat_s_base", pretrained, **SMALL | wide | options)


@register_model
def dinat_s_large(pretrained: bool = False, **options) -> NeighborhoodTransformer:
    """197 M parameters, 34.5 G multiply-adds."""
    return create("dinat_s_large", pretrained, **LARGE | options)


@register_model
def dinat_s_large_384(pretrained: bool = False, **options) -> NeighborhoodTransformer:
    """197 M parameters, 101.5 G multiply-adds at 384 pixels."""
    return create("dinat_s_large_384", pretrained, **LARGE | {"dilations": AT_384} | options)
