"""How large the blocks of a plan are on a grid where nobody asked for a size."""

from __future__ import annotations

import math

from vidattn.grid import Size


def fit_tile(size: Size, tile: Size) -> Size:
    """The tile of as many tokens as ``tile`` that wastes few slots on a grid and keeps its shape.

    Among the boxes with power-of-two edges it weighs the slots left empty at the edges of the grid
    against the distance from the wanted shape; a ``tile`` with other edges is returned as it is.
    Empty slots count most in large tiles, whose grids are large; in small ones the shape does,
    which decides how alike their tokens are.
    """
    volume = math.prod(tile)
    exponent = volume.bit_length() - 1
    if any(edge & (edge - 1) for edge in tile):
        return tile

    def cost(edges: Size) -> float:
        slots = math.prod(-(-extent // edge) * edge for extent, edge in zip(size, edges))
        shape = sum(abs(math.log2(edge / want)) for edge, want in zip(edges, tile))
        return slots / math.prod(size) + (0.05 if volume >= 64 else 0.15) * shape

    shapes = [
        (2**i, 2**j, 2 ** (exponent - i - j))
        for i in range(exponent + 1)
        for j in range(exponent + 1 - i)
    ]
    return min(shapes, key=cost)


def block_tokens(size: Size) -> int:
    """How many tokens of a grid one block is to have, 64 at most.

    Large blocks run faster, but of a small grid too few are left to choose from: there are at least
    128 of them, unless they would have fewer than 8 tokens.

    >>> block_tokens((21, 30, 52)), block_tokens((5, 16, 16))
    (64, 8)
    """
    return max(8, min(64, 2 ** ((math.prod(size) // 128).bit_length() - 1)))


def usual_tile(size: Size, tokens: int | None = None, *, is_flat: bool = False) -> Size:
    """The tile of a plan on a grid where nobody asked for another, close to a cube.

    Args:
        tokens: of the tile, a power of two; ``block_tokens`` when not given.
        is_flat: whether it is one frame deep, and close to a square.
    """
    exponent = (tokens or block_tokens(size)).bit_length() - 1
    axes = 2 if is_flat else 3
    edges = [2 ** ((exponent + axis) // axes) for axis in range(axes)]
    return fit_tile((1, *size[1:]), (1, *edges)) if is_flat else fit_tile(size, tuple(edges))
