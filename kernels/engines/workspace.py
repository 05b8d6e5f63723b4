"""The memory one worker computes in: gathered blocks and their scores, overwritten part by part.

Letters: D head dim, n slots to a block, g plan rows in flight, G query blocks in flight (g for each
copy in flight), P listed blocks in flight.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vidattn.kernels.engines.partial_bias import HIDDEN
from vidattn.kernels.engines.parts import Bias

LN2, LOG2E = math.log(2), math.log2(math.e)
# Scores up to this, base 2, need no maximum subtracted: 2 ** 100 times a million keys is finite,
# and 2 ** -100 still has all its digits.
MAX_PLAIN_SCORE = 100.0
# Scores rounded to bfloat16 are off by at most 2 ** -6 up to here: 0.6 % of a weight in the mean.
MAX_ROUNDED_SCORE = 8.0
# the share of one key in a row above which rounding loses the rest
MAX_ROUNDED_WEIGHT = 0.5


class Workspace:
    """Named buffers, and what is computed in them.

    Args:
        dtype: of the blocks, and of the operands of most products.
        score_dtype: of scores and of sums.
    """

    def __init__(self, dtype: torch.dtype, score_dtype: torch.dtype, device: torch.device):
        self.dtype, self.score_dtype, self._device = dtype, score_dtype, device
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self.begin()

    def begin(self) -> None:
        """Forget what the call before taught: the same input must give the same bits."""
        self._tries = self._misses = 0

    def buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory that stays valid until the name is asked for again."""
        size = math.prod(shape)
        held = self._buffers.get((name, dtype))
        if held is None or held.numel() < size:
            # memory made in inference mode could not be written to outside of it
            with torch.inference_mode(False):
                held = torch.empty(size, dtype=dtype, device=self._device)
            self._buffers[name, dtype] = held
        return held[:size].view(shape)

    def gather(self, name: str, blocks: Tensor, index: Tensor, num_rows: int) -> Tensor:
        """(G, P * n, D) the blocks ``index`` (G * P,) of (K, n, D)."""
        num, n, D = blocks.shape
        into = self.buffer(name, (index.numel(), n * D), blocks.dtype)
        torch.index_select(blocks.view(num, n * D), 0, index, out=into)
        return into.view(num_rows, -1, D)

    def cast(self, name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        """``x`` in ``dtype``, in a buffer of that name where it is not already."""
        return x if x.dtype == dtype else self.buffer(name, x.shape, dtype).copy_(x)

    def add_product(self, acc: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
        """acc = a @ b for the first product, acc += a @ b after it."""
        if acc.dtype != a.dtype:
            product = torch.bmm(a, b, out=self.buffer("product", acc.shape, a.dtype))
            acc.copy_(product) if first else acc.add_(product)
        elif first:
            torch.bmm(a, b, out=acc)
        else:
            acc.baddbmm_(a, b)

    def scores(self, q: Tensor, k: Tensor, bias: Bias | None, begin: int, end: int) -> Tensor:
        """(G, n, P * n) scores, base 2, of listed blocks begin to end; HIDDEN or less if hidden.

        Args:
            q: (G, n, D) scaled queries in the dtype of the scores.
            k: (G, P * n, D) keys.
        """
        shape = (*q.shape[:2], k.shape[1])
        scores = self.buffer("scores", shape, self.score_dtype)
        # where rounding keeps failing it is no longer tried
        if self.dtype != self.score_dtype and self._misses <= 1 + self._tries // 4:
            self._tries += 1
            product = self.buffer("scores", shape, self.dtype)
            torch.bmm(self.cast("rounded q", q, self.dtype), k.mT, out=product)
            scores.copy_(product)
            if bias is not None:
                bias.add_to(scores, begin, end)
            if _is_roundable(scores, 0.0 if bias is None else bias.largest):
                return scores
            self._misses += 1
        torch.bmm(q, self.cast("exact k", k, self.score_dtype).mT, out=scores)
        if bias is not None:
            bias.add_to(scores, begin, end)
        return scores

    def d_weights(self, d_out: Tensor, v: Tensor, weights: Tensor) -> Tensor:
        """(G, n, P * n) products of ``d_out`` (G, n, D) and ``v`` (G, P * n, D), to be overwritten.

        Where one key takes most of the weight of a row, what its score gets is a small difference
        of large products: there they are not rounded.
        """
        exact = self.buffer("d scores", weights.shape, self.score_dtype)
        if self.dtype != self.score_dtype:
            peaked = weights.amax(-1) > MAX_ROUNDED_WEIGHT
            if peaked.sum() * 16 <= peaked.numel():
                rounded = self.buffer("d weights", weights.shape, self.dtype)
                torch.bmm(d_out, v.mT, out=rounded)
                return exact.copy_(rounded)
        d_out, v = (
            self.cast(name, x, self.score_dtype) for name, x in (("exact q", d_out), ("exact k", v))
        )
        return torch.bmm(d_out, v.mT, out=exact)


def _is_roundable(scores: Tensor, largest_bias: float) -> bool:
    """Whether bfloat16 held the scores well enough, before a bias of up to so much was added.

    What counts is the error of the largest score of each row: lesser ones weigh less. A few rows
    may go up to twice the limit.
    """
    top = scores.amax(-1)
    low, high = (x.item() for x in torch.aminmax(top))
    if max(-low, high) + largest_bias <= MAX_ROUNDED_SCORE:
        return True
    size = top.abs().add_(largest_bias).masked_fill_(top <= HIDDEN, 0)
    few = (size > MAX_ROUNDED_SCORE).sum() * 16 <= size.numel()
    return bool(few and size.amax() <= 2 * MAX_ROUNDED_SCORE)
