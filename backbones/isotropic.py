"""Isotropic NAT and DiNAT, and their counterpart with full attention: ViT with the same layout.

Hassani and Shi, "Dilated Neighborhood Attention Transformer", arXiv:2209.15001, section 4.
"""

from __future__ import annotations

import torch
from timm.layers import ClassifierHead, calculate_drop_path_rates
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from vidattn.backbones.attention_block import AttentionBlock
from vidattn.backbones.dinat import URL
from vidattn.backbones.dinat_s import patchify
from vidattn.backbones.neighborhood_attention import NeighborhoodAttention2d
from vidattn.backbones.neighborhood_checkpoint import checkpoint_filter_fn
from vidattn.backbones.pyramid import Pyramid, Stage, pretrained_cfg

PATCH = 16
# cells to a side at 224 pixels
SIDE = 14


class IsotropicTransformer(Pyramid):
    """Blocks of neighborhood attention on patches of 16 x 16 pixels, all at one resolution.

    Args:
        in_chans: channels of an image.
        num_classes: 0 for no classifier.
        global_pool: pooling of the head, as timm names it; "" for none.
        embed_dim: channels of a cell.
        depth: blocks.
        num_heads: of every block.
        window: cells along each axis that a cell reads; None for the 14 x 14 of an image of 224
            pixels, which then is full attention.
        dilation: distance between the cells of a window, in every other block from the second on.
        mlp_ratio: hidden channels of the perceptrons over their width.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout at the end of every branch.
        drop_path_rate: rate at which the last block leaves a branch out; it grows from 0.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 12,
        window: int | None = 7,
        dilation: int = 1,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        dd = {"device": device, "dtype": dtype}

        def block(index: int, rate: float) -> AttentionBlock:
            attn = NeighborhoodAttention2d(
                embed_dim,
                num_heads,
                window=window or SIDE,
                dilation=dilation if index % 2 else 1,
                pads=window is not None,
                proj_drop=proj_drop_rate,
                **dd,
            )
            return AttentionBlock(
                attn, mlp_ratio=mlp_ratio, drop=proj_drop_rate, drop_path=rate, **dd
            )

        rates = calculate_drop_path_rates(drop_path_rate, depth)
        super().__init__(
            patchify(PATCH, in_chans, embed_dim, **dd),
            # a stage to a block, so that the output of every block can be taken
            [Stage(nn.Identity(), [block(i, rate)]) for i, rate in enumerate(rates)],
            nn.LayerNorm(embed_dim, **dd),
            ClassifierHead(embed_dim, num_classes, global_pool, drop_rate, input_fmt="NHWC", **dd),
            in_chans=in_chans,
            taps=[(embed_dim, PATCH)] * depth,
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
