"""AnnSA: a block of queries reads only the blocks of the past that it is near to.

After Fast Autoregressive Video Diffusion (2602.01801), of which there is no public code. Which
blocks those are is found as the method ``topk`` finds them: by attention between block means, in
which a key counts for as many as it stands for. The chunk itself is always read.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from vidattn.attention import attend
from vidattn.grid import Grid, Layout, raster_layout
from vidattn.plan import Plan
from vidattn.planning.method import check_share
from vidattn.planning.selection import select_share
from vidattn.streaming.cache import Part
from vidattn.streaming.policy import QueryPolicy


@dataclass(frozen=True)
class AnnSA(QueryPolicy):
    """Of the keys of the past, the blocks with most attention of a block of queries are read.

    Args:
        density: share of the pairs with keys that are read, the chunk itself included.
        block: tokens to a block.
    """

    density: float = 0.3
    block: int = 64

    def __post_init__(self):
        check_share("density", self.density)
        if self.block not in (16, 32, 64, 128):
            raise ValueError(f"block must be 16, 32, 64 or 128, got {self.block!r}")

    def attend(self, q: Tensor, part: Part, scale: float) -> Tensor:
        """(B, H, S, D): what the queries of a chunk read."""
        plan = self.plan(q, part, scale)
        return attend(q, part.k, part.v, plan, scale=scale, key_weight=part.weight)

    def plan(self, q: Tensor, part: Part, scale: float) -> Plan:
        """Which blocks of keys each block of queries reads."""
        num_queries, num_keys = q.shape[2], part.k.shape[2]
        weight = part.weight
        if weight is None:
            weight = torch.ones(1, 1, num_keys, device=q.device)
        weight = weight.expand(*part.k.shape[:2], -1)[..., None]
        total = _sums(weight, self.block)
        keys = _sums(part.k.float() * weight, self.block) / total.clamp_min(1e-9)
        keys, total = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (keys, total))
        tokens = [
            _sums(torch.ones(length, 1, device=q.device), self.block)
            for length in (num_queries, num_keys)
        ]
        queries = _sums(q.float(), self.block) / tokens[0]
        scores = queries @ keys.mT * scale + total.log().mT
        # blocks with keys of the chunk, which stand last
        first_own = (num_keys - num_queries) // self.block
        own = torch.arange(scores.shape[-1], device=q.device) >= first_own
        scores = scores.masked_fill(own, torch.inf)
        keep = select_share(scores, tokens[1][:, 0], self.density) | own
        places = (_line(length, self.block, q.device) for length in (num_queries, num_keys))
        (grid, layout), other = places
        return Plan.from_blocks(grid, layout, keep, keys=other)


def _sums(x: Tensor, block: int) -> Tensor:
    """(..., blocks, D) sums over (..., S, D) tokens, a block at a time."""
    x = F.pad(x, (0, 0, 0, -x.shape[-2] % block))
    return x.unflatten(-2, (-1, block)).sum(-2)


@lru_cache(maxsize=64)
def _line(num_tokens: int, block: int, device: torch.device) -> tuple[Grid, Layout]:
    """Tokens in their order, in blocks."""
    grid = Grid(1, 1, num_tokens)
    return grid, raster_layout(grid, block).to(device)
