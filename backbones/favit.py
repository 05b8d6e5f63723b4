"""FaViT: a pyramid of factorized attention.

Qin et al., "Factorization Vision Transformer: Modeling Long Range Dependency with Local Window
Cost", arXiv:2312.08614.
"""

from __future__ import annotations

from collections.abc import Sequence

from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from typing_extensions import Unpack

from vidattn.backbones.layers.convolved_block import ConvolvedBlock, ConvolvedMlp
from vidattn.backbones.layers.factorized_attention import FactorizedAttention
from vidattn.backbones.pyramids.checkpoints import rename
from vidattn.backbones.pyramids.doubling_pyramid import build, check_stages
from vidattn.backbones.pyramids.overlapping_patches import OverlappingPyramid, names_of_pvt
from vidattn.backbones.pyramids.pyramid import Options, pretrained_cfg


class FaViT(OverlappingPyramid):
    """FaViT; takes images of any size.

    Args:
        depths: blocks of each stage.
        num_heads: of each stage.
        strides: cells to a side of the patches that attention reads, for each stage.
        mlp_ratios: hidden channels of the perceptrons over their width, for each stage.
        window: cells to a side of the windows that attention reads.
        options: as every pyramid takes them.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        strides: Sequence[int] = (8, 4, 2, 1),
        mlp_ratios: Sequence[float] = (8, 6, 4, 4),
        window: int = 7,
        **options: Unpack[Options],
    ):
        check_stages(depths=depths, num_heads=num_heads, strides=strides, mlp_ratios=mlp_ratios)

        def block(dim: int, rate: float, stage: int, index: int, **dd) -> ConvolvedBlock:
            attn = FactorizedAttention(dim, num_heads[stage], strides[stage], window=window, **dd)
            mlp = ConvolvedMlp(dim, int(dim * mlp_ratios[stage]), **dd)
            return ConvolvedBlock(attn, mlp, dim, rate, **dd)

        super().__init__(
            block,
            depths=depths,
            **Options(embed_dim=32) | options,
        )


# from the names of the authors' code, which begin as those of PVT v2
NAMES = (
    (r"\.mlp\.dwconv\.dwconv\.", ".mlp.dwconv."),
    (r"\.attn\.kv_g\.", ".attn.coarse.kv."),
    (r"\.attn\.local_conv_g\.", ".attn.coarse.local_conv."),
    (r"\.attn\.(sr|norm)\.", r".attn.coarse.\1."),
    (r"\.attn\.kv_l\.depth_conv\.", ".attn.mix.0."),
    (r"\.attn\.kv_l\.point_conv\.", ".attn.mix.1."),
    (r"\.attn\.fcs\.(\d)\.", r".attn.fine.\1.fc."),
    (r"\.attn\.single_heads\.(\d)\.", r".attn.fine.\1.kv."),
    (r"\.attn\.local_convs\.(\d)\.", r".attn.fine.\1.local_conv."),
)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict of ``model`` from one of the authors' code, or in its own layout."""
    rules = *names_of_pvt(len(model.feature_info)), *NAMES
    return rename(rules)(state_dict, model)


def _create(name: str, pretrained: bool, **options) -> FaViT:
    options = {"pretrained_filter_fn": checkpoint_filter_fn} | options
    return build(FaViT, name, pretrained, **options)


# no weights are released
default_cfgs = generate_default_cfgs({f"favit_b{i}": pretrained_cfg("stem.proj") for i in range(4)})


@register_model
def favit_b0(pretrained: bool = False, **options) -> FaViT:
    """3.4 M parameters, 0.6 G multiply-adds."""
    defaults = {"depths": (2, 2, 6, 2), "drop_path_rate": 0.1}
    return _create("favit_b0", pretrained, **defaults | options)


@register_model
def favit_b1(pretrained: bool = False, **options) -> FaViT:
    """13 M parameters, 2.4 G multiply-adds."""
    defaults = {"embed_dim": 64, "depths": (2, 2, 6, 2), "drop_path_rate": 0.1}
    return _create("favit_b1", pretrained, **defaults | options)


@register_model
def favit_b2(pretrained: bool = False, **options) -> FaViT:
    """25 M parameters, 4.5 G multiply-adds."""
    defaults = {"embed_dim": 64, "depths": (2, 3, 18, 3), "drop_path_rate": 0.1}
    return _create("favit_b2", pretrained, **defaults | options)


@register_model
def favit_b3(pretrained: bool = False, **options) -> FaViT:
    """48 M parameters, 8.5 G multiply-adds."""
    defaults = {"embed_dim": 96, "depths": (2, 3, 14, 3), "drop_path_rate": 0.3}
    return _create("favit_b3", pretrained, **defaults | options)
