"""FaViT: a pyramid of factorized attention.

Qin et al., "Factorization Vision Transformer: Modeling Long Range Dependency with Local Window
Cost", arXiv:2312.08614.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vidattn.backbones.convolved_block import ConvolvedBlock, ConvolvedMlp
from vidattn.backbones.doubling_pyramid import build, check_stages
from vidattn.backbones.factorized_attention import FactorizedAttention
from vidattn.backbones.overlapping_patches import OverlappingPyramid, rename
from vidattn.backbones.pyramid import pretrained_cfg


class FaViT(OverlappingPyramid):
    """FaViT; takes images of any size.

    Args:
        in_chans: channels of an image.
        num_classes: 0 for no classifier.
        global_pool: pooling of the head, as timm names it; "" for none.
        embed_dim: channels of the first stage; each stage doubles them.
        depths: blocks of each stage.
        num_heads: of each stage.
        strides: cells to a side of the patches that attention reads, for each stage.
        mlp_ratios: hidden channels of the perceptrons over their width, for each stage.
        window: cells to a side of the windows that attention reads.
        drop_rate: dropout before the classifier.
        drop_path_rate: rate at which the last block leaves a branch out; it grows from 0.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 32,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        strides: Sequence[int] = (8, 4, 2, 1),
        mlp_ratios: Sequence[float] = (8, 6, 4, 4),
        window: int = 7,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_stages(depths=depths, num_heads=num_heads, strides=strides, mlp_ratios=mlp_ratios)
        dd = {"device": device, "dtype": dtype}

        def block(dim: int, rate: float, stage: int, index: int) -> ConvolvedBlock:
            attn = FactorizedAttention(dim, num_heads[stage], strides[stage], window=window, **dd)
            mlp = ConvolvedMlp(dim, int(dim * mlp_ratios[stage]), **dd)
            return ConvolvedBlock(attn, mlp, dim, rate, **dd)

        super().__init__(
            block,
            embed_dim=embed_dim,
            depths=depths,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            **dd,
        )


# (pattern, replacement) from the names of the authors' code, each applied in this order
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
    state_dict = state_dict.get("model", state_dict)
    if any(name.startswith("stages.") for name in state_dict):
        return state_dict
    renamed = {}
    for name, tensor in state_dict.items():
        name = rename(name, len(model.feature_info))
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


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
