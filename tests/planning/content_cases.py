"""Queries and keys for tests of methods that read them, and the loops they are checked with."""

import itertools

import torch
from torch import Tensor

from vidattn.grid import Grid, Layout
from vidattn.plan import AnyPlan, Plan
from vidattn.planning.content import Content
from vidattn.planning.rectification import NUM_SAMPLES
from vidattn.planning.sampled import sample


def coherent(
    grid: Grid,
    *,
    batch: int = 2,
    heads: int = 3,
    dim: int = 16,
    noise: float = 0.3,
    waves: float = 2.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v (B, H, S, D) that vary smoothly over the video, so that near tokens are alike."""
    places = grid.coords().float() / torch.tensor(grid.size)
    tensors = []
    for gain in (3.0, 3.0, 1.0):
        bend = torch.randn(batch, heads, 3, dim) * waves
        phase = torch.rand(batch, heads, 1, dim) * 6.3
        smooth = torch.cos(places @ bend + phase)
        tensors.append(gain * smooth + noise * torch.randn_like(smooth))
    # queries look for keys like them
    q, k, v = tensors
    return 0.7 * k + 0.3 * q, k, v


def tokens_of(layout: Layout, block: int) -> list[int]:
    """The tokens in a block."""
    slots = layout.order.view(-1, layout.block)[block].tolist()
    return [token for token in slots if token >= 0]


def dense_weights(q: Tensor, k: Tensor, scale: float, key_mask: Tensor | None = None) -> Tensor:
    """(B, H, S, S) float64 softmax attention."""
    k = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = scale * q.double() @ k.mT
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None], -torch.inf)
    return scores.softmax(-1)


def slow_trust(content: Content, mask: Tensor, rest: Tensor) -> Tensor:
    """(B, H) float64 least squares factor on what ``rest`` adds to attention of the keys.

    Args:
        mask: (B|1, H|1, S, S) bool, who reads whom.
    """
    layout, grid, key_mask = content.layout, content.grid, content.key_mask
    weights = dense_weights(content.q, content.k, content.scale, content.key_mask)
    keys = content.k.double().repeat_interleave(content.q.shape[1] // content.k.shape[1], 1)
    video = [tokens_of(layout, j) for j in range(content.num_blocks)]
    factors = torch.zeros(weights.shape[:2], dtype=torch.float64)
    for b, h in itertools.product(*map(range, factors.shape)):
        fit = size = 0.0
        for token in sample(grid.num_video_tokens, NUM_SAMPLES).tolist():
            query = grid.video_start + token
            i = next(i for i, tokens in enumerate(video) if query in tokens)
            read = mask[b % len(mask), h % mask.shape[1], query].nonzero().flatten().tolist()
            row = weights[b, h, query]
            sparse = row[read] @ keys[b, h, read] / row[read].sum()
            estimate = -rest[b, h, i].double().sum() * sparse
            for j, tokens in enumerate(video):
                readable = [x for x in tokens if key_mask is None or key_mask[b, x]]
                estimate += rest[b, h, i, j] * keys[b, h, readable].mean(0)
            fit += (row @ keys[b, h] - sparse) @ estimate
            size += estimate @ estimate
        factors[b, h] = (fit / size).clamp(0, 1)
    return factors


def recall_of(plan: AnyPlan, weights: Tensor) -> float:
    """The share of dense attention from and to the video that a plan keeps."""
    grid = plan.grid
    video = slice(grid.video_start, grid.video_start + grid.num_video_tokens)
    between = weights[..., video, video]
    return ((between * plan.mask()[..., video, video]).sum() / between.sum()).item()


def peer_scores(content: Content) -> Tensor:
    """(B, H, nv, nv) scores as others pool them: empty slots count as zeros, blocks all alike."""
    layout, means = content.layout, []
    for x in (content.q, content.k):
        slots = layout.order[: content.num_blocks * layout.block].long()
        blocks = x[:, :, slots.clamp_min(0)] * (slots >= 0)[:, None]
        means.append(blocks.unflatten(2, (-1, layout.block)).mean(3))
    return content.scale * means[0] @ means[1].mT


def by_tokens(scores: list[float], tokens: list[int], share: float, own: int) -> set[int]:
    """An entry, and the best others, whose tokens come nearest to a share of all, slowly."""
    ranked = sorted(range(len(scores)), key=lambda j: (j != own, -scores[j]))
    best, chosen, total = None, [], 0
    for j in ranked:
        chosen.append(j)
        total += tokens[j]
        miss = abs(total - share * sum(tokens))
        # of two at the same distance the larger
        if best is None or miss <= best[0]:
            best = (miss, set(chosen))
    return best[1]


def rows_of(plan: Plan) -> Tensor:
    """(B, H, nv, nv) bool, the blocks of the video that a plan lists."""
    layout, nv = plan.layout, plan.layout.num_video_blocks
    first = layout.order.view(-1, layout.block)[:nv, 0].long()
    return plan.mask()[:, :, first][..., first]
