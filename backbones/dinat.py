"""DiNAT: NAT with dilated windows in every other block.

Hassani and Shi, "Dilated Neighborhood Attention Transformer", arXiv:2209.15001.
"""

from __future__ import annotations

from timm.models import generate_default_cfgs, register_model

from vidattn.backbones.nat import SIZES, NeighborhoodTransformer, create, weights

URL = "https://shi-labs.com/projects/dinat/checkpoints/"
IN1K, IN22K = f"{URL}imagenet1k/dinat_", f"{URL}imagenet22k/dinat_"
# windows that reach over the whole map at 224 pixels, and at 384
AT_224, AT_384 = (8, 4, 2, 1), (13, 6, 3, 1)
TINY = {"depths": (3, 4, 18, 5), "dilations": AT_224, "drop_path_rate": 0.2}
SMALL = TINY | {
    "embed_dim": 96,
    "num_heads": (3, 6, 12, 24),
    "mlp_ratio": 2.0,
    "drop_path_rate": 0.3,
}
LARGE = SMALL | {"embed_dim": 192, "num_heads": (6, 12, 24, 48), "drop_path_rate": 0.35}

default_cfgs = generate_default_cfgs(
    {f"dinat_{x}.shi_in1k": weights(f"{IN1K}{x}_in1k_224.pth") for x in SIZES}
    | {f"dinat_{x}.hf_in1k": weights(hf_hub_id=f"shi-labs/dinat-{x}-in1k-224") for x in SIZES}
    | {
        "dinat_large.shi_in22k_ft_in1k": weights(f"{IN1K}large_in22k_in1k_224.pth"),
        "dinat_large.shi_in22k": weights(f"{IN22K}large_in22k_224.pth", num_classes=21841),
        "dinat_large_384.shi_in22k_ft_in1k": weights(f"{IN1K}large_in22k_in1k_384.pth", size=384),
        "dinat_large_384_11x11.shi_in22k_ft_in1k": weights(
            f"{IN1K}large_in22k_in1k_384_11x11.pth", size=384
        ),
        "dinat_large_384_11x11.shi_in22k": weights(
            f"{IN22K}large_in22k_224_11x11interp.pth", num_classes=21841, size=384
        ),
    }
)


@register_model
def dinat_mini(pretrained: bool = False, **options) -> NeighborhoodTransformer:
    """20 M parameters, 2.7 G multiply-adds."""
    return create("dinat_mini", pretrained, **TINY | {"depths": (3, 4, 6, 5)} | options)


@register_model
def dinat_tiny(pretrained: bool = False, **options) -> NeighborhoodTransformer:
    """28 M parameters, 4.3 G multiply-adds."""
    return create("dinat_tiny", pretrained, **TINY | options)


@register_model
def dinat_small(pretrained: bool = False, **options) -> NeighborhoodTransformer:
    """51 M parameters, 7.8 G multiply-adds."""
    return create("dinat_small", pretrained, **SMALL | options)


@register_model
def dinat_base(pretrained: bool = False, **options) -> NeighborhoodTransformer:
    """90 M parameters, 13.7 G multiply-adds."""
    wide = {"embed_dim": 128, "num_heads": (4, 8, 16, 32)}
    rest = {"layer_scale": 1e-5, "drop_path_rate": 0.5}
    return create("dinat_base", pretrained, **SMALL | wide | rest | options)


@register_model
def dinat_large(pretrained: bool = False, **options) -> NeighborhoodTransformer:
    """201 M parameters, 30.5 G multiply-adds."""
    return create("dinat_large", pretrained, **LARGE | options)


@register_model
def dinat_large_384(pretrained: bool = False, **options) -> NeighborhoodTransformer:
    """201 M parameters, 89.7 G multiply-adds at 384 pixels."""
    return create("dinat_large_384", pretrained, **LARGE | {"dilations": AT_384} | options)


@register_model
def dinat_large_384_11x11(pretrained: bool = False, **options) -> NeighborhoodTransformer:
    """201 M parameters, 92.4 G multiply-adds at 384 pixels, with windows of 11 x 11."""
    return create("dinat_large_384_11x11", pretrained, **LARGE | {"window": 11} | options)
