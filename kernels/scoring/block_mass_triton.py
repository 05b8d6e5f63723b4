"""Exact attention mass of every pair of blocks on NVIDIA GPUs, by a Triton kernel.

Letters: B batch, H query heads, K key heads, S tokens, D head dim, N slots, nb blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vidattn.kernels.block_lists import BlockLists
from vidattn.kernels.engines.block_segments import even_block, pad_blocks
from vidattn.kernels.engines.block_sparse_triton import (
    LOG2E,
    architecture_of,
    attention,
    by_slot,
    launch,
    rows_of,
    unfit,
)
from vidattn.kernels.triton.configs import Tile, padded_head_dim, tile

TAKES = ("scale", "key_mask")


def block_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    order: Tensor,
    block: int,
    *,
    scale: float,
    key_mask: Tensor | None = None,
) -> Tensor:
    """The result of ``block_mass.block_mass``, by a Triton kernel that writes nothing else.

    Args:
        q: (B, H, S, D).
        k: (B, K, S, D), H a multiple of K.
        lse: (B, H, S) natural log-sum-exp of the scaled scores.
        order: (N,) int32, token in each slot, -1 for an empty slot.
        block: slots to a block.
        scale: factor of the scores.
        key_mask: (B, S) bool, False for keys that nobody may read.

    Returns:
        (B, H, nb, nb) float32, query block by key block.
    """
    return _block_mass(q, k, lse, order, block, float(scale), key_mask)


def dense_mass(
    q: Tensor,
    k: Tensor,
    order: Tensor,
    block: int,
    *,
    scale: float,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The result of ``block_mass.dense_mass``, by two Triton kernels.

    Args:
        q: (B, H, S, D).
        k: (B, K, S, D), H a multiple of K.
        order: (N,) int32, token in each slot, -1 for an empty slot.
        block: slots to a block.
        scale: factor of the scores.
        key_mask: (B, S) bool, False for keys that nobody may read.

    Returns:
        (B, H, nb, nb) float32, query block by key block; (B, H, S) float32, -inf for no keys.
    """
    blocks = torch.arange(order.numel() // block, device=order.device)
    nb = blocks.numel()
    lists = BlockLists(
        order=order,
        block=block,
        batch=1,
        heads=1,
        row_start=torch.arange(nb + 1, device=order.device) * nb,
        num_full=torch.full_like(blocks, nb).int(),
        key_block=blocks.int().repeat(nb),
    )
    # only the log-sum-exp is wanted: the keys stand in for the values
    options = {"scale": scale, "key_mask": key_mask}
    _, lse = attention(q, k, k, lists, **options)
    return block_mass(q, k, lse, order, block, **options), lse


def obstacle(q: Tensor, *others: object, scale: float, **options: object) -> str | None:
    """What keeps these kernels from a call, and what to do; None where nothing does."""
    return unfit(q, scale)


@torch.library.custom_op("vidattn::block_mass_triton", mutates_args=())
def _block_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    order: Tensor,
    block: int,
    scale: float,
    key_mask: Tensor | None,
) -> Tensor:
    from vidattn.kernels.triton.block_mass import block_mass_kernel

    even = even_block(block)
    order = pad_blocks(order, block, even, -1)
    num_blocks = order.numel() // even
    readable = (order >= 0)[None]
    if key_mask is not None:
        readable = readable & key_mask[:, order.long().clamp_min(0)]
    q, k = rows_of(q), rows_of(k)
    shipped: Tile = tile("block_mass", architecture_of(q), q.itemsize, q.shape[-1], even)
    num_tiles = order.numel() // shipped.rows
    mass = torch.empty(*q.shape[:2], num_tiles, num_blocks, dtype=torch.float32, device=q.device)
    names = [f"stride_{name}{axis}" for name in "qk" for axis in "bhs"]
    launch(
        block_mass_kernel,
        num_tiles * q.shape[0] * q.shape[1],
        q=q,
        k=k,
        slot_lse=by_slot(lse, order),
        mass=mass,
        order=order,
        readable=readable.to(torch.uint8),
        scale=scale * LOG2E,
        **dict(zip(names, (*q.stride()[:3], *k.stride()[:3]))),
        stride_readable_b=order.numel() if len(readable) > 1 else 0,
        num_heads=q.shape[1],
        group=q.shape[1] // k.shape[1],
        num_blocks=num_blocks,
        D=q.shape[-1],
        BD=padded_head_dim(q.shape[-1]),
        BLOCK=even,
        BM=shipped.rows,
        BN=shipped.columns,
        STAGES=shipped.stages,
        num_warps=shipped.warps,
    )
    return mass.unflatten(2, (num_blocks, -1)).sum(3)


@_block_mass.register_fake
def _(q, k, lse, order, block, scale, key_mask):
    num_blocks = order.numel() // block
    return q.new_empty(*q.shape[:2], num_blocks, num_blocks, dtype=torch.float32)
