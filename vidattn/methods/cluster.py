"""Cluster attention: tokens alike are put together, and clusters read the clusters that matter.

Source: Yang et al., "Sparse VideoGen2: Accelerate Video Generation with Sparse Attention via
Semantic-Aware Permutation", arXiv:2505.18875; the routing by k-means goes back to Roy et al.,
"Routing Transformer", arXiv:2003.05997. In every head the tokens of the video are clustered by
k-means; with S the scores of cluster means and n_j the tokens of cluster j, a cluster gives the
share softmax(S + log n) to each other, and reads itself and the largest until they hold ``mass``,
the one that crosses it included, at least ``least`` of all. The paper clusters queries and keys
apart; here a token's query and key, each brought to mean 0 and variance 1, are clustered together,
since a plan has one order of tokens. Each cluster begins as a tile of the video, or where the
cluster of the step before ended, and fills blocks of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vidattn.grid import Grid, Size, with_text
from vidattn.head_plan import HeadPlan
from vidattn.plan import Plan
from vidattn.planning.content import Content
from vidattn.planning.content_method import ContentMethod
from vidattn.planning.method import as_size, check_share
from vidattn.planning.selection import select_count, select_mass, select_share
from vidattn.planning.tile_size import block_tokens, usual_tile


@dataclass(frozen=True, kw_only=True)
class Cluster(ContentMethod):
    """Clusters of tokens that are alike, and for each the clusters it attends to most.

    Every head of every sample has an order of its own and runs on its own.

    Args:
        density: kept share of the video pairs, above 0 and at most 1, in place of ``mass``.
        mass: share of the attention between cluster means that the read clusters hold.
        least: share of the clusters that are read at least, beside ``mass``.
        iterations: of k-means, where clusters begin as tiles.
        warm_iterations: of k-means, where they begin as those of an earlier step.
        block: slots to a block, of which a cluster leaves half of one empty on average; a quarter
            of the tile when not given.
        tile: tokens along (t, h, w) of the tile that a cluster begins as, so there are as many
            clusters as tiles; twice the usual block when not given.

    Raises:
        ValueError: a value out of range.
    """

    density: float | None = None
    mass: float = 0.9
    least: float = 0.1
    iterations: int = 8
    warm_iterations: int = 2
    block: int | None = None
    # every third step of fifty
    every: int | float = 0.06

    def __post_init__(self):
        super().__post_init__()
        for name in ("density", "mass", "least"):
            check_share(name, getattr(self, name))
        for name, least in (("iterations", 0), ("warm_iterations", 0), ("block", 1)):
            value = getattr(self, name)
            if name == "block" and value is None:
                continue
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")

    def tile_of(self, grid: Grid) -> Size:
        """Tokens along (t, h, w) of the tile that a cluster begins as."""
        if self.tile is not None:
            return as_size("tile", self.tile)
        return usual_tile(grid.size, 2 * block_tokens(grid.size))

    def search(self, content: Content) -> tuple[HeadPlan, Tensor]:
        """A plan for every head, and where its clusters ended."""
        tile_of_token = content.layout.slot_of_token[_video(content.grid)] // content.layout.block
        shape = (content.num_blocks, 2 * content.q.shape[-1])
        rows = list(content.rows())
        memory = content.memory
        warm = memory is not None and memory.shape == (len(rows), *shape)
        plans, ends = [], []
        for i, row in enumerate(rows):
            features = _features(row)
            centers = memory[i] if warm else means_of(features, tile_of_token, shape[0])[0]
            steps = self.warm_iterations if warm else self.iterations
            label, centers = k_means(features, centers, steps)
            plans.append(self._plan(row, label))
            ends.append(centers)
        number = torch.arange(len(rows), device=content.q.device)
        return HeadPlan(tuple(plans), number), torch.stack(ends)

    def _plan(self, row: Content, label: Tensor) -> Plan:
        """The plan of one head from the cluster of each token."""
        block = self.block or max(1, math.prod(self.tile_of(row.grid)) // 4)
        label = torch.unique(label, return_inverse=True)[1]
        tokens = torch.bincount(label)
        per_cluster = -(-tokens // block)
        # a token's slot: where the blocks of its cluster begin, and its rank in the cluster
        begin = (per_cluster.cumsum(0) - per_cluster) * block - (tokens.cumsum(0) - tokens)
        by_cluster = label.argsort(stable=True)
        slot = begin[label[by_cluster]] + torch.arange(len(label), device=label.device)
        order = label.new_full((int(per_cluster.sum()) * block,), -1)
        order[slot] = by_cluster + row.grid.video_start
        row = row.on(with_text(row.grid, order, block))
        cluster = torch.arange(len(tokens), device=label.device).repeat_interleave(per_cluster)
        kept = self._select(row, cluster, tokens)
        blocks = kept[:, :, cluster][..., cluster]
        return row.plan(blocks)

    def _select(self, row: Content, cluster: Tensor, tokens: Tensor) -> Tensor:
        """(1, 1, C, C) bool, which cluster reads which.

        Args:
            cluster: (nv,) cluster of each block.
            tokens: (C,) tokens of each cluster.
        """
        readable = row.counts.expand(1, 1, -1)[0, 0]
        queries, _ = means_of(row.queries[0, 0], cluster, len(tokens), row.tokens)
        keys, counts = means_of(row.keys[0, 0], cluster, len(tokens), readable)
        scores = (row.scale * queries @ keys.mT + counts.log())[None, None]
        own = torch.eye(len(tokens), dtype=torch.bool, device=tokens.device)
        if self.density is not None:
            return select_share(scores.masked_fill(own, torch.inf), tokens, self.density)
        least = select_count(scores, max(1, math.ceil(self.least * len(tokens))))
        return own | least | select_mass(scores.softmax(-1), self.mass)


def _video(grid: Grid) -> slice:
    return slice(grid.video_start, grid.video_start + grid.num_video_tokens)


def _features(row: Content) -> Tensor:
    """(N, 2 D) query and key of each of the N tokens of the video, each part of equal weight."""
    parts = []
    for x in (row.q, row.k):
        x = x[0, 0, _video(row.grid)]
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        x = x - x.mean(0)
        parts.append(x / x.square().mean().sqrt().clamp_min(torch.finfo(x.dtype).tiny))
    return torch.cat(parts, -1)


def k_means(features: Tensor, centers: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm: (N,) the center nearest to each of N features, and the (C, F) centers.

    A center without features stays where it is.

    Args:
        features: (N, F).
        centers: (C, F) to begin with.
        iterations: how often the centers move to the mean of what is nearest to them.
    """
    for _ in range(iterations):
        means, counts = means_of(features, _nearest(features, centers), len(centers))
        centers = torch.where(counts[:, None] > 0, means, centers)
    return _nearest(features, centers), centers


def _nearest(features: Tensor, centers: Tensor) -> Tensor:
    return (features @ centers.mT - centers.square().sum(-1) / 2).argmax(-1)


def means_of(
    x: Tensor, label: Tensor, num_labels: int, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(C, F) weighed mean of the rows of ``x`` (N, F) with each label, and the (C,) weights."""
    weight = x.new_ones(len(x)) if weight is None else weight.to(x.dtype)
    counts = x.new_zeros(num_labels).index_add_(0, label, weight)
    sums = x.new_zeros(num_labels, x.shape[-1]).index_add_(0, label, x * weight[:, None])
    return sums / counts.clamp_min(1)[:, None], counts
