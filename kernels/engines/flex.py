"""Block-sparse attention on PyTorch's FlexAttention: a cross-check, and an engine for GPUs.

Letters: B batch, H query heads, K key heads, S queries, Sk keys, D head dim, n slots to a block, nb
blocks of queries, nbk of keys, Bm and Hm samples and heads of the plan, M distinct masks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from vidattn.kernels.block_lists import BlockLists
from vidattn.kernels.slots import Slots

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
# each shape of the inputs and each kind of rule is compiled once, up to so many
MAX_SHAPES = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TAKES = ("scale", "key_mask", "key_bias", "need_lse")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    *,
    scale: float,
    key_mask: Tensor | None = None,
    key_bias: Tensor | None = None,
    need_lse: bool = True,
    kernel_options: dict[str, int | str] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The result of ``block_sparse_torch.attention``, by compiled FlexAttention.

    Args:
        q: (B, H, S, D).
        k, v: (B, K, Sk, D), H a multiple of K.
        lists: which key blocks each query block reads; on a GPU a block has a multiple of 16 slots.
        scale: factor of the scores.
        key_mask: (B, Sk) bool, False for keys that nobody may read.
        key_bias: (B|1, H|1, Sk) added to the scaled scores, -inf for keys that nobody may read.
        need_lse: whether to return the log-sum-exp, which FlexAttention lacks on a CPU.
        kernel_options: of FlexAttention on a GPU; by default tiles that divide the block, its own
            where a block is a multiple of 128.

    Returns:
        (B, H, S, D) in the dtype of ``q``; (B, H, S) float32 log-sum-exp, or None.
    """
    lists.check(q.shape[2], k.shape[2])
    keys = Slots(lists.key_order, lists.block, key_mask)
    slots = keys if lists.keys is None else Slots(lists.order, lists.block, None)
    block_mask = _block_mask(lists, keys, shared=key_mask is None)
    options = {"scale": scale, "block_mask": block_mask, "enable_gqa": q.shape[1] != k.shape[1]}
    if q.device.type != "cpu" and (chosen := kernel_options or _tiles(lists.block)):
        options["kernel_options"] = chosen
    if key_bias is not None:
        options["score_mod"] = _score_mod(keys.of_tokens(key_bias.expand(*q.shape[:2], -1)))
    blocks = (
        side.fill(x).view(*x.shape[:2], -1, x.shape[-1])
        for side, x in zip((slots, keys, keys), (q, k, v))
    )
    if not need_lse:
        return slots.read(_compiled()(*blocks, **options), q), None
    from torch.nn.attention.flex_attention import AuxRequest

    out, aux = _compiled()(*blocks, **options, return_aux=AuxRequest(lse=True))
    return slots.read(out, q), slots.read(aux.lse[..., None], q).squeeze(-1)


def obstacle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    *,
    need_lse: bool = True,
    **options: object,
) -> str | None:
    """What keeps FlexAttention from a call of ``attention``, and what to do; None if nothing."""
    if q.dtype not in DTYPES:
        return (
            f'FlexAttention takes float32, bfloat16 and float16, got {q.dtype}: use backend="torch"'
        )
    if q.device.type != "cpu":
        if not lists.block % 16 and q.shape[-1] >= 16:
            return None
        return (
            "FlexAttention needs blocks of a multiple of 16 tokens and head dims from 16 on a GPU, "
            f'got {lists.block} and {q.shape[-1]}: choose another tile, or backend="torch"'
        )
    if need_lse:
        return (
            'FlexAttention gives no log-sum-exp on a CPU: use backend="torch", or do not ask for it'
        )
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return 'FlexAttention has no backward on a CPU: use backend="torch", or torch.no_grad()'
    return None


@lru_cache
def _compiled() -> Callable:
    # brings in the compiler of PyTorch: seconds that only this engine's users should wait
    from torch.nn.attention.flex_attention import flex_attention

    # fullgraph: where it cannot be compiled it raises, it never runs with an N by N matrix instead;
    # dynamic: the C++ code made for unknown lengths does not compile
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    return torch._dynamo.config.patch(recompile_limit=MAX_SHAPES)(compiled)


def _tiles(block: int) -> dict[str, int]:
    """Kernel tiles that divide the block; none where FlexAttention's own choice does."""
    if block % 128 == 0:
        return {}
    tile = 64
    while block % tile:
        tile //= 2
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2")
    return dict.fromkeys(names, tile)


def _block_mask(lists: BlockLists, slots: Slots, *, shared: bool) -> BlockMask:
    """Block lists as FlexAttention wants them; kept with the lists where no key mask is in them."""
    if shared and "flex" in lists.cache:
        return lists.cache["flex"]
    from torch.nn.attention.flex_attention import BlockMask

    nbk = slots.num_blocks
    listed = torch.zeros(lists.num_rows, nbk, dtype=torch.bool, device=lists.row_start.device)
    rows, columns = lists.row_of_entry, lists.key_block.long()
    listed[rows, columns] = True
    whole = listed.clone()
    whole[rows[lists.is_partial], columns[lists.is_partial]] = False
    listed, whole = (x.view(lists.batch, lists.heads, -1, nbk) for x in (listed, whole))
    rule = _rule(lists, slots, whole)
    if slots.readable is not None:
        # a block with a key that may not be read needs the rule too
        unread = ~slots.readable.view(-1, 1, 1, nbk, slots.block).all(-1)
        listed, whole = torch.broadcast_tensors(listed, whole & ~unread)
    full = whole.sum(-1, dtype=torch.int32), _columns(whole)
    partial = listed & ~whole
    mask = BlockMask.from_kv_blocks(
        partial.sum(-1, dtype=torch.int32),
        _columns(partial),
        *full,
        BLOCK_SIZE=slots.block,
        mask_mod=rule,
    )
    if shared:
        lists.cache["flex"] = mask
    return mask


def _columns(table: Tensor) -> Tensor:
    """(Bm, Hm, nb, nbk) int32, in each row the columns that are set, then the others."""
    return torch.argsort(table.int(), dim=-1, descending=True, stable=True).int()


def _score_mod(bias: Tensor) -> ScoreMod:
    """Adds (B, H, N) biases of the slots of keys."""

    def biased(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + bias[b, h, key]

    return biased


def _rule(lists: BlockLists, slots: Slots, whole: Tensor) -> MaskMod | None:
    """What decides the pairs of a block that is not read whole; None where all are."""
    visible = _predicate(lists, slots.block, whole)
    readable = slots.readable
    if readable is None:
        return visible
    per_sample = int(readable.shape[0] > 1)

    def rule(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = readable[b * per_sample, key]
        return seen if visible is None else seen & visible(b, h, query, key)

    return rule


def _predicate(lists: BlockLists, n: int, whole: Tensor) -> MaskMod | None:
    per_sample, per_head = int(lists.batch > 1), int(lists.heads > 1)
    if lists.box is not None:
        key_at, low, high, guard = lists.box.key, lists.box.low, lists.box.high, lists.box.guard

        def in_box(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            position = key_at[key]
            inside = (position - low[query]) & (high[query] - position) & guard
            return whole[b * per_sample, h * per_head, query // n, key // n] | (inside == guard)

        return in_box
    if lists.masks is None:
        return None
    # whole blocks take the last mask, in which everything is visible
    masks = F.pad(lists.masks, (0, 0, 0, 0, 0, 1), value=True)
    ids = torch.full(whole.shape, len(masks) - 1, device=whole.device).flatten(0, 2)
    partial = lists.is_partial
    ids[lists.row_of_entry[partial], lists.key_block[partial].long()] = lists.mask_id[
        partial
    ].long()
    ids = ids.view(whole.shape)

    def in_mask(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        mask = ids[b * per_sample, h * per_head, query // n, key // n]
        return masks[mask, query % n, key % n]

    return in_mask
