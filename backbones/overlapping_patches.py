"""A pyramid whose stages begin with overlapping patches, as in the second Pyramid Transformer.

Wang et al., "PVT v2: Improved Baselines with Pyramid Vision Transformer", arXiv:2106.13797.

Letters: B batch, C channels, H, W size of a feature map.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from vidattn.backbones.doubling_pyramid import DoublingPyramid


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
        in_chans: channels of an image.
        embed_dim: channels of the first stage.
        options: of DoublingPyramid.
    """

    def __init__(
        self,
        block: Callable[[int, float, int, int], nn.Module],
        *,
        in_chans: int,
        embed_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__(
            OverlappingStem(in_chans, embed_dim, **dd),
            block,
            OverlappingDownsample,
            partial(nn.LayerNorm, eps=1e-6),
            in_chans=in_chans,
            embed_dim=embed_dim,
            **options,
            **dd,
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


def rename(name: str, num_stages: int) -> str:
    """The name that a tensor has here, from that in files laid out as those of PVT v2.

    Args:
        name: "patch_embed1.proj.weight", "block1.0.norm1.weight", "norm1.weight" and the like.
        num_stages: of the model.
    """
    found = re.match(r"^(patch_embed|block|norm)(\d+)\.(.*)$", name)
    if not found:
        return re.sub(r"^head\.(?!fc\.)", "head.fc.", name)
    kind, stage, rest = found[1], int(found[2]), found[3]
    if kind == "block":
        index, _, rest = rest.partition(".")
        return f"stages.{stage - 1}.blocks.{index}.{rest}"
    if kind == "norm":
        return (
            f"norm.{rest}" if stage == num_stages else f"stages.{stage}.downsample.prenorm.{rest}"
        )
    return f"stem.{rest}" if stage == 1 else f"stages.{stage - 1}.downsample.{rest}"
