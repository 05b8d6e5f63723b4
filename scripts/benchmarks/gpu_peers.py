"""What scripts/bench_gpu.py times beside ours: peers, other launches, and published windows."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from benchmarks.gpu_times import TRAIN, Row, Sizes, forward, on_plan, train
from torch import Tensor

from vidattn.grid import Grid
from vidattn.kernels.engines import block_sparse_triton, flash
from vidattn.kernels.triton.configs import Tile
from vidattn.neighborhood import neighborhood_attention

# The windows of generalized neighborhood attention (Hassani et al., 2504.16922) for HunyuanVideo
# and FLUX.1-dev at 4K, with the strides that make them block-sparse, as docs/profiler.md of NATTEN
# 0.21.7 gives them; and the local windows of the sparse Cosmos-Predict2 14B at 720p and 16 frames a
# second, all frames by 12x24 and by 20x40, from cosmos_predict2/configs/base/config_natten.py
WINDOWS = {
    "gna hunyuan-video": (Grid(30, 48, 80), (18, 24, 24), (16, 8, 8)),
    "gna flux": (Grid(1, 256, 256), (1, 80, 80), (1, 16, 16)),
    "cosmos-predict2-14b, 12x24": (Grid(24, 44, 80), (24, 12, 24), (1, 4, 8)),
    "cosmos-predict2-14b, 20x40": (Grid(24, 44, 80), (24, 20, 40), (1, 4, 8)),
}
# launches beside the ones that ship, by kernel and block
TILES = {
    ("forward", 128): [Tile(128, 128, 8, n) for n in (3, 2)] + [Tile(128, 64, 8, 3)],
    ("forward", 64): [Tile(64, 64, 4, n) for n in (3, 2)],
    ("key_gradient", 128): [Tile(32, 128, 8, n) for n in (3, 2)] + [Tile(64, 128, 8, 2)],
    ("key_gradient", 64): [Tile(32, 64, warps, 2) for warps in (4, 8)],
}


def peers(sizes: Sizes) -> Iterator[Row]:
    """FlexAttention, and FlashAttention-4 where it is installed, on plans that ours run too."""
    if sizes.device == "cpu":
        return
    engines = ["flex"] if flash.missing(sizes.device) else ["flex", "flash"]
    for name, tile in zip(("long", "short"), sizes.tiles):
        plan, given = sizes.random_blocks(tile), sizes.inputs()
        for engine in engines:
            attention = partial(on_plan, plan=plan, backend=engine)
            yield from sizes.both(f"{engine}, {name} blocks", attention, given, plan)


def tiles(sizes: Sizes) -> Iterator[Row]:
    """Launches beside those that ship."""
    if sizes.engine != "triton":
        return
    for (kernel, block), launches in TILES.items():
        plan = sizes.random_blocks(sizes.tiles[0 if block == 128 else 1], heads=sizes.heads)
        is_forward = kernel == "forward"
        flop = (1 if is_forward else TRAIN) * sizes.dense_flop * plan.visited_density
        attention = partial(on_plan, plan=plan, backend="triton")
        call = (forward if is_forward else train)(attention, sizes.inputs())
        for launch in launches:
            shape = f"{launch.rows}x{launch.columns}, {launch.warps} warps, {launch.stages} stages"
            name = f"{'' if is_forward else 'train '}{kernel}, blocks of {block}, {shape}"
            yield name, partial(_timed_with, launch, kernel, sizes, call, flop)


def _timed_with(
    launch: Tile, kernel: str, sizes: Sizes, call: Callable[[], object], flop: float
) -> dict:
    with _launched_with(launch, kernel):
        return sizes.timed(call, flop)


@contextmanager
def _launched_with(launch: Tile, kernel: str) -> Iterator[None]:
    shipped = block_sparse_triton.tile

    def chosen(name: str, *size: int, **options: bool) -> Tile:
        return launch if name == kernel else shipped(name, *size, **options)

    block_sparse_triton.tile = chosen
    try:
        yield
    finally:
        block_sparse_triton.tile = shipped


def windows(sizes: Sizes) -> Iterator[Row]:
    """Windows as they are published, without a plan of the caller's, and NATTEN where it is."""
    if sizes.engine != "triton":
        return
    for name, (grid, window, stride) in WINDOWS.items():
        kept = [axis for axis, extent in enumerate(grid.size) if extent > 1]
        size, window, stride = (tuple(x[i] for i in kept) for x in (grid.size, window, stride))
        places = [x.unflatten(2, size) for x in sizes.inputs(grid=grid)]
        flop = 4 * sizes.heads * grid.num_tokens * math.prod(window) * sizes.head_dim
        call = forward(partial(neighborhood_attention, window=window, stride=stride), places)
        yield name, partial(sizes.timed, call, flop)
        if importlib.util.find_spec("natten") is not None:
            yield f"NATTEN, {name}", partial(_natten, sizes, places, window, stride, flop)


def _natten(sizes: Sizes, places: list[Tensor], window: tuple, stride: tuple, flop: float) -> dict:
    natten = importlib.import_module("natten")
    attention = {1: natten.na1d, 2: natten.na2d, 3: natten.na3d}[len(window)]
    # heads stand last there
    last = [x.movedim(1, -2).contiguous() for x in places]
    call = forward(partial(attention, kernel_size=window, stride=stride), last)
    return sizes.timed(call, flop)
