"""Swin, Swin V2, DaViT and HaloNet of timm, their windows computed by one kernel.

A module gets a subclass of its own class, which computes the same from the same parameters: names,
hooks, copies and checkpoints stay as they are. timm rolls the picture, cuts windows, computes
queries, keys and values, scores and weights, and puts the windows together again, each a pass over
memory; here the kernel gathers a window into the cache and writes its output.

Letters: B batch, H, W size of a feature map, C channels, n heads, D head dim.
"""

import math

import torch
import torch.nn.functional as F
from timm.layers import halo_attn
from timm.models import davit, swin_transformer, swin_transformer_v2
from timm.models._features_fx import register_notrace_module
from torch import Tensor, nn

from vidattn.backbones.faster_layers import FASTER_LAYERS, is_served, product
from vidattn.kernels.block_sparse_cpu import is_available
from vidattn.kernels.window_attention_cpu import packed_window_attention, window_attention
from vidattn.kernels.windows import halo_windows, shifted_windows

# Swin V2 lets cosines count this many times at most
MAX_TEMPERATURE = 100.0


@register_notrace_module
class FasterSwinBlock(swin_transformer.SwinTransformerBlock):
    """A block of Swin: windows with position biases, shifted in every other block."""

    def _attn(self, x: Tensor) -> Tensor:
        attn = self.attn
        if not is_served(x, attn):
            return super()._attn(x)
        bias = attn._get_rel_pos_bias()[0]
        scale = x.new_full((attn.num_heads,), attn.scale)
        x = _in_windows(self, attn.qkv, x, shift=self.shift_size, scale=scale, bias=bias)
        return attn.proj_drop(attn.proj(x))


@register_notrace_module
class FasterSwinV2Block(swin_transformer_v2.SwinTransformerV2Block):
    """A block of Swin V2: cosines, and position biases that a network makes."""

    def _attn(self, x: Tensor) -> Tensor:
        attn = self.attn
        if not is_served(x, attn):
            return super()._attn(x)
        area = math.prod(self.window_size)
        table = 16 * attn.cpb_mlp(attn.relative_coords_table).view(-1, attn.num_heads).sigmoid()
        bias = table[attn.relative_position_index.view(-1)].view(area, area, -1).permute(2, 0, 1)
        scale = attn.logit_scale.clamp(max=math.log(MAX_TEMPERATURE)).exp().flatten()
        options = {"scale": scale, "bias": bias, "is_cosine": True}
        x = _in_windows(self, self._qkv, x, shift=self.shift_size, **options)
        return attn.proj_drop(attn.proj(x))

    def _qkv(self, x: Tensor) -> Tensor:
        attn = self.attn
        if attn.q_bias is None:
            return attn.qkv(x)
        return product(x, attn.qkv.weight, torch.cat((attn.q_bias, attn.k_bias, attn.v_bias)))


@register_notrace_module
class FasterSpatialBlock(davit.SpatialBlock):
    """A block of DaViT with windows, which have neither biases nor shifts."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W), like ``x``."""
        attn = self.attn
        if not is_served(x, attn):
            return super().forward(x)
        shortcut = self.cpe1(x).permute(0, 2, 3, 1)
        scale = x.new_full((attn.num_heads,), attn.scale)
        x = attn.proj(_in_windows(self, attn.qkv, self.norm1(shortcut), shift=(0, 0), scale=scale))
        x = self.cpe2((shortcut + self.drop_path1(x)).permute(0, 3, 1, 2))
        if self.mlp is None:
            return x
        x = x.permute(0, 2, 3, 1)
        return (x + self.drop_path2(self.mlp(self.norm2(x)))).permute(0, 3, 1, 2)


@register_notrace_module
class FasterHaloAttn(halo_attn.HaloAttn):
    """The attention of HaloNet: blocks of queries that read the keys around them too."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, its own channels, H / stride, W / stride)."""
        size, stride = tuple(x.shape[2:]), self.block_stride
        if not is_served(x, self) or any(extent % self.block_size for extent in size):
            return super().forward(x)
        x = x.permute(0, 2, 3, 1).contiguous()
        q = _pointwise(self.q, x[:, ::stride, ::stride]).unflatten(-1, (self.num_heads, -1))
        kv = _pointwise(self.kv, x).unflatten(-1, (self.num_heads, -1)).flatten(1, 2)
        k, v = kv.split([self.dim_head_qk, self.dim_head_v], -1)
        rows, columns = self._position_scores(q)
        if self.scale_pos_embed:
            rows, columns = rows * self.scale, columns * self.scale
        windows = halo_windows(size, self.block_size, self.halo_size, stride)
        scale = x.new_full((self.num_heads,), self.scale)
        queries = torch.cat([q, rows, columns], -1).flatten(1, 2)
        out = window_attention(queries, k, v, windows, scale=scale)
        out = out.view(*q.shape[:3], -1).permute(0, 3, 1, 2).contiguous()
        return self.pool(out)

    def _position_scores(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, W, n, window) what a query gives every row of its window, and every column."""
        place = torch.arange(self.win_size) - torch.arange(self.block_size_ds)[:, None]
        place = place + self.win_size - 1
        embed, edge = self.pos_embed, self.block_size_ds
        by_row = q.unflatten(1, (-1, edge))
        rows = torch.einsum("brywnd,ykd->brywnk", by_row, embed.height_rel[place]).flatten(1, 2)
        by_column = q.unflatten(2, (-1, edge))
        columns = torch.einsum("bhcxnd,xkd->bhcxnk", by_column, embed.width_rel[place])
        return rows, columns.flatten(2, 3)


FASTER = {
    swin_transformer.SwinTransformerBlock: FasterSwinBlock,
    swin_transformer_v2.SwinTransformerV2Block: FasterSwinV2Block,
    davit.SpatialBlock: FasterSpatialBlock,
    halo_attn.HaloAttn: FasterHaloAttn,
}


class Acceleration:
    """What ``accelerate`` changed; ``remove``, or the end of its ``with`` block, undoes it.

    Attributes:
        num_modules: blocks or attentions whose windows the kernel computes.
    """

    def __init__(self, model: nn.Module):
        faster = FASTER | FASTER_LAYERS
        self._modules = [module for module in model.modules() if type(module) in faster]
        self.num_modules = sum(type(module) in FASTER for module in self._modules)
        for module in self._modules:
            module.__class__ = faster[type(module)]

    def remove(self) -> None:
        """Give every module its own class back."""
        for module in self._modules:
            module.__class__ = type(module).__base__
        self._modules = []

    def __enter__(self) -> "Acceleration":
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def accelerate(model: nn.Module) -> Acceleration:
    """Compute the windows of a model with one C++ kernel, in place.

    Takes Swin, Swin V2, DaViT and HaloNet of timm, and whatever holds their blocks; linear layers
    and the channel attention of DaViT become those of ``faster_layers``. Outputs and gradients stay
    the same within the rounding of floats, and the state dict as it is. This serves float32 on a
    CPU; timm's own code runs where it cannot: on other devices and dtypes, in autocast, for
    attention dropout in training, and inside ``torch.compile`` and tracing. Undo it before
    ``torch.jit.script``.

    Args:
        model: timm's, or any that holds blocks of these.

    Returns:
        A handle that undoes the change.

    Raises:
        ValueError: nothing to accelerate, or no C++ compiler.

    >>> model = timm.create_model("swin_tiny_patch4_window7_224")
    >>> with accelerate(model) as handle:
    ...     scores = model(images)
    """
    if not any(type(module) in FASTER for module in model.modules()):
        names = ", ".join(cls.__name__ for cls in FASTER)
        raise ValueError(
            f"{type(model).__name__} has nothing to accelerate: it needs a {names} of timm, which "
            "is not accelerated yet"
        )
    if not is_available(torch.float32):
        raise ValueError("acceleration needs a C++ compiler: install one, or set CXX to it")
    return Acceleration(model)


def _pointwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution of single pixels, of (B, H, W, C)."""
    return product(x, conv.weight.flatten(1), conv.bias)


def _in_windows(
    block: nn.Module,
    qkv: nn.Module,
    x: Tensor,
    *,
    shift: tuple[int, int],
    **options: object,
) -> Tensor:
    """(B, H, W, n * D) what the windows of a block make of a map (B, H, W, C)."""
    size = tuple(x.shape[1:3])
    windows, padded = shifted_windows(size, tuple(block.window_size), tuple(shift))
    if padded != size:
        x = F.pad(x, (0, 0, 0, padded[1] - size[1], 0, padded[0] - size[0]))
    packed = qkv(x).flatten(1, 2).unflatten(-1, (3, block.attn.num_heads, -1))
    out = packed_window_attention(packed, windows, **options)
    return out.flatten(2).unflatten(1, padded)[:, : size[0], : size[1]]
