"""Layers beside the windows of timm's models, computed faster on a CPU from the same parameters.

Letters: B batch, N pixels, C channels, n heads, D channels of a head.
"""

import torch
import torch.nn.functional as F
from timm.models import davit
from timm.models._features_fx import register_notrace_module
from torch import Tensor, nn

from vidattn.kernels import onednn


@register_notrace_module
class FasterLinear(nn.Linear):
    """A linear layer in the faster of two libraries."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., other channels)."""
        if not is_served(x, self) or type(self.weight) is not nn.Parameter:
            return super().forward(x)
        return product(x, self.weight, self.bias)


@register_notrace_module
class FasterChannelAttention(davit.ChannelAttention):
    """The other attention of DaViT, where the channels of a head attend to each other."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C), like ``x``."""
        if not is_served(x, self):
            return super().forward(x)
        # (B, N, n, D), one sample at a time: a product of all of them would copy them first
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        q, k, v = (part.transpose(1, 2).unbind() for part in qkv)
        scores = torch.stack([a.mT @ b for a, b in zip(k, v)])
        weights = (scores * self.scale).softmax(-1).mT
        out = torch.stack([(a @ b).transpose(0, 1) for a, b in zip(q, weights)])
        return self.proj(out.flatten(2))


FASTER_LAYERS = {nn.Linear: FasterLinear, davit.ChannelAttention: FasterChannelAttention}


def is_served(x: Tensor, module: nn.Module) -> bool:
    """Whether a call of a module, which may drop attention, can be computed faster."""
    # a subclass of tensors stands for something else than its numbers
    is_plain = type(x) is Tensor and x.device.type == "cpu" and x.dtype == torch.float32
    if not is_plain or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return False
    dropout = getattr(module, "attn_drop", None)
    drops = module.training and dropout is not None and dropout.p > 0
    return not drops and not torch.jit.is_tracing()


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer of a map (..., C) that is served, in oneDNN where that is faster."""
    is_faster = onednn.has_faster_linear() and weight.dtype == x.dtype and x.numel() > 0
    return onednn.linear(x, weight, bias) if is_faster else F.linear(x, weight, bias)
