"""Gradients of gradients: right, or refused; a gradient penalty that is silently off is the worst.

Letters: B batch, H query heads, K key heads, S tokens, D head dim.
"""

from collections.abc import Callable

import torch
from fuzzing.cases import Case, Wrong
from fuzzing.inputs import Inputs, score_scale
from fuzzing.oracle import Truth
from torch import Tensor

import vidattn
from vidattn.plan import AnyPlan

# a fault loses whole terms; what is right is right by far
TOLERANCE = 1e-2
# what engines of ours say, and PyTorch's own attention
REFUSALS = ("no gradient of its own", "is not implemented")


def is_for(case: Case, truth: Truth) -> bool:
    """Whether a case is one of those that are tried: a part of them, of plain numbers."""
    plain = case.values == "normal" and not case.states and case.dtype in ("float32", "float64")
    is_rectified = truth.gain is not None or truth.rest is not None
    return case.gradients and plain and case.batch > 0 and case.seed % 2 == 0 and not is_rectified


def check_second(case: Case, inputs: Inputs, plan: AnyPlan, truth: Truth) -> None:
    """Raise Wrong unless the gradient of a gradient penalty is right, or refused."""

    def ours(*leaves: Tensor) -> Tensor:
        options = {"scale": case.scale, "key_mask": inputs.key_mask, "backend": case.engine}
        return vidattn.attend(*leaves, plan, **options)

    try:
        found = _penalty(ours, inputs, case.torch_dtype)
    except RuntimeError as error:
        if not any(words in str(error) for words in REFUSALS):
            raise
        return
    expected = _penalty(lambda *leaves: _plain(*leaves, case, inputs, truth), inputs, torch.float64)
    for name, one, right in zip("qkv", found, expected):
        error, size = (one.double() - right).norm().item(), right.norm().item()
        if error > TOLERANCE * size + 1e-6:
            raise Wrong(
                "a gradient of a gradient is off", f"of {name} by {error / (size or 1):.2e}"
            )


def _penalty(attention: Callable, inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Gradients of the squared gradients of a loss that is linear in the output of attention.

    Another term of it keeps a graph of its own: where that of attention is lost, nothing says so.
    """
    leaves = [x.detach().to(dtype).requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    loss = (attention(*leaves) * inputs.d_out.to(dtype)).sum()
    loss = loss + sum(x.square().sum() for x in leaves) / 2
    slopes = torch.autograd.grad(loss, leaves, create_graph=True)
    return torch.autograd.grad(sum(x.square().sum() for x in slopes), leaves)


def _plain(q: Tensor, k: Tensor, v: Tensor, case: Case, inputs: Inputs, truth: Truth) -> Tensor:
    """(B, H, S, D) masked softmax attention, 0 for queries without keys."""
    k, v = (x.repeat_interleave(case.group, 1) for x in (k, v))
    mask = truth.mask.expand(len(q), q.shape[1], -1, -1)
    if inputs.key_mask is not None:
        mask = mask & inputs.key_mask[:, None, None]
    empty = ~mask.any(-1, keepdim=True)
    scores = score_scale(case) * truth.sharpness * q @ k.mT
    weights = scores.masked_fill(~(mask | empty), -torch.inf).softmax(-1)
    return weights.masked_fill(empty, 0) @ v
