"""Runs a plan on the engine that is chosen for it.

Letters: B batch, H heads, Hk key heads, S queries, Sk keys, D head dim.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from vidattn.engines import BACKENDS, engine_for
from vidattn.inputs import check_inputs, check_weight
from vidattn.kernels.compensation import compensate
from vidattn.kernels.engines.exact import exact_attention, exact_engine
from vidattn.kernels.scoring.pooling import block_means
from vidattn.plan import AnyPlan, Index, Plan
from vidattn.support.registry import unknown
from vidattn.support.steady import cast_by_autocast


@overload
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AnyPlan,
    *,
    scale: float | None = ...,
    key_mask: Tensor | None = ...,
    key_weight: Tensor | None = ...,
    backend: str = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AnyPlan,
    *,
    scale: float | None = ...,
    key_mask: Tensor | None = ...,
    key_weight: Tensor | None = ...,
    backend: str = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AnyPlan,
    *,
    scale: float | None = ...,
    key_mask: Tensor | None = ...,
    key_weight: Tensor | None = ...,
    backend: str = ...,
    return_lse: bool = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AnyPlan,
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    key_weight: Tensor | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over the pairs that a plan keeps.

    Gradients reach q, k and v, also through the log-sum-exp, unless the plan has a precision of its
    own; they have no gradients themselves, and asking for one is an error. A query without keys
    gives 0. Inputs that were changed in place before the gradient was asked for are noticed as
    PyTorch notices it: on every engine of ours, in a dense plan where PyTorch's attention does.

    Under ``torch.autocast`` the inputs, float64 ones aside, are cast to its dtype first, as by
    PyTorch's own attention.

    Args:
        q: (B, H, S, D) queries in sequence order.
        k: (B, Hk, Sk, D) keys; H must be a multiple of Hk (grouped-query attention).
        v: (B, Hk, Sk, D) values.
        plan: for the grid of these S tokens, with 1 or B samples and 1 or H heads. Sk is S, unless
            the plan is for keys of other tokens (``Plan.dense(grid, keys)``, ``keys`` of a plan).
        scale: factor of the scores, a number; D ** -0.5 by default. A plan may sharpen it.
        key_mask: (B, Sk) bool, False for keys that nobody may read, such as padded text.
        key_weight: (B|1, Hk|1, Sk) how many keys each one stands for: the logarithm is added to its
            scaled scores, in float32 or more, and nobody reads a key of weight 0, which must hold
            finite numbers all the same. A key of weight n with the mean of n values is n equal keys
            with these values. It may change from call to call, and has no gradient. That weights
            are finite and not negative is checked on a CPU; elsewhere, where that would wait for
            the device, others make the output NaN.
        backend: "triton" (NVIDIA GPUs), "cpp" (CPUs with a C++ compiler), "torch" (any device),
            "flex" (compiled FlexAttention), "flash" (its FlashAttention-4 kernels, on Hopper and
            Blackwell), "reference" (float64, dense memory), or "auto": dense plans run on PyTorch's
            own attention (on Hopper by cuDNN, unless you chose a kernel), or on a CPU on "cpp"
            where that has measured faster; others on "cpp" on a CPU where it compiles, else on
            "torch", on "triton" on a GPU that it knows, or on "flash" where that has measured
            faster, and on "flex" on other GPUs. Plans with a precision run on "triton", where it
            has that precision, and on "torch".
        return_lse: also return the (B, H, S) float32 log-sum-exp of the scaled scores.

    Returns:
        (B, H, S, D) in the dtype of ``q``, or of autocast, and the log-sum-exp if asked for.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, an unknown backend, or one
            that cannot do this, with one that can.

    >>> grid = vidattn.Grid(5, 8, 8)
    >>> q = k = v = torch.randn(1, 4, grid.num_tokens, 64)
    >>> attend(q, k, v, vidattn.plan("radial", grid)).shape
    torch.Size([1, 4, 320, 64])
    """
    if backend not in BACKENDS:
        raise unknown("backend", backend, BACKENDS)
    if not isinstance(plan, AnyPlan):
        raise ValueError(f"plan must be one, as vidattn.plan makes it, got {type(plan).__name__}")
    is_square = plan.key_grid is plan.grid
    check_inputs(plan.grid, (q, k, v), scale, key_mask, None if is_square else plan.key_grid)
    if key_weight is not None:
        check_weight(key_weight, q, k)
    if _is_in_other_state(q.device.type):
        options = {"scale": scale, "key_mask": key_mask, "key_weight": key_weight}
        return _in_plain_state(q, k, v, plan, backend=backend, return_lse=return_lse, **options)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if plan.device != q.device:
        plan = plan.to(q.device)
    plan.check_counts(*q.shape[:2])
    key_bias = None if key_weight is None else _bias(key_weight, q, k)
    outs, lses = [], []
    for part, samples, heads in plan.parts():
        given = _of_part(q, k, v, key_mask, key_bias, samples, heads)
        out, lse = _attend(*given, part, scale=scale, backend=backend, need_lse=return_lse)
        outs.append(out)
        lses.append(lse)
    out = plan.put_back(outs)
    return (out, plan.put_back(lses)) if return_lse else out


def _is_in_other_state(device: str) -> bool:
    if device != "meta" and torch.is_autocast_enabled(device):
        return True
    # not to be asked while a compiler traces
    return not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()


def _in_plain_state(q, k, v, plan, **options):
    """``attend`` in the dtype of autocast, and outside of inference mode."""
    device = q.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        q, k, v = cast_by_autocast(q, k, v)
        with torch.autocast(device, enabled=False):
            return attend(q, k, v, plan, **options)
    # what a plan finds out about itself in here must serve in training too
    with torch.inference_mode(False), torch.no_grad():
        return attend(q, k, v, plan, **options)


def engines_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AnyPlan,
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    key_weight: Tensor | None = None,
    backend: str = "auto",
) -> tuple[str, ...]:
    """The engines that ``attend`` runs a plan on, in alphabetical order; takes what that takes.

    "pytorch" is PyTorch's own attention, which dense plans run on where nothing is faster.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    key_bias = None if key_weight is None else _bias(key_weight, q, k)
    names = set()
    for part, *_ in plan.parts():
        options = _options(part, scale, key_mask, key_bias, False)
        is_exact = _is_exact(part, backend, q, options)
        call = (q, k, v, part.lists)
        names.add(exact_engine(q, k, v) if is_exact else engine_for(call, options, backend)[0])
    return tuple(sorted(names))


def _bias(key_weight: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """(B|1, H|1, Sk) what weights add to scaled scores, in float32 or more."""
    bias = key_weight.detach().to(torch.promote_types(q.dtype, torch.float32)).log()
    return bias if bias.shape[1] == 1 else bias.repeat_interleave(q.shape[1] // k.shape[1], dim=1)


def _of_part(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    key_bias: Tensor | None,
    samples: Index,
    heads: Index,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """What some of H query heads, of some samples, attend with."""
    if isinstance(heads, slice):
        return q, k, v, key_mask, key_bias
    key_heads = heads // (q.shape[1] // k.shape[1])
    mask = None if key_mask is None else key_mask[samples].flatten(0, -2)
    bias = None if key_bias is None else key_bias.expand(*q.shape[:2], -1)[samples, heads]
    return q[samples, heads], k[samples, key_heads], v[samples, key_heads], mask, bias


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    key_bias: Tensor | None,
    plan: Plan,
    *,
    scale: float,
    backend: str,
    need_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    if plan.precision is not None:
        _check_gradient(q, k, v, plan)
    if key_bias is not None:
        _check_plain(plan)
    options = _options(plan, scale, key_mask, key_bias, need_lse)
    if _is_exact(plan, backend, q, options):
        given = {name: options[name] for name in ("scale", "key_mask", "key_bias")}
        return exact_attention(q, k, v, **given), None
    call = (q, k, v, plan.lists)
    _, engine = engine_for(call, options, backend)
    gain, shift = _compensation(v, plan, key_mask, q.shape[1])
    options |= {"gain": gain, "shift": shift}
    out, lse = engine.attention(*call, **{name: options[name] for name in engine.TAKES})
    if "gain" not in engine.TAKES:
        out = compensate(out, plan.lists, gain, shift)
    return out, lse


def _is_exact(plan: Plan, backend: str, q: Tensor, options: dict) -> bool:
    """Whether a plan runs as attention to everything, by whatever is fastest at that."""
    if not plan.is_dense or backend != "auto" or options["need_lse"]:
        return False
    # PyTorch's kernels for a GPU round biases to half precision
    return options["key_bias"] is None or q.device.type == "cpu"


def _options(
    plan: Plan, scale: float, key_mask: Tensor | None, key_bias: Tensor | None, need_lse: bool
) -> dict:
    """All that an engine may be told of a call, gain and shift aside."""
    return {
        "scale": scale * plan.sharpness,
        "key_mask": key_mask,
        "key_bias": key_bias,
        "need_lse": need_lse,
        "precision": plan.precision,
    }


def _check_gradient(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> None:
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        # rounding has gradient 0: anything else would be that of attention nobody computed
        raise ValueError(
            f"a plan of precision {plan.precision!r} has no gradient: use torch.no_grad(), or "
            "train with plan.with_precision(None)"
        )


def _check_plain(plan: Plan) -> None:
    if not plan.precision is plan.gain is plan.rest is None:
        raise ValueError(
            "weights of keys go with plans that have no precision of their own and estimate "
            f"nothing of what is not read; this one has precision {plan.precision!r}, gain "
            f"{plan.gain is not None} and rest {plan.rest is not None}: leave key_weight out, use "
            "plan.with_precision(None), or plan without rectify"
        )


def _compensation(v: Tensor, plan: Plan, key_mask: Tensor | None, num_heads: int) -> tuple:
    """Gain of query blocks, and the mean values of what they do not read (see ``Plan``)."""
    if plan.rest is None:
        return plan.gain, None
    means, _ = block_means(v, plan.layout.order, plan.layout.block, key_mask)
    rest = plan.rest.to(means.dtype)
    return plan.gain, rest @ means.repeat_interleave(num_heads // v.shape[1], dim=1)
