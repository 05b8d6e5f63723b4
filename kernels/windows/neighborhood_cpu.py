"""Neighborhood attention in C++: block-sparse attention of plans whose rule is a window.

``neighborhood_cpu.cpp`` is compiled at the first call, as ``block_sparse_cpu.cpp`` is. The twin of
both is ``block_sparse_torch``.

Letters: B batch, H query heads, K key heads, S tokens, D head dim, P places of a grid, X tokens
beside it.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from vidattn.kernels.block_lists import BlockLists
from vidattn.kernels.cpp.compiler import load
from vidattn.kernels.cpp.rows import Rows, rows_of
from vidattn.kernels.windows.place_windows import PlaceWindows

SOURCE = Path(__file__).parents[1] / "cpp/neighborhood_cpu.cpp"
NO_MEMORY = 2
# queries whose outputs share registers, ROWS of the source
GROUP = 4
# Pairs in listed blocks for each pair that is kept, from which walking over windows wins: on
# AVX-512 it took 0.5 to 0.75 of the time where there are over 3, and more where there are under 2.
LEAST_WASTE = 3.0
ROWS = ("q", "k", "v", "out", "d_out", "d_q", "d_k", "d_v")
ARRAYS = ("lse", "delta", "key_mask")
TABLES = ("token", "first", "last", "cuts")
AXES = ("size", "tiles", "edge", "group")
NUMBERS = (*"BHKSDX", "is_in_order", "kind", "threads")


class Call(ctypes.Structure):
    """One call; the struct of this name in the C++ source has the same fields."""

    _fields_ = [
        *((name, Rows) for name in ROWS),
        *((name, ctypes.c_void_p) for name in (*ARRAYS, *TABLES)),
        *((name, ctypes.c_int64 * 3) for name in AXES),
        *((name, ctypes.c_int64) for name in NUMBERS),
        ("scale", ctypes.c_double),
    ]


def windows_of(lists: BlockLists) -> PlaceWindows | None:
    """The windows that a plan was made of, where its lists are all of that."""
    return lists.cache.get("windows")


def is_faster(lists: BlockLists) -> bool:
    """Whether a plan has windows, and listed blocks would compute far more pairs than they keep."""
    windows = windows_of(lists)
    if windows is None:
        return False
    if "waste of blocks" not in lists.cache:
        listed = lists.key_block.numel() * lists.block**2
        lists.cache["waste of blocks"] = listed / windows.num_pairs
    return lists.cache["waste of blocks"] >= LEAST_WASTE


def run(
    direction: str,
    rows: dict[str, Tensor],
    arrays: dict[str, Tensor | None],
    lists: BlockLists,
    *,
    scale: float,
    kind: int,
    flags: tuple[str, ...],
) -> None:
    """Attention of a plan that has windows, or its gradients.

    Args:
        direction: "forward" or "backward".
        rows: the fields of ``Call`` of these names, (B, H, S, D) with last stride 1.
        arrays: likewise: log-sum-exp and delta (B, H, S) float32, key_mask (B, S) bool; others are
            not looked at.
        scale: factor of the scores.
        kind: of the numbers, as the library knows it.
        flags: what the compiler is told of the instruction set.

    Raises:
        CompileError: there is no compiler, or it failed.
        MemoryError: no room for the packed rows.
    """
    width = next(int(x.partition("=")[2]) for x in flags if x.startswith("-DVIDATTN_WIDTH"))
    tables, numbers = _tables(lists, width)
    (B, H, S, D), K = rows["q"].shape, rows["k"].shape[1]
    # kept until the call returns
    held = {name: arrays[name] for name in ARRAYS if arrays.get(name) is not None}
    held = {name: x.contiguous() for name, x in held.items()}
    call = Call(
        **rows_of(rows),
        **{name: x.data_ptr() for name, x in held.items()},
        **{name: x.data_ptr() for name, x in tables.items()},
        **numbers,
        **dict(zip("BHKSD", (B, H, K, S, D))),
        kind=kind,
        threads=torch.get_num_threads(),
        scale=scale,
    )
    library = load(SOURCE, flags)
    if getattr(library, f"vidattn_neighborhood_{direction}")(ctypes.byref(call)) == NO_MEMORY:
        raise MemoryError("no memory for the packed rows of attention")


def _tables(lists: BlockLists, width: int) -> tuple[dict[str, Tensor], dict]:
    """The fields of a call that are those of its plan, made once for vectors of ``width``."""
    key = ("tiles of windows", width)
    if key not in lists.cache:
        windows = windows_of(lists)
        tiles = windows.tiles(width, GROUP)
        tables = {
            "token": windows.token.int().contiguous(),
            "first": torch.cat(windows.first).int(),
            "last": torch.cat(windows.last).int(),
            "cuts": torch.tensor(sum(tiles.cuts, []), dtype=torch.int32),
        }
        num_tokens = windows.token.numel()
        axes = {"size": windows.size, "edge": tiles.edge, "group": tiles.group}
        axes["tiles"] = tuple(len(x) - 1 for x in tiles.cuts)
        numbers = {name: (ctypes.c_int64 * 3)(*value) for name, value in axes.items()}
        in_order = torch.equal(windows.token, torch.arange(num_tokens).int())
        numbers |= {"X": windows.num_beside, "is_in_order": in_order}
        lists.cache[key] = tables, numbers
    return lists.cache[key]
