"""SwiFT: a pyramid of shifted windows in the three axes of a brain and in time.

Kim et al., "SwiFT: Swin 4D fMRI Transformer", arXiv:2307.05916, NeurIPS 2023. Sizes and names are
those of the released code, as its script for the paper's main task runs it.

Letters: B batch, C channels, X, Y, Z, T size of a scan or its map.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import partial

import torch
from einops import rearrange
from timm.layers import get_device_dtype, trunc_normal_
from timm.models import generate_default_cfgs, register_model, register_notrace_function
from torch import Tensor, nn
from typing_extensions import Unpack

from vidattn.backbones.layers.attention_block import AttentionBlock
from vidattn.backbones.layers.window_attention import PatchMerging, WindowAttention, pad_axes
from vidattn.backbones.pyramids.checkpoints import new_name, tensors_of
from vidattn.backbones.pyramids.doubling_pyramid import build, check_stages
from vidattn.backbones.pyramids.pyramid import Options, pretrained_cfg
from vidattn.backbones.pyramids.volume_pyramid import VolumePyramid


class ScanPatches(nn.Module):
    """A cell for every patch of a scan, padded to whole patches."""

    def __init__(self, in_chans: int, dim: int, patch: Sequence[int], device=None, dtype=None):
        super().__init__()
        self.patch = list(patch)
        self.fc = nn.Linear(in_chans * math.prod(patch), dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, X, Y, Z, T, C) patches of scans (B, in_chans, width, depth, height, frames)."""
        x = pad_axes(x, 2, self.patch).movedim(1, -1)
        for axis in (4, 3, 2, 1):
            x = x.unflatten(axis, (-1, self.patch[axis - 1]))
        return self.fc(x.permute(0, 1, 3, 5, 7, 2, 4, 6, 8, 9).flatten(5))


class Positions(nn.Module):
    """Adds what was learned for every place of a map, and for every frame.

    Args:
        dim: channels.
        size: X, Y, Z and T of a map; a map may have fewer frames.
    """

    def __init__(self, dim: int, size: Sequence[int], device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.pos_embed = nn.Parameter(torch.empty(*size[:3], 1, dim, **dd))
        self.time_embed = nn.Parameter(torch.empty(size[3], dim, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw what training starts from."""
        trunc_normal_(self.pos_embed, std=0.02)
        trunc_normal_(self.time_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(B, X, Y, Z, T, C), like ``x``."""
        return add_positions(x, self.pos_embed, self.time_embed)


@register_notrace_function
def add_positions(x: Tensor, places: Tensor, frames: Tensor) -> Tensor:
    """Add (X, Y, Z, 1, C) and the first T of (frames, C) to a map (B, X, Y, Z, T, C)."""
    if x.shape[1:4] != places.shape[:3] or x.shape[4] > frames.shape[0]:
        raise ValueError(
            f"got a map of {list(x.shape[1:4])} cells and {x.shape[4]} frames, but positions are "
            f"embedded for {list(places.shape[:3])} cells and up to {frames.shape[0]} frames: "
            "create the model with the scan_size of these scans"
        )
    return x + places + frames[: x.shape[4]]


class SwiFT(VolumePyramid):
    """SwiFT; takes scans of one size, and of any length up to that it is made for.

    The blocks of the last stage read the whole brain, in windows of time that are not shifted. As
    in the released code, the last map has no norm. The released model tells two classes apart by
    one output, the logit of the second.

    Args:
        scan_size: voxels along each axis, and frames.
        patch: voxels along each axis of a patch, and frames.
        depths: blocks of each stage.
        num_heads: of each stage.
        window: cells along each axis, and frames, that a cell reads; every other block shifts
            them by half.
        mlp_ratio: hidden channels of the perceptrons over their width.
        options: as every pyramid takes them.
    """

    def __init__(
        self,
        *,
        scan_size: Sequence[int] = (96, 96, 96, 20),
        patch: Sequence[int] = (6, 6, 6, 1),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window: Sequence[int] = (4, 4, 4, 4),
        mlp_ratio: float = 4.0,
        **options: Unpack[Options],
    ):
        check_stages(depths=depths, num_heads=num_heads)
        sizes = [[-(-voxels // side) for voxels, side in zip(scan_size, patch)]]
        for _ in depths[1:]:
            sizes.append([*(-(-cells // 2) for cells in sizes[-1][:3]), sizes[-1][3]])

        def block(dim: int, rate: float, stage: int, index: int, **dd) -> AttentionBlock:
            is_last = stage == len(depths) - 1
            sides = [*sizes[-1][:3], window[3]] if is_last else window
            shift = [0 if is_last or index % 2 == 0 else side // 2 for side in sides]
            attn = WindowAttention(dim, num_heads[stage], sides, shift, has_bias=False, **dd)
            return AttentionBlock(attn, mlp_ratio=mlp_ratio, drop_path=rate, **dd)

        super().__init__(
            partial(ScanPatches, patch=patch),
            block,
            partial(PatchMerging, axes=(3, 2, 1)),
            nn.Identity,
            patch=patch[0],
            depths=depths,
            **Options(in_chans=1, num_classes=1, embed_dim=36) | options,
        )
        for stage, tap, size in zip(self.stages, self.feature_info, sizes):
            positions = Positions(tap["num_chs"], size, **get_device_dtype(self))
            stage.downsample = nn.Sequential(stage.downsample, positions)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The position embeddings."""
        return {"*.pos_embed", "*.time_embed"}


# from the names of the authors
NAMES = (
    (r"^(?:model\.)?patch_embed\.", "stem."),
    (r"^(?:model\.)?pos_embeds\.(\d+)\.", r"stages.\1.downsample.1."),
    (r"^(?:model\.)?layers\.(\d+)\.downsample\.", "stages.{next}.downsample.0."),
    (r"^(?:model\.)?layers\.(\d+)\.blocks\.", r"stages.\1.blocks."),
    (r"\.mlp\.linear([12])\.", r".mlp.fc\1."),
    (r"^output_head\.head\.", "head.fc."),
)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict of ``model`` from one of the authors, or in its own layout."""
    renamed = {}
    for name, tensor in tensors_of(state_dict).items():
        # of no use to them either
        if re.fullmatch(r"(model\.)?norm\.(weight|bias)", name):
            continue
        name = new_name(name, NAMES)
        # theirs have the channels first, and axes of one cell
        if name.endswith(".pos_embed") and tensor.dim() == 6:
            tensor = rearrange(tensor, "1 c x y z 1 -> x y z 1 c")
        elif name.endswith(".time_embed") and tensor.dim() == 6:
            tensor = rearrange(tensor, "1 c 1 1 1 t -> t c")
        renamed[name] = tensor
    return renamed


default_cfgs = generate_default_cfgs(
    {
        "swift": pretrained_cfg(
            "stem.fc",
            # timm knows two axes
            input_size=(1, 96, 96),
            pool_size=(2, 2),
            num_classes=1,
            # scans are normalized one by one
            mean=(0.0,),
            std=(1.0,),
        )
    }
)


@register_model
def swift(pretrained: bool = False, **options) -> SwiFT:
    """4.3 M parameters, the one size of the paper."""
    defaults = {"depths": (2, 2, 6, 2), "pretrained_filter_fn": checkpoint_filter_fn}
    return build(SwiFT, "swift", pretrained, **defaults | options)
