"""Swin, Swin V2, DaViT and HaloNet of timm, their windows computed by one kernel.

A module keeps its class, its parameters and its hooks; one of its methods is computed otherwise, as
``faster_layers`` says. timm rolls the picture, cuts windows, computes queries, keys and values,
scores and weights, and puts the windows together again, each a pass over memory; here the kernel
gathers a window into the cache and writes its output.

Letters: B batch, H, W size of a feature map, C channels, n heads, D head dim.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import halo_attn
from timm.models import davit, swin_transformer, swin_transformer_v2
from torch import Tensor, fx, nn

from vidattn.backbones.faster.attention import FasterAttention, may_attend
from vidattn.backbones.faster.layers import FASTER_LAYERS, Faster, is_served, is_watched, product
from vidattn.kernels.engines.block_sparse_cpu import missing
from vidattn.kernels.windows.packed_windows import packed_windows
from vidattn.kernels.windows.window_attention_cpu import window_attention
from vidattn.kernels.windows.windows import halo_windows

# Swin V2 lets cosines count this many times at most
MAX_TEMPERATURE = 100.0


class FasterWindows(Faster):
    """Windows of a block around the layers of its attention, which is not called itself."""

    method = "_attn"

    def serves(self, x: Tensor) -> bool:
        """Whether nothing waits for the attention to be called."""
        attn = self.module.attn
        return is_served(x, attn) and not is_watched(attn)


class FasterSwinBlock(FasterWindows):
    """A block of Swin: windows with position biases, shifted in every other block."""

    def compute(self, x: Tensor) -> Tensor:
        """(B, H, W, C), like ``x``."""
        block, attn = self.module, self.module.attn
        bias, scale = attn._get_rel_pos_bias()[0], scale_of(attn)
        x = in_windows(block, attn.qkv(padded(x, block)), x, block.shift_size, scale, bias)
        return attn.proj_drop(attn.proj(x))


class FasterSwinV2Block(FasterWindows):
    """A block of Swin V2: cosines, and position biases that a network makes."""

    def compute(self, x: Tensor) -> Tensor:
        """(B, H, W, C), like ``x``."""
        block, attn = self.module, self.module.attn
        area = math.prod(block.window_size)
        table = 16 * attn.cpb_mlp(attn.relative_coords_table).view(-1, attn.num_heads).sigmoid()
        bias = table[attn.relative_position_index.view(-1)].view(area, area, -1).permute(2, 0, 1)
        scale = attn.logit_scale.clamp(max=math.log(MAX_TEMPERATURE)).exp().flatten()
        qkv = self._qkv(padded(x, block))
        x = in_windows(block, qkv, x, block.shift_size, scale, bias, is_cosine=True)
        return attn.proj_drop(attn.proj(x))

    def _qkv(self, x: Tensor) -> Tensor:
        attn = self.module.attn
        if attn.q_bias is None:
            return attn.qkv(x)
        return product(x, attn.qkv.weight, torch.cat((attn.q_bias, attn.k_bias, attn.v_bias)))


class FasterSpatialBlock(FasterWindows):
    """A block of DaViT with windows, which have neither biases nor shifts."""

    method = "forward"

    def compute(self, x: Tensor) -> Tensor:
        """(B, C, H, W), like ``x``."""
        block, attn = self.module, self.module.attn
        shortcut = block.cpe1(x).permute(0, 2, 3, 1)
        x = block.norm1(shortcut)
        qkv = attn.qkv(padded(x, block))
        x = attn.proj(in_windows(block, qkv, x, (0, 0), scale_of(attn)))
        x = block.cpe2((shortcut + block.drop_path1(x)).permute(0, 3, 1, 2))
        if block.mlp is None:
            return x
        x = x.permute(0, 2, 3, 1)
        return (x + block.drop_path2(block.mlp(block.norm2(x)))).permute(0, 3, 1, 2)


class FasterHaloAttn(Faster):
    """The attention of HaloNet: blocks of queries that read the keys around them too."""

    def serves(self, x: Tensor) -> bool:
        """Whether nothing waits for its layers to be called, and blocks fill the map."""
        attn = self.module
        # its convolutions take most of the time: a graph has timm's own code
        if isinstance(x, fx.Proxy) or torch.compiler.is_compiling():
            return False
        is_whole = not any(extent % attn.block_size for extent in x.shape[2:])
        return is_whole and is_served(x, attn) and not any(map(is_watched, attn.children()))

    def compute(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, its own channels, H / stride, W / stride)."""
        attn = self.module
        size, stride = tuple(x.shape[2:]), attn.block_stride
        x = rearrange(x, "b c h w -> b h w c").contiguous()
        q = _pointwise(attn.q, x[:, ::stride, ::stride]).unflatten(-1, (attn.num_heads, -1))
        kv = rearrange(_pointwise(attn.kv, x), "b h w (n d) -> b (h w) n d", n=attn.num_heads)
        k, v = kv.split([attn.dim_head_qk, attn.dim_head_v], -1)
        rows, columns = self._position_scores(q)
        if attn.scale_pos_embed:
            rows, columns = rows * attn.scale, columns * attn.scale
        windows = halo_windows(size, attn.block_size, attn.halo_size, stride)
        queries = torch.cat([q, rows, columns], -1).flatten(1, 2)
        out = window_attention(queries, k, v, windows, scale=scale_of(attn))
        out = rearrange(out, "b (h w) n d -> b (n d) h w", h=q.shape[1])
        return attn.pool(out.contiguous())

    def _position_scores(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, W, n, window) what a query gives every row of its window, and every column."""
        attn = self.module
        place = torch.arange(attn.win_size) - torch.arange(attn.block_size_ds)[:, None]
        place = place + attn.win_size - 1
        embed, edge = attn.pos_embed, attn.block_size_ds
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
        num_modules: blocks or attentions whose windows the kernel computes, and other attentions
            that run on the faster engine.
    """

    def __init__(self, model: nn.Module):
        found = [module for module in model.modules() if _takes(module, FASTER)]
        others = _attentions(model)
        self.num_modules = len(found) + len(others)
        found += [module for module in model.modules() if _takes(module, FASTER_LAYERS)]
        self._faster: list[Faster] = [FasterAttention(module) for module in others]
        self._faster += [(FASTER | FASTER_LAYERS)[type(module)](module) for module in found]

    def remove(self) -> None:
        """Let every module compute as it did, whatever has been put on it or taken off since."""
        for faster in self._faster:
            faster.take_off()
        self._faster = []

    def __enter__(self) -> "Acceleration":
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def accelerate(model: nn.Module) -> Acceleration:
    """Compute the windows of a model with one C++ kernel, its attention on the faster engine.

    Takes Swin, Swin V2, DaViT and HaloNet of timm, and whatever holds their blocks; linear layers
    and the channel attention of DaViT become those of ``faster_layers``. Vision transformers, and
    all other modules of timm that call PyTorch's fused attention, run it on our engine where that
    has measured faster for the dtype, the head dim and the length, training included and under
    autocast too, and on PyTorch's otherwise and when compiled.

    Outputs, gradients and their gradients stay the same within the rounding of floats; modules keep
    their classes, names and state dict. Windows and linear layers are served in float32 on a CPU,
    inside ``torch.compile`` too. timm's own code runs where they cannot be: on other devices and
    dtypes, in autocast, for attention dropout in training, in a block with a hook on its attention
    or in it, which is called as before, and for what ``torch.export`` and ``torch.jit.trace`` make.
    Undo it before ``torch.jit.script``.

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
    is_taken = any(_takes(module, FASTER) for module in model.modules())
    if not is_taken and not _attentions(model):
        names = ", ".join(cls.__name__ for cls in FASTER)
        raise ValueError(
            f"{type(model).__name__} has nothing to accelerate: it needs a {names} of timm, or an "
            "attention with fused_attn=True, which is not accelerated yet"
        )
    if missing(torch.float32):
        raise ValueError("acceleration needs a C++ compiler: install one, or set CXX to it")
    return Acceleration(model)


def _attentions(model: nn.Module) -> list[nn.Module]:
    """The attentions that may run on the faster engine; those in windows have their kernel."""
    blocks = [module for module in model.modules() if type(module) in FASTER]
    inside = {part for block in blocks for part in block.modules()}
    return [x for x in model.modules() if may_attend(x) and x not in inside]


def _takes(module: nn.Module, faster: dict[type, type[Faster]]) -> bool:
    """Whether a module can be made faster, and nothing has taken the place of its method yet."""
    return type(module) in faster and faster[type(module)].method not in vars(module)


def _pointwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution of single pixels, of (B, H, W, C)."""
    return product(x, conv.weight.flatten(1), conv.bias)


def scale_of(attn: nn.Module) -> Tensor:
    """(n,) what the scores of an attention are multiplied by."""
    return torch.full((attn.num_heads,), attn.scale, dtype=torch.float32, device="cpu")


def padded(x: Tensor, block: nn.Module) -> Tensor:
    """A map (B, H, W, C) padded to whole windows of a block."""
    rows, columns = (-x.shape[1 + i] % side for i, side in enumerate(block.window_size))
    # a graph that does not know its sizes pads always
    if isinstance(x, fx.Proxy) or rows or columns:
        x = F.pad(x, (0, 0, 0, columns, 0, rows))
    return x


def in_windows(
    block: nn.Module,
    qkv: Tensor,
    x: Tensor,
    shift: tuple[int, int],
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    is_cosine: bool = False,
) -> Tensor:
    """(B, H, W, n * D) what the windows of a block make of a map.

    Args:
        qkv: (B, padded H, padded W, 3 * n * D).
        x: (B, H, W, C), the map before it was padded.
    """
    size, whole = (x.shape[1], x.shape[2]), (qkv.shape[1], qkv.shape[2])
    packed = qkv.flatten(1, 2).unflatten(-1, (3, block.attn.num_heads, -1))
    places = (size, tuple(block.window_size), tuple(shift))
    out = attend(packed, scale, bias, *places, is_cosine)
    return out.flatten(2).unflatten(1, whole)[:, : size[0], : size[1]]


@fx.wrap
def attend(packed: Tensor, *arguments: Any) -> Tensor:
    """``packed_windows``, left whole in the graphs of FX."""
    return packed_windows(packed, *arguments)
