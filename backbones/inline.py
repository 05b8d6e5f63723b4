"""InLine-Swin: the layout of Swin with injective linear attention in all stages but the last.

Han et al., "Bridging the Divide: Reconsidering Softmax and Linear Attention", arXiv:2412.06590.

Letters: B batch, n heads, H, W size of a feature map, N its cells, C channels, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from timm.models import generate_default_cfgs, register_model
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn
from torch.nn.functional import conv2d
from typing_extensions import Unpack

from vidattn.backbones.layers.attention_block import AttentionBlock
from vidattn.backbones.layers.patchify import patchify
from vidattn.backbones.layers.window_attention import WindowAttention
from vidattn.backbones.pyramids import neighborhood_checkpoint
from vidattn.backbones.pyramids.checkpoints import tensors_of
from vidattn.backbones.pyramids.doubling_pyramid import DoublingPyramid, build, check_stages
from vidattn.backbones.pyramids.pyramid import Options, pretrained_cfg


class InLineAttention(nn.Module):
    """Linear attention whose weights sum to 1 and differ between queries, over a whole map.

    The weight of a key is the scaled product of query and key, less its mean over keys, plus one:
    all over N (equation 5). The output is then the mean value, and the query times the covariance
    of keys and values. To it comes a 3 x 3 convolution of the values with a kernel that a
    perceptron draws from the mean of the input.

    Args:
        dim: channels.
        num_heads: a divisor of ``dim``.
    """

    def __init__(self, dim: int, num_heads: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got {dim} and {num_heads}")
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.residual = nn.Sequential(
            nn.Conv1d(dim, dim, 1, groups=num_heads, **dd),
            nn.GELU(),
            nn.Conv1d(dim, 9 * dim, 1, groups=num_heads, **dd),
        )
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C), like ``x``."""
        qkv = self.qkv(x)
        values = qkv.chunk(3, -1)[2].permute(0, 3, 1, 2)
        kernels = self.residual(x.mean((1, 2)).unsqueeze(-1))
        local = convolve(values, kernels).permute(0, 2, 3, 1)
        # (B, n, N, D) each
        tokens = qkv.unflatten(-1, (3, self.num_heads, -1)).flatten(1, 2).permute(2, 0, 3, 1, 4)
        q, k, v = tokens[0], tokens[1], tokens[2]
        # on both sides, so that no half-precision number grows or shrinks out of range
        share = (self.scale / q.shape[2]) ** 0.5
        covariance = ((k - k.mean(2, keepdim=True)) * share).transpose(2, 3) @ (v * share)
        out = q @ covariance + v.mean(2, keepdim=True)
        return self.proj(out.transpose(1, 2).reshape(x.shape) + local)


def convolve(x: Tensor, kernels: Tensor) -> Tensor:
    """(B, C, H, W), every map convolved with its kernel in ``kernels``, (B, 9 * C, 1)."""
    B, C = x.shape[0], x.shape[1]
    # all maps as channels of one image
    kernels = kernels.reshape(B * C, 1, 3, 3)
    out = conv2d(x.reshape(1, B * C, x.shape[2], x.shape[3]), kernels, padding=1, groups=B * C)
    return out.view(x.shape)


class InLineSwin(DoublingPyramid):
    """InLine-Swin; takes images of any size.

    At the released sizes of 224 and 384 pixels, linear attention spans the whole map, as it does
    here at every size; the windows of the last stage then are its whole map too.

    Args:
        depths: blocks of each stage.
        num_heads: of each stage.
        are_linear: whether the attention of a stage is linear; else it is that of Swin.
        window: cells to a side of the windows of Swin, which every other block shifts.
        mlp_ratio: hidden channels of the perceptrons over their width.
        options: as every pyramid takes them.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        are_linear: Sequence[bool] = (True, True, True, False),
        window: int = 7,
        mlp_ratio: float = 4.0,
        **options: Unpack[Options],
    ):
        check_stages(depths=depths, num_heads=num_heads, are_linear=are_linear)

        def block(dim: int, rate: float, stage: int, index: int, **dd) -> AttentionBlock:
            heads = num_heads[stage]
            if are_linear[stage]:
                attn = InLineAttention(dim, heads, **dd)
            else:
                shift = window // 2 if index % 2 else 0
                attn = WindowAttention(dim, heads, (window,) * 2, (shift,) * 2, **dd)
            return AttentionBlock(attn, mlp_ratio=mlp_ratio, drop_path=rate, **dd)

        super().__init__(
            partial(patchify, 4),
            block,
            PatchMerging,
            depths=depths,
            **options,
        )

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The position biases."""
        return {"*.rpb"}


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict of ``model`` from one of the authors, or in its own layout."""
    tensors = tensors_of(state_dict)
    renamed = neighborhood_checkpoint.checkpoint_filter_fn(tensors, model)
    table = ".relative_position_bias_table"
    renamed = {name.replace(table, ".rpb"): tensor for name, tensor in renamed.items()}
    return neighborhood_checkpoint.resize_biases(renamed, model)


default_cfgs = generate_default_cfgs(
    {
        "inline_swin_tiny.in1k": pretrained_cfg(
            "stem.proj", url="https://cloud.tsinghua.edu.cn/f/32810869fcc34410966b/?dl=1"
        )
    }
)


@register_model
def inline_swin_tiny(pretrained: bool = False, **options) -> InLineSwin:
    """29 M parameters, 4.5 G multiply-adds."""
    defaults = {"depths": (2, 2, 6, 2), "drop_path_rate": 0.2}
    options = {"pretrained_filter_fn": checkpoint_filter_fn} | defaults | options
    return build(InLineSwin, "inline_swin_tiny", pretrained, **options)
