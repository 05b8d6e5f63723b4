"""Attention over a sequence that diffusers' context parallelism spreads over processes.

Every process comes with some tokens of all heads. Ulysses hands each all tokens of some heads and
takes their outputs back; a ring hands each the queries, keys and values of all, and each attends
with some of the queries. Both are one exchange between processes, which has a gradient; what is
attended to in between is the whole sequence in its usual order, as in one process. Diffusers' own
operators are left out of it: they recompute dense attention for the gradient, and leave the text of
each process beside its part of the video.

Letters: B batch, H heads, S tokens, D head dim; w processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from vidattn.pipelines.hooks.exchange import exchange
from vidattn.pipelines.hooks.ring import Ring


class Shards(NamedTuple):
    """How a sequence is spread: tokens of each process in turn, and how many of them are text.

    Args:
        lengths: (w,) tokens.
        texts: (w,) text tokens, at one end of each.
        text_first: whether text stands in front.
    """

    lengths: tuple[int, ...]
    texts: tuple[int, ...]
    text_first: bool

    @property
    def order(self) -> Tensor | None:
        """(S,) int64, where each token of the usual order stands when all shards are joined.

        None where they stand in that order.
        """
        if not any(self.texts):
            return None
        ends = list(accumulate(self.lengths))
        text, video = [], []
        for end, length, num_text in zip(ends, self.lengths, self.texts):
            places = torch.arange(end - length, end)
            front, back = places.tensor_split([num_text if self.text_first else length - num_text])
            text.append(front if self.text_first else back)
            video.append(back if self.text_first else front)
        return torch.cat(text + video if self.text_first else video + text)


def find_shards(config: Any, length: int, num_text: int, text_first: bool, device) -> Shards:
    """What every process has, from what this one has and a setting of diffusers."""
    size = config.ring_degree * config.ulysses_degree
    if not (config.ulysses_anything or config.ring_anything):
        return Shards((length,) * size, (num_text,) * size, text_first)
    mine = torch.tensor([length, num_text], device=device)
    every = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(every, mine, group=config._flattened_mesh.get_group())
    lengths, texts = torch.stack(every, 1).tolist()
    return Shards(tuple(lengths), tuple(texts), text_first)


def attend(
    config: Any,
    shards: Shards,
    attention: Callable[[Tensor, Tensor, Tensor, Tensor | None, Ring | None], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """(B, H, S, D) attention of this process's tokens.

    Args:
        config: of diffusers' context parallelism.
        attention: takes q, k and v of some heads of the whole sequence, a mask of it, and the ring
            that says which queries are this process's, None for all; gives (B, h, S, D).
        mask: of this process's keys, or of all in the usual order.

    Raises:
        ValueError: keys of other tokens than the queries, or heads that share keys and part.
    """
    _check(q, k, config.ulysses_degree)
    num, rank, group = config.ulysses_degree, config._ulysses_local_rank, None
    first = config._ring_local_rank * num
    near = shards.lengths[first : first + num]
    if mask is not None and mask.shape[-1] == near[rank]:
        mask = _gather_mask(mask, shards, config)
    heads = _shares(q.shape[1], num)
    if num > 1:
        group = config._ulysses_mesh.get_group()
        q, k, v = (_to_heads(x, _shares(x.shape[1], num), near, rank, group) for x in (q, k, v))
    ring, order = None, shards.order
    order = None if order is None else order.to(q.device)
    if config.ring_degree > 1:
        rows = [sum(shards.lengths[i : i + num]) for i in range(0, len(shards.lengths), num)]
        circle = config._ring_mesh.get_group()
        q, k, v = (_gather(x, rows, circle) for x in (q, k, v))
        ring = Ring(config._ring_local_rank, rows, order, circle, q.device)
    if order is not None:
        q, k, v = (x[:, :, order] for x in (q, k, v))
    out = attention(q, k, v, mask, ring)
    if ring is not None:
        out = ring.give_back(out)
    elif order is not None:
        out = out[:, :, order.argsort()]
    return out if group is None else _to_tokens(out, heads, near, rank, group)


def _check(q: Tensor, k: Tensor, num: int) -> None:
    """Refuse what would bring queries to keys that are not theirs."""
    heads, groups = q.shape[1], k.shape[1]
    if q.shape[2] != k.shape[2]:
        raise ValueError(
            f"its {q.shape[2]} queries and {k.shape[2]} keys in each process are of different "
            "tokens, which context parallelism does not spread here: run it in one process"
        )
    if heads != groups and (heads % num or groups % num):
        raise ValueError(
            f"its {heads} heads share {groups} heads of keys, and {num} processes cannot part "
            "them: take a number that divides both, or a ring"
        )


def _shares(num_heads: int, num: int) -> list[int]:
    """Heads of each process: equally many, those of the last may be fewer."""
    each = -(-num_heads // num)
    return [max(0, min(each, num_heads - i * each)) for i in range(num)]


def _to_heads(
    x: Tensor, heads: Sequence[int], lengths: Sequence[int], rank: int, group: ProcessGroup
) -> Tensor:
    """(B, h, S, D) of this process's heads from (B, H, s, D) of its tokens."""
    batch, dim = x.shape[0], x.shape[3]
    pieces = x.split(list(heads), dim=1)
    shapes = [(batch, heads[rank], length, dim) for length in lengths]
    return torch.cat(exchange(pieces, shapes, group), dim=2)


def _to_tokens(
    x: Tensor, heads: Sequence[int], lengths: Sequence[int], rank: int, group: ProcessGroup
) -> Tensor:
    """(B, H, s, D) of this process's tokens from (B, h, S, D) of its heads."""
    batch, dim = x.shape[0], x.shape[3]
    pieces = x.split(list(lengths), dim=2)
    shapes = [(batch, num, lengths[rank], dim) for num in heads]
    return torch.cat(exchange(pieces, shapes, group), dim=1)


def _gather(x: Tensor, lengths: Sequence[int], group: ProcessGroup) -> Tensor:
    """(B, h, S, D) of all tokens from (B, h, s, D) of this process's."""
    batch, num_heads, _, dim = x.shape
    shapes = [(batch, num_heads, length, dim) for length in lengths]
    return torch.cat(exchange([x] * len(lengths), shapes, group), dim=2)


def _gather_mask(mask: Tensor, shards: Shards, config: Any) -> Tensor:
    """A mask of all keys in the usual order, from one of this process's."""
    group, size = config._flattened_mesh.get_group(), len(shards.lengths)
    longest = max(shards.lengths)
    padded = torch.nn.functional.pad(mask.contiguous(), (0, longest - mask.shape[-1]))
    every = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(every, padded, group=group)
    joined = torch.cat([x[..., :n] for x, n in zip(every, shards.lengths)], dim=-1)
    return joined if shards.order is None else joined[..., shards.order.to(mask.device)]
