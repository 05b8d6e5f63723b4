"""Block lists: which key blocks each query block reads, as tensors any kernel can take.

Letters: R rows (plan batch x plan heads x query blocks), E listed blocks, N slots of queries, Nk of
keys, n slots to a block, M distinct masks.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vidattn.kernels.box import Box

# lists that are alive, with what engines derived from them, by the id of their key_block
_alive: weakref.WeakValueDictionary[int, BlockLists] = weakref.WeakValueDictionary()


@dataclass(frozen=True, eq=False)
class BlockLists:
    """Key blocks of every query block in compressed rows, whole blocks first, partial ones after.

    Row ``(b * heads + h) * num_blocks + i`` lists the key blocks that query block ``i`` reads;
    ``batch`` and ``heads`` are 1 where the plan is shared. A partial block is decided by ``box``,
    or by ``masks[mask_id]`` where the rule is no box. Keys in empty slots are never read. Keys may
    be other tokens than the queries, in slots of their own, in blocks of the same length.
    """

    order: Tensor  # (N,) int32, token in each slot, -1 for an empty slot
    block: int  # n, slots to a block
    batch: int
    heads: int
    row_start: Tensor  # (R + 1,) int64
    num_full: Tensor  # (R,) int32, how many of a row's blocks need no predicate
    key_block: Tensor  # (E,) int32
    box: Box | None = None
    mask_id: Tensor | None = None  # (E,) int32, -1 for a whole block
    masks: Tensor | None = None  # (M, n, n) bool, query by key
    keys: Tensor | None = None  # (Nk,) int32, ``order`` of other tokens that are read, if any
    # what an engine derives from the lists once; never changes a result
    cache: dict = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        self.remember()

    def remember(self) -> None:
        """Let ``find`` find these lists, of all that share a ``key_block``."""
        if not torch.compiler.is_compiling():
            _alive[id(self.key_block)] = self

    @property
    def key_order(self) -> Tensor:
        """(Nk,) int32, the token in each slot of keys, -1 for an empty slot."""
        return self.order if self.keys is None else self.keys

    @property
    def num_blocks(self) -> int:
        """Blocks of queries."""
        return self.order.numel() // self.block

    @property
    def num_key_blocks(self) -> int:
        """Blocks of keys."""
        return self.key_order.numel() // self.block

    @property
    def num_rows(self) -> int:
        """R."""
        return self.num_full.numel()

    @property
    def nbytes(self) -> int:
        """Memory of the tensors, without what is found out about them."""
        tensors = [self.order, self.row_start, self.num_full, self.key_block]
        tensors += [self.mask_id, self.masks, self.keys]
        if self.box is not None:
            tensors += [self.box.key, self.box.low, self.box.high]
        return sum(x.nbytes for x in tensors if x is not None)

    @property
    def num_partial(self) -> int:
        """Listed blocks that need the predicate."""
        return self.key_block.numel() - int(self.num_full.sum())

    def of_heads(self, heads: Tensor, sample: int | None = None) -> BlockLists:
        """The lists of (h,) ``heads``, numbered anew in their order; of one sample, or of all."""
        rows = torch.arange(self.num_rows, device=heads.device)
        rows = rows.view(self.batch, self.heads, -1)[:, heads]
        rows = rows if sample is None else rows[sample, None]
        batch, rows = len(rows), rows.flatten()
        start, counts = self.row_start[rows], self.row_start.diff()[rows]
        row_start = F.pad(counts.cumsum(0), (1, 0))
        shift = (start - row_start[:-1]).repeat_interleave(counts)
        entries = torch.arange(shift.numel(), device=heads.device) + shift
        return replace(
            self,
            batch=batch,
            heads=heads.numel(),
            row_start=row_start,
            num_full=self.num_full[rows],
            key_block=self.key_block[entries],
            mask_id=None if self.mask_id is None else self.mask_id[entries],
        )

    def of_queries(self, wanted: Tensor) -> BlockLists:
        """The lists of query blocks with any of the (S,) bool ``wanted``; others read nothing."""
        slots = wanted[self.order.clamp_min(0).long()] & (self.order >= 0)
        rows = slots.view(-1, self.block).any(1).repeat(self.num_rows // self.num_blocks)
        entries = rows[self.row_of_entry]
        return replace(
            self,
            row_start=F.pad((self.counts * rows).cumsum(0), (1, 0)),
            num_full=self.num_full * rows,
            key_block=self.key_block[entries],
            mask_id=None if self.mask_id is None else self.mask_id[entries],
        )

    @classmethod
    def stack(cls, parts: Sequence[BlockLists]) -> BlockLists:
        """The lists of several batches of equally many heads as those of one.

        They share their layout, and their box if they have one; masks are numbered anew.
        """
        mask_id, masks = None, None
        if any(x.masks is not None for x in parts):
            held = [x for x in parts if x.masks is not None]
            masks = torch.cat([x.masks for x in held])
            begin, ids = 0, []
            for x in parts:
                number = torch.full_like(x.key_block, -1) if x.mask_id is None else x.mask_id
                ids.append(torch.where(number < 0, number, number + begin))
                begin += 0 if x.masks is None else len(x.masks)
            mask_id = torch.cat(ids)
        counts = torch.cat([x.counts for x in parts])
        return replace(
            parts[0],
            batch=sum(x.batch for x in parts),
            row_start=F.pad(counts.cumsum(0), (1, 0)),
            num_full=torch.cat([x.num_full for x in parts]),
            key_block=torch.cat([x.key_block for x in parts]),
            mask_id=mask_id,
            masks=masks,
        )

    @property
    def counts(self) -> Tensor:
        """(R,) int64, listed blocks of each row."""
        return self.row_start.diff()

    @property
    def row_of_entry(self) -> Tensor:
        """(E,) int64, the row each listed block belongs to."""
        rows = torch.arange(self.num_rows, device=self.row_start.device)
        return rows.repeat_interleave(self.counts)

    @property
    def is_partial(self) -> Tensor:
        """(E,) bool, whether a listed block needs its predicate."""
        rank = torch.arange(self.key_block.numel(), device=self.row_start.device)
        rows = self.row_of_entry
        return rank - self.row_start[rows] >= self.num_full[rows]

    def check(self, num_tokens: int, num_keys: int | None = None) -> None:
        """Look, once, at what the lists point at in so many queries and keys: engines read it.

        Raises:
            ValueError: something outside the layout or the tokens, or lists of the wrong lengths.
        """
        num_keys = num_tokens if num_keys is None else num_keys
        key = ("checked", num_tokens, num_keys)
        if self.order.is_meta or key in self.cache:
            return
        nb, starts = self.num_blocks, self.row_start.numel() - 1
        rows = self.batch * self.heads * nb
        if (self.num_rows, starts) != (rows, rows):
            raise ValueError(
                f"the plan has {self.num_rows} rows of lists and {starts} starts; "
                f"{self.batch} samples, {self.heads} heads and {nb} blocks need {rows} of each"
            )
        box, masks = self.box, self.masks
        slots = [x.numel() for x in (self.key_order, self.order, self.order)]
        fits = box is None or [x.numel() for x in (box.key, box.low, box.high)] == slots
        if masks is not None:
            named = self.mask_id is not None and self.mask_id.numel() == self.key_block.numel()
            fits &= named and masks.shape[1:] == (self.block, self.block)
        if not fits:
            raise ValueError(
                f"the plan's box or masks are not for {nb} blocks of {self.block}: make them from "
                "one grid"
            )
        self._check_bounds(num_tokens, num_keys)
        self.cache[key] = True

    def _check_bounds(self, num_tokens: int, num_keys: int) -> None:
        entries = self.key_block.numel()
        has_rule = self.box is not None or self.masks is not None
        partial = entries + 1 if has_rule else 1
        rule = "lists" if has_rule else "lists, which have neither box nor masks"
        bounds = {
            "lists blocks": (self.key_block, 0, self.num_key_blocks, "layout"),
            "holds tokens": (self.order, -1, num_tokens, "grid"),
            "holds keys": (self.key_order, -1, num_keys, "grid"),
            "begins rows at": (self.row_start, 0, entries + 1, "lists"),
            "has rows of length": (self.counts, 0, entries + 1, "lists"),
            "has partial blocks": (self.counts - self.num_full, 0, partial, rule),
        }
        if self.masks is not None:
            bounds["names masks"] = (self.mask_id, -1, len(self.masks), "table")
        bounds = {what: bound for what, bound in bounds.items() if bound[0].numel()}
        # one wait for the device, not one for each
        found = torch.stack([torch.stack(x.long().aminmax()) for x, *_ in bounds.values()])
        for (what, bound), (low, high) in zip(bounds.items(), found.tolist()):
            _, first, count, owner = bound
            if low < first or high >= count:
                raise ValueError(
                    f"the plan {what} {low} to {high}; {first} to {count - 1} fit its {owner}: "
                    "make them from one grid"
                )

    def mask(self, num_tokens: int, num_keys: int | None = None) -> Tensor:
        """(B|1, H|1, S, Sk) bool in sequence order, query by key: what the lists mean."""
        self.check(num_tokens, num_keys)
        n, nb, num_columns = self.block, self.num_blocks, self.num_key_blocks
        shape = (self.num_rows * num_columns, n, n)
        blocks = torch.zeros(shape, dtype=torch.bool, device=self.order.device)
        cell = self.row_of_entry * num_columns + self.key_block
        blocks[cell] = True
        partial = self.is_partial.nonzero().flatten()
        if partial.numel():
            query = self.row_of_entry[partial] % nb
            blocks[cell[partial]] = partial_mask(self, query, partial[:, None])[:, :, 0]
        slots = blocks.view(-1, nb, num_columns, n, n).transpose(2, 3).flatten(1, 2).flatten(2)
        query, key = (_slots_in_sequence(x) for x in (self.order, self.key_order))
        return slots[:, query[:, None], key].unflatten(0, (self.batch, self.heads))

    def transposed(self) -> BlockLists:
        """The lists of the key blocks: which query blocks read each, made once.

        ``box`` and ``masks`` stay as they are, query by key.
        """
        if "transposed" not in self.cache:
            rows, partial = self.row_of_entry, self.is_partial
            new_rows = rows // self.num_blocks * self.num_key_blocks + self.key_block
            order = (new_rows * 2 + partial).argsort(stable=True)
            num_rows = self.batch * self.heads * self.num_key_blocks
            counts = torch.bincount(new_rows, minlength=num_rows)
            num_full = torch.bincount(new_rows[~partial], minlength=num_rows)
            self.cache["transposed"] = replace(
                self,
                order=self.key_order,
                keys=None if self.keys is None else self.order,
                row_start=F.pad(counts.cumsum(0), (1, 0)),
                num_full=num_full.int(),
                key_block=(rows % self.num_blocks)[order].int(),
                mask_id=None if self.mask_id is None else self.mask_id[order],
            )
        return self.cache["transposed"]

    def to(self, device: torch.device | str) -> BlockLists:
        """The same lists with their tensors on ``device``; themselves where they are there."""
        order = self.order.to(device)
        if order is self.order:
            return self
        names = ("row_start", "num_full", "key_block", "box", "mask_id", "masks", "keys")
        held = {name: getattr(self, name) for name in names}
        moved = {name: None if x is None else x.to(device) for name, x in held.items()}
        return replace(self, order=order, **moved)


def _slots_in_sequence(order: Tensor) -> Tensor:
    """The slots that hold a token, in the order of the tokens."""
    filled = (order >= 0).nonzero().flatten()
    return filled[order[filled].argsort()]


def find(key_block: Tensor) -> BlockLists | None:
    """The lists that were made, or remembered, last with this very tensor, if any are alive."""
    lists = _alive.get(id(key_block))
    return None if lists is None or lists.key_block is not key_block else lists


def partial_mask(lists: BlockLists, rows: Tensor, entries: Tensor) -> Tensor:
    """(G, n, P, n) bool predicate of P listed blocks for each of G query blocks.

    ``rows`` (G,) are query block numbers, ``entries`` (G, P) positions in ``key_block``.
    """
    if lists.box is None:
        return lists.masks[lists.mask_id[entries].long()].transpose(1, 2)
    block = lists.block
    inside = torch.arange(block, device=rows.device)
    query_slots = rows[:, None] * block + inside  # (G, n)
    key_slots = lists.key_block[entries].long()[..., None] * block + inside  # (G, P, n)
    return lists.box.visible(query_slots[:, :, None, None], key_slots[:, None])
