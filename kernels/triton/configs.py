"""The tiles that ship: which launch each Triton kernel gets on each GPU.

Nothing is tuned at run time. The table is what scripts/triton_resources.py compiles without a GPU
and what the tests hold to the limits of every architecture.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

KERNELS = (
    "forward",
    "query_gradient",
    "key_gradient",
    "key_gradient_bias",
    "block_mass",
    "int8_qk",
    "int8",
)
# they make the integers that int8_qk and int8 multiply
QUANTISING = ("quantise_queries", "quantise_keys", "quantise_values")
# compute capability the rows of the table are for
ARCHITECTURES = (80, 89, 90, 100, 120)
HEAD_DIMS = (32, 64, 128, 256)
# what one program may use of it, in bytes
SHARED_BYTES = {80: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376}


@dataclass(frozen=True)
class Tile:
    """One launch: queries by keys to a tile, warps, and how many tiles are held for one to come.

    With ``stages`` of n, a tile is read n - 1 turns of the loop before its turn.
    """

    rows: int
    columns: int
    warps: int
    stages: int


_OLD = (80, 89, 120)
# for blocks of 128 and more, by kernel and padded head dim: architectures and their tile
_HALF = {
    ("forward", 32): {(*_OLD, 90, 100): Tile(128, 128, 8, 3)},
    ("forward", 64): {(*_OLD, 90, 100): Tile(128, 128, 8, 3)},
    ("forward", 128): {_OLD: Tile(128, 64, 8, 3), (90, 100): Tile(128, 128, 8, 3)},
    ("forward", 256): {
        (80,): Tile(64, 64, 8, 2),
        (89, 120): Tile(64, 32, 8, 2),
        (90,): Tile(128, 64, 8, 2),
        (100,): Tile(128, 32, 8, 2),
    },
    ("query_gradient", 32): {_OLD: Tile(128, 64, 8, 2), (90, 100): Tile(128, 128, 8, 2)},
    ("query_gradient", 64): {_OLD: Tile(128, 64, 8, 2), (90, 100): Tile(128, 128, 8, 2)},
    ("query_gradient", 128): {_OLD: Tile(128, 32, 8, 2), (90, 100): Tile(128, 64, 8, 3)},
    ("query_gradient", 256): {
        (80,): Tile(64, 32, 8, 2),
        (89, 120): Tile(32, 32, 8, 2),
        (90,): Tile(128, 32, 8, 2),
        (100,): Tile(64, 32, 8, 2),
    },
    ("key_gradient", 32): {(*_OLD, 90, 100): Tile(64, 128, 8, 2)},
    ("key_gradient", 64): {_OLD: Tile(32, 128, 8, 2), (90, 100): Tile(64, 128, 8, 2)},
    ("key_gradient", 128): {(*_OLD, 100): Tile(64, 64, 8, 2), (90,): Tile(32, 128, 8, 3)},
    ("key_gradient", 256): {(*_OLD, 90, 100): Tile(32, 32, 8, 2)},
    ("key_gradient_bias", 32): {(*_OLD, 90, 100): Tile(64, 128, 8, 2)},
    ("key_gradient_bias", 64): {_OLD: Tile(32, 128, 8, 2), (90, 100): Tile(64, 128, 8, 2)},
    ("key_gradient_bias", 128): {
        (100,): Tile(64, 64, 8, 2),
        _OLD: Tile(64, 32, 8, 2),
        (90,): Tile(32, 128, 8, 3),
    },
    ("key_gradient_bias", 256): {(*_OLD, 90, 100): Tile(32, 32, 8, 2)},
    # Triton 3.6 compiles no sums of the newest products of sm_100: fewer keys take older ones
    **{
        ("block_mass", n): {(*_OLD, 90): Tile(128, 128, 8, 2), (100,): Tile(128, 32, 8, 2)}
        for n in (32, 64, 128)
    },
    ("block_mass", 256): {(*_OLD, 90): Tile(64, 64, 8, 2), (100,): Tile(64, 32, 8, 2)},
    **{
        ("int8_qk", n): {_OLD: Tile(128, 64, 8, 3), (90, 100): Tile(128, 128, 8, 3)}
        for n in (32, 64, 128)
    },
    ("int8_qk", 256): {(80, 90, 100): Tile(64, 64, 8, 2), (89, 120): Tile(64, 32, 8, 2)},
    # as many keys everywhere as share a scale of their weights, on whatever GPU
    **{
        ("int8", n): {(80, 90, 100): Tile(128, 64, 8, 3), (89, 120): Tile(64, 64, 4, 3)}
        for n in (32, 64, 128)
    },
    ("int8", 256): {(80, 89, 90): Tile(64, 64, 8, 2), (100, 120): Tile(32, 64, 8, 2)},
}
# float32 has no tensor cores: equal on all architectures, by padded head dim
_SINGLE_KEYS = {
    32: Tile(32, 32, 8, 2),
    64: Tile(32, 32, 8, 2),
    128: Tile(16, 16, 8, 2),
    256: Tile(16, 16, 8, 2),
}
_SINGLE = {
    32: Tile(32, 32, 4, 2),
    64: Tile(32, 32, 4, 2),
    128: Tile(32, 32, 8, 2),
    256: Tile(16, 16, 8, 2),
}


def quantising_tile(head_dim: int) -> Tile:
    """Slots by numbers of each in one step of a kernel of ``QUANTISING``, on any GPU.

    The slots are those of the smallest block. There are no products to load ahead of: one stage.
    """
    return Tile(32, max(HEAD_DIMS[0], padded_head_dim(head_dim)), warps=4, stages=1)


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


def tile(
    kernel: str,
    arch: int,
    itemsize: int,
    head_dim: int,
    block: int,
    *,
    has_masks: bool = False,
    has_bias: bool = False,
) -> Tile:
    """The tile of one launch.

    Args:
        kernel: one of ``KERNELS``.
        arch: one of ``ARCHITECTURES``.
        itemsize: bytes of a number of q.
        head_dim: of q.
        block: slots to a block, a multiple of 16; a tile never crosses a block.
        has_masks: whether pairs are looked up in a table, which takes shared memory too.
        has_bias: whether keys have biases or a mask.
    """
    padded = max(HEAD_DIMS[0], padded_head_dim(head_dim))
    best = (_SINGLE_KEYS if kernel.startswith("key") else _SINGLE)[padded]
    if itemsize == 2:
        (best,) = (x for archs, x in _HALF[kernel, padded].items() if arch in archs)
        if kernel == "key_gradient_bias" and padded == 128 and has_masks and arch != 100:
            # more spill
            best = replace(best, rows=best.rows // 2)
    if arch == 100 and has_bias and kernel in ("int8_qk", "int8"):
        # more spill
        fewer = {"columns": 64} if kernel == "int8_qk" else {"rows": min(best.rows, 64)}
        best = replace(best, **fewer)
    if has_masks or (has_bias and arch not in _OLD):
        best = replace(best, stages=min(best.stages, 2))
    largest = block & -block
    rows, columns = min(best.rows, largest), min(best.columns, largest)
    # the side that a program keeps while it walks over the other
    kept, most = (columns, best.columns) if kernel.startswith("key") else (rows, best.rows)
    if kept == most:
        return replace(best, rows=rows, columns=columns)
    # a warp has registers for 16 rows, except where two tiles are kept, and where it spilled
    is_key = kernel.startswith("key")
    spills = is_key and (arch != 90 or kernel.endswith("bias") or kept < 64)
    spills |= kernel == "int8" and arch == 100
    spills |= kernel == "forward" and (kept == 32 or (kept == 64 and arch in _OLD))
    # one program fills the shared memory there: it needs the warps of two
    spills |= kernel == "query_gradient" and kept == 64 and arch == 100
    rows_to_warp = 4 if is_key and arch == 100 and kept == 32 else 8 if spills else 16
    warps = min(best.warps, max(1, kept // rows_to_warp))
    # so that two programs fit a multiprocessor
    fits = kernel == "forward" and kept == 64 and arch != 100
    return Tile(rows, columns, warps, best.stages if fits else min(best.stages, 2))
