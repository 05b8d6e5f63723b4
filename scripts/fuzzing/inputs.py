"""The tensors of a case.

Letters: B batch, H query heads, K key heads, S tokens, D head dim.
"""

import math
from dataclasses import dataclass

import torch
from fuzzing.cases import Case
from torch import Tensor

VALUES = (
    "normal", "coherent", "ties", "constant", "zero queries", "zero keys", "zeros", "huge", "tiny",
    "peaked",
)  # fmt: skip
MASKS = ("none", "all readable", "some", "text", "one sample without", "one key", "no keys")
STRIDES = ("plain", "heads last", "packed", "sliced", "every other", "expanded", "shifted")
# the largest factor on queries and keys; products of float16 must stay finite in it
HUGE = {"float16": 12.0, "bfloat16": 30.0}
TINY = {"float16": 1e-3}


@dataclass
class Inputs:
    """What one call is given; ``d_out`` and ``d_lse`` pull its results."""

    q: Tensor  # (B, H, S, D)
    k: Tensor  # (B, K, S, D)
    v: Tensor  # (B, K, S, D)
    d_out: Tensor  # (B, H, S, D)
    d_lse: Tensor  # (B, H, S)
    key_mask: Tensor | None  # (B, S) bool

    def cast(self, dtype: torch.dtype) -> "Inputs":
        """The same in another dtype."""
        tensors = (x.to(dtype) for x in (self.q, self.k, self.v, self.d_out))
        return Inputs(*tensors, self.d_lse, self.key_mask)

    def of_sample(self, b: int) -> "Inputs":
        """Those of one sample, alone."""
        mask = None if self.key_mask is None else self.key_mask[b : b + 1]
        tensors = (self.q, self.k, self.v, self.d_out, self.d_lse)
        return Inputs(*(x[b : b + 1] for x in tensors), mask)


def make_inputs(case: Case) -> Inputs:
    """The tensors of a case, the same ones whenever they are made."""
    generator = torch.Generator().manual_seed(case.seed)
    shapes = [(case.batch, heads, case.grid.num_tokens, case.dim) for heads in _heads(case)]
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    q, k = _content(case, q, k, generator)
    d_out, d_lse = (
        torch.randn(q.shape, generator=generator),
        torch.randn(q.shape[:3], generator=generator),
    )
    dtype = case.torch_dtype
    q, k, v = _strided(case, [x.to(dtype) for x in (q, k, v)])
    mask = _key_mask(case, generator)
    return Inputs(q, k, v, d_out.to(dtype), d_lse, mask)


def _heads(case: Case) -> tuple[int, int, int]:
    return case.heads, case.key_heads, case.key_heads


def _content(case: Case, q: Tensor, k: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Queries and keys (B, H, S, D) and (B, K, S, D) of some kind."""
    kind = case.values
    if kind == "coherent":
        places = case.grid.coords().float() / torch.tensor(case.size)
        bend = 2 * torch.randn(case.batch, case.key_heads, 3, case.dim, generator=generator)
        smooth = torch.cos(
            places @ bend + 6 * torch.rand(bend[:, :, :1].shape, generator=generator)
        )
        k = 3 * smooth + 0.3 * k
        q = k.repeat_interleave(case.group, 1) + 0.3 * q
    elif kind == "ties":
        q, k = q.round().clamp(-1, 1), k.round().clamp(-1, 1)
    elif kind == "constant":
        q, k = torch.full_like(q, 0.5), torch.full_like(k, -0.75)
    elif kind == "zero queries":
        q = torch.zeros_like(q)
    elif kind == "zero keys":
        k = torch.zeros_like(k)
    elif kind == "zeros":
        q, k = torch.zeros_like(q), torch.zeros_like(k)
    elif kind in ("huge", "tiny"):
        table, usual = (HUGE, 100.0) if kind == "huge" else (TINY, 1e-20)
        factor = table.get(case.attended, usual)
        q, k = factor * q, factor * k
    elif kind == "peaked":
        loud = torch.rand(k.shape[:3], generator=generator) < 0.02
        k = k * (1 + 9 * loud[..., None])
    return q, k


def _strided(case: Case, tensors: list[Tensor]) -> list[Tensor]:
    """The same numbers, laid out in memory some other way."""
    kind = case.strides
    if kind == "heads last":
        return [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    if kind == "packed":
        # as one projection leaves them: (B, S, Hq + Hk + Hv, D)
        whole = torch.cat(tensors, 1).transpose(1, 2).contiguous().transpose(1, 2)
        return list(whole.split([x.shape[1] for x in tensors], 1))
    if kind == "sliced":
        return [torch.cat([x, x], -1)[..., : x.shape[-1]] for x in tensors]
    if kind == "every other":
        return [torch.stack([x, x.new_full((), 7.0).expand_as(x)], -1).flatten(-2)[..., ::2]
                for x in tensors]  # fmt: skip
    if kind == "expanded":
        # one sample for all
        return [x[:1].expand_as(x) if x.shape[0] else x for x in tensors]
    if kind == "shifted":
        return [torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in tensors]
    return tensors


def _key_mask(case: Case, generator: torch.Generator) -> Tensor | None:
    """(B, S) bool, False for keys that nobody may read."""
    grid, kind = case.grid, case.key_mask
    if kind == "none":
        return None
    mask = torch.ones(case.batch, grid.num_tokens, dtype=torch.bool)
    draw = torch.rand(mask.shape, generator=generator)
    if kind == "some":
        mask = draw < 0.7
    elif kind == "text":
        # prompts of different length
        length = torch.randint(grid.text + 1, (case.batch, 1), generator=generator)
        place = torch.arange(grid.num_tokens) - grid.text_start
        mask = (place < 0) | (place >= grid.text) | (place < length)
    elif kind == "one sample without":
        mask[-1:] = False
    elif kind == "one key":
        mask = draw == draw.amax(-1, keepdim=True)
    elif kind == "no keys":
        mask[:] = False
    return mask


def score_scale(case: Case) -> float:
    """The factor of the scores that a case asks for, the usual one where it asks for none."""
    return 1 / math.sqrt(case.dim) if case.scale is None else case.scale
