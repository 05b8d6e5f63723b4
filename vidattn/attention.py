"""Runs a plan: the only place where an engine is chosen.

Letters: B batch, H heads, S tokens, D head dim.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from vidattn.head_plan import HeadPlan
from vidattn.inputs import check_inputs
from vidattn.kernels import (
    block_sparse_cpu,
    block_sparse_torch,
    block_sparse_triton,
    flash,
    quantised,
    quantised_triton,
    reference,
)
from vidattn.kernels.compensation import compensate
from vidattn.kernels.constant import constant_result
from vidattn.kernels.dense import dense_attention
from vidattn.kernels.pooled_scores import block_means
from vidattn.plan import Plan
from vidattn.registry import unknown
from vidattn.steady import cast_by_autocast

BACKENDS = ("auto", "triton", "cpp", "torch", "flex", "flash", "reference")
log = logging.getLogger("vidattn")


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan | HeadPlan,
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
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
        k: (B, Hk, S, D) keys; H must be a multiple of Hk (grouped-query attention).
        v: (B, Hk, S, D) values.
        plan: for the grid of these S tokens, with 1 or B samples and 1 or H heads.
        scale: factor of the scores, a number; D ** -0.5 by default. A plan may sharpen it.
        key_mask: (B, S) bool, False for keys that nobody may read, such as padded text.
        backend: "triton" (NVIDIA GPUs), "cpp" (CPUs with a C++ compiler), "torch" (any device),
            "flex" (compiled FlexAttention), "flash" (its FlashAttention-4 kernels, on Hopper and
            Blackwell), "reference" (float64, dense memory), or "auto": dense plans run on PyTorch's
            own attention (on Hopper by cuDNN, unless you chose a kernel), others on "cpp" on a CPU
            where it compiles, else on "torch", on "triton" on a GPU that it knows, or on "flash"
            where that has measured faster, and on "flex" on other GPUs. Plans with a precision run
            on "triton", where it has that precision, and on "torch".
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
    if not isinstance(plan, Plan | HeadPlan):
        raise ValueError(f"plan must be one, as vidattn.plan makes it, got {type(plan).__name__}")
    check_inputs(plan.grid, (q, k, v), scale, key_mask)
    if _is_in_other_state(q.device.type):
        return _in_plain_state(q, k, v, plan, scale, key_mask, backend, return_lse)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if plan.device != q.device:
        plan = plan.to(q.device)
    options = {"scale": scale, "key_mask": key_mask, "backend": backend, "need_lse": return_lse}
    if isinstance(plan, HeadPlan):
        out, lse = _attend_by_heads(q, k, v, plan, options)
    else:
        out, lse = _attend(q, k, v, plan, **options)
    return (out, lse) if return_lse else out


def _is_in_other_state(device: str) -> bool:
    if device != "meta" and torch.is_autocast_enabled(device):
        return True
    # not to be asked while a compiler traces
    return not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()


def _in_plain_state(q, k, v, plan, scale, key_mask, backend, return_lse):
    """``attend`` in the dtype of autocast, and outside of inference mode."""
    device, options = q.device.type, {"scale": scale, "key_mask": key_mask}
    options |= {"backend": backend, "return_lse": return_lse}
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
    plan: Plan | HeadPlan,
    key_mask: Tensor | None = None,
    backend: str = "auto",
) -> tuple[str, ...]:
    """The engines that ``attend`` runs a plan on, in alphabetical order; takes what that takes.

    "pytorch" is PyTorch's own attention, which dense plans run on.
    """
    plans = plan.plans if isinstance(plan, HeadPlan) else (plan,)
    return tuple(sorted({_engine(q, k, v, one, key_mask, backend, False) for one in plans}))


def _engine(q, k, v, plan: Plan, key_mask: Tensor | None, backend: str, need_lse: bool) -> str:
    """What runs a plan."""
    if backend != "auto":
        return backend
    if plan.precision is not None:
        return _auto_quantised(q.device, q.dtype, plan.precision)
    if plan.is_dense and not need_lse:
        return "pytorch"
    engine = _auto_engine(q.device, q.dtype)
    is_for_flash = engine == "triton" and _is_for_flash(q, k, v, plan, key_mask)
    return "flash" if is_for_flash else engine


def _attend_by_heads(
    q: Tensor, k: Tensor, v: Tensor, plan: HeadPlan, options: dict
) -> tuple[Tensor, Tensor | None]:
    """Every group of heads by its own plan."""
    if plan.num_heads != q.shape[1]:
        raise ValueError(f"the plan is for {plan.num_heads} heads, q has {q.shape[1]}")
    if plan.by_sample and len(plan.plan_of_head) != q.shape[0]:
        raise ValueError(f"the plan is for {len(plan.plan_of_head)} samples, q has {q.shape[0]}")
    groups = q.shape[1] // k.shape[1]
    if plan.by_sample:
        return _attend_by_samples(q, k, v, plan, options)
    parts = [
        _attend(q[:, heads], k[:, heads // groups], v[:, heads // groups], part, **options)
        for part, heads in zip(plan.plans, plan.heads)
    ]
    # the heads stand in the order of the plans: put them back
    back = torch.cat(plan.heads).argsort()
    outs, lses = zip(*parts)
    out = torch.cat(outs, dim=1)[:, back]
    return out, torch.cat(lses, dim=1)[:, back] if options["need_lse"] else None


def _attend_by_samples(
    q: Tensor, k: Tensor, v: Tensor, plan: HeadPlan, options: dict
) -> tuple[Tensor, Tensor | None]:
    """Every head of every sample by its own plan, each as a sample of one head."""
    groups, key_mask = q.shape[1] // k.shape[1], options["key_mask"]
    parts = []
    for part, rows in zip(plan.plans, plan.heads):
        sample, head = rows // q.shape[1], rows % q.shape[1]
        given = (q[sample, head], k[sample, head // groups], v[sample, head // groups])
        mask = None if key_mask is None else key_mask[sample]
        parts.append(_attend(*(x[:, None] for x in given), part, **options | {"key_mask": mask}))
    back = torch.cat(plan.heads).argsort()
    outs, lses = zip(*parts)
    out = torch.cat(outs)[back].view(q.shape)
    return out, torch.cat(lses)[back].view(q.shape[:3]) if options["need_lse"] else None


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    *,
    scale: float,
    key_mask: Tensor | None,
    backend: str,
    need_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    _check_lists(q, plan)
    scale *= plan.sharpness
    engine = _engine(q, k, v, plan, key_mask, backend, need_lse)
    if plan.precision is not None:
        return _quantised(q, k, v, plan, scale, key_mask, engine)
    if engine == "pytorch":
        mask = None if key_mask is None else key_mask[:, None, None]
        return dense_attention(q, k, v, mask=mask, scale=scale), None
    gain, shift = _compensation(v, plan, key_mask, q.shape[1])
    call = (q, k, v, plan, scale, key_mask)
    if engine == "triton":
        # its kernel adds them to what it writes
        return _run(block_sparse_triton.block_sparse_attention, *call, gain=gain, shift=shift)
    out, lse = _ENGINES[engine](*call, need_lse=need_lse)
    return compensate(out, plan.lists, gain, shift), lse


def _quantised(q, k, v, plan, scale, key_mask, backend) -> tuple[Tensor, Tensor]:
    """Attention in the precision of the plan."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        # rounding has gradient 0: anything else would be that of attention nobody computed
        raise ValueError(
            f"a plan of precision {plan.precision!r} has no gradient: use torch.no_grad(), or "
            "train with plan.with_precision(None)"
        )
    if backend not in _QUANTISED:
        raise ValueError(
            f"the {backend!r} engine does not run plans of precision {plan.precision!r}: use "
            'backend="torch", "triton" on an NVIDIA GPU, or plan.with_precision(None)'
        )
    attention = _QUANTISED[backend].block_sparse_attention
    out, lse = _run(attention, q, k, v, plan, scale, key_mask, precision=plan.precision)
    gain, shift = _compensation(v, plan, key_mask, q.shape[1])
    return compensate(out, plan.lists, gain, shift), lse


@lru_cache
@constant_result
def _auto_quantised(device: torch.device, dtype: torch.dtype, precision: str) -> str:
    fits = quantised_triton.runs(precision) and dtype in quantised_triton.DTYPES
    engine = "triton" if fits and block_sparse_triton.is_available(device) else "torch"
    log.info("%s attention in %s on %s runs on the %r engine", precision, dtype, device, engine)
    return engine


def _compensation(v: Tensor, plan: Plan, key_mask: Tensor | None, num_heads: int) -> tuple:
    """Gain of query blocks, and the mean values of what they do not read (see ``Plan``)."""
    if plan.rest is None:
        return plan.gain, None
    means, _ = block_means(v, plan.layout.order, plan.layout.block, key_mask)
    rest = plan.rest.to(means.dtype)
    return plan.gain, rest @ means.repeat_interleave(num_heads // v.shape[1], dim=1)


def _check_lists(q: Tensor, plan: Plan) -> None:
    lists = plan.lists
    if lists.batch not in (1, q.shape[0]) or lists.heads not in (1, q.shape[1]):
        raise ValueError(
            f"the plan is for {lists.batch} samples and {lists.heads} heads, q has {q.shape[0]} "
            f"and {q.shape[1]}: each must be equal, or 1 in the plan"
        )


@lru_cache
@constant_result
def _auto_engine(device: torch.device, dtype: torch.dtype) -> str:
    if device.type == "cpu":
        engine = "cpp" if block_sparse_cpu.is_available(dtype) else "torch"
    else:
        engine = "triton" if block_sparse_triton.is_available(device) else "flex"
    log.info("attention in %s on %s runs on the %r engine", dtype, device, engine)
    return engine


def _is_for_flash(q, k, v, plan, key_mask) -> bool:
    """Whether FlashAttention-4 does this faster than Triton, and with the same bits every time."""
    pulled = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    simple = key_mask is None and plan.lists.masks is None
    if pulled or not simple or torch.compiler.is_compiling():
        return False
    return flash.is_faster(q, plan.lists)


def _run(attention: Callable, q, k, v, plan, scale, key_mask, **options):
    """Attention of an engine over the lists of a plan."""
    options |= {"scale": scale, "key_mask": key_mask}
    return attention(q, k, v, plan.lists, **options)


def _torch(*call, need_lse):
    return _run(block_sparse_torch.block_sparse_attention, *call)


def _cpp(*call, need_lse):
    return _run(block_sparse_cpu.block_sparse_attention, *call)


def _flex(*call, need_lse):
    # brings in the compiler of PyTorch: seconds that only this engine's users should wait
    from vidattn.kernels import flex

    return _run(flex.block_sparse_attention, *call, need_lse=need_lse)


def _flash(*call, need_lse):
    return _run(flash.block_sparse_attention, *call, need_lse=need_lse)


def _reference(q, k, v, plan, scale, key_mask, *, need_lse):
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    mask = plan.mask()
    if key_mask is not None:
        mask = mask & key_mask[:, None, None]
    return reference.masked_attention(q, k, v, mask, scale)


_ENGINES = {
    "cpp": _cpp,
    "torch": _torch,
    "flex": _flex,
    "flash": _flash,
    "reference": _reference,
}
_QUANTISED = {"torch": quantised, "triton": quantised_triton}
