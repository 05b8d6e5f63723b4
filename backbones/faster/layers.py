"""Layers beside the windows of timm's models, computed faster on a CPU from the same parameters.

A module keeps its class: a callable takes the place of one of its methods, as an attribute of the
module alone, and hands on to the method of the class whatever it cannot compute faster.

Letters: B batch, N pixels, C channels, n heads, D channels of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models import davit
from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook

from vidattn.backbones.exporting import is_exported
from vidattn.kernels.cpp import onednn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Faster:
    """Stands for a method of one module until it is taken off."""

    method = "forward"

    def __init__(self, module: nn.Module):
        self.module, self.is_on = module, True
        setattr(module, self.method, self)

    def __call__(self, x: Tensor) -> Tensor:
        """What the method gives."""
        if self.is_on and self.serves(x):
            return self.compute(x)
        return getattr(type(self.module), self.method)(self.module, x)

    def serves(self, x: Tensor) -> bool:
        """Whether this input is computed faster."""
        return is_served(x, self.module)

    def compute(self, x: Tensor) -> Tensor:
        """The same faster."""
        raise NotImplementedError

    def take_off(self) -> None:
        """Let the method be that of the class again, whoever has wrapped this since."""
        self.is_on = False
        if vars(self.module).get(self.method) is self:
            delattr(self.module, self.method)


class FasterLinear(Faster):
    """A linear layer in the faster of two libraries."""

    def serves(self, x: Tensor) -> bool:
        """Whether the weight is a plain one, which nothing has parametrized or frozen away."""
        return type(self.module.weight) is nn.Parameter and is_served(x, self.module)

    def compute(self, x: Tensor) -> Tensor:
        """(..., C) to (..., other channels)."""
        return product(x, self.module.weight, self.module.bias)


class FasterChannelAttention(Faster):
    """The other attention of DaViT, where the channels of a head attend to each other."""

    def compute(self, x: Tensor) -> Tensor:
        """(B, N, C), like ``x``."""
        attn = self.module
        # (B, N, n, D), one sample at a time: a product of all of them would copy them first
        qkv = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).unbind(2)
        q, k, v = (part.transpose(1, 2).unbind() for part in qkv)
        scores = torch.stack([a.mT @ b for a, b in zip(k, v)])
        weights = (scores * attn.scale).softmax(-1).mT
        out = torch.stack([(a @ b).transpose(0, 1) for a, b in zip(q, weights)])
        return attn.proj(out.flatten(2))

    def serves(self, x: Tensor) -> bool:
        """Whether there are samples to go through one by one."""
        # a graph has one product for all of them, whatever their number
        return not isinstance(x, fx.Proxy) and is_served(x, self.module)


FASTER_LAYERS = {nn.Linear: FasterLinear, davit.ChannelAttention: FasterChannelAttention}


def is_served(x: Tensor, module: nn.Module) -> bool:
    """Whether a call of a module, which may drop attention, can be computed faster."""
    dropout = getattr(module, "attn_drop", None)
    if is_exported() or module.training and dropout is not None and dropout.p > 0:
        return False
    # the operators in a graph see for themselves
    if isinstance(x, fx.Proxy):
        return True
    # a subclass of tensors stands for something else than its numbers
    is_plain = type(x) is Tensor and x.device.type == "cpu" and x.dtype == torch.float32
    return is_plain and not torch.is_autocast_enabled("cpu")


def is_watched(module: nn.Module) -> bool:
    """Whether something else hooks into a module or its parts, and would miss what is left out."""
    if _has_any_global_hook():
        return True
    for part in module.modules():
        if any(getattr(part, hooks) for hooks in HOOKS):
            return True
        if not isinstance(vars(part).get("forward"), Faster | None):
            return True
    return False


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer of a map (..., C) that is served, in oneDNN where that is faster."""
    # a compiler has libraries of its own to choose from
    if torch.compiler.is_compiling() or isinstance(x, fx.Proxy):
        return F.linear(x, weight, bias)
    is_faster = onednn.has_faster_linear() and weight.dtype == x.dtype and x.numel() > 0
    return onednn.linear(x, weight, bias) if is_faster else F.linear(x, weight, bias)
