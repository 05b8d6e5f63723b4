"""How fast a plan can be on a GPU: pairs counted exactly, time bounded and modelled, not measured.

Two questions, kept apart. The bound asks what the best dense kernel would take for the visited
pairs alone: no kernel of its speed per pair can beat it. The model asks what a Triton kernel takes,
from its published rate, the share of blocks with a predicate, the reads of keys and values from
the L2 cache, and the passes over q, k, v and the output that a method needs beside attention.

Letters: S tokens, H heads, D head dim.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from vidattn.grid import Grid, Size
from vidattn.plan import AnyPlan
from vidattn.planning.method import Method
from vidattn.planning.reading import Reading
from vidattn.simulation.gpus import Gpu, break_even
from vidattn.simulation.video_models import VideoModel
from vidattn.simulation.work import visited_share

TERA = 1e12
# tokens of a block that kernels run well: fewer rows read keys and values too often
BLOCK_SIZES = (64, 128)
LONGEST_EDGE = 32
# query rows of one kernel tile
MAX_ROWS = 128
# what passes over memory reach of its peak rate, and products that fit no attention kernel
MEMORY_EFFICIENCY = 0.8
SCORE_EFFICIENCY = 0.3
# cross attention reads few keys, at half the rate of a long sequence
CROSS_EFFICIENCY = 0.5
# passes over the (S, H * D) tokens in a layer's norms, rotations, gates and residuals
ELEMENTWISE_PASSES = 30
# q, k and v into the order of the layout and the output back, each read and written
PERMUTE_PASSES = 8


@dataclass(frozen=True)
class Counts:
    """What a plan keeps and visits, for one head on average."""

    tile: Size | None  # None where the method chose
    block: int  # the smallest, where heads differ
    needed_pairs: int  # of the sequence, text included
    visited_pairs: int  # in the listed blocks
    density: float  # needed over all pairs of video tokens
    visited_density: float  # visited over all pairs of video tokens
    visited_share: float  # visited over all pairs of the sequence
    computed_share: float  # slots of listed blocks, empty ones included, over pairs of the sequence
    partial_share: float  # listed blocks that need a predicate
    num_blocks: float  # listed
    padding: float  # slots over tokens
    is_dense: bool


def count(plan: AnyPlan, tile: Size | None = None) -> Counts:
    """The exact counts of a plan.

    Raises:
        ValueError: keys that are other tokens than the queries.
    """
    plan.check_square("a count of work")
    grid, pairs, video = plan.grid, plan.grid.num_tokens**2, plan.grid.num_video_tokens**2
    density, share = plan.density, visited_share(plan)
    every = torch.arange(plan.num_heads, device=plan.device)
    parts = [(part, every[heads].numel()) for part, _, heads in plan.parts()]
    num_heads = sum(heads for _, heads in parts)
    listed = partial = slots = slot_pairs = 0.0
    for part, heads in parts:
        lists, block = part.lists, part.layout.block
        # of this part, on average over the heads of the whole plan
        scale = heads / (num_heads * lists.batch * lists.heads)
        listed += scale * lists.key_block.numel()
        partial += scale * lists.num_partial
        slot_pairs += scale * lists.key_block.numel() * block**2
        slots += heads / num_heads * part.layout.order.numel()
    return Counts(
        tile=tile,
        block=min(part.layout.block for part, _ in parts),
        needed_pairs=round(density * video) + pairs - video,
        visited_pairs=round(share * pairs),
        density=density,
        visited_density=plan.visited_density,
        visited_share=share,
        computed_share=slot_pairs / pairs,
        partial_share=partial / max(1, listed),
        num_blocks=listed,
        padding=slots / grid.num_tokens,
        is_dense=plan.is_dense,
    )


def candidate_tiles(method: Method, grid: Grid) -> list[Size]:
    """Tiles worth trying: boxes with power-of-two edges of 64 and 128 tokens that fit the grid.

    Empty for a method without a ``tile`` option, or whose tile is set.
    """
    if "tile" not in method.options() or method.tile is not None:
        return []
    longest = [min(LONGEST_EDGE, 2 ** (extent - 1).bit_length()) for extent in grid.size]
    edges = [[2**i for i in range(edge.bit_length())] for edge in longest]
    tiles = [
        (t, h, volume // (t * h))
        for volume in BLOCK_SIZES
        for t in edges[0]
        for h in edges[1]
        if volume % (t * h) == 0 and volume // (t * h) in edges[2]
    ]
    return [tile for tile in tiles if _accepts(method, tile)]


def _accepts(method: Method, tile: Size) -> bool:
    try:
        dataclasses.replace(method, tile=tile)
    except ValueError:
        return False
    return True


def count_tiles(method: Method, grid: Grid, reading: Reading | None = None) -> Iterable[Counts]:
    """The counts of a method with every tile worth trying, and with its own choice, which is last.

    Args:
        reading: for methods that read content.
    """
    for tile in candidate_tiles(method, grid):
        yield count(dataclasses.replace(method, tile=tile).plan(grid, reading), tile)
    yield count(method.plan(grid, reading), getattr(method, "tile", None))


@dataclass(frozen=True)
class Work:
    """One attention layer, and what else its transformer block does.

    Args:
        heads: H.
        head_dim: D.
        model: adds the work beside self-attention; without it, speed is that of attention alone.
        dense_share: of the attention calls, those that guarded layers and steps keep dense.
    """

    heads: int
    head_dim: int
    model: VideoModel | None = None
    dense_share: float = 0.0

    def token_bytes(self, grid: Grid) -> float:
        """Bytes of one (S, H * D) tensor of 16-bit numbers."""
        return 2.0 * grid.num_tokens * self.heads * self.head_dim


@dataclass(frozen=True)
class Estimate:
    """Modelled times of one layer in ms, on one GPU."""

    gpu: str
    counts: Counts
    dense_ms: float  # the best dense kernel
    ideal_ms: float  # its time for the visited pairs
    kernel_ms: float  # a Triton kernel for the listed blocks
    overhead_ms: dict[str, float]  # beside the kernel
    rest_ms: float  # the block without self-attention
    dense_share: float
    break_even: float

    @property
    def sparse_ms(self) -> float:
        """Kernel and overheads."""
        return self.kernel_ms + sum(self.overhead_ms.values())

    @property
    def ideal_speedup(self) -> float:
        """The most that attention alone can gain."""
        return self.dense_ms / self.ideal_ms

    @property
    def speedup(self) -> float:
        """What attention alone gains with the modelled kernel."""
        return self.dense_ms / self.sparse_ms

    @property
    def ideal_end_to_end(self) -> float:
        """The most that the transformer can gain."""
        return self._end_to_end(self.ideal_ms)

    @property
    def end_to_end(self) -> float:
        """What the transformer gains with the modelled kernel."""
        return self._end_to_end(self.sparse_ms)

    @property
    def runs_dense(self) -> bool:
        """Whether dense attention is modelled to be as fast, or faster."""
        return self.sparse_ms >= self.dense_ms

    def _end_to_end(self, attention_ms: float) -> float:
        mixed = self.dense_share * self.dense_ms + (1 - self.dense_share) * attention_ms
        return (self.dense_ms + self.rest_ms) / (mixed + self.rest_ms)


def estimate(
    counts: Counts, grid: Grid, gpu: Gpu, work: Work, *, reads_content: bool = False
) -> Estimate:
    """The modelled times of a plan on a GPU.

    Args:
        reads_content: whether the method pools q and k and scores their blocks on every call.
    """
    flops = 4.0 * grid.num_tokens**2 * work.heads * work.head_dim
    dense_ms = 1e3 * flops / (gpu.dense_tflops.value * TERA)
    kernel_ms = dense_ms if counts.is_dense else _kernel_ms(counts, flops, gpu)
    overhead_ms = {}
    if not counts.is_dense:
        overhead_ms = _overhead_ms(counts, grid, gpu, work, reads_content)
    return Estimate(
        gpu=gpu.name,
        counts=counts,
        dense_ms=dense_ms,
        ideal_ms=dense_ms * counts.visited_share,
        kernel_ms=kernel_ms,
        overhead_ms=overhead_ms,
        rest_ms=_rest_ms(grid, gpu, work.model) if work.model else 0.0,
        dense_share=work.dense_share,
        break_even=break_even(gpu),
    )


def _kernel_ms(counts: Counts, flops: float, gpu: Gpu) -> float:
    slowdown = 1 - counts.partial_share + counts.partial_share / gpu.masked_ratio.value
    computed = flops * counts.computed_share
    rate_s = computed * slowdown / (gpu.triton_tflops.value * TERA)
    # every query tile reads its keys and values, 4 bytes for 4 * rows operations
    rows = min(counts.block, MAX_ROWS)
    cache_s = computed / rows / (gpu.cache_tb_s.value * TERA)
    return 1e3 * max(rate_s, cache_s)


def _overhead_ms(
    counts: Counts, grid: Grid, gpu: Gpu, work: Work, reads_content: bool
) -> dict[str, float]:
    memory = gpu.memory_tb_s.value * TERA * MEMORY_EFFICIENCY
    found = {"permute": 1e3 * PERMUTE_PASSES * work.token_bytes(grid) / memory}
    if reads_content:
        block_pairs = (grid.num_tokens / counts.block) ** 2 * work.heads
        found["pool"] = 1e3 * 2 * work.token_bytes(grid) / memory
        products = 2 * block_pairs * work.head_dim / (gpu.peak_tflops.value * TERA)
        found["score"] = 1e3 * (products / SCORE_EFFICIENCY + 3 * 4 * block_pairs / memory)
    return found


def _rest_ms(grid: Grid, gpu: Gpu, model: VideoModel) -> float:
    linear_s = model.linear_flops(grid) / (gpu.linear_tflops.value * TERA)
    cross_rate = CROSS_EFFICIENCY * gpu.dense_tflops.value * TERA
    moved = ELEMENTWISE_PASSES * 2 * grid.num_video_tokens * model.dim
    elementwise_s = moved / (gpu.memory_tb_s.value * TERA * MEMORY_EFFICIENCY)
    return 1e3 * (linear_s + model.cross_flops(grid) / cross_rate + elementwise_s)


def best_first(estimates: Iterable[Estimate]) -> list[Estimate]:
    """Estimates of one method by modelled time for each pair that it keeps.

    Where the tile leaves the mask alone that is the order of time; where larger tiles keep more,
    time alone would choose the tile that keeps least.
    """
    return sorted(estimates, key=lambda x: x.sparse_ms / max(x.counts.density, math.ulp(0.0)))
