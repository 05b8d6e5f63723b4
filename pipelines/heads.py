"""Which of the model's heads an attention call has: not all of them, where processes share a layer.

Ulysses (diffusers' context parallelism) hands each process some heads of the whole sequence, tensor
parallelism cuts the projections by heads. Letters: B batch, H heads, S tokens, D head dim.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vidattn.pipelines.family import num_heads
from vidattn.planning.method import Method
from vidattn.schedule import Part


class Heads(NamedTuple):
    """Heads ``first`` to ``first + num - 1`` of the ``total`` that a layer of the model has."""

    first: int
    num: int
    total: int

    @property
    def are_all(self) -> bool:
        """Whether no head is elsewhere."""
        return self.num == self.total

    @property
    def numbers(self) -> tuple[int, ...]:
        """Those that they have in the model."""
        return tuple(range(self.first, self.first + self.num))

    def here(self, numbers: tuple[int, ...]) -> tuple[int, ...]:
        """Where heads of the model stand among these."""
        return tuple(number - self.first for number in numbers)

    def parts(self, parts: tuple[Part, ...]) -> tuple[Part, ...]:
        """What these heads follow of what those of the model do.

        Raises:
            ValueError: a method that needs to see all heads of a layer.
        """
        if self.are_all:
            return parts
        found = []
        for part in parts:
            mine = [x for x in self.numbers if part.heads is None or x in part.heads]
            if mine:
                check_apart(part.method)
                found.append(replace(part, heads=None if len(mine) == self.num else tuple(mine)))
        return tuple(found)


def heads_here(module: nn.Module, q: Tensor, model: nn.Module | None = None) -> Heads:
    """The heads of (B, H, S, D) queries in the layer of a model.

    Raises:
        ValueError: some are missing, and which is not known.
    """
    num, first, left = q.shape[1], 0, num_heads(module)
    if (cut := _cut(module, q.shape[-1])) is not None:
        first, left, total = cut
    else:
        total = left = num if left is None else left
    parallel = context_parallel(module.processor, model)
    if parallel is not None and parallel.ulysses_degree > 1:
        each = -(-left // parallel.ulysses_degree)
        first += parallel._ulysses_local_rank * each
        left = min(each, left - parallel._ulysses_local_rank * each)
    if num != left:
        raise ValueError(
            f"it attends with {num} heads where {left} of the {total} of its layer are expected, "
            "so that which of them they are is not known"
        )
    return Heads(first, num, total)


def context_parallel(processor: object, model: nn.Module | None = None) -> Any:
    """The settings of diffusers' context parallelism of a processor, None outside of it.

    Some processors are told nothing of those of their model.
    """
    # not as attributes, which diffusers must not see while we are at work
    told = (getattr(x, "__dict__", {}).get("_parallel_config") for x in (processor, model))
    parallel = next((x for x in told if x is not None), None)
    config = getattr(parallel, "context_parallel_config", None)
    return config if config is not None and (config._world_size or 1) > 1 else None


def _cut(module: nn.Module, head_dim: int) -> tuple[int, int, int] | None:
    """First head, their number and the total of a layer under tensor parallelism, else None."""
    weight = getattr(getattr(module, "to_q", None), "weight", None)
    if not isinstance(weight, DTensor):
        return None
    total, first = weight.shape[0] // head_dim, 0
    num = total
    for dim, placement in enumerate(weight.placements):
        if placement.is_shard(0):
            num //= weight.device_mesh.size(dim)
            first += weight.device_mesh.get_local_rank(dim) * num
    return first, num, total


def are_spread(module: nn.Module, model: nn.Module) -> bool:
    """Whether processes share the heads of a layer of a model."""
    parallel = context_parallel(module.processor, model)
    weight = getattr(getattr(module, "to_q", None), "weight", None)
    is_cut = isinstance(weight, DTensor) and any(x.is_shard(0) for x in weight.placements)
    return is_cut or parallel is not None and parallel.ulysses_degree > 1


def check_apart(method: Method) -> None:
    """Refuse a method that needs to see all heads of a layer, of which a process has some.

    Raises:
        ValueError: it is one.
    """
    if method.numbers_heads or method.by_head() != method:
        raise ValueError(
            f"{type(method).__name__} plans all heads of a layer together, and processes share "
            "them: use a method that plans each head for itself, or a ring, which leaves the heads "
            "of a layer together"
        )
