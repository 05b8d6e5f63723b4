"""Block lists: which key blocks each query block reads, as tensors any kernel can take.

Letters: R rows (plan batch x plan heads x query blocks), E listed blocks, N slots, n slots to a
block, M distinct masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

# what hides a pair when added to its score: below every real score, and finite, so that the largest
# score of a row that sees nothing can be subtracted
HIDDEN = -1e28


@dataclass(frozen=True, eq=False)
class Box:
    """A predicate: the key's position lies in a box that depends on the query.

    Every position is three small integers packed in one int32 with a guard bit above each, so one
    subtraction compares three axes: ``guard`` survives where no axis borrowed.
    """

    key: Tensor  # (N,) int32, position of each slot
    low: Tensor  # (N,) int32, first visible position of each query slot, guard bits cleared below
    high: Tensor  # (N,) int32, last visible position of each query slot, guard bits set
    guard: int

    @classmethod
    def pack(cls, axes: Sequence[tuple[int, Tensor, Tensor, Tensor]]) -> Box:
        """One box to a slot.

        Args:
            axes: the extent of each, and three (N,) int64 tensors: the place of each slot, and the
                first and the last place that a query in it reads.

        Raises:
            ValueError: too many places for 31 bits.
        """
        check_packable([extent for extent, *_ in axes])
        key, low, high, guard, shift = 0, 0, 0, 0, 0
        for extent, here, first, last in axes:
            key = key + (here << shift)
            low = low + (first << shift)
            high = high + (last << shift)
            shift += (extent - 1).bit_length() + 1
            guard += 1 << (shift - 1)
        return cls(key.int(), (low - guard).int(), (high | guard).int(), guard)

    def visible(self, query_slots: Tensor, key_slots: Tensor) -> Tensor:
        """Bool of the two slot tensors broadcast together."""
        key = self.key[key_slots]
        above = (key - self.low[query_slots]).bitwise_and_(self.high[query_slots] - key)
        return above.bitwise_and_(self.guard) == self.guard

    def num_visible(self, query_slots: Tensor) -> Tensor:
        """(Q,) int64, the positions in the box of each of Q query slots."""
        low, high = self.low[query_slots].long() + self.guard, self.high[query_slots].long()
        count, shift = torch.ones_like(low), 0
        for bit in range(self.guard.bit_length()):
            if self.guard >> bit & 1:
                field = (1 << bit) - (1 << shift)
                count *= ((high & field) >> shift) - ((low & field) >> shift) + 1
                shift = bit + 1
        return count

    def to(self, device: torch.device | str) -> Box:
        """The same box with its tensors on ``device``."""
        return Box(self.key.to(device), self.low.to(device), self.high.to(device), self.guard)


def check_packable(size: Sequence[int]) -> None:
    """Raise ValueError unless a position on the grid fits in 31 bits, guards included."""
    bits = sum((extent - 1).bit_length() + 1 for extent in size)
    if bits > 31:
        raise ValueError(
            f"a grid of {tuple(size)} needs {bits} bits to pack a position, 31 are there: "
            "attend to the video in pieces"
        )


@dataclass(frozen=True, eq=False)
class BlockLists:
    """Key blocks of every query block in compressed rows, whole blocks first, partial ones after.

    Row ``(b * heads + h) * num_blocks + i`` lists the key blocks that query block ``i`` reads;
    ``batch`` and ``heads`` are 1 where the plan is shared. A partial block is decided by ``box``,
    or by ``masks[mask_id]`` where the rule is no box. Keys in empty slots are never read.
    """

    batch: int
    heads: int
    row_start: Tensor  # (R + 1,) int64
    num_full: Tensor  # (R,) int32, how many of a row's blocks need no predicate
    key_block: Tensor  # (E,) int32
    box: Box | None = None
    mask_id: Tensor | None = None  # (E,) int32, -1 for a whole block
    masks: Tensor | None = None  # (M, n, n) bool, query by key
    # what an engine derives from the lists once; never changes a result
    cache: dict = field(default_factory=dict, repr=False)

    @property
    def num_rows(self) -> int:
        """R."""
        return self.num_full.numel()

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
        return BlockLists(
            batch=batch,
            heads=heads.numel(),
            row_start=row_start,
            num_full=self.num_full[rows],
            key_block=self.key_block[entries],
            box=self.box,
            mask_id=None if self.mask_id is None else self.mask_id[entries],
            masks=self.masks,
        )

    @classmethod
    def stack(cls, parts: Sequence[BlockLists]) -> BlockLists:
        """The lists of several batches of equally many heads as those of one.

        They share their box, if they have one; masks are numbered anew.
        """
        first, mask_id, masks = parts[0], None, None
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
        return cls(
            batch=sum(x.batch for x in parts),
            heads=first.heads,
            row_start=F.pad(counts.cumsum(0), (1, 0)),
            num_full=torch.cat([x.num_full for x in parts]),
            key_block=torch.cat([x.key_block for x in parts]),
            box=first.box,
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

    def check(self, order: Tensor, block: int, num_tokens: int) -> None:
        """Look, once, at what the lists and a layout point at: an engine would read it.

        Args:
            order: (N,) int32, token in each slot, -1 for an empty slot.
            block: slots to a block.

        Raises:
            ValueError: something outside the layout or the tokens, or lists of the wrong lengths.
        """
        held = (order, self.row_start, self.num_full, self.key_block)
        held += (self.box, self.mask_id, self.masks)
        seen = self.cache.get(("checked", num_tokens), (None,))
        if order.is_meta or all(a is b for a, b in zip(held, seen)):
            return
        nb, starts = order.numel() // block, self.row_start.numel() - 1
        rows = self.batch * self.heads * nb
        if (self.num_rows, starts) != (rows, rows):
            raise ValueError(
                f"the plan has {self.num_rows} rows of lists and {starts} starts; "
                f"{self.batch} samples, {self.heads} heads and {nb} blocks need {rows} of each"
            )
        box, masks = self.box, self.masks
        fits = box is None or {x.numel() for x in (box.key, box.low, box.high)} == {order.numel()}
        if masks is not None:
            named = self.mask_id is not None and self.mask_id.numel() == self.key_block.numel()
            fits &= named and masks.shape[1:] == (block, block)
        if not fits:
            raise ValueError(
                f"the plan's box or masks are not for {nb} blocks of {block}: make them from one "
                "grid"
            )
        self._check_bounds(order, nb, num_tokens)
        self.cache["checked", num_tokens] = held

    def _check_bounds(self, order: Tensor, nb: int, num_tokens: int) -> None:
        entries = self.key_block.numel()
        has_rule = self.box is not None or self.masks is not None
        rule = "lists" if has_rule else "lists, which have neither box nor masks"
        bounds = {
            "lists blocks": (self.key_block, 0, nb, "layout"),
            "holds tokens": (order, -1, num_tokens, "grid"),
            "begins rows at": (self.row_start, 0, entries + 1, "lists"),
            "has rows of length": (self.counts, 0, entries + 1, "lists"),
            "has partial blocks": (
                self.counts - self.num_full,
                0,
                entries + 1 if has_rule else 1,
                rule,
            ),
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

    def transposed(self) -> BlockLists:
        """The lists of the key blocks: which query blocks read each, made once.

        ``box`` and ``masks`` stay as they are, query by key.
        """
        if "transposed" not in self.cache:
            num_blocks = self.num_rows // (self.batch * self.heads)
            rows, partial = self.row_of_entry, self.is_partial
            new_rows = rows - rows % num_blocks + self.key_block
            order = (new_rows * 2 + partial).argsort(stable=True)
            counts = torch.bincount(new_rows, minlength=self.num_rows)
            num_full = torch.bincount(new_rows[~partial], minlength=self.num_rows)
            self.cache["transposed"] = BlockLists(
                self.batch,
                self.heads,
                F.pad(counts.cumsum(0), (1, 0)),
                num_full.int(),
                (rows % num_blocks)[order].int(),
                self.box,
                None if self.mask_id is None else self.mask_id[order],
                self.masks,
            )
        return self.cache["transposed"]

    def to(self, device: torch.device | str) -> BlockLists:
        """The same lists with their tensors on ``device``; themselves where they are there."""
        row_start = self.row_start.to(device)
        if row_start is self.row_start:
            return self

        def move(x: Tensor | Box | None) -> Tensor | Box | None:
            return None if x is None else x.to(device)

        return BlockLists(
            self.batch,
            self.heads,
            row_start,
            self.num_full.to(device),
            self.key_block.to(device),
            move(self.box),
            move(self.mask_id),
            move(self.masks),
        )


def partial_mask(lists: BlockLists, block: int, rows: Tensor, entries: Tensor) -> Tensor:
    """(G, n, P, n) bool predicate of P listed blocks for each of G query blocks.

    ``rows`` (G,) are query block numbers, ``entries`` (G, P) positions in ``key_block``.
    """
    if lists.box is None:
        return lists.masks[lists.mask_id[entries].long()].transpose(1, 2)
    inside = torch.arange(block, device=rows.device)
    query_slots = rows[:, None] * block + inside  # (G, n)
    key_slots = lists.key_block[entries].long()[..., None] * block + inside  # (G, P, n)
    return lists.box.visible(query_slots[:, :, None, None], key_slots[:, None])


def partial_bias(
    lists: BlockLists, block: int, rows: Tensor, entries: Tensor, dtype: torch.dtype
) -> Tensor:
    """(G, n, P * n) what to add to scores so that hidden pairs drop out: 0, or HIDDEN and less.

    ``rows`` (G,) are plan rows, ``entries`` (G, P) positions in ``key_block``; whole blocks among
    them get 0.
    """
    whole = entries < (lists.row_start[rows] + lists.num_full[rows])[:, None]
    if lists.box is None:
        tables = _mask_biases(lists, dtype)[lists.mask_id[entries].long()]
        return tables.transpose(1, 2).flatten(2)
    box = lists.box
    inside = torch.arange(block, device=rows.device)
    num_blocks = lists.num_rows // (lists.batch * lists.heads)
    query_slots = (rows % num_blocks)[:, None] * block + inside  # (G, n)
    key_slots = lists.key_block[entries].long()[..., None] * block + inside  # (G, P, n)
    key = box.key[key_slots].flatten(1)[:, None]
    # a lost guard bit leaves a negative number
    lost = (key - box.low[query_slots][..., None]).bitwise_and_(
        box.high[query_slots][..., None] - key
    )
    bias = lost.bitwise_and_(box.guard).sub_(box.guard).to(dtype).mul_(-HIDDEN)
    if bool(whole.any()):
        bias.unflatten(-1, (-1, block)).mul_((~whole)[:, None, :, None].to(dtype))
    return bias


def _mask_biases(lists: BlockLists, dtype: torch.dtype) -> Tensor:
    """(M + 1, n, n) the masks as biases; the last one, for whole blocks, is 0."""
    key = ("mask biases", dtype)
    if key not in lists.cache:
        bias = torch.zeros(lists.masks.shape, dtype=dtype, device=lists.masks.device)
        bias.masked_fill_(~lists.masks, HIDDEN)
        lists.cache[key] = torch.cat([bias, torch.zeros_like(bias[:1])])
    return lists.cache[key]
