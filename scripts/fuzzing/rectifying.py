"""The estimate of what is not read, by the words of ``Content.rectified``, slowly in float64.

Letters: B batch, H query heads, S tokens, D head dim, nv video blocks.
"""

from fuzzing.blocks import Blocks, blocks_of
from fuzzing.cases import Case, Wrong
from fuzzing.inputs import Inputs
from fuzzing.oracle import Truth
from torch import Tensor


def check_estimate(case: Case, inputs: Inputs, plan, truth: Truth) -> None:
    """Raise Wrong unless gains and estimates hang together and follow the block means."""
    if truth.gain is None or truth.rest is None:
        if case.options.get("rectify"):
            raise Wrong("a rectified plan estimates nothing")
        return
    gain, rest = truth.gain[..., 0], truth.rest
    if not gain.numel():
        return
    if not (gain.isfinite().all() and rest.isfinite().all()):
        raise Wrong("an estimate is not finite", f"{rest.isnan().sum()} NaN")
    if (rest < 0).any() or (rest.sum(-1) > 1 + 1e-4).any():
        raise Wrong("an estimate is no share of attention")
    if (gain - (1 - rest.sum(-1))).abs().max() > 1e-4:
        raise Wrong("what is read and what is estimated do not add up to one")
    mask = truth.mask.expand(case.batch, case.heads, -1, -1)
    for b in range(case.batch):
        for h in range(case.heads):
            row = rest[b if len(rest) > 1 else 0, h if rest.shape[1] > 1 else 0]
            _check_head(case, blocks_of(case, inputs, plan, b, h), mask[b, h], row)


def _check_head(case: Case, blocks: Blocks, mask: Tensor, rest: Tensor) -> None:
    """What is read whole is not estimated, and estimates keep the ratios of pooled attention."""
    first = blocks.first
    rest = rest[first][:, : len(first)]
    share = blocks.sums(blocks.sums(mask[blocks.video][:, blocks.video].double()).mT).mT
    share = share / (blocks.tokens[:, None] * blocks.tokens)
    if rest[share > 1 - 1e-9].any():
        raise Wrong("what is read is estimated too")
    if case.method == "adaspa":
        return
    base = blocks.shares * (1 - share)
    sure = blocks.coherence()
    if rest[sure < 0].any():
        raise Wrong("an estimate where the means do not speak for the pairs")
    kept = (sure > 0) & (base > 1e-6)
    ratio = rest[kept] / base[kept]
    if len(ratio) and (ratio.max() - ratio.min()) > 1e-3 * ratio.max() + 1e-6 / base[kept].min():
        detail = f"{ratio.min():.5f} to {ratio.max():.5f}"
        raise Wrong("the estimate of a head has more than one factor", detail)
