"""Block-sparse attention in PyTorch: the engine of every CPU, and the twin of the Triton kernels.

Letters: B batch, H query heads, K key heads, S queries, Sk keys, D head dim, N slots, n slots to a
block, nb blocks, G query blocks in flight, P listed blocks in flight.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vidattn.kernels.block_lists import BlockLists
from vidattn.kernels.cpp.onednn import fast_float32_products, has_bfloat16_products
from vidattn.kernels.engines.chunks import Chunk
from vidattn.kernels.engines.parts import Bias, Part, Parts
from vidattn.kernels.engines.workspace import LN2, LOG2E, MAX_PLAIN_SCORE, Workspace
from vidattn.kernels.library import Operator
from vidattn.kernels.slots import Rows, Slots
from vidattn.kernels.workers import run

# below every real score, above every hidden one
FLOOR = -1e20
# smaller than any sum of weights, so that dividing by it leaves the 0 of a row without keys
TINY = 1e-37
TAKES = ("scale", "key_mask", "key_bias")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    *,
    scale: float,
    key_mask: Tensor | None = None,
    key_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over listed blocks.

    Query blocks with equally long lists are computed together in batched products, a few MiB at a
    time; nothing of size N by N is ever made. Gradients reach q, k and v, also through the
    log-sum-exp. A query that sees no key gives 0.

    Args:
        q: (B, H, S, D).
        k, v: (B, K, Sk, D), H a multiple of K.
        lists: which key blocks each query block reads.
        scale: factor of the scores.
        key_mask: (B, Sk) bool, False for keys that nobody may read.
        key_bias: (B|1, H|1, Sk) added to the scaled scores, -inf for keys that nobody may read; it
            has a gradient too.

    Returns:
        (B, H, S, D) in the dtype of ``q``; (B, H, S) float32 log-sum-exp, -inf for no keys.
    """
    dtype = q.dtype
    if not _computes_in(dtype, q.device):
        q, k, v = q.float(), k.float(), v.float()
    out, lse = _attention(q, k, v, lists, scale=scale, key_mask=key_mask, key_bias=key_bias)
    return out.to(dtype), lse.float()


def obstacle(*call: object, **options: object) -> None:
    """Nothing keeps this engine from a call."""


def _computes_in(dtype: torch.dtype, device: torch.device) -> bool:
    if dtype == torch.bfloat16:
        return device.type == "cpu" and has_bfloat16_products()
    return dtype in (torch.float32, torch.float64)


def _forward(q, k, v, lists, scale, key_mask, key_bias):
    with torch.autocast(q.device.type, enabled=False):
        return Call(q, k, v, lists, scale, key_mask, key_bias).forward()


def _backward(d_out, delta, q, k, v, lse, lists, scale, key_mask, key_bias):
    with torch.autocast(q.device.type, enabled=False):
        call = Call(q, k, v, lists, scale, key_mask, key_bias)
        *grads, d_bias = call.backward(d_out, lse, delta)
    if d_bias is None:
        return *grads, q.new_empty(0)
    return *grads, d_bias.sum_to_size(key_bias.shape).to(key_bias.dtype)


_attention = Operator("block_sparse_torch", _forward, _backward)


class Call:
    """One call: k and v in blocks, and the parts of the queries that workers take.

    Args:
        q: (B, H, S, D).
        k, v: (B, K, Sk, D).
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lists: BlockLists,
        scale: float,
        key_mask: Tensor | None,
        key_bias: Tensor | None = None,
    ):
        slots = Slots(lists.key_order, lists.block, key_mask)
        self.tokens, self.slots, self.lists, self.scale = (q, k, v), slots, lists, scale
        self.q, self.k, self.v = Rows(q), slots.fill(k), slots.fill(v)
        self.dtype = q.dtype
        self.score_dtype = torch.float32 if q.dtype == torch.bfloat16 else q.dtype
        longest_q, longest_k = (
            torch.linalg.vector_norm(x, dim=-1, dtype=self.score_dtype).amax().item()
            for x in (q, self.k)
        )
        n, D = slots.block, q.shape[-1]
        block_bytes = n * (n * self.score_dtype.itemsize + 2 * D * q.dtype.itemsize)
        # log2 of the sum of weights
        lse = torch.full((*q.shape[:3], 1), -math.inf, dtype=self.score_dtype, device=q.device)
        self.lse = Rows(lse)
        self.has_bias = key_bias is not None
        bias = key_bias * LOG2E if self.has_bias else None
        given = (self.q, self.lse, k.shape[1], block_bytes, self.score_dtype, bias)
        self.parts = Parts(lists, slots, *given)
        largest = longest_q * longest_k * abs(scale) * LOG2E + self.parts.largest_bias
        self.is_plain = largest <= MAX_PLAIN_SCORE

    def _run(self, work: Callable[[Workspace, Chunk, Part, Bias | None], None]) -> None:
        device = self.k.device
        # kept from call to call: memory new to the process costs a tenth of the time
        spaces = self.lists.cache.setdefault(("workspaces", self.dtype, device), [])

        def worker(index: int) -> None:
            try:
                space = spaces.pop()
            except IndexError:
                space = Workspace(self.dtype, self.score_dtype, device)
            space.begin()
            for chunk, part, bias in self.parts.of_worker(index):
                work(space, chunk, part, bias)
            spaces.append(space)

        with fast_float32_products(device):
            run(worker, self.parts.num_workers)

    def _new_output(self) -> tuple[Tensor, Callable[[Part], Tensor]]:
        """Zeros for what is written query by query, laid out like q if it can be, and its index."""
        out = torch.zeros_like(self.q.tensor)
        if Rows(out).strides == self.q.strides:
            return out, lambda part: part.query_rows
        return out.contiguous(), lambda part: part.lse_rows

    def forward(self) -> tuple[Tensor, Tensor]:
        """Output in the dtype of q, natural log-sum-exp in the dtype of the scores."""
        out, row_index = self._new_output()
        out_rows, lse_rows = Rows(out).flat, self.lse.flat

        def work(space: Workspace, chunk: Chunk, part: Part, bias: Bias | None) -> None:
            acc, total, top = self._attend(space, chunk, part, bias)
            part.put(lse_rows, part.lse_rows, total.log2().add_(top))
            acc.div_(total.clamp_min_(TINY))
            part.put(out_rows, row_index(part), space.cast("out", acc, out.dtype))

        self._run(work)
        return out, self.lse.tensor.mul_(LN2).squeeze(-1)

    def _attend(
        self, space: Workspace, chunk: Chunk, part: Part, bias: Bias | None
    ) -> tuple[Tensor, Tensor, Tensor | float]:
        """(G, n, D) weighted values, (G, n, 1) sum of the weights, and the score of weight 1."""
        q = part.take(self.q.flat, part.query_rows).to(self.score_dtype).mul_(self.scale * LOG2E)
        acc = space.buffer("acc", q.shape, self.score_dtype)
        total, top = None, 0.0
        for index, (begin, end) in zip(part.segments, chunk.segments()):
            k = space.gather("k", self.k, index, len(q))
            scores = space.scores(q, k, bias, begin, end)
            if not self.is_plain:
                highest = scores.amax(-1, keepdim=True).clamp_min_(FLOOR)
                if begin:
                    highest = torch.maximum(top, highest)
                    fade = torch.exp2(top - highest)
                    acc.mul_(fade)
                    total.mul_(fade)
                scores.sub_(highest)
                top = highest
            sums = self.weigh(scores)
            total = total.add_(sums) if begin else sums
            # over the keys, which are done with: less memory to pass through the caches
            v = space.gather("k", self.v, index, len(q))
            space.add_product(acc, space.cast("weights", scores, v.dtype), v, first=not begin)
        return acc, total, top

    def weigh(self, scores: Tensor) -> Tensor:
        """(G, n, 1) sums of weights; (G, n, P * n) scores become weights, in place."""
        return scores.exp2_().sum(-1, keepdim=True)

    def backward(self, d_out: Tensor, lse: Tensor, delta: Tensor) -> list[Tensor | None]:
        """Gradients of q, k, v and the biases of keys, (B, H, Sk), or None where there are none.

        Args:
            delta: what the softmax of each row loses.
        """
        q, k, v = self.tokens
        # a row without keys gets no weights
        lse = (lse / LN2).masked_fill_(lse == -math.inf, -FLOOR).view(-1, 1)
        delta = delta.reshape(-1, 1)
        d_q, row_index = self._new_output()
        d_q_rows = Rows(d_q).flat
        pulls = [d_out.reshape(-1, d_out.shape[-1]), lse, delta]
        d_k, d_v = (torch.zeros_like(x, dtype=self.score_dtype) for x in (self.k, self.v))
        d_bias = None
        if self.has_bias:
            d_bias = d_k.new_zeros(d_k.shape[0] // k.shape[1] * q.shape[1], self.slots.block, 1)

        def work(space: Workspace, chunk: Chunk, part: Part, bias: Bias | None) -> None:
            rows = [part.take(x, part.lse_rows) for x in pulls]
            if part.live is not None:
                rows[1].masked_fill_(~part.live[..., None], -FLOOR)
            grad = self._pull(space, (chunk, part, bias), rows, (d_k, d_v, d_bias))
            grad.mul_(self.scale)
            part.put(d_q_rows, row_index(part), space.cast("out", grad, d_q.dtype))

        self._run(work)
        d_k.mul_(self.scale)
        d_k, d_v = (self.slots.read(d, x).to(x.dtype) for d, x in ((d_k, k), (d_v, v)))
        if d_bias is not None:
            d_bias = self.slots.read(d_bias, q).squeeze(-1)
        return [d_q, d_k, d_v, d_bias]

    def _pull(
        self,
        space: Workspace,
        piece: tuple[Chunk, Part, Bias | None],
        rows: list[Tensor],
        grads: tuple[Tensor, Tensor, Tensor | None],
    ) -> Tensor:
        """Adds to the gradients of all but the queries; returns theirs, without the scale.

        Args:
            rows: of the queries, the gradient of their output, their log-sum-exp and ``delta``.
        """
        chunk, part, bias = piece
        (d_out, lse, delta), (d_k, d_v, d_bias) = rows, grads
        raw_q = part.take(self.q.flat, part.query_rows)
        q = raw_q.to(self.score_dtype) * (self.scale * LOG2E)
        d_q = space.buffer("acc", q.shape, self.score_dtype)
        for index, (begin, end) in zip(part.segments, chunk.segments()):
            k = space.gather("k", self.k, index, len(q))
            v = space.gather("v", self.v, index, len(q))
            weights = space.scores(q, k, bias, begin, end).sub_(lse).exp2_()
            d_scores = space.d_weights(d_out, v, weights).sub_(delta).mul_(weights)
            if d_bias is not None:
                cells = part.cells[:, begin:end].flatten()
                d_bias.index_add_(0, cells, d_scores.sum(1).view(cells.numel(), -1, 1))
            d_scores = space.cast("d weights", d_scores, k.dtype)
            space.add_product(d_q, d_scores, k, first=not begin)
            for grad, a, b in (
                (d_v, space.cast("weights", weights, v.dtype), d_out),
                (d_k, d_scores, raw_q),
            ):
                product = torch.bmm(a.mT, b, out=space.buffer("d block", k.shape, k.dtype))
                product = space.cast("d block", product, grad.dtype)
                grad.flatten(1).index_add_(0, index, product.view(index.numel(), -1))
        return d_q
