"""Neighborhood attention in PyTorch, with a bias for every relative position.

Every tile of queries is multiplied with its whole halo, so the work per tile is two batched
products, and nothing is gathered key by key: queries and halos are strided views.

Letters: B batch, H heads, (t, h, w) size, D head dim, n queries of a tile, m keys of its halo,
c tiles in flight, K relative positions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vidattn.kernels.cpp.onednn import fast_float32_products
from vidattn.kernels.engines.partial_bias import HIDDEN
from vidattn.kernels.engines.workspace import LN2, LOG2E, MAX_PLAIN_SCORE, Workspace
from vidattn.kernels.windows.halo import Halo, Run
from vidattn.kernels.workers import num_workers, run

# bytes of scores, queries, keys and values in flight
BUDGET = 4 << 20
# Numbers in the queries from which workers win over the threads of each product: to start workers
# takes as long as many a call.
SHARED_FROM = 1 << 23
Runs = tuple[Run, Run, Run]


def forward(
    q: Tensor, k: Tensor, v: Tensor, halo: Halo, scale: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Softmax attention of every query over its window.

    Args:
        q: (B, H, t, h, w, D).
        k, v: likewise; the size may be another where the halo says so.
        halo: the windows.
        scale: factor of the scores.
        bias: (H, K), added to the scaled scores.

    Returns:
        Output like ``q``; (B, H, t, h, w) log-sum-exp, float64 for float64 inputs, else float32.
    """
    call = _Call(q, k, v, halo, scale, bias)
    is_plain = call.highest_score() <= MAX_PLAIN_SCORE
    lse = q.new_empty(q.shape[:-1], dtype=call.dtype)
    out = torch.empty_like(call.q)

    def work(space: Workspace, piece: Piece) -> None:
        weights = call.scores(space, piece)
        top = 0.0
        if not is_plain:
            top = weights.amax(-1, keepdim=True)
            weights.sub_(top)
        total = weights.exp2_().sum(-1, keepdim=True)
        values = call.take(space, "v", call.v, piece, keys=True)
        shape = (*weights.shape[:2], q.shape[-1])
        product = torch.bmm(weights, values, out=space.buffer("product", shape, call.dtype))
        call.put(out, product.div_(total), piece)
        call.put(lse[..., None], total.log2_().add_(top).mul_(LN2), piece)

    call.run(work)
    return call.in_sequence(out, q), call.in_sequence(lse[..., None], lse[..., None])[..., 0]


def backward(
    d_out: Tensor,
    delta: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    halo: Halo,
    scale: float,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and bias, an empty tensor for the last where there is none.

    Args:
        d_out: (B, H, t, h, w, D), the gradient of the output.
        delta: (B, H, t, h, w), what the softmax of each query loses.
        lse: (B, H, t, h, w), of the forward call.
    """
    call = _Call(q, k, v, halo, scale, bias)
    pulls = (d_out, delta[..., None], lse[..., None] * LOG2E)
    d_out, delta, lse = (call.in_places(x) for x in pulls)
    d_q = torch.empty_like(call.q)
    d_k, d_v = (torch.zeros(x.shape, dtype=call.dtype, device=x.device) for x in (call.k, call.v))
    # one for each worker, with room for hidden pairs
    size = (len(call.shares), q.shape[1], math.prod(halo.table_size) + 1)
    d_bias = torch.zeros(size, dtype=call.dtype, device=q.device)

    def work(space: Workspace, piece: Piece) -> None:
        weights = call.scores(space, piece)
        weights.sub_(call.take(space, "lse", lse, piece)).exp2_()
        pulled = call.take(space, "d out", d_out, piece)
        values = call.take(space, "v", call.v, piece, keys=True)
        d_scores = torch.bmm(
            pulled, values.mT, out=space.buffer("d scores", weights.shape, call.dtype)
        )
        d_scores.sub_(call.take(space, "delta", delta, piece)).mul_(weights)
        call.add(d_v, torch.bmm(weights.mT, pulled, out=values), piece)
        if bias is not None:
            _add_bias(d_bias[piece.worker], d_scores, piece)
        keys = call.take(space, "v", call.k, piece, keys=True)
        product = torch.bmm(d_scores, keys, out=pulled).mul_(scale)
        call.put(d_q, product, piece)
        queries = call.take(space, "d out", call.q, piece)
        call.add(d_k, torch.bmm(d_scores.mT, queries, out=keys).mul_(scale), piece)

    call.run(work)
    d_q, d_k, d_v = (call.in_sequence(x, y) for x, y in ((d_q, q), (d_k, k), (d_v, v)))
    return d_q, d_k, d_v, q.new_empty(0) if bias is None else d_bias.sum(0)[:, :-1].to(bias.dtype)


@dataclass(frozen=True)
class Piece:
    """Tiles of one kind in flight, for some samples and heads."""

    worker: int
    runs: Runs
    samples: slice
    heads: slice
    tiles: tuple[slice, slice, slice]
    pairs: Tensor  # (n * m,) int64, the relative position of each pair
    bias: Tensor | None  # (1 or heads, n, m), added to the scores

    @property
    def shape(self) -> tuple[int, int, int]:
        """Samples, heads and tiles."""
        b, h, *tiles = (x.stop - x.start for x in (self.samples, self.heads, *self.tiles))
        return b, h, math.prod(tiles)


class _Call:
    """One call: the tensors sorted by dilation group, and the pieces that workers take."""

    def __init__(self, q, k, v, halo: Halo, scale: float, bias: Tensor | None):
        self.halo, self.scale = halo, scale
        self.dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.q, self.k, self.v = (self.in_places(x) for x in (q, k, v))
        self.table = None
        if bias is not None:
            hidden = bias.new_full((bias.shape[0], 1), HIDDEN, dtype=self.dtype)
            self.table = torch.cat([bias.to(self.dtype) * LOG2E, hidden], 1)
        limit = num_workers(q.device) if q.numel() >= SHARED_FROM else 1
        self.shares = _share_out(q.shape[0], q.shape[1], limit)

    def highest_score(self) -> float:
        """What no score, base 2, is beyond."""
        longest_q, longest_k = (
            torch.linalg.vector_norm(x, dim=-1, dtype=self.dtype).amax().item()
            for x in (self.q, self.k)
        )
        bias = 0.0 if self.table is None else self.table[:, :-1].abs().amax().item()
        return longest_q * longest_k * abs(self.scale) * LOG2E + bias

    def in_places(self, x: Tensor) -> Tensor:
        """(B, H, t, h, w, ...) with every axis sorted by dilation group."""
        for axis, tiles in enumerate(self.halo.axes):
            if tiles.order is not None:
                x = x.index_select(axis + 2, tiles.order.to(x.device))
        return x

    def in_sequence(self, x: Tensor, like: Tensor) -> Tensor:
        """The reverse, with the dtype and the strides of ``like``."""
        for axis, tiles in enumerate(self.halo.axes):
            if tiles.order is not None:
                x = x.index_select(axis + 2, tiles.back.to(x.device))
        if x.dtype == like.dtype and x.stride() == torch.empty_like(like, device="meta").stride():
            return x
        return torch.empty_like(like).copy_(x)

    def run(self, work: Callable[[Workspace, Piece], None]) -> None:
        """Do the work on every piece."""
        device = self.q.device

        def worker(index: int) -> None:
            with torch.autocast(device.type, enabled=False):
                space = Workspace(self.dtype, self.dtype, device)
                for piece in self._pieces(index):
                    work(space, piece)

        with fast_float32_products(device):
            run(worker, len(self.shares))

    def _pieces(self, worker: int) -> Iterator[Piece]:
        samples, heads = self.shares[worker]
        for runs in self.halo.runs:
            n, m = (math.prod(x) for x in zip(*(run.table.shape for run in runs)))
            pairs, has_hidden = self.halo.pairs(runs, self.q.device)
            bias = self._bias(pairs, heads, has_hidden)
            bias = None if bias is None else bias.view(-1, n, m)
            bytes_of_tile = self.dtype.itemsize * (n * m + (2 * m + 2 * n) * self.q.shape[-1])
            tiles = [slice(0, run.count) for run in runs]
            for cut in _boxes([samples, heads, *tiles], BUDGET // bytes_of_tile):
                own = bias
                if self.table is not None:
                    own = bias[cut[1].start - heads.start : cut[1].stop - heads.start]
                yield Piece(worker, runs, cut[0], cut[1], cut[2:], pairs, own)

    def _bias(self, pairs: Tensor, heads: slice, has_hidden: bool) -> Tensor | None:
        """(1 or heads, n * m) what is added to scores, HIDDEN for hidden pairs."""
        if self.table is not None:
            return self.table[heads].index_select(1, pairs)
        if not has_hidden:
            return None
        hidden = pairs == math.prod(self.halo.table_size)
        return hidden.to(self.dtype).mul_(HIDDEN)

    def take(
        self, space: Workspace, name: str, x: Tensor, piece: Piece, *, keys: bool = False
    ) -> Tensor:
        """(b * h * c, n or m, ...) the queries, or the halos, of a piece."""
        tiles = _tiles(x, piece, keys)
        into = space.buffer(name, tiles.shape, self.dtype).copy_(tiles)
        return into.view(math.prod(piece.shape), -1, x.shape[-1])

    def put(self, x: Tensor, values: Tensor, piece: Piece) -> None:
        """Write the queries of a piece."""
        tiles = _tiles(x, piece, keys=False)
        tiles.copy_(values.view(tiles.shape))

    def add(self, x: Tensor, values: Tensor, piece: Piece) -> None:
        """Add to the halos of a piece, which overlap: tiles that do not overlap at a time."""
        tiles = _tiles(x, piece, keys=True)
        values = values.view(tiles.shape)
        # tiles of one axis until the next one that shares no key with the first
        apart = [
            min(-(-run.table.shape[1] // run.key_step) if run.key_step else count, count)
            for run, count in zip(piece.runs, tiles.shape[2:5])
        ]
        for starts in itertools.product(*map(range, apart)):
            some = (..., *(slice(a, None, b) for a, b in zip(starts, apart)), *[slice(None)] * 4)
            tiles[some].add_(values[some])

    def scores(self, space: Workspace, piece: Piece) -> Tensor:
        """(b * h * c, n, m) scaled scores with their bias, base 2; HIDDEN or less where hidden."""
        queries = self.take(space, "q", self.q, piece).mul_(self.scale * LOG2E)
        keys = self.take(space, "v", self.k, piece, keys=True)
        shape = (len(queries), queries.shape[1], keys.shape[1])
        scores = torch.bmm(queries, keys.mT, out=space.buffer("scores", shape, self.dtype))
        if piece.bias is not None:
            scores.view(*piece.shape, *shape[1:]).add_(piece.bias[:, None])
        return scores


def _tiles(x: Tensor, piece: Piece, keys: bool) -> Tensor:
    """(b, h, c, c, c, l, l, l, D) view of the tiles of a piece, or of their halos."""
    b, h = (cut.stop - cut.start for cut in (piece.samples, piece.heads))
    stride = x.stride()
    offset = x.storage_offset() + piece.samples.start * stride[0] + piece.heads.start * stride[1]
    counts, steps, lengths = [], [], []
    for axis, (run_, cut) in enumerate(zip(piece.runs, piece.tiles), start=2):
        first, step, _, length = run_.keys if keys else run_.queries
        offset += (first + cut.start * step) * stride[axis]
        counts.append(cut.stop - cut.start)
        steps.append(step * stride[axis])
        lengths.append(length)
    shape = (b, h, *counts, *lengths, x.shape[-1])
    return x.as_strided(shape, (*stride[:2], *steps, *stride[2:]), offset)


def _add_bias(d_bias: Tensor, d_scores: Tensor, piece: Piece) -> None:
    """Add the gradients of the scores (b * h * c, n, m) to (H, K + 1)."""
    by_pair = d_scores.view(*piece.shape, -1).sum((0, 2))
    d_bias[piece.heads].scatter_add_(1, piece.pairs.expand_as(by_pair), by_pair)


def _boxes(ranges: list[slice], size: int) -> Iterator[tuple[slice, ...]]:
    """Cut ranges into boxes of up to ``size`` cells, whole along the last ranges if they can be."""
    steps = []
    for part in reversed(ranges):
        steps.append(max(1, min(part.stop - part.start, size)))
        size //= steps[-1]
    cuts = [
        [slice(a, min(a + step, part.stop)) for a in range(part.start, part.stop, step)]
        for part, step in zip(ranges, reversed(steps))
    ]
    return itertools.product(*cuts)


def _share_out(samples: int, heads: int, limit: int) -> list[tuple[slice, slice]]:
    """Samples and heads of each worker, in equal shares."""
    for count in range(limit, 1, -1):
        if heads % count == 0:
            step = heads // count
            return [(slice(0, samples), slice(i, i + step)) for i in range(0, heads, step)]
        if samples % count == 0:
            step = samples // count
            return [(slice(i, i + step), slice(0, heads)) for i in range(0, samples, step)]
    return [(slice(0, samples), slice(0, heads))]
