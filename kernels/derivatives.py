"""What our operators have no derivatives for is refused, in words and always."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

TWICE = (
    "the gradient of this operator has no gradient of its own (gradient penalties, Hessians): "
    'attend(..., backend="reference") has one'
)
FORWARD = (
    "this operator has no forward derivative (torch.func.jvp, torch.autograd.forward_ad): "
    'attend(..., backend="reference") has one'
)
TRANSFORMS = (
    "this operator knows none of torch.func's transforms (vmap, grad, jvp): use torch.autograd and "
    'the batch axis, or attend(..., backend="reference")'
)


def once(grads: tuple[Tensor | None, ...], sources: tuple[Tensor | None, ...]) -> tuple:
    """Gradients that raise when somebody asks for theirs.

    PyTorch's ``once_differentiable`` notices that only where the gradient of the output has a graph
    of its own: of a loss that is linear in the output it would be silently wrong.

    Args:
        grads: of an operator, computed without a graph.
        sources: what they were computed from.
    """
    sources = tuple(x for x in sources if x is not None and x.requires_grad)
    if not torch.is_grad_enabled() or not sources:
        return grads
    places = [i for i, x in enumerate(grads) if x is not None]
    guarded = list(grads)
    outputs = _Once.apply(len(places), *(grads[i] for i in places), *sources)
    for place, x in zip(places, outputs):
        guarded[place] = x
    return tuple(guarded)


def refuse_transforms() -> None:
    """Raise ValueError inside of one of ``torch.func``'s transforms."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise ValueError(TRANSFORMS)


def may_be_pulled(tensors: tuple[Tensor, ...]) -> bool:
    """Whether a derivative of what is computed from these may be asked for, of either kind."""
    is_recorded = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return is_recorded or forward_ad._current_level >= 0


class _Once(torch.autograd.Function):
    """Passes gradients on, as what depends on the tensors behind them."""

    @staticmethod
    def forward(ctx, count, *tensors):
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(TWICE)
