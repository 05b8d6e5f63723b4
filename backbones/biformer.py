"""BiFormer: a pyramid of bi-level routing attention.

Zhu et al., "BiFormer: Vision Transformer with Bi-Level Routing Attention", arXiv:2303.08810.

Letters: B batch, C channels, H, W size of a feature map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from timm.layers import DropPath, Mlp
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from typing_extensions import Unpack

from vidattn.backbones.exporting import attention
from vidattn.backbones.layers.bilevel_routing import BiLevelRoutingAttention
from vidattn.backbones.pyramids.checkpoints import rename
from vidattn.backbones.pyramids.doubling_pyramid import DoublingPyramid, build, check_stages
from vidattn.backbones.pyramids.pyramid import Options, pretrained_cfg

HEAD_DIM = 32


class FullAttention(nn.Module):
    """Attention of every cell to every cell, and a depth-wise convolution of its input."""

    def __init__(self, dim: int, num_heads: int = 8, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **dd)
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C), like ``x``."""
        tokens = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).flatten(1, 2)
        q, k, v = tokens.permute(2, 0, 3, 1, 4).unbind(0)
        out = attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return self.proj(out + self.lepe(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class BiFormerBlock(nn.Module):
    """Attention and a perceptron, each behind a norm and beside a shortcut.

    Args:
        dim: channels.
        attn: of the same width.
        mlp_ratio: hidden channels of the perceptron over ``dim``.
        drop_path: rate at which a branch is left out.
        has_position: whether a depth-wise convolution comes first.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        *,
        mlp_ratio: float,
        drop_path: float = 0.0,
        has_position: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        convolve = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd) if has_position else None
        self.pos_embed = convolve
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W), like ``x``."""
        if self.pos_embed is not None:
            x = x + self.pos_embed(x)
        x = x.permute(0, 2, 3, 1)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x.permute(0, 3, 1, 2)


def conv_stem(in_chans: int, dim: int, **dd) -> nn.Sequential:
    """Two convolutions that leave a cell for every 4 x 4 pixels."""
    half = dim // 2
    return nn.Sequential(
        nn.Conv2d(in_chans, half, 3, stride=2, padding=1, **dd),
        nn.BatchNorm2d(half, **dd),
        nn.GELU(),
        nn.Conv2d(half, dim, 3, stride=2, padding=1, **dd),
        nn.BatchNorm2d(dim, **dd),
    )


def conv_downsample(dim: int, out_dim: int, **dd) -> nn.Sequential:
    """A convolution that leaves a cell for every 2 x 2."""
    conv = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1, **dd)
    return nn.Sequential(conv, nn.BatchNorm2d(out_dim, **dd))


def patch_stem(in_chans: int, dim: int, **dd) -> nn.Sequential:
    """Patches of 4 x 4 pixels, as in Swin."""
    return nn.Sequential(nn.Conv2d(in_chans, dim, 4, stride=4, **dd), nn.BatchNorm2d(dim, **dd))


def patch_downsample(dim: int, out_dim: int, **dd) -> nn.Sequential:
    """Patches of 2 x 2 cells, as in Swin."""
    return nn.Sequential(nn.BatchNorm2d(dim, **dd), nn.Conv2d(dim, out_dim, 2, stride=2, **dd))


class BiFormer(DoublingPyramid):
    """BiFormer; takes images of any size.

    Args:
        depths: blocks of each stage.
        topks: regions that a region reads, for each stage; None for full attention.
        mlp_ratio: hidden channels of the perceptrons over their width.
        has_positions: whether every block begins with a depth-wise convolution.
        stem_layer: takes channels of the image and of the first stage; a cell is 4 x 4 pixels.
        downsample_layer: takes the channels before and after; a cell becomes 2 x 2 cells.
        options: as every pyramid takes them.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 2, 8, 2),
        topks: Sequence[int | None] = (1, 4, 16, None),
        mlp_ratio: float = 3.0,
        has_positions: bool = True,
        stem_layer: Callable[..., nn.Module] = conv_stem,
        downsample_layer: Callable[..., nn.Module] = conv_downsample,
        **options: Unpack[Options],
    ):
        check_stages(depths=depths, topks=topks)

        def block(dim: int, rate: float, stage: int, index: int, **dd) -> BiFormerBlock:
            topk = topks[stage]
            attn: nn.Module
            if topk is None:
                attn = FullAttention(dim, **dd)
            else:
                attn = BiLevelRoutingAttention(dim, dim // HEAD_DIM, topk, **dd)
            return BiFormerBlock(
                dim, attn, mlp_ratio=mlp_ratio, drop_path=rate, has_position=has_positions, **dd
            )

        super().__init__(
            stem_layer,
            block,
            downsample_layer,
            nn.BatchNorm2d,
            output_fmt="NCHW",
            depths=depths,
            **Options(embed_dim=64) | options,
        )


# from the names of the authors
NAMES = (
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.qkv\.qkv\.", ".qkv."),
    (r"\.wo\.", ".proj."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.[23]\.", ".mlp.fc2."),
    (r"^head\.(?!fc\.)", "head.fc."),
)
checkpoint_filter_fn = rename(NAMES)


def _create(name: str, pretrained: bool, **options) -> BiFormer:
    options = {"pretrained_filter_fn": checkpoint_filter_fn} | options
    return build(BiFormer, name, pretrained, **options)


SHARE = "https://api.onedrive.com/v1.0/shares/s!AkBbczdRlZvCh{}/root/content"
FILES = {
    "tiny": "HEOoGkgwgQzEDlM",
    "small": "HDyM-x9KWRBZ832",
    "base": "HI_XPhoadjaNxtO",
    "stl": "Sf-m7ujkvx9lIQ1",
}
default_cfgs = generate_default_cfgs(
    {
        f"biformer_{size}.in1k": pretrained_cfg("stem.0", url=SHARE.format(file))
        for size, file in FILES.items()
    }
)


@register_model
def biformer_tiny(pretrained: bool = False, **options) -> BiFormer:
    """13 M parameters, 2.2 G multiply-adds."""
    defaults = {"depths": (2, 2, 8, 2), "drop_path_rate": 0.1}
    return _create("biformer_tiny", pretrained, **defaults | options)


@register_model
def biformer_small(pretrained: bool = False, **options) -> BiFormer:
    """26 M parameters, 4.5 G multiply-adds."""
    defaults = {"depths": (4, 4, 18, 4), "drop_path_rate": 0.15}
    return _create("biformer_small", pretrained, **defaults | options)


@register_model
def biformer_base(pretrained: bool = False, **options) -> BiFormer:
    """57 M parameters, 9.8 G multiply-adds."""
    defaults = {"embed_dim": 96, "depths": (4, 4, 18, 4), "drop_path_rate": 0.1}
    return _create("biformer_base", pretrained, **defaults | options)


@register_model
def biformer_stl(pretrained: bool = False, **options) -> BiFormer:
    """28 M parameters, 4.6 G multiply-adds; the layout of Swin-T."""
    defaults = {
        "embed_dim": 96,
        "depths": (2, 2, 6, 2),
        "mlp_ratio": 4.0,
        "has_positions": False,
        "drop_path_rate": 0.1,
        "stem_layer": patch_stem,
        "downsample_layer": patch_downsample,
    }
    return _create("biformer_stl", pretrained, **defaults | options)
