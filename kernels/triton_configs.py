"""The tiles that ship: which launch each Triton kernel gets on each GPU.

Nothing is tuned at run time. The table is what scripts/triton_resources.py compiles without a GPU
and what the tests hold to the limits of every architecture.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

KERNELS = ("forward", "query_gradient", "key_gradient", "key_gradient_bias")
# compute capability the rows of the table are for
ARCHITECTURES = (80, 89, 90, 100, 120)
HEAD_DIMS = (32, 64, 128, 256)
# what one program may use of it, in bytes
SHARED_BYTES = {80: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376}


@dataclass(frozen=True)
class Tile:
    """One launch: queries by keys to a tile, warps, and stages of the software pipeline."""

    rows: int
    columns: int
    warps: int
    stages: int


# by kernel, architecture, bytes of a number and padded head dim, for blocks of 128 and more
_TILES = {
    ("forward", 90, 2, 128): Tile(128, 128, 8, 5),
}
_DEFAULT = Tile(64, 64, 8, 2)


def architecture(capability: tuple[int, int]) -> int:
    """The row of the table for a compute capability.

    Raises:
        ValueError: the GPU is older than sm_80.
    """
    number = capability[0] * 10 + capability[1]
    if number < ARCHITECTURES[0]:
        raise ValueError(
            f"the Triton kernels need a GPU from compute capability 8.0 on, this one has "
            f'{capability[0]}.{capability[1]}: use backend="flex" or backend="torch"'
        )
    # sm_86 has the shared memory of sm_89
    return 89 if number == 86 else max(x for x in ARCHITECTURES if x <= number)


def padded_head_dim(head_dim: int) -> int:
    """The power of two, at least 16, that holds a head dim."""
    return max(16, 1 << (head_dim - 1).bit_length())


def tile(kernel: str, arch: int, itemsize: int, head_dim: int, block: int) -> Tile:
    """The tile of one launch.

    Args:
        kernel: one of ``KERNELS``.
        arch: one of ``ARCHITECTURES``.
        itemsize: bytes of a number of q.
        head_dim: of q.
        block: slots to a block, a multiple of 16; a tile never crosses a block.
    """
    padded = max(32, padded_head_dim(head_dim))
    best = _TILES.get((kernel, arch, itemsize, padded), _DEFAULT)
    largest = block & -block
    rows, columns = min(best.rows, largest), min(best.columns, largest)
    warps = max(1, min(best.warps, best.warps * rows * columns // (best.rows * best.columns)))
    return replace(best, rows=rows, columns=columns, warps=warps)
