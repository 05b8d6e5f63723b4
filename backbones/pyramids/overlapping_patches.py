"""A pyramid whose stages begin with overlapping patches, as in the second Pyramid Transformer.

Wang et al., "PVT v2: Improved Baselines with Pyramid Vision Transformer", arXiv:2106.13797.

Letters: B batch, C channels, H, W size of a feature map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from vidattn.backbones.pyramids.checkpoints import Rules
from vidattn.backbones.pyramids.doubling_pyramid import DoublingPyramid
from vidattn.backbones.pyramids.pyramid import Options


class OverlappingStem(nn.Module):
    """A cell for every 4 x 4 pixels, from the 7 x 7 around them."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.proj = nn.Conv2d(in_chans, dim, 7, stride=4, padding=3, **dd)
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H / 4, W / 4, C) from images (B, in_chans, H, W)."""
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class OverlappingDownsample(nn.Module):
    """A cell for every 2 x 2, from the 3 x 3 around them, behind the norm of the stage before."""

    def __init__(self, dim: int, out_dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.prenorm = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.proj = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1, **dd)
        self.norm = nn.LayerNorm(out_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H / 2, W / 2, out_dim) from (B, H, W, dim)."""
        x = self.prenorm(x).permute(0, 3, 1, 2)
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class OverlappingPyramid(DoublingPyramid):
    """Stages that begin with overlapping patches; takes images of any size.

    Args:
        block: as DoublingPyramid takes it.
        depths: blocks of each stage.
        options: as every pyramid takes them.
    """

    def __init__(
        self,
        block: Callable[..., nn.Module],
        *,
        depths: Sequence[int],
        **options: Unpack[Options],
    ):
        norm = partial(nn.LayerNorm, eps=1e-6)
        super().__init__(
            OverlappingStem, block, OverlappingDownsample, norm, depths=depths, **options
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
                fan_out = module.weight[:, 0].numel() // module.groups
                nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
                nn.init.zeros_(module.bias)


def names_of_pvt(num_stages: int) -> Rules:
    """What ``rename`` takes, from the names of tensors in files laid out as those of PVT v2.

    Args:
        num_stages: of the model.
    """
    rules = [(r"^head\.(?!fc\.)", "head.fc."), (r"^patch_embed1\.", "stem.")]
    rules.append((rf"^norm{num_stages}\.", "norm."))
    for i in range(1, num_stages + 1):
        rules.append((rf"^block{i}\.", f"stages.{i - 1}.blocks."))
        rules.append((rf"^patch_embed{i}\.", f"stages.{i - 1}.downsample."))
        rules.append((rf"^norm{i}\.", f"stages.{i}.downsample.prenorm."))
    return rules
