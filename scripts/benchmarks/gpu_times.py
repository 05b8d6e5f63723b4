"""What scripts/bench_gpu.py times: the machine's ceilings, dense attention and ours.

A part gives rows: a name, and what measures it. Attention is that of Wan 2.1 14B at 720p, on eight
of its 40 heads: heads run beside one another, and the time of one is the same.

Letters: B batch, H heads, S tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vidattn.attention import attend
from vidattn.grid import Grid, Size, tile_layout
from vidattn.kernels.timing import interleaved_ms
from vidattn.methods import plan as plan_of
from vidattn.plan import Plan

Row = tuple[str, Callable[[], dict]]
DENSE = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "PyTorch's choice": None,
}
# forward and backward against forward alone: two products and five
TRAIN = 3.5


@dataclass(frozen=True)
class Sizes:
    """What is timed, and where."""

    device: str
    engine: str
    grid: Grid
    heads: int
    head_dim: int
    dtype: torch.dtype
    tiles: tuple[Size, Size]  # blocks of the larger and of the smaller length
    density: float
    window: Size
    planning_heads: int
    rounds: int = 5

    @classmethod
    def of(cls, device: str, engine: str) -> Sizes:
        """Wan 2.1 14B at 720p; on the engine of a CPU the smallest that tries the program."""
        if engine == "triton":
            usual = (Grid(21, 45, 80), 8, 128, torch.bfloat16, ((1, 8, 16), (1, 8, 8)), 0.3)
            return cls(device, engine, *usual, (9, 21, 41), 40)
        tiny = (Grid(3, 9, 10), 2, 32, torch.float32, ((1, 4, 8), (1, 4, 4)), 0.9)
        return cls(device, engine, *tiny, (1, 3, 5), 2)

    @property
    def dense_flop(self) -> float:
        """Of a forward call in which every token reads every token."""
        return 4 * self.heads * self.grid.num_tokens**2 * self.head_dim

    def inputs(self, *, heads: int | None = None, grid: Grid | None = None) -> list[Tensor]:
        """q, k and v as transformers lay them out: heads beside one another."""
        shape = (1, (grid or self.grid).num_tokens, heads or self.heads, self.head_dim)
        made = (torch.randn(shape, device=self.device, dtype=self.dtype) for _ in range(3))
        return [x.transpose(1, 2) for x in made]

    def plan(self, method: str, *, grid: Grid | None = None, **options) -> Plan:
        """The plan of a method that reads no content."""
        return plan_of(method, grid or self.grid, **options).to(self.device)

    def random_blocks(self, tile: Size, *, heads: int = 1, grid: Grid | None = None) -> Plan:
        """As many random blocks as the density says, others for every head."""
        grid = grid or self.grid
        layout = tile_layout(grid, tile).to(self.device)
        nv = layout.num_video_blocks
        chosen = torch.rand(1, heads, nv, nv, device=self.device) < self.density
        return Plan.from_blocks(grid, layout, chosen)

    def timed(self, call: Callable[[], object], flop: float, **more: float) -> dict:
        """Median ms of a call, and TFLOP/s."""
        ms = interleaved_ms({"": call}, rounds=self.rounds, device=self.device)[""]
        return {"ms": round(ms, 3), "tflops": round(flop / ms / 1e9, 1)} | more

    def both(
        self, name: str, attention: Callable, given: list[Tensor], plan: Plan
    ) -> Iterator[Row]:
        """The rows of a plan: forward, and forward and backward."""
        visited = plan.visited_density
        flop = 4 * given[0].shape[1] * plan.grid.num_tokens**2 * self.head_dim * visited
        timed = partial(self.timed, visited=round(visited, 4))
        yield name, partial(timed, forward(attention, given), flop)
        yield f"train {name}", partial(timed, train(attention, given), TRAIN * flop)


def forward(attention: Callable, given: list[Tensor]) -> Callable[[], object]:
    """A call of attention without gradients."""

    def call() -> object:
        with torch.no_grad():
            return attention(*given)

    return call


def train(attention: Callable, given: list[Tensor]) -> Callable[[], object]:
    """A call of attention and of its gradient."""
    pulled = torch.randn_like(given[0])

    def call() -> object:
        leaves = [x.detach().requires_grad_() for x in given]
        return torch.autograd.grad(attention(*leaves), leaves, pulled)

    return call


def ceilings(sizes: Sizes) -> Iterator[Row]:
    """What the machine multiplies and copies at most."""
    n = 8192 if sizes.device == "cuda" else 64
    a, b = (torch.randn(n, n, device=sizes.device, dtype=sizes.dtype) for _ in range(2))
    yield f"product of {n} x {n}", partial(sizes.timed, partial(torch.matmul, a, b), 2 * n**3)

    def copy() -> dict:
        source = torch.empty(n * n * 32, device=sizes.device, dtype=torch.uint8)
        ms = interleaved_ms({"": source.clone}, rounds=sizes.rounds, device=sizes.device)[""]
        return {"ms": round(ms, 3), "tb_s": round(2 * source.nbytes / ms / 1e9, 2)}

    yield "copy", copy


def dense(sizes: Sizes) -> Iterator[Row]:
    """Attention of PyTorch to everything."""
    given = sizes.inputs()
    for name, kernel in DENSE.items():
        if sizes.device == "cpu" and kernel is not None:
            continue

        def attention(q: Tensor, k: Tensor, v: Tensor, kernel=kernel) -> Tensor:
            with nullcontext() if kernel is None else sdpa_kernel(kernel):
                return F.scaled_dot_product_attention(q, k, v)

        flop = sizes.dense_flop
        yield name, partial(sizes.timed, forward(attention, given), flop)
        yield f"train {name}", partial(sizes.timed, train(attention, given), TRAIN * flop)


def sparse(sizes: Sizes) -> Iterator[Row]:
    """Our engine on plans of each kind."""
    large, small = sizes.tiles
    by_head = partial(sizes.random_blocks, heads=sizes.heads)
    densities = (0.2, 0.3, 0.5) if sizes.engine == "triton" else (sizes.density,)
    plans = {f"radial {x}": partial(sizes.plan, "radial", density=x) for x in densities} | {
        "long blocks by head": partial(by_head, large),
        "short blocks by head": partial(by_head, small),
        "short blocks without gaps": partial(by_head, small, grid=_whole(sizes.grid, small)),
        "window": partial(sizes.plan, "neighborhood", window=sizes.window),
    }
    for name, make in plans.items():
        try:
            plan = make()
        # whatever it is, it costs this plan's row and no other
        except Exception as error:
            yield name, partial(_raise, error)
            continue
        given = sizes.inputs(grid=plan.grid)
        attention = partial(on_plan, plan=plan, backend=sizes.engine)
        yield from sizes.both(name, attention, given, plan)
        for precision in ("int8_qk", "int8"):
            rounded = plan.with_precision(precision)
            attention = partial(on_plan, plan=rounded, backend=sizes.engine)
            # the other row of the two is training, which integers have none of
            yield next(sizes.both(f"{precision} {name}", attention, given, rounded))


def on_plan(q: Tensor, k: Tensor, v: Tensor, plan: Plan, backend: str) -> Tensor:
    """Attention of an engine, named and with its plan."""
    return attend(q, k, v, plan, backend=backend)


def _whole(grid: Grid, tile: Size) -> Grid:
    """The nearest grid of whole tiles."""
    return Grid(*(max(1, round(extent / edge)) * edge for extent, edge in zip(grid.size, tile)))


def _raise(error: Exception) -> dict:
    raise error
