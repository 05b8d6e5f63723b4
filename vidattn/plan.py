"""A plan: which key blocks every query block reads, resolved for one grid.

Letters: B batch, H heads, S tokens, N slots, n slots to a block, nv video blocks, nb all blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from vidattn.grid import Grid, Layout, Size, dilation_order, tile_layout
from vidattn.kernels.block_lists import BlockLists, partial_mask
from vidattn.kernels.box import Box
from vidattn.kernels.quantise import PRECISIONS
from vidattn.registry import unknown

Window = tuple[Tensor, Tensor]
# rows of block lists, or partial blocks, taken together where all of them would need much memory
ROWS_AT_ONCE = 512
# pairs of blocks that are looked at together: on a GPU every piece is a wait
BLOCKS_AT_ONCE = {"cpu": 2**19, "cuda": 2**28}


@dataclass(frozen=True, eq=False)
class Plan:
    """Who reads whom on one grid: block lists over a layout of its tokens.

    ``mask()`` defines what ``attend`` computes. A plan is shared by all samples, or all heads,
    where ``lists.batch``, or ``lists.heads``, is 1. Memory grows with the listed blocks.
    """

    grid: Grid
    layout: Layout
    lists: BlockLists
    # compensation of what is not read: out = gain * out + rest @ (means of v over key blocks)
    gain: Tensor | None = None  # (B|1, H|1, nb), per query block
    rest: Tensor | None = None  # (B|1, H|1, nb, nb), query block by key block
    sharpness: float = 1.0  # factor of the scale of the scores
    # what the method's next plan for the same place starts from, of no concern to any engine
    memory: tuple[Tensor, ...] = ()
    precision: str | None = None  # of the products (see ``with_precision``)
    # whether this is attention of every token to every token, and nothing else
    is_dense: bool = field(init=False)

    def __post_init__(self):
        if self.precision is not None and self.precision not in PRECISIONS:
            raise unknown("precision", self.precision, PRECISIONS)
        layout, lists = self.layout, self.lists
        if lists.order is not layout.order or lists.block != layout.block:
            raise ValueError(
                f"the lists are of another layout, {lists.order.numel()} slots in blocks of "
                f"{lists.block}, than the plan's {layout.order.numel()} in blocks of "
                f"{layout.block}: make them with its order and its block"
            )
        # found out now: a compiler that traces attention could not
        entries = lists.num_rows * layout.num_blocks
        is_plain = all(x is None for x in (self.gain, self.rest, self.precision))
        is_whole = is_plain and lists.key_block.numel() == entries
        if is_whole and not self.device.type == "meta":
            is_whole = self._num_partial == 0
        object.__setattr__(self, "is_dense", is_whole)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.layout.order.device

    @property
    def _num_partial(self) -> int:
        return int(self.lists.key_block.numel() - self.lists.num_full.sum())

    @cached_property
    def density(self) -> float:
        """Kept pairs over all pairs of video tokens, counted exactly."""
        lists, layout = self.lists, self.layout
        if lists.box is not None:
            video = layout.live[: layout.num_video_blocks * layout.block].nonzero().flatten()
            return lists.box.num_visible(video).sum().item() / self.grid.num_video_tokens**2
        pairs = self._visited_pairs
        if lists.masks is not None:
            pairs -= self._masked_pairs()
        return self._share(pairs)

    @cached_property
    def visited_density(self) -> float:
        """Pairs in visited blocks over all pairs of video tokens: what an engine has to compute."""
        return self._share(self._visited_pairs)

    @cached_property
    def _visited_pairs(self) -> int:
        """Pairs of video tokens in the listed blocks, some rows at a time."""
        lists, tokens, nb, total = self.lists, self._video_tokens, self.layout.num_blocks, 0
        queries = tokens.repeat(lists.batch * lists.heads)
        step = _rows_at_once(tokens.device, nb)
        for row in range(0, lists.num_rows, step):
            starts = lists.row_start[row : row + step + 1]
            first, last = starts[[0, -1]].tolist()
            keys = tokens.index_select(0, lists.key_block[first:last])
            sums = torch.nn.functional.pad(keys.cumsum(0), (1, 0))[starts - first].diff()
            total += int((sums * queries[row : row + step]).sum())
        return total

    def _masked_pairs(self) -> int:
        """Pairs of video tokens in the listed blocks that a mask hides."""
        lists, tokens = self.lists, self._video_tokens
        partial = lists.is_partial.nonzero().flatten()
        query = lists.row_of_entry[partial] % self.layout.num_blocks
        pairs = tokens[query] * tokens[lists.key_block[partial].long()]
        seen = lists.masks.sum((1, 2))[lists.mask_id[partial].long()]
        return int((pairs - seen)[pairs > 0].sum())

    @property
    def _video_tokens(self) -> Tensor:
        """(nb,) int64, video tokens in each block."""
        tokens = self.layout.tokens_per_block.clone()
        tokens[self.layout.num_video_blocks :] = 0
        return tokens

    def _share(self, pairs: int) -> float:
        rows = self.lists.batch * self.lists.heads
        return pairs / (self.grid.num_video_tokens**2 * rows)

    def mask(self) -> Tensor:
        """(B|1, H|1, S, S) bool in sequence order, query by key; for tests and pictures."""
        return self.lists.mask(self.grid.num_tokens)

    @cached_property
    def read_share(self) -> Tensor:
        """(B|1, H|1, nv, nv) float32, the visible share of the pairs of tokens of video blocks."""
        lists, n, nb = self.lists, self.layout.block, self.layout.num_blocks
        share = torch.zeros(lists.num_rows, nb, device=self.device)
        row, key = lists.row_of_entry, lists.key_block.long()
        share[row, key] = 1
        live = self.layout.live.view(nb, n)
        whole = lists.box is None and lists.masks is None
        partial = row[:0] if whole else lists.is_partial.nonzero().flatten()
        for begin in range(0, partial.numel(), ROWS_AT_ONCE):
            some = partial[begin : begin + ROWS_AT_ONCE]
            query = row[some] % nb
            pairs = live[query][:, :, None] & live[key[some]][:, None]
            seen = partial_mask(lists, query, some[:, None])[:, :, 0] & pairs
            share[row[some], key[some]] = seen.sum((1, 2)) / pairs.sum((1, 2)).clamp_min(1)
        nv = self.layout.num_video_blocks
        return share.view(lists.batch, lists.heads, nb, nb)[..., :nv, :nv]

    def summary(self) -> dict[str, float | int | str]:
        """Figures worth printing: densities, blocks and memory."""
        lists, box = self.lists, self.lists.box
        tensors = [lists.order, lists.row_start, lists.num_full, lists.key_block]
        tensors += [lists.mask_id, lists.masks, self.gain, self.rest, *self.memory]
        if box is not None:
            tensors += [box.key, box.low, box.high]
        return {
            "num_tokens": self.grid.num_tokens,
            "density": self.density,
            "visited_density": self.visited_density,
            "block": self.layout.block,
            "num_blocks": lists.key_block.numel(),
            "num_partial_blocks": self._num_partial,
            "precision": self.precision or "of the inputs",
            "memory_mib": sum(x.nbytes for x in tensors if x is not None) / 2**20,
        }

    def to(self, device: torch.device | str) -> Plan:
        """The same plan with its tensors on ``device``: itself, or a copy that is made once."""
        # "cuda" is the GPU at hand, with its number
        device = torch.empty(0, device=device).device
        if device == self.device:
            return self
        if device not in self._copies:
            gain, rest = (None if x is None else x.to(device) for x in (self.gain, self.rest))
            lists, memory = self.lists.to(device), tuple(x.to(device) for x in self.memory)
            changes = {"lists": lists, "gain": gain, "rest": rest, "memory": memory}
            layout = replace(self.layout, order=lists.order)
            self._copies[device] = replace(self, layout=layout, **changes)
        return self._copies[device]

    @cached_property
    def _copies(self) -> dict[torch.device, Plan]:
        """What ``to`` made: what engines learn of a plan once is kept with its tensors."""
        return {}

    def with_precision(self, precision: str | None) -> Plan:
        """The same plan with its products in another precision, which has no gradient but for None.

        "int8_qk" multiplies queries and keys as 8-bit integers, "int8" weights and values too,
        "int8_qk_int4_pv" those as 4-bit integers, simulated by the "torch" engine.
        """
        return replace(self, precision=precision)

    @classmethod
    def from_blocks(
        cls,
        grid: Grid,
        layout: Layout,
        blocks: Tensor,
        *,
        gain: Tensor | None = None,
        rest: Tensor | None = None,
        memory: tuple[Tensor, ...] = (),
    ) -> Plan:
        """A plan of whole blocks; text reads, and is read by, everything.

        Args:
            blocks: (B|1, H|1, nv, nv) bool, whether a query block reads a key block of the video.
            gain: (B|1, H|1, nb) factor of the output of a query block.
            rest: (B|1, H|1, nb, nb) share of the mean value of each key block that is added to the
                output of a query block.
            memory: any tensors that the method wants back when it plans for this place again.

        Raises:
            ValueError: ``blocks`` does not fit the layout.
        """
        nv, nb = layout.num_video_blocks, layout.num_blocks
        if blocks.dim() != 4 or blocks.shape[-2:] != (nv, nv) or blocks.dtype != torch.bool:
            raise ValueError(
                f"blocks must be bool of shape (batch, heads, {nv}, {nv}) for this layout, "
                f"got {blocks.dtype} {tuple(blocks.shape)}"
            )
        blocks = torch.nn.functional.pad(blocks, (0, nb - nv, 0, nb - nv), value=True)
        # some rows at a time: sum() and nonzero() take 8 and 16 bytes to a block
        pieces = blocks.flatten(0, 2).split(_rows_at_once(blocks.device, nb))
        counts = torch.cat([rows.sum(-1) for rows in pieces])
        lists = BlockLists(
            order=layout.order,
            block=layout.block,
            batch=blocks.shape[0],
            heads=blocks.shape[1],
            row_start=_row_start(counts),
            num_full=counts.int(),
            key_block=torch.cat([rows.nonzero()[:, 1].int() for rows in pieces]),
        )
        return cls(grid, layout, lists, gain, rest, memory=memory)

    @classmethod
    def from_windows(
        cls, grid: Grid, windows: tuple[Window, Window, Window], *, tile: Size, dilation: Size
    ) -> Plan:
        """An exact plan in which a pair is visible when it is visible on every axis.

        Args:
            windows: for each axis two int64 tensors over its places in dilation order: the first
                and the last place that the query at a place reads.
            tile: edges of a block.
            dilation: step of each axis; it sets the order (see ``dilation_order``).
        """
        layout = tile_layout(grid, tile, dilation)
        query = key = torch.zeros(1, dtype=torch.long)
        whole = torch.ones(1, dtype=torch.bool)
        for (first, last), edge in zip(windows, tile):
            axis_query, axis_key, axis_whole = _tile_pairs(first, last, edge)
            num_tiles = -(-first.numel() // edge)
            query = (query[:, None] * num_tiles + axis_query).flatten()
            key = (key[:, None] * num_tiles + axis_key).flatten()
            whole = (whole[:, None] & axis_whole).flatten()
        lists = _compress(layout, query, key, whole)
        return cls(grid, layout, replace(lists, box=_pack(grid, layout, windows, dilation)))

    @classmethod
    def from_rule(
        cls, grid: Grid, layout: Layout, rule: Callable[[Tensor, Tensor], Tensor]
    ) -> Plan:
        """An exact plan for any rule on two positions; it visits every pair, so for small grids.

        Args:
            rule: takes (..., 3) query and key positions, gives a bool tensor of their shape
                broadcast together. Text is not asked about: it reads, and is read by, everything.
        """
        n, nv = layout.block, layout.num_video_blocks
        live = layout.live.view(-1, n)[:nv]
        coords = grid.coords()[layout.order[: nv * n].long().clamp_min(0)].view(nv, n, 3)
        real = live[:, None, :, None] & live[None, :, None, :]
        visible = torch.stack([rule(q[None, :, None], coords[:, None]) for q in coords])
        whole = (visible | ~real).all(-1).all(-1)
        visible &= real
        query, key = visible.any(-1).any(-1).nonzero(as_tuple=True)
        masks, mask_of_pair = torch.unique(visible[~whole], dim=0, return_inverse=True)
        mask_id = torch.full((layout.num_blocks,) * 2, -1, dtype=torch.int32)
        mask_id[:nv, :nv][~whole] = mask_of_pair.int()
        lists = _compress(layout, query, key, whole[query, key])
        ids = mask_id[lists.row_of_entry, lists.key_block.long()]
        return cls(grid, layout, replace(lists, mask_id=ids, masks=masks))


def _rows_at_once(device: torch.device, num_blocks: int) -> int:
    return max(1, BLOCKS_AT_ONCE.get(device.type, BLOCKS_AT_ONCE["cpu"]) // num_blocks)


def _row_start(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def _compress(layout: Layout, query: Tensor, key: Tensor, whole: Tensor) -> BlockLists:
    """The lists of (E,) video block pairs in any order, with the blocks of text added."""
    nv, nb = layout.num_video_blocks, layout.num_blocks
    blocks = torch.arange(nb)
    beside = torch.cartesian_prod(blocks[:nv], blocks[nv:]).view(-1, 2)
    below = torch.cartesian_prod(blocks[nv:], blocks).view(-1, 2)
    query = torch.cat([query, beside[:, 0], below[:, 0]])
    key = torch.cat([key, beside[:, 1], below[:, 1]])
    partial = torch.nn.functional.pad(~whole, (0, query.numel() - whole.numel()))
    order = ((query * 2 + partial) * nb + key).argsort()
    counts = torch.bincount(query, minlength=nb)
    num_full = torch.bincount(query[~partial], minlength=nb)
    return BlockLists(
        order=layout.order,
        block=layout.block,
        batch=1,
        heads=1,
        row_start=_row_start(counts),
        num_full=num_full.int(),
        key_block=key[order].int(),
    )


def _tile_pairs(first: Tensor, last: Tensor, edge: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tiles of one axis that see each other: query tiles, key tiles, whether every pair is seen."""
    begin = torch.arange(0, first.numel(), edge)
    end = (begin + edge).clamp(max=first.numel()) - 1
    some = (first[:, None] <= end) & (last[:, None] >= begin)
    every = (first[:, None] <= begin) & (last[:, None] >= end)
    some = torch.stack([rows.any(0) for rows in some.split(edge)])
    every = torch.stack([rows.all(0) for rows in every.split(edge)])
    query, key = some.nonzero(as_tuple=True)
    return query, key, every[query, key]


def _pack(grid: Grid, layout: Layout, windows: tuple[Window, ...], dilation: Size) -> Box:
    """The windows as one packed box to a query slot; the slots of text are never asked about."""
    coords = grid.coords()[layout.order.long().clamp_min(0)].clamp_min_(0)
    axes = []
    for axis, (extent, (first, last)) in enumerate(zip(grid.size, windows)):
        place = torch.empty(extent, dtype=torch.long)
        place[dilation_order(extent, dilation[axis])] = torch.arange(extent)
        here = place[coords[:, axis]]
        axes.append((extent, here, first[here], last[here]))
    return Box.pack(axes)
