"""NAT: a pyramid of neighborhood attention.

Hassani et al., "Neighborhood Attention Transformer", arXiv:2204.07143, CVPR 2023.

Letters: B batch, C channels, H, W size of a feature map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from typing_extensions import Unpack

from vidattn.backbones.layers.attention_block import AttentionBlock
from vidattn.backbones.layers.neighborhood_attention import NeighborhoodAttention2d
from vidattn.backbones.pyramids.doubling_pyramid import DoublingPyramid, build, check_stages
from vidattn.backbones.pyramids.neighborhood_checkpoint import checkpoint_filter_fn
from vidattn.backbones.pyramids.pyramid import Options, pretrained_cfg


class ConvStem(nn.Module):
    """Two convolutions that leave a cell for every 4 x 4 pixels, and a norm."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd),
        )
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H / 4, W / 4, C) from images (B, in_chans, H, W)."""
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class ConvDownsample(nn.Module):
    """A convolution that leaves a cell for every 2 x 2, and a norm."""

    def __init__(self, dim: int, out_dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.reduction = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1, bias=False, **dd)
        self.norm = nn.LayerNorm(out_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H / 2, W / 2, out_dim) from (B, H, W, dim)."""
        return self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class NeighborhoodTransformer(DoublingPyramid):
    """NAT; DiNAT with dilations; DiNAT_s with patches. Takes images of any size.

    Args:
        depths: blocks of each stage.
        num_heads: of each stage.
        window: cells along each axis that a cell reads.
        dilations: distance between the cells of a window, for each stage; every other block,
            beginning with the first, has none.
        mlp_ratio: hidden channels of the perceptrons over their width.
        layer_scale: factor of every branch to begin with; none for None.
        proj_drop_rate: dropout at the end of every branch.
        stem_layer: takes channels of the image and of the first stage; a cell is 4 x 4 pixels.
        downsample_layer: takes the channels before and after; a cell becomes 2 x 2 cells.
        options: as every pyramid takes them.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int] = (3, 4, 6, 5),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        window: int = 7,
        dilations: Sequence[int] = (1, 1, 1, 1),
        mlp_ratio: float = 3.0,
        layer_scale: float | None = None,
        proj_drop_rate: float = 0.0,
        stem_layer: Callable[..., nn.Module] = ConvStem,
        downsample_layer: Callable[..., nn.Module] = ConvDownsample,
        **options: Unpack[Options],
    ):
        check_stages(depths=depths, num_heads=num_heads, dilations=dilations)

        def block(dim: int, rate: float, stage: int, index: int, **dd) -> AttentionBlock:
            attn = NeighborhoodAttention2d(
                dim,
                num_heads[stage],
                window=window,
                dilation=dilations[stage] if index % 2 else 1,
                proj_drop=proj_drop_rate,
                **dd,
            )
            return AttentionBlock(
                attn,
                mlp_ratio=mlp_ratio,
                drop=proj_drop_rate,
                drop_path=rate,
                layer_scale=layer_scale,
                **dd,
            )

        super().__init__(
            stem_layer,
            block,
            downsample_layer,
            depths=depths,
            **Options(embed_dim=64) | options,
        )

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The position biases."""
        return {"*.rpb"}


def create(name: str, pretrained: bool, **options) -> NeighborhoodTransformer:
    """A registered model, by the conventions of timm."""
    options = {"pretrained_filter_fn": checkpoint_filter_fn} | options
    return build(NeighborhoodTransformer, name, pretrained, **options)


def weights(url: str = "", **fields) -> dict:
    """timm's description of released weights with the stem of NAT."""
    return pretrained_cfg("stem.proj.0", url=url, license="mit", **fields)


URL = "https://shi-labs.com/projects/nat/checkpoints/CLS/"
SIZES = ("mini", "tiny", "small", "base")
default_cfgs = generate_default_cfgs(
    {f"nat_{size}.shi_in1k": weights(f"{URL}nat_{size}.pth") for size in SIZES}
    | {f"nat_{size}.hf_in1k": weights(hf_hub_id=f"shi-labs/nat-{size}-in1k-224") for size in SIZES}
)


@register_model
def nat_mini(pretrained: bool = False, **options) -> NeighborhoodTransformer:
    """20 M parameters, 2.7 G multiply-adds."""
    defaults = {"depths": (3, 4, 6, 5), "drop_path_rate": 0.2}
    return create("nat_mini", pretrained, **defaults | options)


@register_model
def nat_tiny(pretrained: bool = False, **options) -> NeighborhoodTransformer:
    """28 M parameters, 4.3 G multiply-adds."""
    defaults = {"depths": (3, 4, 18, 5), "drop_path_rate": 0.2}
    return create("nat_tiny", pretrained, **defaults | options)


@register_model
def nat_small(pretrained: bool = False, **options) -> NeighborhoodTransformer:
    """51 M parameters, 7.8 G multiply-adds."""
    defaults = {
        "embed_dim": 96,
        "depths": (3, 4, 18, 5),
        "num_heads": (3, 6, 12, 24),
        "mlp_ratio": 2.0,
        "layer_scale": 1e-5,
        "drop_path_rate": 0.3,
    }
    return create("nat_small", pretrained, **defaults | options)


@register_model
def nat_base(pretrained: bool = False, **options) -> NeighborhoodTransformer:
    """90 M parameters, 13.7 G multiply-adds."""
    defaults = {
        "embed_dim": 128,
        "depths": (3, 4, 18, 5),
        "num_heads": (4, 8, 16, 32),
        "mlp_ratio": 2.0,
        "layer_scale": 1e-5,
        "drop_path_rate": 0.5,
    }
    return create("nat_base", pretrained, **defaults | options)
