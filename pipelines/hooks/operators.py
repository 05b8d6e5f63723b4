"""What compiled code calls: opaque operators, which find their layer or transformer by number.

Letters: B batch, H heads, S tokens, D head dim.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# the operators read what changes from step to step, which a replayed CUDA graph would freeze
TAGS = tuple(tag for name, tag in torch.Tag.__members__.items() if name == "cudagraph_unsafe")
# operators of torch take no Python objects, so they find theirs by number
_by_number: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def numbered(thing: object) -> Tensor:
    """A number for ``thing``, in a tensor so that compiled code does not depend on its value."""
    number = next(_numbers)
    _by_number[number] = thing
    return torch.tensor(number, device="cpu")


@contextmanager
def _recording() -> Iterator[None]:
    """Have PyTorch record gradients of dense attention too, which it does not in an operator."""
    included, excluded = (
        torch._C._dispatch_tls_local_include_set(),
        torch._C._dispatch_tls_local_exclude_set(),
    )
    for name in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, name))
    with torch._C._ForceDispatchKeyGuard(included, excluded):
        yield


def _run(q, k, v, mask, scale, layer: Tensor) -> Tensor:
    found = _by_number.get(layer.item())
    if found is None:
        # the patch is gone, the compiled code is not
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return found.owner.attend(found, q, k, v, mask, scale)


@torch.library.custom_op("vidattn::attend", mutates_args=(), tags=TAGS)
def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, layer: Tensor
) -> Tensor:
    return _run(q, k, v, mask, scale, layer).contiguous()


@_attend.register_fake
def _(q, k, v, mask, scale, layer):
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


@torch.library.custom_op("vidattn::attend_backward", mutates_args=(), tags=TAGS)
def _attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    layer: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.enable_grad(), _recording():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = _run(leaves[0], leaves[1], leaves[2], mask, scale, layer)
    return tuple(x.contiguous() for x in torch.autograd.grad(out, leaves, grad))


@_attend_backward.register_fake
def _(grad, q, k, v, mask, scale, layer):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save(ctx, inputs, output):
    q, k, v, mask, scale, layer = inputs
    ctx.save_for_backward(q, k, v, mask, layer)
    ctx.scale = scale


def _backward(ctx, grad):
    q, k, v, mask, layer = ctx.saved_tensors
    grads = torch.ops.vidattn.attend_backward(grad, q, k, v, mask, ctx.scale, layer)
    return *grads, None, None, None


_attend.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("vidattn::begin", mutates_args=(), tags=TAGS)
def _begin(
    hidden_states: Tensor, timestep: Tensor, size: list[int], num_before: int, site: Tensor
) -> Tensor:
    found = _by_number.get(site.item())
    if found is not None:
        found.begin(hidden_states, timestep, (size[0], size[1], size[2]), num_before)
    return hidden_states.clone()


@_begin.register_fake
def _(hidden_states, timestep, size, num_before, site):
    return torch.empty_like(hidden_states)


@torch.library.custom_op("vidattn::end", mutates_args=(), tags=TAGS)
def _end(output: Tensor, site: Tensor) -> Tensor:
    found = _by_number.get(site.item())
    if found is not None:
        found.end(output)
    return output.clone()


@_end.register_fake
def _(output, site):
    return torch.empty_like(output)


@torch.library.custom_op("vidattn::check_gradient", mutates_args=(), tags=TAGS)
def _check_gradient(output: Tensor, layer: Tensor) -> Tensor:
    found = _by_number.get(layer.item())
    if found is not None:
        found.owner.check_gradient(found)
    return output.clone()


@_check_gradient.register_fake
def _(output, layer):
    return torch.empty_like(output)


_begin.register_autograd(lambda ctx, grad: (grad, None, None, None, None))
_end.register_autograd(lambda ctx, grad: (grad, None))
_check_gradient.register_autograd(lambda ctx, grad: (grad, None))
