"""Isotropic NAT and DiNAT, and their counterpart with full attention: ViT with the same layout.

Hassani and Shi, "Dilated Neighborhood Attention Transformer", arXiv:2209.15001, section 4.
"""

from __future__ import annotations

from functools import partial

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn
from typing_extensions import Unpack

from vidattn.backbones.dinat import URL
from vidattn.backbones.layers.attention_block import AttentionBlock
from vidattn.backbones.layers.neighborhood_attention import NeighborhoodAttention2d
from vidattn.backbones.layers.patchify import patchify
from vidattn.backbones.pyramids.doubling_pyramid import DoublingPyramid
from vidattn.backbones.pyramids.neighborhood_checkpoint import checkpoint_filter_fn
from vidattn.backbones.pyramids.pyramid import Options, pretrained_cfg

PATCH = 16
# cells to a side at 224 pixels
SIDE = 14


class IsotropicTransformer(DoublingPyramid):
    """Blocks of neighborhood attention on patches of 16 x 16 pixels, all at one resolution.

    Args:
        depth: blocks.
        num_heads: of every block.
        window: cells along each axis that a cell reads; None for the 14 x 14 of an image of 224
            pixels, which then is full attention.
        dilation: distance between the cells of a window, in every other block from the second on.
        mlp_ratio: hidden channels of the perceptrons over their width.
        proj_drop_rate: dropout at the end of every branch.
        options: as every pyramid takes them.
    """

    def __init__(
        self,
        *,
        depth: int = 12,
        num_heads: int = 12,
        window: int | None = 7,
        dilation: int = 1,
        mlp_ratio: float = 4.0,
        proj_drop_rate: float = 0.0,
        **options: Unpack[Options],
    ):
        def block(dim: int, rate: float, stage: int, index: int, **dd) -> AttentionBlock:
            attn = NeighborhoodAttention2d(
                dim,
                num_heads,
                window=window or SIDE,
                dilation=dilation if stage % 2 else 1,
                pads=window is not None,
                proj_drop=proj_drop_rate,
                **dd,
            )
            return AttentionBlock(
                attn, mlp_ratio=mlp_ratio, drop=proj_drop_rate, drop_path=rate, **dd
            )

        super().__init__(
            partial(patchify, PATCH),
            block,
            nn.Identity,
            growth=1,
            patch=PATCH,
            # a stage to a block, so that the output of every block can be taken
            depths=(1,) * depth,
            **Options(embed_dim=384) | options,
        )

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The position biases."""
        return {"*.rpb"}


def _create(name: str, pretrained: bool, **options) -> IsotropicTransformer:
    return build_model_with_cfg(
        IsotropicTransformer,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **options,
    )


BASE = {"embed_dim": 768, "num_heads": 24, "drop_path_rate": 0.4}
default_cfgs = generate_default_cfgs(
    {
        f"{ours}_{size}.shi_in1k": pretrained_cfg(
            "stem.proj",
            reduction=PATCH,
            url=f"{URL}isotropic/{theirs}_{size}_in1k_224.pth",
            license="mit",
        )
        for ours, theirs in (
            ("nat_iso", "nat_isotropic"),
            ("dinat_iso", "dinat_isotropic"),
            ("vitrpb", "vitrpb"),
        )
        for size in ("small", "base")
    }
)


@register_model
def nat_iso_small(pretrained: bool = False, **options) -> IsotropicTransformer:
    """22 M parameters, 4.3 G multiply-adds."""
    return _create("nat_iso_small", pretrained, **{"drop_path_rate": 0.1} | options)


@register_model
def nat_iso_base(pretrained: bool = False, **options) -> IsotropicTransformer:
    """86 M parameters, 17.0 G multiply-adds."""
    return _create("nat_iso_base", pretrained, **BASE | options)


@register_model
def dinat_iso_small(pretrained: bool = False, **options) -> IsotropicTransformer:
    """22 M parameters, 4.3 G multiply-adds."""
    defaults = {"dilation": 2, "drop_path_rate": 0.1}
    return _create("dinat_iso_small", pretrained, **defaults | options)


@register_model
def dinat_iso_base(pretrained: bool = False, **options) -> IsotropicTransformer:
    """86 M parameters, 17.0 G multiply-adds."""
    return _create("dinat_iso_base", pretrained, **BASE | {"dilation": 2} | options)


@register_model
def vitrpb_small(pretrained: bool = False, **options) -> IsotropicTransformer:
    """22 M parameters, 4.6 G multiply-adds; full attention with relative position biases."""
    defaults = {"window": None, "drop_path_rate": 0.1}
    return _create("vitrpb_small", pretrained, **defaults | options)


@register_model
def vitrpb_base(pretrained: bool = False, **options) -> IsotropicTransformer:
    """87 M parameters, 17.5 G multiply-adds; full attention with relative position biases."""
    return _create("vitrpb_base", pretrained, **BASE | {"window": None} | options)
