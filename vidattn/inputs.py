"""What attention and planning are given fits together, or an error names what does not.

Letters: B batch, H query heads, K key heads, S queries, Sk keys, D head dim.
"""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor
from torch.nn import Parameter

from vidattn.grid import Grid


def check_inputs(
    grid: Grid,
    given: tuple[Tensor, ...],
    scale: float | None,
    key_mask: Tensor | None,
    key_grid: Grid | None = None,
) -> None:
    """Raise ValueError unless tensors can be planned for, or attended to.

    Args:
        given: q (B, H, S, D) and k (B, K, Sk, D), H a multiple of K; for attention also v like k.
        scale: a number, or None.
        key_mask: (B, Sk) bool, or None.
        key_grid: where keys sit that are other tokens than the queries.
    """
    names, q = ("q", "k", "v")[: len(given)], given[0]
    _check_shapes(names, given, key_grid is None)
    if not q.is_floating_point():
        raise ValueError(f"{_list(names)} must be floating point, got {q.dtype}: convert them")
    if q.shape[2] != grid.num_tokens:
        raise ValueError(
            f"q {tuple(q.shape)} has {q.shape[2]} tokens but the plan is for {grid.num_tokens} "
            f"({grid}): make the plan for the grid of this sequence; tokens are the third axis"
        )
    if key_grid is not None and given[1].shape[2] != key_grid.num_tokens:
        raise ValueError(
            f"k {tuple(given[1].shape)} has {given[1].shape[2]} tokens but the plan reads "
            f"{key_grid.num_tokens} keys ({key_grid}): make the plan for so many keys"
        )
    # planning looks at any, autocast makes them one
    may_mix = len(given) == 2 or (not q.is_meta and torch.is_autocast_enabled(q.device.type))
    if any((x.dtype != q.dtype and not may_mix) or x.device != q.device for x in given[1:]):
        kinds = ", ".join(f"{x.dtype} on {x.device}" for x in given)
        raise ValueError(f"{_list(names)} must share one dtype and one device, got {kinds}")
    if scale is not None and type(scale) is not float:
        _check_scale(scale)
    if key_mask is not None:
        _check_mask(key_mask, given[1])


def check_weight(key_weight: Tensor, q: Tensor, k: Tensor) -> None:
    """Raise ValueError unless keys can have these weights.

    Their numbers are looked at on a CPU alone, where that waits for nothing, and not while a
    compiler traces.

    Args:
        key_weight: (B|1, K|1, Sk) floating point.
        q: (B, H, S, D).
        k: (B, K, Sk, D).
    """
    B, K, Sk, _ = k.shape
    if not isinstance(key_weight, Tensor):
        raise ValueError(f"key_weight must be a tensor, got {type(key_weight).__name__}")
    shape = tuple(key_weight.shape)
    fits = len(shape) == 3 and shape[0] in (1, B) and shape[1] in (1, K) and shape[2] == Sk
    if not fits or not key_weight.is_floating_point():
        raise ValueError(
            "key_weight must be floating point of shape (1 or batch, 1 or key heads, keys) = "
            f"(1 or {B}, 1 or {K}, {Sk}), got {key_weight.dtype} {shape}"
        )
    if key_weight.device != q.device:
        raise ValueError(f"key_weight is on {key_weight.device}, q on {q.device}")
    if key_weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("key_weight has no gradient: give key_weight.detach()")
    is_plain = type(key_weight) in (Tensor, Parameter) and key_weight.device.type == "cpu"
    if is_plain and not torch.compiler.is_compiling():
        low, high = (x.item() for x in torch.aminmax(key_weight))
        if not 0 <= low <= high < math.inf:
            raise ValueError(
                f"key_weight must be finite and not negative, got numbers from {low} to {high}: 0 "
                "hides a key"
            )


def _check_shapes(names: tuple[str, ...], given: tuple[Tensor, ...], is_square: bool) -> None:
    q, k = given[:2]
    if not all(isinstance(x, Tensor) for x in given):
        kinds = ", ".join(type(x).__name__ for x in given)
        raise ValueError(f"{_list(names)} must be tensors, got {kinds}")
    if q.dim() == 4 == k.dim() and k.shape == given[-1].shape:
        (B, H, S, D), (Bk, K, Sk, Dk) = q.shape, k.shape
        fits = (B, D) == (Bk, Dk) and (S == Sk or not is_square)
        if fits and 0 not in (B, D, H, K) and H % K == 0:
            return
    shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in zip(names, given))
    if q.dim() != 4 or k.dim() != 4 or k.shape != given[-1].shape:
        raise ValueError(f"{_list(names)} must be (batch, heads, tokens, head dim), got {shapes}")
    if 0 in (*q.shape, *k.shape):
        raise ValueError(f"{_list(names)} must hold at least one sample and one head, got {shapes}")
    what, wish = "batch and head dim", ""
    if is_square:
        what = "batch, tokens and head dim"
        wish = ": keys of other tokens need a plan for them, such as Plan.dense(grid, keys)"
    raise ValueError(
        f"{_list(names)} must agree in {what}, and the heads of q must be a multiple of the heads "
        f"of k, got {shapes}{wish}"
    )


def _check_scale(scale: object) -> None:
    # what torch.compile and export trace stands for a number
    if isinstance(scale, torch.SymFloat | torch.SymInt):
        return
    if isinstance(scale, bool) or not isinstance(scale, Real):
        raise ValueError(f"scale must be a number, got {scale!r}")


def _check_mask(key_mask: Tensor, k: Tensor) -> None:
    wanted = (k.shape[0], k.shape[2])
    if not isinstance(key_mask, Tensor):
        raise ValueError(
            f"key_mask must be a bool tensor of shape (batch, tokens) = {wanted}, got "
            f"{type(key_mask).__name__}"
        )
    if key_mask.dtype != torch.bool or key_mask.shape != wanted:
        raise ValueError(
            f"key_mask must be bool of shape (batch, tokens) = {wanted}, "
            f"got {key_mask.dtype} {tuple(key_mask.shape)}"
        )
    if key_mask.device != k.device:
        raise ValueError(f"key_mask is on {key_mask.device}, q on {k.device}")


def _list(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"
