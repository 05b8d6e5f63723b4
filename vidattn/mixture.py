"""Two attentions over different keys of the same queries, merged by their log-sum-exps."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention over the keys of two attentions together.

    Exact where the two share no key. Gradients reach all four tensors. A query that has no key in
    one of them takes the other; without any key it gives 0.

    Args:
        out_a, out_b: (..., S, D) outputs.
        lse_a, lse_b: (..., S) log-sum-exps of their scaled scores, -inf for no keys.

    Returns:
        (..., S, D) in the dtype of ``out_a``, and the (..., S) log-sum-exp.

    Raises:
        ValueError: shapes that do not fit together.

    >>> a, b = (attend(q, k, v, x, return_lse=True) for x in (near, far))
    >>> out, lse = merge(*a, *b)
    """
    shapes = [tuple(x.shape) for x in (out_a, lse_a, out_b, lse_b)]
    if shapes[0] != shapes[2] or shapes[1] != shapes[3] or shapes[0][:-1] != shapes[1]:
        raise ValueError(
            "two outputs (..., S, D) and their log-sum-exps (..., S) are merged, got out_a {}, "
            "lse_a {}, out_b {}, lse_b {}".format(*shapes)
        )
    top = torch.maximum(lse_a, lse_b).detach()
    top = top.masked_fill(top == -math.inf, 0)
    weight_a, weight_b = (lse_a - top).exp(), (lse_b - top).exp()
    total = weight_a + weight_b
    # the larger weight is 1, so only a query without keys is below
    safe = total.clamp_min(0.5)
    out = (weight_a / safe)[..., None] * out_a + (weight_b / safe)[..., None] * out_b
    lse = torch.where(total > 0, safe.log() + top, -math.inf)
    return out.to(out_a.dtype), lse
