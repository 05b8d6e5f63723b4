"""L2ViT: attention inside windows and linear attention to the whole map, block by block.

Zheng, "The Linear Attention Resurrection in Vision Transformer", arXiv:2501.16182.

Letters: B batch, C channels, H, W size of a feature map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath, Mlp, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn.functional import pad
from typing_extensions import Unpack

from vidattn.backbones.layers.linear_attention import LinearAttention, LocalConcentration
from vidattn.backbones.layers.window_attention import WindowAttention
from vidattn.backbones.pyramids.checkpoints import rename
from vidattn.backbones.pyramids.doubling_pyramid import DoublingPyramid, build, check_stages
from vidattn.backbones.pyramids.pyramid import Options, pretrained_cfg


class ConvolvedPosition(nn.Module):
    """A depth-wise convolution beside a shortcut; it tells cells where they are."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        self.proj = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C), like ``x``."""
        return x + self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class L2ViTBlock(nn.Module):
    """Attention, what is local, and a perceptron, each beside a shortcut.

    Linear attention is followed by local concentration, that of windows by a convolved position.

    Args:
        dim: channels.
        num_heads: a divisor of ``dim``.
        window: cells to a side of the windows of attention; None for linear attention.
        mlp_ratio: hidden channels of the perceptron over ``dim``.
        drop_path: rate at which a branch is left out.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window: int | None,
        mlp_ratio: float,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.position = ConvolvedPosition(dim, **dd)
        self.norm1 = nn.LayerNorm(dim, **dd)
        if window is None:
            self.attn = LinearAttention(dim, num_heads, **dd)
            self.local = LocalConcentration(dim, drop_path, **dd)
        else:
            sides = (window, window)
            self.attn = WindowAttention(
                dim, num_heads, sides, (0, 0), has_bias=False, shrinks=False, **dd
            )
            self.local = ConvolvedPosition(dim, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C), like ``x``."""
        x = self.position(x)
        x = self.local(x + self.drop_path(self.attn(self.norm1(x))))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ConvStem(nn.Module):
    """Two convolutions with norms that leave a cell for every 4 x 4 pixels of a padded image."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd),
            nn.BatchNorm2d(dim // 2, **dd),
            nn.ReLU(),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd),
            nn.BatchNorm2d(dim, **dd),
        )
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H / 4, W / 4, C) from images (B, in_chans, H, W)."""
        x = pad(x, [0, -x.shape[3] % 4, 0, -x.shape[2] % 4])
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class Downsample(nn.Module):
    """A norm, and a convolution that leaves a cell for every 2 x 2 of a padded map."""

    def __init__(self, dim: int, out_dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(dim, **dd)
        self.proj = nn.Conv2d(dim, out_dim, 2, stride=2, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H / 2, W / 2, out_dim) from (B, H, W, dim)."""
        x = pad(self.norm(x), [0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2])
        return self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class L2ViT(DoublingPyramid):
    """L2ViT; takes images of any size.

    Args:
        depths: blocks of each stage; every other one, from the second on, has linear attention.
        num_heads: of each stage.
        window: cells to a side of the windows of the other blocks.
        mlp_ratio: hidden channels of the perceptrons over their width.
        options: as every pyramid takes them.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window: int = 7,
        mlp_ratio: float = 4.0,
        **options: Unpack[Options],
    ):
        check_stages(depths=depths, num_heads=num_heads)

        def block(dim: int, rate: float, stage: int, index: int, **dd) -> L2ViTBlock:
            options = {"mlp_ratio": mlp_ratio, "drop_path": rate, **dd}
            local = None if index % 2 else window
            return L2ViTBlock(dim, num_heads[stage], window=local, **options)

        super().__init__(
            ConvStem,
            block,
            Downsample,
            depths=depths,
            **options,
        )

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Draw the weights from which training starts.

        Args:
            needs_reset: whether the tensors hold nothing yet, as after ``to_empty``.
        """
        super().init_weights(needs_reset)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)


# from the names of the authors
NAMES = (
    (r"^downsample_layers\.0\.(?:proj\.)?", "stem."),
    (r"^downsample_layers\.(\d)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.cpe\.0\.", ".position."),
    (r"\.cpe\.1\.", ".local."),
    (r"\.norm3\.", ".local.norm."),
    (r"\.local_mp\.", ".local."),
    (r"^head\.(?!fc\.)", "head.fc."),
)
checkpoint_filter_fn = rename(NAMES)


FILES = "https://github.com/ChuanyangZheng/L2ViT/releases/download/v1.0/"
default_cfgs = generate_default_cfgs(
    {
        "l2vit_tiny.in1k": pretrained_cfg(
            "stem.proj.0", url=f"{FILES}L2ViT-Tiny-checkpoint-best-ema.pth", license="mit"
        )
    }
)


@register_model
def l2vit_tiny(pretrained: bool = False, **options) -> L2ViT:
    """29 M parameters, 4.7 G multiply-adds.

    The rate of dropped paths is that of a model of its size, ConvNeXt-T; its own is not published.
    """
    defaults = {"depths": (2, 2, 6, 2), "drop_path_rate": 0.1}
    options = {"pretrained_filter_fn": checkpoint_filter_fn} | defaults | options
    return build(L2ViT, "l2vit_tiny", pretrained, **options)
