"""Video Swin: a pyramid of shifted windows in space and time.

Liu et al., "Video Swin Transformer", arXiv:2106.13230, CVPR 2022.

Letters: B batch, C channels, T, H, W size of a video or its map.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import partial

import torch
from einops import rearrange
from timm.models import adapt_input_conv, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn.functional import interpolate
from typing_extensions import Unpack

from vidattn.backbones.layers.attention_block import AttentionBlock
from vidattn.backbones.layers.window_attention import PatchMerging, WindowAttention, pad_axes
from vidattn.backbones.pyramids.checkpoints import new_name, tensors_of
from vidattn.backbones.pyramids.doubling_pyramid import build, check_stages
from vidattn.backbones.pyramids.pyramid import Options, pretrained_cfg
from vidattn.backbones.pyramids.volume_pyramid import VolumePyramid


class VideoPatches(nn.Module):
    """A cell for every patch of a video, padded to whole patches, and a norm."""

    def __init__(self, in_chans: int, dim: int, patch: Sequence[int], device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.patch = list(patch)
        self.proj = nn.Conv3d(in_chans, dim, tuple(patch), stride=tuple(patch), **dd)
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, H, W, C) patches of videos (B, in_chans, frames, height, width)."""
        return self.norm(self.proj(pad_axes(x, 2, self.patch)).movedim(1, -1))


class VideoSwin(VolumePyramid):
    """Video Swin; takes videos of any size and length.

    The released weights for Something-Something v2 are of a base model with ``window=(16, 7, 7)``.

    Args:
        patch: frames, rows and columns of a patch.
        depths: blocks of each stage.
        num_heads: of each stage.
        window: frames, rows and columns that a cell reads; every other block shifts them by half.
        mlp_ratio: hidden channels of the perceptrons over their width.
        options: as every pyramid takes them.
    """

    def __init__(
        self,
        *,
        patch: Sequence[int] = (2, 4, 4),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window: Sequence[int] = (8, 7, 7),
        mlp_ratio: float = 4.0,
        **options: Unpack[Options],
    ):
        check_stages(depths=depths, num_heads=num_heads)

        def block(dim: int, rate: float, stage: int, index: int, **dd) -> AttentionBlock:
            shift = [side // 2 if index % 2 else 0 for side in window]
            attn = WindowAttention(dim, num_heads[stage], window, shift, by_place=True, **dd)
            return AttentionBlock(attn, mlp_ratio=mlp_ratio, drop_path=rate, **dd)

        super().__init__(
            partial(VideoPatches, patch=patch),
            block,
            partial(PatchMerging, axes=(2, 3)),
            patch=patch[-1],
            depths=depths,
            **Options(num_classes=400) | options,
        )

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The position biases."""
        return {"*.rpb"}


# from the names of the authors, then of torchvision
NAMES = (
    (r"^backbone\.", ""),
    (r"^layers\.(\d+)\.downsample\.", "stages.{next}.downsample."),
    (r"^layers\.(\d+)\.blocks\.", r"stages.\1.blocks."),
    (r"^cls_head\.fc_cls\.", "head.fc."),
    (r"^patch_embed\.", "stem."),
    (r"\.relative_position_bias_table$", ".rpb"),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
    (r"^head\.(?!fc\.)", "head.fc."),
)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict of ``model`` from one of the authors, of torchvision, or in its own layout.

    What was trained with other windows in space, or with other channels, is resized.
    """
    renamed = {}
    for name, tensor in tensors_of(state_dict).items():
        # made from the window by whoever needs it
        if name.endswith(".relative_position_index"):
            continue
        # stages and what lies between them take turns, in those of torchvision
        if found := re.match(r"features\.(\d+)\.(\d+\.)?", name):
            stage, is_between = divmod(int(found[1]), 2)
            place = f"{stage + 1}.downsample." if is_between else f"{stage}.blocks.{found[2]}"
            name = f"stages.{place}{name[found.end() :]}"
        renamed[new_name(name, NAMES)] = tensor
    return _resize(renamed, model)


def _resize(state_dict: dict[str, Tensor], model: VideoSwin) -> dict[str, Tensor]:
    """Position biases for the windows of a model, and a stem for its channels."""
    for i, stage in enumerate(model.stages):
        for j, block in enumerate(stage.blocks):
            name = f"stages.{i}.blocks.{j}.attn.rpb"
            if name in state_dict:
                state_dict[name] = resize_biases(state_dict[name], block.attn.window)
    name = "stem.proj.weight"
    if name in state_dict and state_dict[name].dim() == 5:
        # timm knows the layers of images: patches of two axes
        weight = state_dict[name].flatten(2, 3)
        weight = adapt_input_conv(model.in_chans, weight, weight.shape[1])
        state_dict[name] = weight.unflatten(2, state_dict[name].shape[2:4])
    return state_dict


def resize_biases(rpb: Tensor, window: Sequence[int]) -> Tensor:
    """Position biases of windows with other heights and widths, resized as the authors do.

    Args:
        rpb: (distances, n), of windows as long as the new ones in time, and square.
        window: frames, rows and columns of the new windows.

    Returns:
        (distances, n) for these windows; ``rpb`` where it was made for others.
    """
    frames, *size = (2 * side - 1 for side in window)
    side = math.isqrt(len(rpb) // frames)
    if len(rpb) != frames * side**2 or [side, side] == size:
        return rpb
    table = rearrange(rpb, "(t y x) n -> t n y x", t=frames, y=side)
    table = interpolate(table, size, mode="bicubic", align_corners=False)
    return rearrange(table, "t n y x -> (t y x) n")


def _create(name: str, pretrained: bool, **options) -> VideoSwin:
    options = {"pretrained_filter_fn": checkpoint_filter_fn} | options
    return build(VideoSwin, name, pretrained, **options)


def _weights(url: str, num_classes: int = 400) -> dict:
    # timm knows sizes of frames, not lengths of videos
    return pretrained_cfg(None, url=url, num_classes=num_classes)


def _torchvision(file: str) -> dict:
    return _weights(f"https://download.pytorch.org/models/swin3d_{file}.pth")


def _authors(file: str, num_classes: int = 400) -> dict:
    folder = "https://github.com/SwinTransformer/storage/releases/download/v1.0.4"
    return _weights(f"{folder}/swin_{file}.pth", num_classes)


default_cfgs = generate_default_cfgs(
    {
        "video_swin_tiny.tv_k400": _torchvision("t-7615ae03"),
        "video_swin_small.tv_k400": _torchvision("s-da41c237"),
        "video_swin_base.tv_k400": _torchvision("b_1k-24f7c7c6"),
        "video_swin_base.tv_in22k_k400": _torchvision("b_22k-7c6ae6fa"),
        "video_swin_base.ms_in22k_k600": _authors(
            "base_patch244_window877_kinetics600_22k", num_classes=600
        ),
    }
)


@register_model
def video_swin_tiny(pretrained: bool = False, **options) -> VideoSwin:
    """28 M parameters, 88 G multiply-adds for 32 frames."""
    defaults = {"depths": (2, 2, 6, 2), "drop_path_rate": 0.1}
    return _create("video_swin_tiny", pretrained, **defaults | options)


@register_model
def video_swin_small(pretrained: bool = False, **options) -> VideoSwin:
    """50 M parameters, 166 G multiply-adds for 32 frames."""
    defaults = {"depths": (2, 2, 18, 2), "drop_path_rate": 0.1}
    return _create("video_swin_small", pretrained, **defaults | options)


@register_model
def video_swin_base(pretrained: bool = False, **options) -> VideoSwin:
    """88 M parameters, 282 G multiply-adds for 32 frames."""
    defaults = {
        "embed_dim": 128,
        "depths": (2, 2, 18, 2),
        "num_heads": (4, 8, 16, 32),
        "drop_path_rate": 0.1,
    }
    return _create("video_swin_base", pretrained, **defaults | options)
