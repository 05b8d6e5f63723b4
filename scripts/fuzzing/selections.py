"""Do methods choose what they say they choose: slow float64 searches, one head after the other.

Letters: N video tokens, nv video blocks, C chunks.
"""

import itertools
import math
from collections.abc import Callable

import torch
from fuzzing import definitions
from fuzzing.blocks import SURE, Blocks, blocks_of
from fuzzing.cases import Case, Wrong
from fuzzing.inputs import Inputs
from fuzzing.plans import method_of
from torch import Tensor

from vidattn.planning.method import Method


def check_selection(case: Case, inputs: Inputs, plan, mask: Tensor) -> None:
    """Raise Wrong unless every head reads what the definition of its method chooses.

    Args:
        mask: (B, H, S, S) bool, who reads whom.
    """
    check = _CHECKS.get(case.method)
    if check is None:
        return
    method = method_of(case)
    for b, h in itertools.product(range(case.batch), range(case.heads)):
        blocks = blocks_of(case, inputs, plan, b, h)
        # what a head without a key to read chooses is all the same
        if blocks.counts.any():
            check(case, method, blocks, mask[b, h, blocks.video, blocks.video])


def whole_blocks(blocks: Blocks, seen: Tensor) -> Tensor:
    """(nv, nv) bool of an (N, N) mask that cuts no block."""
    first = blocks.member.argmax(-1)
    pairs = seen[first][:, first]
    of_token = blocks.member.argmax(0)
    if not torch.equal(pairs[of_token][:, of_token], seen):
        raise Wrong("a plan of whole blocks cuts one")
    return pairs


def check_ranks(scores: Tensor, kept: Tensor, forced: Tensor, doubt: float) -> None:
    """Raise Wrong where something is left out that is better than something chosen.

    Args:
        scores: (R, E).
        kept, forced: (R, E) bool, what is read, and what is read in any case.
        doubt: differences up to this are nobody's business.
    """
    worst = scores.masked_fill(~kept | forced, torch.inf).amin(-1)
    best = scores.masked_fill(kept, -torch.inf).amax(-1)
    if (best > worst + doubt).any():
        row = int((best - worst).argmax())
        detail = f"row {row}: {best[row]:.6f} is left out, {worst[row]:.6f} is read"
        raise Wrong("something better is left out", detail)


def check_tokens(blocks: Blocks, kept: Tensor, share: float, most: float | None = None) -> None:
    """Raise Wrong where a row's tokens are not those of a share, to within a block.

    Args:
        most: further tokens that a row may have; those of its own block when not given.
    """
    total, largest = blocks.tokens.sum(), blocks.tokens.max() / 2 + 1e-6
    found = kept.double() @ blocks.tokens
    beside = blocks.tokens if most is None else torch.full_like(found, most)
    low, high = found < share * total - largest, found > share * total + largest + beside
    # a row has one block at least
    high &= kept.sum(-1) > 1
    if (low | high).any():
        row = int((low | high).nonzero()[0])
        detail = f"{found[row]:.0f} of {total:.0f} tokens for a share of {share}"
        raise Wrong("a row is not as dense as asked", detail)


def _doubt(blocks: Blocks) -> float:
    """How far float32 may be off in a score."""
    size = blocks.q.abs() @ blocks.k.abs().mT * abs(blocks.scale)
    return SURE * (1 + (size.max().item() if size.numel() else 0.0)) / 10


def _own(blocks: Blocks) -> Tensor:
    return torch.eye(len(blocks.member), dtype=torch.bool)


def _check_mass(shares: Tensor, kept: Tensor, forced: Tensor, mass: float, doubt: float) -> None:
    """A row reads the best until they hold a share of its sum, and not one more."""
    held, total = (shares * kept).sum(-1), shares.sum(-1)
    if (held < mass * total - doubt - 1e-5).any():
        raise Wrong("the blocks of a row hold less than the mass asked for")
    # without the worst of what it chose, a row holds less
    chosen = shares.masked_fill(~kept | forced, 0)
    least = chosen.masked_fill(chosen == 0, torch.inf).amin(-1)
    if mass < 1 and (chosen.sum(-1) - least > mass * total + doubt + 1e-5).any():
        raise Wrong("a row reads more blocks than its mass needs")
    check_ranks(shares, kept, forced, doubt)


def _topk(case: Case, method: Method, blocks: Blocks, seen: Tensor) -> None:
    kept, own = whole_blocks(blocks, seen), _own(blocks)
    if method.mass is None:
        check_ranks(blocks.scores, kept, own, _doubt(blocks))
        check_tokens(blocks, kept, method.density)
    else:
        doubt = min(_doubt(blocks) * 4, 1.0)
        _check_mass(blocks.shares, kept, own, method.mass, doubt)


def _adaspa(case: Case, method: Method, blocks: Blocks, seen: Tensor) -> None:
    kept = whole_blocks(blocks, seen)
    doubt = SURE * blocks.mass.max().item() + min(_doubt(blocks), 1.0) * blocks.mass.max().item()
    check_ranks(blocks.mass, kept, _own(blocks), doubt)
    if method.recall is None:
        check_tokens(blocks, kept, method.density)


def _rectified(case: Case, method: Method, blocks: Blocks, seen: Tensor) -> None:
    kept, own = whole_blocks(blocks, seen), _own(blocks)
    tile = method.tile_of(case.grid)
    always = own.clone()
    if method.near is not None:
        always |= (definitions.tile_gaps(case.size, tile) <= method.near).all(-1)
    if method.first_frame:
        counts, _ = definitions.tiles_of(case.size, tile)
        always[: counts[1] * counts[2], : counts[1] * counts[2]] = True
    if not kept[always].all():
        raise Wrong("a block that is always read is not")
    check_ranks(blocks.scores, kept, always, _doubt(blocks))
    check_tokens(blocks, kept, method.density, most=float("inf"))
    held = (blocks.shares * kept).sum(-1)
    if (held < method.mass * blocks.shares.sum(-1) - 1e-4 - min(_doubt(blocks), 1)).any():
        raise Wrong("the blocks of a row hold less than the mass asked for")


def _anchor(case: Case, method: Method, blocks: Blocks, seen: Tensor) -> None:
    kept = whole_blocks(blocks, seen)
    near = torch.tensor(definitions.triple(method.near))
    tile = method.tile_of(case.grid)
    counts, _ = definitions.tiles_of(case.size, tile)
    gaps = definitions.tile_gaps(case.size, tile)
    gaps[:, : counts[1] * counts[2], 0] = 0
    anchors = (gaps <= near).all(-1)
    if not kept[anchors].all():
        raise Wrong("an anchor is not read")
    scores = blocks.scale * blocks.queries @ blocks.k[blocks.video].mT
    scores = scores.masked_fill(~blocks.readable[blocks.video], -torch.inf)
    best = torch.stack(
        [scores.masked_fill(row == 0, -torch.inf).amax(-1) for row in blocks.member], -1
    )
    top = best.masked_fill(~anchors, -torch.inf).amax(-1, keepdim=True)
    doubt = _doubt(blocks)
    if method.density is None:
        wanted, sure = best >= top - method.theta, (best - top + method.theta).abs() > doubt
        sure &= best.isfinite() & top.isfinite()
        if ((kept != (anchors | wanted)) & sure).any():
            raise Wrong("a block is read though its best key is far from the anchors', or not")
        return
    total = blocks.tokens.sum()
    held = (kept * blocks.tokens[:, None] * blocks.tokens).sum()
    if held < method.density * total**2 * (1 - 1e-9) and (~kept & best.isfinite()).any():
        raise Wrong("a head reads less than its density", f"{held / total**2:.4f}")
    check_tokens(blocks, kept, method.density / 2, most=float("inf"))


def _paro(case: Case, method: Method, blocks: Blocks, seen: Tensor) -> None:
    kept = whole_blocks(blocks, seen)
    mass = blocks.mass
    doubt = (SURE + min(_doubt(blocks), 1.0)) * mass.max().item()
    best = mass >= mass.amax(-1, keepdim=True) - doubt
    forced = _own(blocks) | best
    check_ranks(*(x.reshape(1, -1) for x in (mass, kept, forced)), doubt)
    pairs = (blocks.tokens[:, None] * blocks.tokens) / blocks.tokens.sum() ** 2
    found, spare = (pairs * kept).sum(), (pairs * (kept & forced)).sum()
    if not method.density - pairs.max() < found < method.density + pairs.max() + spare:
        raise Wrong("a head is not as dense as asked", f"{found:.4f}, not {method.density}")


def _svg(case: Case, method: Method, blocks: Blocks, seen: Tensor) -> None:
    """Every query block reads the nearest blocks, in one sense of near for the whole head."""
    kept = whole_blocks(blocks, seen)
    tile = method.tile_of(case.grid)
    gaps = definitions.tile_gaps(case.size, tile) * torch.tensor(tile)
    t, h, w = gaps.unbind(-1)
    apart = h**2 + w**2
    counts, _ = definitions.tiles_of(case.size, tile)
    sinks = (False, True) if method.sink is None else (method.sink,)
    doubts = []
    for keys, sink in itertools.product(((t, apart), (apart, t), (h, w, t), (w, h, t)), sinks):
        far = torch.zeros_like(t)
        for key in keys:
            far = far * 100_000 + key
        if sink:
            far[:, : counts[1] * counts[2]] = -1
        try:
            check_ranks(-far.double(), kept, _own(blocks), 0.0)
        except Wrong as wrong:
            doubts.append(wrong)
    if len(doubts) == 4 * len(sinks):
        raise Wrong("a head reads what is nearest in no sense", doubts[0])
    check_tokens(blocks, kept, method.density)


def _vmoba(case: Case, method: Method, blocks: Blocks, seen: Tensor) -> None:
    """The own chunk, and the chunks of the largest gates."""
    counts, place = definitions.tiles_of(case.size, method.chunk_of(case.grid))
    chunk = (place[:, 0] * counts[1] + place[:, 1]) * counts[2] + place[:, 2]
    chunk = torch.unique(chunk, return_inverse=True)[1]
    member = (chunk == torch.arange(int(chunk.max()) + 1)[:, None]).double()
    first = member.argmax(-1)
    if not torch.equal(seen[:, first][:, chunk], seen):
        raise Wrong("a chunk is read in part")
    kept, home, queries = seen[:, first], chunk, blocks.q[blocks.video]
    weights = torch.ones(len(home), dtype=torch.float64)
    if method.granularity == "block":
        lead = blocks.member.argmax(-1)
        if not torch.equal(kept[lead][blocks.member.argmax(0)], kept):
            raise Wrong("the queries of a block read different chunks")
        kept, home, queries, weights = kept[lead], chunk[lead], blocks.queries, blocks.tokens
    own = home[:, None] == torch.arange(len(member))
    if not kept[own].all():
        raise Wrong("a query does not read its own chunk")
    readable = member * blocks.readable[blocks.video]
    keys = readable @ (blocks.k[blocks.video] - blocks.center)
    gates = queries @ (keys / readable.sum(-1, keepdim=True).clamp_min(1)).mT
    doubt = _doubt(blocks) / abs(blocks.scale or 1)
    if method.select == "topk":
        check_ranks(gates, kept, own, doubt)
        if (kept.sum(-1) != min(method.topk + 1, len(member))).any():
            raise Wrong("another number of chunks is read than asked for")
        return
    tokens = weights[:, None] * member.sum(-1)
    rows = [gates, kept, own, tokens, weights[:, None].expand_as(gates)]
    if method.select == "global":
        # of a head, all pairs compete
        rows = [x.reshape(1, -1) for x in rows]
    check_ranks(*rows[:3], doubt)
    if doubt < 1e-3:
        _check_budget(method, *rows)


def _check_budget(
    method: Method, gates: Tensor, kept: Tensor, own: Tensor, tokens: Tensor, weights: Tensor
) -> None:
    """What is kept of every row reaches its budget, and would not without the worst of it."""
    if method.density is not None:
        share, worth = method.density, tokens
    else:
        low, high = gates.amin(-1, keepdim=True), gates.amax(-1, keepdim=True)
        share, worth = method.tau, (gates - low) / (high - low).clamp_min(1e-30) * weights
        # rounding decides where all gates are alike
        some = (high - low)[:, 0] > 1e-3
        gates, kept, own, worth = gates[some], kept[some], own[some], worth[some]
    need, held, slack = (share * worth).sum(-1), (worth * kept).sum(-1), 1e-3 * worth.sum(-1)
    if (held < need - slack).any():
        raise Wrong("the chunks read hold less than the budget")
    chosen = gates.masked_fill(~kept | own, torch.inf)
    worst = chosen.amin(-1, keepdim=True)
    last = worth.masked_fill(chosen > worst, 0).amax(-1)
    if ((held - last > need + slack) & worst[:, 0].isfinite()).any():
        raise Wrong("more chunks are read than the budget needs")


def _by_count(case: Case, method: Method, blocks: Blocks, seen: Tensor) -> None:
    """So many blocks of a row by their means, and its own."""
    kept, own = whole_blocks(blocks, seen), _own(blocks)
    scores = blocks.scale * blocks.queries @ blocks.keys.mT
    check_ranks(scores.masked_fill(blocks.counts == 0, -torch.inf), kept, own, _doubt(blocks))
    share = method.density * len(kept)
    count = math.ceil(share - 1e-6) if case.method == "vsa" else math.floor(share + 1e-6)
    chosen = kept.sum(-1) - max(1, count)
    if ((chosen < 0) | (chosen > 1)).any():
        raise Wrong("a row reads another number of blocks than asked")


_CHECKS: dict[str, Callable[[Case, Method, Blocks, Tensor], None]] = {
    "adaspa": _adaspa,
    "anchor": _anchor,
    "paro": _paro,
    "rectified": _rectified,
    "sla": _by_count,
    "svg": _svg,
    "topk": _topk,
    "vmoba": _vmoba,
    "vsa": _by_count,
}
