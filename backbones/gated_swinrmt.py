"""Gated-SwinRMT: windows read along their rows, then along their columns, and the result is gated.

Maity et al., "Gated-SwinRMT: Unifying Swin Windowed Attention with Retentive Manhattan Decay via
Input-Dependent Gating", arXiv:2604.06014. Only the abstract of the paper has been at hand, which
says what the two kinds of attention do, but neither sizes nor equations. Chosen here: decays,
widths, heads and depths are those of RMT-T (Fan et al., arXiv:2309.11523); the slopes of SWAT are
those of Fu et al., arXiv:2502.18845; stem, merging and perceptrons are Swin's. The model of the
paper has 77 to 79 M parameters.

Letters: B batch, n heads, H, W size of a feature map, C channels, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from timm.models import generate_default_cfgs, register_model, register_notrace_function
from torch import Tensor, nn
from torch.nn.functional import silu
from typing_extensions import Unpack

from vidattn.backbones.layers.attention_block import AttentionBlock
from vidattn.backbones.layers.patchify import patchify
from vidattn.backbones.layers.window_attention import (
    PatchMerging,
    attend_in_windows,
    crop,
    pad_to_windows,
)
from vidattn.backbones.pyramids.doubling_pyramid import DoublingPyramid, build, check_stages
from vidattn.backbones.pyramids.pyramid import Options, pretrained_cfg

KINDS = ("retention", "swat")


class GatedWindowAttention(nn.Module):
    """Attention to the row of a window that a cell lies in, then to the column.

    The weight of a cell decays with its distance, for each head at another rate. A depth-wise
    convolution of the values is added. By ``kind``,

    - retention: weights are a softmax; the output is multiplied by a sigmoid of the input.
    - swat: weights are a sigmoid, in which one half of the heads prefers the cells before and the
      other those behind; values are multiplied by a SiLU of the input; the output has a norm.

    Args:
        dim: channels.
        num_heads: a divisor of ``dim``, even for swat.
        window: cells along each axis of a window; one window where the map is smaller.
        shift: where the second window of an axis begins; 0 for windows side by side.
        decay_range: the decays per cell are 1 - 2 ** -r with r from 2 to below 2 + this.
        kind: "retention" or "swat".
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window: int = 7,
        shift: int = 0,
        decay_range: float = 4.0,
        kind: str = "retention",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got {dim} and {num_heads}")
        if kind == "swat" and num_heads % 2:
            raise ValueError(f"num_heads must be even for swat, got {num_heads}")
        self.num_heads, self.window, self.shift = num_heads, window, shift
        self.decay_range, self.is_swat = float(decay_range), kind == "swat"
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.gate = nn.Linear(dim, dim, **dd)
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim, **dd)
        self.norm = nn.LayerNorm(dim, **dd) if self.is_swat else nn.Identity()
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C), like ``x``."""
        whole = pad_to_windows(x, [self.window, self.window])
        q, k, v = self.qkv(whole).chunk(3, -1)
        if self.is_swat:
            v = v * silu(self.gate(whole))
        out = attend_along_axes(
            q, k, v, self.num_heads, self.window, self.shift, self.decay_range, self.is_swat
        )
        local = self.lepe(crop(v, x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        out = self.norm(crop(out, x) + local)
        if not self.is_swat:
            out = out * self.gate(x).sigmoid()
        return self.proj(out)


@register_notrace_function
def attend_along_axes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_heads: int,
    window: int,
    shift: int,
    decay_range: float,
    is_swat: bool,
) -> Tensor:
    """Attention along the rows of windows, then along their columns.

    Args:
        q, k, v: (B, H, W, C) each, padded to whole windows.
        num_heads: n.
        window: cells along each axis of a window.
        shift: where the second window of an axis begins; 0 for windows side by side.
        decay_range: as GatedWindowAttention takes it.
        is_swat: whether weights are a sigmoid.

    Returns:
        (B, H, W, C).
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    heads = torch.arange(num_heads, dtype=dtype, device=q.device)
    # (distances, 1), of a query from a key, and (distances, n)
    distances = torch.arange(1 - window, window, dtype=dtype, device=q.device)[:, None]
    decay = torch.log(1 - 2.0 ** (-2 - decay_range * heads / num_heads)) * distances.abs()
    bias = decay
    factor: Tensor | None = None
    if is_swat:
        half = num_heads // 2
        slopes = 2.0 ** -(1.0 + heads % half)
        bias, factor = torch.where(heads < half, -slopes, slopes) * distances, decay.exp()
    for _ in range(2):
        # rows, and in the second pass columns, in the batch
        x = torch.cat([q, k, v], -1)
        rows = attend_in_windows(x.flatten(0, 1), bias, num_heads, [window], [shift], factor)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        v = rows.unflatten(0, x.shape[:2]).transpose(1, 2)
    return v


class GatedSwinRMT(DoublingPyramid):
    """Gated-SwinRMT; takes images of any size.

    Args:
        depths: blocks of each stage.
        num_heads: of each stage.
        decay_ranges: of each stage, as GatedWindowAttention takes them.
        window: cells along each axis of a window; every other block shifts them by half.
        kind: of the attention, "retention" or "swat".
        mlp_ratio: hidden channels of the perceptrons over their width.
        options: as every pyramid takes them.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 2, 8, 2),
        num_heads: Sequence[int] = (4, 4, 8, 16),
        decay_ranges: Sequence[float] = (4.0, 4.0, 6.0, 6.0),
        window: int = 7,
        kind: str = "retention",
        mlp_ratio: float = 3.0,
        **options: Unpack[Options],
    ):
        check_stages(depths=depths, num_heads=num_heads, decay_ranges=decay_ranges)

        def block(dim: int, rate: float, stage: int, index: int, **dd) -> AttentionBlock:
            attn = GatedWindowAttention(
                dim,
                num_heads[stage],
                window=window,
                shift=window // 2 if index % 2 else 0,
                decay_range=decay_ranges[stage],
                kind=kind,
                **dd,
            )
            return AttentionBlock(attn, mlp_ratio=mlp_ratio, drop_path=rate, **dd)

        super().__init__(
            partial(patchify, 4),
            block,
            partial(PatchMerging, axes=(1, 2)),
            depths=depths,
            **Options(embed_dim=64) | options,
        )


def _create(name: str, pretrained: bool, **options) -> GatedSwinRMT:
    defaults = {"depths": (2, 2, 8, 2), "drop_path_rate": 0.1}
    return build(GatedSwinRMT, name, pretrained, **defaults | options)


default_cfgs = generate_default_cfgs(
    {f"gated_swinrmt_{kind}_tiny": pretrained_cfg("stem.proj") for kind in KINDS}
)


@register_model
def gated_swinrmt_retention_tiny(pretrained: bool = False, **options) -> GatedSwinRMT:
    """13 M parameters."""
    return _create("gated_swinrmt_retention_tiny", pretrained, **{"kind": "retention"} | options)


@register_model
def gated_swinrmt_swat_tiny(pretrained: bool = False, **options) -> GatedSwinRMT:
    """13 M parameters."""
    return _create("gated_swinrmt_swat_tiny", pretrained, **{"kind": "swat"} | options)
