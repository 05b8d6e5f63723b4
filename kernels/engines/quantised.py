"""Block-sparse attention in low precision, simulated in PyTorch: the twin of the Triton kernel.

Letters: B batch, H query heads, K key heads, S tokens, D head dim, N slots, n slots to a block,
G query blocks in flight, P listed blocks in flight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vidattn.kernels.block_lists import BlockLists
from vidattn.kernels.engines.block_sparse_torch import Call
from vidattn.kernels.library import LISTS, flatten, gather, new_like
from vidattn.kernels.quantise import (
    PRECISIONS,
    quantise_blocks,
    quantise_channels,
    round_weights,
)
from vidattn.kernels.slots import Slots

TAKES = ("scale", "key_mask", "precision")
SCHEMA = (
    f"(Tensor q, Tensor k, Tensor v, {LISTS}, float scale, Tensor? key_mask, str precision) "
    "-> (Tensor, Tensor)"
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    *,
    scale: float,
    precision: str,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over listed blocks, its operands rounded to integers.

    Queries and keys are rounded with one scale to a block, keys after their mean is subtracted,
    which moves all scores of a query alike (SageAttention, 2410.02367). Where the precision says
    so, values are rounded with one scale to a channel, and weights with one to a row and
    ``keys_together`` keys. Sums, and so the log-sum-exp, are of weights that are not rounded. What
    units for integers would compute exactly is computed in float32. It has no gradient.

    Args:
        q: (B, H, S, D).
        k, v: (B, K, S, D), H a multiple of K.
        lists: which key blocks each query block reads.
        scale: factor of the scores.
        precision: one of ``PRECISIONS``.
        key_mask: (B, S) bool, False for keys that nobody may read.

    Returns:
        (B, H, S, D) in the dtype of ``q``; (B, H, S) float32 log-sum-exp, -inf for no keys.
    """
    return _attention(q, k, v, *flatten(lists), float(scale), key_mask, precision)


def obstacle(*call: object, **options: object) -> None:
    """Nothing keeps this engine from a call."""


def _forward(q, k, v, lists, scale, key_mask, precision):
    order, block = lists.order, lists.block
    mean = k.mean(2, dtype=torch.float32)
    rough_q = _rough(q, order, block, *quantise_blocks(q, order, block))
    rough_k = _rough(k, order, block, *quantise_blocks(k, order, block, mean))
    levels = PRECISIONS[precision]
    rough_v = v.float()
    if levels.values is not None:
        codes, scales = quantise_channels(v, order, levels.values)
        rough_v = Slots(order, block, None).read(codes * scales[:, :, None], v)
    with torch.autocast(q.device.type, enabled=False):
        call = _Rounded(rough_q, rough_k, rough_v, lists, scale, key_mask)
        call.levels = levels.weights
        out, lse = call.forward()
    mean = mean.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    lse = lse + scale * (q.float() @ mean[..., None]).squeeze(-1)
    return new_like(q).copy_(out), lse


def _rough(x: Tensor, order: Tensor, block: int, codes: Tensor, scales: Tensor) -> Tensor:
    """(B, H, S, D) float32 that the integers stand for."""
    blocks = codes.unflatten(2, (-1, block)) * scales[..., None, None]
    return Slots(order, block, None).read(blocks, x)


class _Rounded(Call):
    """A call that rounds weights to ``levels``, if any."""

    levels: int | None = None

    def weigh(self, scores: Tensor) -> Tensor:
        """(G, n, 1) sums of weights; (G, n, P * n) scores become weights, rounded, in place."""
        sums = super().weigh(scores)
        if self.levels is not None:
            round_weights(scores, self.slots.block, self.levels)
        return sums


def fake(q: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    """What an operator of ``SCHEMA`` returns, without its numbers."""
    return new_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


_attention = torch.library.custom_op(
    "vidattn::quantised_torch",
    lambda *inputs: _forward(*gather(inputs)),
    mutates_args=(),
    schema=SCHEMA,
)
_attention.register_fake(fake)
