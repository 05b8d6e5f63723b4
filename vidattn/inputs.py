"""What attention and planning are given fits together, or an error names what does not.

Letters: B batch, H query heads, K key heads, S tokens, D head dim.
"""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor

from vidattn.grid import Grid


def check_inputs(
    grid: Grid, given: tuple[Tensor, ...], scale: float | None, key_mask: Tensor | None
) -> None:
    """Raise ValueError unless tensors can be planned for, or attended to.

    Args:
        given: q (B, H, S, D) and k (B, K, S, D), H a multiple of K; for attention also v like k.
        scale: a number, or None.
        key_mask: (B, S) bool, or None.
    """
    names, q = ("q", "k", "v")[: len(given)], given[0]
    _check_shapes(names, given)
    if not q.is_floating_point():
        raise ValueError(f"{_list(names)} must be floating point, got {q.dtype}: convert them")
    if q.shape[2] != grid.num_tokens:
        raise ValueError(
            f"q {tuple(q.shape)} has {q.shape[2]} tokens but the plan is for {grid.num_tokens} "
            f"({grid}): make the plan for the grid of this sequence; tokens are the third axis"
        )
    # planning looks at any, autocast makes them one
    may_mix = len(given) == 2 or (not q.is_meta and torch.is_autocast_enabled(q.device.type))
    if any((x.dtype != q.dtype and not may_mix) or x.device != q.device for x in given[1:]):
        kinds = ", ".join(f"{x.dtype} on {x.device}" for x in given)
        raise ValueError(f"{_list(names)} must share one dtype and one device, got {kinds}")
    if scale is not None and type(scale) is not float:
        _check_scale(scale)
    if key_mask is not None:
        _check_mask(key_mask, q)


def _check_shapes(names: tuple[str, ...], given: tuple[Tensor, ...]) -> None:
    q, k = given[:2]
    if not all(isinstance(x, Tensor) for x in given):
        kinds = ", ".join(type(x).__name__ for x in given)
        raise ValueError(f"{_list(names)} must be tensors, got {kinds}")
    if q.dim() == 4 == k.dim() and k.shape == given[-1].shape:
        (B, H, S, D), (Bk, K, Sk, Dk) = q.shape, k.shape
        if (B, S, D) == (Bk, Sk, Dk) and 0 not in (B, D, H, K) and H % K == 0:
            return
    shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in zip(names, given))
    if q.dim() != 4 or k.dim() != 4 or k.shape != given[-1].shape:
        raise ValueError(f"{_list(names)} must be (batch, heads, tokens, head dim), got {shapes}")
    if 0 in (*q.shape, *k.shape):
        raise ValueError(f"{_list(names)} must hold at least one sample and one head, got {shapes}")
    raise ValueError(
        f"{_list(names)} must agree in batch, tokens and head dim, and the heads of q must be a "
        f"multiple of the heads of k, got {shapes}"
    )


def _check_scale(scale: object) -> None:
    # what torch.compile and export trace stands for a number
    if isinstance(scale, torch.SymFloat | torch.SymInt):
        return
    if isinstance(scale, bool) or not isinstance(scale, Real):
        raise ValueError(f"scale must be a number, got {scale!r}")


def _check_mask(key_mask: Tensor, q: Tensor) -> None:
    wanted = (q.shape[0], q.shape[2])
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
    if key_mask.device != q.device:
        raise ValueError(f"key_mask is on {key_mask.device}, q on {q.device}")


def _list(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"
