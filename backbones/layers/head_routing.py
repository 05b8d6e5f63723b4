"""Mixture-of-head attention: every token weighs the heads of attention, and leaves some out.

Jin et al., "MoH: Multi-Head Attention as Mixture-of-Head Attention", arXiv:2410.11842.

Letters: n heads, E of them that tokens choose from, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.hooks import RemovableHandle
from torch.utils.module_tracker import ModuleTracker


class HeadRouter(nn.Module):
    """Weights of the outputs of heads, in two steps: between kinds of heads, and within a kind.

    The first ``num_shared`` heads are weighed by every token; of the others, a token takes those
    that score best, and gives 0 to the rest. Weights within a kind average 1, as in the released
    code, and so do the two of the kinds.

    Args:
        dim: channels.
        num_heads: n.
        num_shared: heads that every token takes.
        num_routed: heads that a token takes of the others; with none, all heads must be shared.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_shared: int,
        num_routed: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype, "bias": False}
        choice = num_heads - num_shared
        if not 0 <= num_shared <= num_heads or not min(choice, 1) <= num_routed <= choice:
            raise ValueError(
                f"of {num_heads} heads, {num_shared} cannot be shared and {num_routed} routed: "
                "routed heads must be 1 to as many as are not shared, or 0 where all are shared"
            )
        self.num_shared, self.num_routed = num_shared, num_routed
        self.shared = nn.Linear(dim, num_shared, **dd) if num_shared > 1 else None
        self.routed = nn.Linear(dim, choice, **dd) if num_routed else None
        self.kinds = nn.Linear(dim, 2, **dd) if num_shared and num_routed else None

    def forward(self, x: Tensor) -> Tensor:
        """Weights (..., n) of tokens (..., C)."""
        weights = torch.ones_like(x[..., : self.num_shared])
        if self.shared is not None:
            weights = self.shared(x).softmax(-1) * self.num_shared
        if self.routed is not None:
            gates = self.routed(x).softmax(-1)
            gates = gates * chosen(gates, self.num_routed)
            gates = gates / gates.sum(-1, keepdim=True) * self.num_routed
            if self.kinds is not None:
                kinds = self.kinds(x).softmax(-1) * 2
                weights, gates = weights * kinds[..., :1], gates * kinds[..., 1:]
            weights = torch.cat([weights, gates], -1)
        return weights


def chosen(gates: Tensor, number: int) -> Tensor:
    """1 at the ``number`` largest of the last axis, and 0 elsewhere."""
    return torch.zeros_like(gates).scatter(-1, gates.topk(number, -1)[1], 1.0)


@contextmanager
def balance_losses(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what every router adds to the loss, so that all its heads stay in use.

    Each is E times the sum, over the heads to choose from, of the mean gate and the share of
    tokens that take the head. The authors add 0.01 times their mean. Blocks may be checkpointed,
    and the backward pass may run inside the ``with`` block or behind it.

    >>> with balance_losses(model) as losses:
    ...     loss = criterion(model(images), labels)
    >>> if losses:
    ...     loss = loss + 0.01 * torch.stack(losses).mean()
    """
    losses: list[Tensor] = []

    def listen(router: HeadRouter) -> RemovableHandle:
        assert router.routed is not None

        def look(module, inputs, logits):
            # a checkpointed block that is computed again adds nothing
            if ModuleTracker().is_bw:
                return
            # and counts what its forward pass saved, which this is no part of
            with saved_tensors_hooks(_same, _same):
                gates = logits.flatten(0, -2).softmax(-1)
                taken = chosen(gates, router.num_routed)
                losses.append(gates.shape[-1] * (gates.mean(0) * taken.mean(0)).sum())

        return router.routed.register_forward_hook(look)

    routers = [m for m in model.modules() if isinstance(m, HeadRouter) and m.routed is not None]
    handles = [listen(router) for router in routers]
    try:
        yield losses
    finally:
        for handle in handles:
            handle.remove()


def _same(x: Tensor) -> Tensor:
    return x
