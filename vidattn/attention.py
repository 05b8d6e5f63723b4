"""Runs a plan: the only place where an engine is chosen.

Letters: B batch, H heads, S tokens, D head dim.
"""

from __future__ import annotations

import logging
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from vidattn.head_plan import HeadPlan
from vidattn.kernels import block_sparse_cpu, block_sparse_torch, block_sparse_triton, reference
from vidattn.kernels.compensation import compensate
from vidattn.kernels.pooled_scores import block_means
from vidattn.plan import Plan
from vidattn.registry import unknown

BACKENDS = ("auto", "triton", "cpp", "torch", "flex", "reference")
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

    Gradients reach q, k and v, also through the log-sum-exp. A query without keys gives 0.

    Args:
        q: (B, H, S, D) queries in sequence order.
        k: (B, Hk, S, D) keys; H must be a multiple of Hk (grouped-query attention).
        v: (B, Hk, S, D) values.
        plan: for the grid of these S tokens, with 1 or B samples and 1 or H heads.
        scale: factor of the scores; D ** -0.5 by default. A plan may sharpen it.
        key_mask: (B, S) bool, False for keys that nobody may read, such as padded text.
        backend: "triton" (NVIDIA GPUs), "cpp" (CPUs with a C++ compiler), "torch" (any device),
            "flex" (compiled FlexAttention), "reference" (float64, dense memory), or "auto": dense
            plans run on PyTorch's own attention, others on "cpp" on a CPU where it compiles, else
            on "torch", on "triton" on a GPU that it knows, and on "flex" on other GPUs.
        return_lse: also return the (B, H, S) float32 log-sum-exp of the scaled scores.

    Returns:
        (B, H, S, D) in the dtype of ``q``, and the log-sum-exp if asked for.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, or an unknown backend.

    >>> grid = vidattn.Grid(5, 8, 8)
    >>> q = k = v = torch.randn(1, 4, grid.num_tokens, 64)
    >>> attend(q, k, v, vidattn.plan("radial", grid)).shape
    torch.Size([1, 4, 320, 64])
    """
    if backend not in BACKENDS:
        raise unknown("backend", backend, BACKENDS)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if plan.device != q.device:
        plan = plan.to(q.device)
    options = {"scale": scale, "key_mask": key_mask, "backend": backend, "need_lse": return_lse}
    if isinstance(plan, HeadPlan):
        out, lse = _attend_by_heads(q, k, v, plan, options)
    else:
        out, lse = _attend(q, k, v, plan, **options)
    return (out, lse) if return_lse else out


def _attend_by_heads(
    q: Tensor, k: Tensor, v: Tensor, plan: HeadPlan, options: dict
) -> tuple[Tensor, Tensor | None]:
    """Every group of heads by its own plan."""
    if plan.num_heads != q.shape[1]:
        raise ValueError(f"the plan is for {plan.num_heads} heads, q has {q.shape[1]}")
    groups = q.shape[1] // max(k.shape[1], 1)
    parts = [
        _attend(q[:, heads], k[:, heads // groups], v[:, heads // groups], part, **options)
        for part, heads in zip(plan.plans, plan.heads)
    ]
    # the heads stand in the order of the plans: put them back
    back = torch.cat(plan.heads).argsort()
    outs, lses = zip(*parts)
    out = torch.cat(outs, dim=1)[:, back]
    return out, torch.cat(lses, dim=1)[:, back] if options["need_lse"] else None


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
    _check(q, k, v, plan, key_mask)
    scale *= plan.sharpness
    if backend == "auto" and plan.is_dense and not need_lse:
        mask = None if key_mask is None else key_mask[:, None, None]
        grouped = k.shape[1] != q.shape[1]
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped
        )
        return out, None
    engine = _auto_engine(q.device.type, q.dtype) if backend == "auto" else backend
    gain, shift = _compensation(v, plan, key_mask, q.shape[1])
    if engine == "triton":
        # its kernel adds them to what it writes
        return _triton(q, k, v, plan, scale, key_mask, gain, shift)
    out, lse = _ENGINES[engine](q, k, v, plan, scale, key_mask, need_lse)
    return compensate(out, plan.layout.order, plan.layout.block, gain, shift), lse


def _compensation(v: Tensor, plan: Plan, key_mask: Tensor | None, num_heads: int) -> tuple:
    """Gain of query blocks, and the mean values of what they do not read (see ``Plan``)."""
    if plan.rest is None:
        return plan.gain, None
    means, _ = block_means(v, plan.layout.order, plan.layout.block, key_mask)
    return plan.gain, plan.rest @ means.repeat_interleave(num_heads // v.shape[1], dim=1)


def _check(q: Tensor, k: Tensor, v: Tensor, plan: Plan, key_mask: Tensor | None) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise ValueError(f"q, k and v must be (batch, heads, tokens, head dim), got {shapes}")
    if q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:] or q.shape[1] % k.shape[1]:
        raise ValueError(
            "q, k and v must agree in batch, tokens and head dim, and the heads of q must be a "
            f"multiple of the heads of k, got {shapes}"
        )
    if q.shape[2] != plan.grid.num_tokens:
        raise ValueError(
            f"q has {q.shape[2]} tokens but the plan is for {plan.grid.num_tokens} ({plan.grid}): "
            "make the plan for the grid of this sequence; tokens are the third axis"
        )
    if len({q.dtype, k.dtype, v.dtype}) > 1 or len({q.device, k.device, v.device}) > 1:
        kinds = ", ".join(f"{x.dtype} on {x.device}" for x in (q, k, v))
        raise ValueError(f"q, k and v must share one dtype and one device, got {kinds}")
    lists = plan.lists
    if lists.batch not in (1, q.shape[0]) or lists.heads not in (1, q.shape[1]):
        raise ValueError(
            f"the plan is for {lists.batch} samples and {lists.heads} heads, q has {q.shape[0]} "
            f"and {q.shape[1]}: each must be equal, or 1 in the plan"
        )
    if key_mask is not None and (
        key_mask.dtype != torch.bool or key_mask.shape != (q.shape[0], q.shape[2])
    ):
        raise ValueError(
            f"key_mask must be bool of shape (batch, tokens) = {(q.shape[0], q.shape[2])}, "
            f"got {key_mask.dtype} {tuple(key_mask.shape)}"
        )


@lru_cache
def _auto_engine(device: str, dtype: torch.dtype) -> str:
    if device == "cpu":
        engine = "cpp" if block_sparse_cpu.is_available(dtype) else "torch"
    else:
        engine = "triton" if block_sparse_triton.is_available(device) else "flex"
    log.info("attention in %s on %s runs on the %r engine", dtype, device, engine)
    return engine


def _torch(q, k, v, plan, scale, key_mask, need_lse):
    layout, lists = plan.layout, plan.lists
    return block_sparse_torch.block_sparse_attention(
        q, k, v, layout.order, layout.block, lists, scale=scale, key_mask=key_mask
    )


def _cpp(q, k, v, plan, scale, key_mask, need_lse):
    layout, lists = plan.layout, plan.lists
    return block_sparse_cpu.block_sparse_attention(
        q, k, v, layout.order, layout.block, lists, scale=scale, key_mask=key_mask
    )


def _triton(q, k, v, plan, scale, key_mask, gain, shift):
    layout, lists = plan.layout, plan.lists
    return block_sparse_triton.block_sparse_attention(
        q,
        k,
        v,
        layout.order,
        layout.block,
        lists,
        scale=scale,
        key_mask=key_mask,
        gain=gain,
        shift=shift,
    )


def _flex(q, k, v, plan, scale, key_mask, need_lse):
    # brings in the compiler of PyTorch: seconds that only this engine's users should wait
    from vidattn.kernels import flex

    layout, lists = plan.layout, plan.lists
    return flex.block_sparse_attention(
        q,
        k,
        v,
        layout.order,
        layout.block,
        lists,
        scale=scale,
        key_mask=key_mask,
        need_lse=need_lse,
    )


def _reference(q, k, v, plan, scale, key_mask, need_lse):
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    mask = plan.mask()
    if key_mask is not None:
        mask = mask & key_mask[:, None, None]
    return reference.masked_attention(q, k, v, mask, scale)


_ENGINES = {
    "cpp": _cpp,
    "torch": _torch,
    "flex": _flex,
    "reference": _reference,
}
