"""Block-sparse attention in PyTorch: the engine of every CPU, and the twin of the Triton kernels.

Letters: B batch, H query heads, K key heads, S tokens, D head dim, N slots, n slots to a block,
nb blocks, G query blocks in flight, P listed blocks in flight.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vidattn.kernels.block_lists import BlockLists
from vidattn.kernels.onednn import fast_float32_products, has_bfloat16_products
from vidattn.kernels.slots import Slots
from vidattn.kernels.tiles import FLOOR, Part, Tiles

LN2 = math.log(2)
# smaller than any sum of weights, so that dividing by it leaves the 0 of a row without keys
TINY = 1e-37


@torch.compiler.disable
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: Tensor,
    block: int,
    lists: BlockLists,
    *,
    scale: float,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over listed blocks.

    Query blocks with equally long lists are computed together in batched products, a few MiB at a
    time; nothing of size N by N is ever made. Gradients reach q, k and v, also through the
    log-sum-exp. A query that sees no key gives 0.

    Args:
        q: (B, H, S, D).
        k, v: (B, K, S, D), H a multiple of K.
        order: (N,) int32, token in each slot, -1 for an empty slot.
        block: slots to a block.
        lists: which key blocks each query block reads.
        scale: factor of the scores.
        key_mask: (B, S) bool, False for keys that nobody may read.

    Returns:
        (B, H, S, D) in the dtype of ``q``; (B, H, S) float32 log-sum-exp, -inf for no keys.
    """
    dtype = q.dtype
    with torch.autocast(q.device.type, enabled=False):
        if not _computes_in(dtype, q.device):
            q, k, v = q.float(), k.float(), v.float()
        slots = Slots(order, block, key_mask)
        out, lse = _Attention.apply(q, k, v, slots, lists, scale)
        return out.to(dtype), lse


def _computes_in(dtype: torch.dtype, device: torch.device) -> bool:
    if dtype == torch.bfloat16:
        return device.type == "cpu" and has_bfloat16_products()
    return dtype in (torch.float32, torch.float64)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, slots, lists, scale):
        out, lse = _forward(q, k, v, slots, lists, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.slots, ctx.lists, ctx.scale = slots, lists, scale
        ctx.set_materialize_grads(False)
        return out, lse.float()

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, d_lse):
        q, k, v, out, lse = ctx.saved_tensors
        if d_out is None and d_lse is None:
            return (None,) * 6
        with torch.autocast(q.device.type, enabled=False):
            d_out = torch.zeros_like(out) if d_out is None else d_out
            # what the softmax of a row loses when its output, or its log-sum-exp, is pulled
            delta = (out.to(lse.dtype) * d_out).sum(-1)
            if d_lse is not None:
                delta -= d_lse
            tiles = Tiles(q, k, v, ctx.slots, ctx.lists, ctx.scale)
            grads = _backward(tiles, d_out, lse, delta)
            return *(ctx.slots.read(g, x).to(x.dtype) for g, x in zip(grads, (q, k, v))), *_NOTHING


_NOTHING = (None, None, None)


def _forward(q, k, v, slots, lists, scale):
    """Output, and natural log-sum-exp in the dtype of the scores."""
    tiles = Tiles(q, k, v, slots, lists, scale)
    out = torch.zeros_like(tiles.q)
    lse = torch.full_like(tiles.q[..., :1], -math.inf, dtype=tiles.score_dtype)
    with fast_float32_products(q.device):
        for chunk in tiles.chunks:
            for part in tiles.parts(chunk):
                acc, total, top = _attend(tiles, part)
                row_lse = (total.log2() + top) * LN2
                out.index_copy_(0, part.rows, acc.div_(total.clamp_min_(TINY)).to(out.dtype))
                lse.index_copy_(0, part.rows, row_lse)
    return slots.read(out, q), slots.read(lse, q).squeeze(-1)


def _attend(tiles: Tiles, part: Part) -> tuple[Tensor, Tensor, Tensor | float]:
    """(G, n, D) weighted sum of values, (G, n, 1) sum of weights, and the score of weight 1."""
    q = tiles.queries(part)
    acc = tiles.buffer("acc", q.shape, tiles.score_dtype)
    total = top = None
    for begin, end in part.segments():
        keys = part.keys[:, begin:end]
        k = tiles.gather("k", tiles.k_rows, keys)
        scores = tiles.scores(q, k, part, begin, end)
        if not tiles.is_plain:
            new = scores.amax(-1, keepdim=True).clamp_min_(FLOOR)
            new = new if top is None else torch.maximum(top, new)
            scores.sub_(new)
            if top is not None:
                fade = torch.exp2(top - new)
                acc.mul_(fade)
                total.mul_(fade)
            top = new
        weights = scores.exp2_()
        sums = weights.sum(-1, keepdim=True)
        v = tiles.gather("v", tiles.v_rows, keys)
        _add_product(tiles, acc, tiles.cast("weights", weights, v.dtype), v, first=total is None)
        total = sums if total is None else total.add_(sums)
    return acc, total, 0.0 if top is None else top


def _add_product(tiles: Tiles, acc: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """acc = a @ b for the first product, acc += a @ b after it."""
    if acc.dtype != a.dtype:
        product = torch.bmm(a, b, out=tiles.buffer("product", acc.shape, a.dtype))
        acc.copy_(product) if first else acc.add_(product)
    elif first:
        torch.bmm(a, b, out=acc)
    else:
        acc.baddbmm_(a, b)


def _backward(tiles: Tiles, d_out: Tensor, lse: Tensor, delta: Tensor) -> list[Tensor]:
    """Gradients of the blocks of q, k and v, in the dtype of the scores."""
    fill = tiles.slots.fill
    d_out, lse, delta = fill(d_out), fill(lse[..., None] / LN2), fill(delta[..., None])
    # a row without keys gets no weights
    lse.masked_fill_(lse == -math.inf, -FLOOR)
    grads = [torch.zeros_like(x, dtype=tiles.score_dtype) for x in (tiles.q, tiles.k, tiles.v)]
    with fast_float32_products(d_out.device):
        for chunk in tiles.chunks:
            for part in tiles.parts(chunk):
                rows = (x.index_select(0, part.rows) for x in (d_out, lse, delta))
                d_q = _pull(tiles, part, *rows, *grads[1:])
                grads[0].index_copy_(0, part.rows, d_q)
    grads[0].mul_(tiles.scale)
    grads[1].mul_(tiles.scale)
    return grads


def _pull(
    tiles: Tiles, part: Part, d_out: Tensor, lse: Tensor, delta: Tensor, d_k: Tensor, d_v: Tensor
) -> Tensor:
    """Adds to the gradients of k and v; returns that of the queries in flight, without the scale."""
    q, raw_q = tiles.queries(part), tiles.q.index_select(0, part.rows)
    d_q = tiles.buffer("acc", q.shape, tiles.score_dtype)
    for begin, end in part.segments():
        keys = part.keys[:, begin:end]
        k = tiles.gather("k", tiles.k_rows, keys)
        v = tiles.gather("v", tiles.v_rows, keys)
        weights = tiles.scores(q, k, part, begin, end).sub_(lse).exp2_()
        product = tiles.buffer("d weights", weights.shape, v.dtype)
        torch.bmm(d_out, v.mT, out=product)
        d_scores = tiles.cast("d scores", product, weights.dtype).sub_(delta).mul_(weights)
        d_scores = tiles.cast("d weights", d_scores, k.dtype)
        weights = tiles.cast("weights", weights, v.dtype)
        _add_product(tiles, d_q, d_scores, k, first=begin == 0)
        index = keys.flatten()
        for grad, a, b in ((d_v, weights, d_out), (d_k, d_scores, raw_q)):
            product = torch.bmm(a.mT, b, out=tiles.buffer("d block", k.shape, k.dtype))
            product = tiles.cast("d block", product, grad.dtype)
            grad.view(grad.shape[0], -1).index_add_(0, index, product.view(index.numel(), -1))
    return d_q
