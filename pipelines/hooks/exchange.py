"""What processes hand each other, with its gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed._functional_collectives as collectives
from torch import Tensor
from torch.distributed import ProcessGroup


def exchange(
    pieces: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], group: ProcessGroup
) -> list[Tensor]:
    """What the processes have for this one, of these shapes, for a piece to each of them."""
    sent = [piece.numel() for piece in pieces]
    taken = [torch.Size(shape).numel() for shape in shapes]
    flat = torch.cat([piece.reshape(-1) for piece in pieces])
    got = collectives.all_to_all_single_autograd(flat, taken, sent, group)
    return [part.view(shape) for part, shape in zip(got.split(taken), shapes)]
