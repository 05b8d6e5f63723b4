"""Engines as operators of ``torch.library``: what torch.compile, export, FX and meta tensors see.

Letters: B batch, H query heads, K key heads, S queries, Sk keys, D head dim, N slots, n slots to a
block.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from operator import is_

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from vidattn.kernels.block_lists import BlockLists, find
from vidattn.kernels.box import Box
from vidattn.kernels.derivatives import FORWARD, may_be_pulled, once, refuse_transforms

# the arguments of an operator that describe the block lists, in the order of `flatten`, and others
LISTS = (
    "Tensor order, Tensor row_start, Tensor num_full, Tensor key_block, Tensor? box_key, "
    "Tensor? box_low, Tensor? box_high, Tensor? mask_id, Tensor? masks, Tensor? keys, "
    "int block, int batch, int heads, int guard"
)
REST = "float scale, Tensor? key_mask, Tensor? key_bias"
_NUM_LISTS, _NUM_TENSORS = LISTS.count(",") + 1, LISTS.count("Tensor")

Forward = Callable[..., tuple[Tensor, Tensor]]
Backward = Callable[..., tuple[Tensor, ...]]


class Operator:
    """A differentiable block-sparse attention, registered as ``vidattn::name``.

    Args:
        name: of the operator; its backward is ``name_backward``.
        forward: takes q (B, H, S, D), k and v (B, K, Sk, D), the block lists, scale, key_mask and
            key_bias; gives the output with the natural log-sum-exp (B, H, S), float64 for float64
            inputs, else float32.
        backward: takes the gradient of the output, ``delta`` (B, H, S), which is what the softmax
            of each row loses, q, k, v, the log-sum-exp, then what ``forward`` takes after v; gives
            the gradients of q, k, v and key_bias, any tensor for the last where there is none.
    """

    def __init__(self, name: str, forward: Forward, backward: Backward):
        self._run = forward
        self._plain_forward = lambda *inputs: forward(*gather(inputs))
        self._plain_backward = lambda *inputs: backward(*inputs[:2], *gather(inputs[2:], 4))
        self._forward = torch.library.custom_op(
            f"vidattn::{name}",
            lambda *inputs: _laid_out(self._plain_forward(*inputs), inputs[:1]),
            mutates_args=(),
            schema=f"(Tensor q, Tensor k, Tensor v, {LISTS}, {REST}) -> (Tensor, Tensor)",
        )
        self._backward = torch.library.custom_op(
            f"vidattn::{name}_backward",
            lambda *inputs: _laid_out(self._plain_backward(*inputs), (*inputs[2:5], inputs[-1])),
            mutates_args=(),
            schema=f"(Tensor d_out, Tensor delta, Tensor q, Tensor k, Tensor v, Tensor lse, "
            f"{LISTS}, {REST}) -> (Tensor, Tensor, Tensor, Tensor)",
        )
        self._forward.register_fake(_fake_forward)
        self._backward.register_fake(_fake_backward)
        self._forward.register_autograd(self._pull, setup_context=_keep)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lists: BlockLists,
        *,
        scale: float,
        key_mask: Tensor | None,
        key_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Output (B, H, S, D) and log-sum-exp (B, H, S)."""
        rest = float(scale), key_mask, key_bias
        if torch.compiler.is_compiling():
            return self._forward(q, k, v, *flatten(lists), *rest)
        refuse_transforms()
        needs = (q, k, v) if key_bias is None else (q, k, v, key_bias)
        if may_be_pulled(needs):
            return _Eager.apply(self, q, k, v, *flatten(lists), *rest)
        if _is_watched((q, k, v)):
            return self._forward(q, k, v, *flatten(lists), *rest)
        lists.check(q.shape[2], k.shape[2])
        return self._run(q, k, v, lists, *rest)

    def forward(self, *inputs) -> tuple[Tensor, Tensor]:
        """What ``__call__`` gives for flat inputs, without a gradient."""
        return (self._forward if _is_watched(inputs[:3]) else self._plain_forward)(*inputs)

    def _pull(self, ctx, d_out, d_lse):
        return self._gradients(ctx.saved_tensors, ctx.rest, d_out, d_lse)

    def _gradients(self, saved, rest, d_out, d_lse):
        q, k, v, out, lse = saved
        # what the softmax of a row loses when its output, or its log-sum-exp, is pulled
        delta = (out.to(lse.dtype) * d_out).sum(-1) - d_lse
        # a compiler traces it as it traces the forward operator
        is_traced = torch.compiler.is_compiling() or _is_watched((d_out, q, k, v))
        backward = self._backward if is_traced else self._plain_backward
        d_q, d_k, d_v, d_bias = backward(d_out, delta, q, k, v, lse, *rest)
        has_bias = rest[-1] is not None
        return d_q, d_k, d_v, *(None,) * (len(rest) - 1), d_bias if has_bias else None


class _Eager(torch.autograd.Function):
    """An operator with a gradient also inside another operator, where PyTorch records none."""

    @staticmethod
    def forward(ctx, operator, *inputs):
        output = operator.forward(*inputs)
        _keep(ctx, inputs, output)
        ctx.operator = operator
        return output

    @staticmethod
    def backward(ctx, d_out, d_lse):
        # looked up once: gradient checkpointing computes them anew for that
        saved = ctx.saved_tensors
        with torch.no_grad():
            grads = ctx.operator._gradients(saved, ctx.rest, d_out, d_lse)
        return None, *once(grads, (*saved[:3], ctx.rest[-1], d_out, d_lse))

    @staticmethod
    def jvp(ctx, *tangents):
        raise RuntimeError(FORWARD)


def _is_watched(tensors: tuple[Tensor, ...]) -> bool:
    """Whether anything but numbers is to come of operators: tracers, modes, profilers, subclasses.

    Where nothing does, calling what an operator runs takes half the time of calling the operator.
    """
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
        or forward_ad._current_level >= 0
        or not all(map(_is_plain, tensors))
    )


def _is_plain(x: Tensor) -> bool:
    return type(x) in (Tensor, Parameter) and not x.is_meta


def _laid_out(outputs: tuple[Tensor, ...], like: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """The outputs with the strides that the fake operators promise."""
    promised = [None if x is None else torch.empty_like(x, device="meta") for x in like]
    return tuple(
        x if y is None or x.stride() == y.stride() else torch.empty_like(z).copy_(x)
        for x, y, z in itertools.zip_longest(outputs, promised, like)
    )


def _keep(ctx, inputs, output):
    """Save the inputs and outputs of the forward operator for its backward."""
    q, k, v, *rest = inputs
    ctx.save_for_backward(q, k, v, *output)
    # held as they are: a plan made in inference mode cannot be saved for backward
    ctx.rest = rest


def flatten(lists: BlockLists) -> tuple:
    """The arguments ``LISTS`` of an operator."""
    lists.remember()
    return *_tensors(lists), *_numbers(lists)


def _tensors(lists: BlockLists) -> tuple[Tensor | None, ...]:
    box = lists.box
    packed = (None, None, None) if box is None else (box.key, box.low, box.high)
    held = (lists.order, lists.row_start, lists.num_full, lists.key_block)
    return *held, *packed, lists.mask_id, lists.masks, lists.keys


def _numbers(lists: BlockLists) -> tuple[int, ...]:
    return lists.block, lists.batch, lists.heads, 0 if lists.box is None else lists.box.guard


def gather(inputs: tuple, num_before: int = 3) -> tuple:
    """The arguments of an operator, with block lists for their tensors and numbers.

    Args:
        inputs: q, k and others, then ``LISTS``, then the rest.
        num_before: arguments before ``LISTS``.

    Raises:
        ValueError: lists that point outside of the tokens of q and k.
    """
    q, k, *_ = before = inputs[:num_before]
    lists = _lists_of(inputs[num_before : num_before + _NUM_LISTS])
    lists.check(q.shape[2], k.shape[2])
    return *before, lists, *inputs[num_before + _NUM_LISTS :]


def _lists_of(given: tuple) -> BlockLists:
    tensors, numbers = given[:_NUM_TENSORS], given[_NUM_TENSORS:]
    order, row_start, num_full, key_block, key, low, high, mask_id, masks, keys = tensors
    lists = find(key_block)
    if lists is None or not _is_of(lists, tensors, numbers):
        block, batch, heads, guard = numbers
        lists = BlockLists(
            *(order, block, batch, heads, row_start, num_full, key_block),
            box=None if key is None else Box(key, low, high, guard),
            mask_id=mask_id,
            masks=masks,
            keys=keys,
        )
    return lists


def mask_of(lists: BlockLists, num_tokens: int, num_keys: int) -> Tensor:
    """``lists.mask``, as an operator where a compiler traces: it depends on values."""
    if not torch.compiler.is_compiling():
        return lists.mask(num_tokens, num_keys)
    return torch.ops.vidattn.mask(num_tokens, num_keys, *flatten(lists))


_mask = torch.library.custom_op(
    "vidattn::mask",
    lambda num_tokens, num_keys, *given: _lists_of(given).mask(num_tokens, num_keys),
    mutates_args=(),
    schema=f"(int num_tokens, int num_keys, {LISTS}) -> Tensor",
)


@_mask.register_fake
def _(num_tokens, num_keys, *given):
    order, (_, batch, heads, _) = given[0], given[_NUM_TENSORS:]
    return order.new_empty(batch, heads, num_tokens, num_keys, dtype=torch.bool)


def _is_of(lists: BlockLists, tensors: tuple, numbers: tuple) -> bool:
    return _numbers(lists) == numbers and all(map(is_, _tensors(lists), tensors))


def new_like(x: Tensor) -> Tensor:
    """Memory for a result where tokens stay as they are, the numbers of one side by side."""
    like = torch.empty_like(x)
    return like if like.stride(-1) == 1 else torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _fake_forward(q, k, v, *rest):
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=lse_dtype)


def _fake_backward(d_out, delta, q, k, v, lse, *rest):
    key_bias = rest[-1]
    d_bias = q.new_empty(0) if key_bias is None else torch.empty_like(key_bias)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), d_bias
