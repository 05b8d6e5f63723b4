"""Video Swin: a pyramid of shifted windows in space and time.

Liu et al., "Video Swin Transformer", arXiv:2106.13230, CVPR 2022.

Letters: B batch, C channels, T, H, W size of a video or its map.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from timm.layers import ClassifierHead, calculate_drop_path_rates
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from vidattn.backbones.attention_block import AttentionBlock
from vidattn.backbones.pyramid import Stage, pretrained_cfg
from vidattn.backbones.volume_pyramid import VolumePyramid
from vidattn.backbones.window_attention import PatchMerging, WindowAttention, pad_axes


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

    On a map smaller than a window a bias belongs to the distance of query and key. The released
    code picks others there when the map is lower or narrower than a window.

    Args:
        in_chans: channels of a video.
        num_classes: 0 for no classifier.
        global_pool: pooling of the head, as timm names it; "" for none.
        patch: frames, rows and columns of a patch.
        embed_dim: channels of the first stage; each stage doubles them.
        depths: blocks of each stage.
        num_heads: of each stage.
        window: frames, rows and columns that a cell reads; every other block shifts them by half.
        mlp_ratio: hidden channels of the perceptrons over their width.
        drop_rate: dropout before the classifier.
        drop_path_rate: rate at which the last block leaves a branch out; it grows from 0.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 400,
        global_pool: str = "avg",
        patch: Sequence[int] = (2, 4, 4),
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window: Sequence[int] = (8, 7, 7),
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if len(depths) != len(num_heads):
            raise ValueError(
                f"depths and num_heads must have one number for each stage, got {depths} and "
                f"{num_heads}"
            )
        dd = {"device": device, "dtype": dtype}
        widths = [embed_dim * 2**i for i in range(len(depths))]
        rates = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)

        def block(stage: int, index: int) -> AttentionBlock:
            shift = [side // 2 if index % 2 else 0 for side in window]
            attn = WindowAttention(widths[stage], num_heads[stage], window, shift, **dd)
            rate = rates[stage][index]
            return AttentionBlock(attn, mlp_ratio=mlp_ratio, drop_path=rate, **dd)

        stages = []
        for i, depth in enumerate(depths):
            down = PatchMerging(widths[i - 1], widths[i], (2, 3), **dd) if i else nn.Identity()
            stages.append(Stage(down, [block(i, j) for j in range(depth)]))
        super().__init__(
            VideoPatches(in_chans, embed_dim, patch, **dd),
            stages,
            nn.LayerNorm(widths[-1], **dd),
            ClassifierHead(widths[-1], num_classes, global_pool, drop_rate, input_fmt="NHWC", **dd),
            in_chans=in_chans,
            taps=[(width, patch[-1] * 2**i) for i, width in enumerate(widths)],
        )

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The position biases."""
        return {"*.rpb"}


# (pattern, replacement) from the names of torchvision, each applied in this order
NAMES = (
    (r"^patch_embed\.", "stem."),
    (r"\.relative_position_bias_table$", ".rpb"),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
    (r"^head\.(?!fc\.)", "head.fc."),
)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict of ``model`` from one of torchvision, or in its own layout."""
    renamed = {}
    for name, tensor in state_dict.items():
        # made from the window by whoever needs it
        if name.endswith(".relative_position_index"):
            continue
        # stages and what lies between them take turns
        if found := re.match(r"features\.(\d+)\.(\d+\.)?", name):
            stage, is_between = divmod(int(found[1]), 2)
            place = f"{stage + 1}.downsample." if is_between else f"{stage}.blocks.{found[2]}"
            name = f"stages.{place}{name[found.end() :]}"
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def _create(name: str, pretrained: bool, **options) -> VideoSwin:
    stages = range(len(options.get("depths", (2, 2, 6, 2))))
    return build_model_with_cfg(
        VideoSwin,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": tuple(stages), "flatten_sequential": True},
        **options,
    )


def _weights(file: str) -> dict:
    url = f"https://download.pytorch.org/models/swin3d_{file}.pth"
    # timm knows sizes of frames, not lengths of videos
    return pretrained_cfg("stem.proj", url=url, num_classes=400)


default_cfgs = generate_default_cfgs(
    {
        "video_swin_tiny.tv_k400": _weights("t-7615ae03"),
        "video_swin_small.tv_k400": _weights("s-da41c237"),
        "video_swin_base.tv_k400": _weights("b_1k-24f7c7c6"),
        "video_swin_base.tv_in22k_k400": _weights("b_22k-7c6ae6fa"),
    }
)


@register_model
def video_swin_tiny(pretrained: bool = False, **options) -> VideoSwin:
    """28 M parameters, 88 G multiply-adds for 32 frames."""
    return _create("video_swin_tiny", pretrained, **{"drop_path_rate": 0.1} | options)


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
