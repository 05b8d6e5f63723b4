"""What scripts/bench_gpu.py checks: every engine and kernel against float64, on awkward sizes.

Letters: B batch, H query heads, K key heads, S tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vidattn.attention import attend
from vidattn.grid import Grid, Layout, tile_layout
from vidattn.kernels.engines import flash
from vidattn.kernels.scoring import block_mass_triton
from vidattn.kernels.scoring.block_mass import block_mass
from vidattn.kernels.triton.configs import padded_head_dim
from vidattn.methods import plan as plan_of
from vidattn.neighborhood import neighborhood_attention
from vidattn.plan import Plan

# relative RMS distance that passes, outputs and gradients alike
LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# of attention in low precision on normal numbers, to float64 attention
ROUNDED_LIMIT = 0.03
GRID = Grid(5, 13, 9, text=17)
HEADS, KEY_HEADS = 4, 2
NEIGHBORHOODS = {
    "1d causal": ((97,), {"window": 9, "dilation": 2, "causal": True}),
    "2d": ((17, 13), {"window": (7, 5), "stride": (3, 1), "dilation": (1, 2)}),
    "3d": ((5, 11, 9), {"window": (3, 5, 4), "stride": (1, 2, 1), "causal": (True, False, False)}),
}
Errors = dict[str, float]


@dataclass(frozen=True)
class Check:
    """One comparison: relative RMS errors by what they are of, each at most ``limit``."""

    name: str
    limit: float
    run: Callable[[], Errors]


def plans() -> dict[str, Plan]:
    """One plan of each kind: whole blocks for each head, boxes, and a table of masks."""
    layout = tile_layout(GRID, (2, 8, 8))
    return {
        "blocks": _random_blocks(layout),
        "short blocks": _random_blocks(tile_layout(GRID, (1, 8, 8))),
        "boxes": plan_of("neighborhood", GRID, window=(3, 5, 5), tile=(2, 8, 8)),
        "masks": Plan.from_rule(GRID, layout, lambda q, k: (q - k).abs().sum(-1) % 3 == 0),
    }


def _random_blocks(layout: Layout) -> Plan:
    nv = layout.num_video_blocks
    blocks = torch.rand(1, HEADS, nv, nv) < 0.5
    # one query block reads the text alone
    blocks[:, :, nv // 2] = False
    return Plan.from_blocks(GRID, layout, blocks)


def checks(device: str, engine: str) -> Iterator[Check]:
    """Every check, those first that decide the most.

    Args:
        engine: of ours for the device; "triton" is checked in every kernel.
    """
    bf16, made = torch.bfloat16, plans()
    others = [dtype for dtype in LIMITS if dtype != bf16]
    kinds = list(made.items())
    for head_dim in (128, 40):
        yield from (_attention(engine, *kind, bf16, head_dim, device) for kind in kinds)
    if engine == "triton":
        yield _same_bits(made["boxes"], device)
        yield from (_mass(made["boxes"], dtype, device) for dtype in LIMITS)
    for dtype in (bf16, torch.float16):
        for precision in ("int8_qk", "int8"):
            yield from (_rounded(precision, *kind, dtype, device, engine) for kind in kinds)
    yield from (_neighborhood(name, dtype, device) for dtype in LIMITS for name in NEIGHBORHOODS)
    for dtype in others:
        for head_dim in (128, 40):
            yield from (_attention(engine, *kind, dtype, head_dim, device) for kind in kinds)
    # what cross-checks ours takes minutes to compile: once for each kind
    if device == "cuda":
        peers = ["flex"] if flash.missing(device) else ["flex", "flash"]
        for peer in (*peers, "torch"):
            yield from (_attention(peer, *kind, bf16, 128, device) for kind in kinds)


def _attention(
    engine: str, kind: str, plan: Plan, dtype: torch.dtype, head_dim: int, device: str
) -> Check:
    name = f"{engine}, {kind}, {_short(dtype)}, head dim {head_dim}, forward and backward"
    # with padded text where the head dim is no power of two, so that both ways are taken
    padded = head_dim != padded_head_dim(head_dim)

    def run() -> Errors:
        given = _inputs(dtype, head_dim, device)
        actual = _pulled(plan, given, engine, padded)
        exact = _pulled(plan, [x.double() for x in given], "reference", padded)
        return _errors(("out", "lse", "dq", "dk", "dv"), actual, exact)

    return Check(name, LIMITS[dtype], run)


def _pulled(plan: Plan, given: list[Tensor], engine: str, padded: bool) -> list[Tensor]:
    """Output, log-sum-exp, and the gradients of q, k and v through both."""
    key_mask = None
    if padded:
        key_mask = torch.ones(2, GRID.num_tokens, dtype=torch.bool, device=given[0].device)
        key_mask[1, -5:] = False
    leaves = [x.clone().requires_grad_() for x in given[:3]]
    out, lse = attend(*leaves, plan, backend=engine, key_mask=key_mask, return_lse=True)
    lse = lse.masked_fill(lse.isinf(), 0)
    total = (out.double() * given[3].double()).sum() + lse.double().square().sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(total, leaves)]


def _neighborhood(name: str, dtype: torch.dtype, device: str) -> Check:
    size, options = NEIGHBORHOODS[name]

    def run() -> Errors:
        shapes = [(2, HEADS, *size, 64)] + 2 * [(2, KEY_HEADS, *size, 64)]
        q, k, v = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
        out = neighborhood_attention(q, k, v, **options)
        exact = [x.double() for x in (q, k, v)]
        expected = neighborhood_attention(*exact, **options, backend="reference")
        return _errors(("out",), [out], [expected])

    return Check(f"neighborhood {name}, {_short(dtype)}", LIMITS[dtype], run)


def _rounded(
    precision: str, kind: str, plan: Plan, dtype: torch.dtype, device: str, engine: str
) -> Check:
    def run() -> Errors:
        q, k, v, _ = _inputs(dtype, 128, device)
        # far from 0, as keys of video models are
        k = k + 2
        rounded = plan.with_precision(precision)
        out = attend(q, k, v, rounded, backend=engine)
        exact = attend(q.double(), k.double(), v.double(), plan, backend="reference")
        twin = attend(q, k, v, rounded, backend="torch")
        return _errors(("float64", "twin"), [out, out], [exact, twin])

    return Check(f"{precision}, {kind}, {_short(dtype)}", ROUNDED_LIMIT, run)


def _mass(plan: Plan, dtype: torch.dtype, device: str) -> Check:
    def run() -> Errors:
        q, k, *_ = _inputs(dtype, 64, device)
        layout = plan.layout.to(device)
        lse = torch.randn(q.shape[:3], device=q.device) + 4
        rest = (lse, layout.order, layout.block)
        mass = block_mass_triton.block_mass(q, k, *rest, scale=0.125)
        exact = block_mass(q.double(), k.double(), *rest, scale=0.125)
        return _errors(("mass",), [mass], [exact])

    return Check(f"block mass, {_short(dtype)}", LIMITS[torch.float32], run)


def _same_bits(plan: Plan, device: str) -> Check:
    def run() -> Errors:
        given = _inputs(torch.bfloat16, 64, device)
        once, again = (_pulled(plan, given, "triton", True) for _ in range(2))
        return _errors(("out", "lse", "dq", "dk", "dv"), once, again)

    return Check("triton gives the same bits twice, forward and backward", 0.0, run)


def _inputs(dtype: torch.dtype, head_dim: int, device: str) -> list[Tensor]:
    """q, k, v and what the output is pulled by."""
    heads = (HEADS, KEY_HEADS, KEY_HEADS, HEADS)
    shapes = [(2, count, GRID.num_tokens, head_dim) for count in heads]
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes]


def _errors(names: tuple[str, ...], actual: list[Tensor], exact: list[Tensor]) -> Errors:
    """Relative RMS distances."""

    def distance(a: Tensor, e: Tensor) -> float:
        return ((a.double() - e.double()).norm() / e.double().norm().clamp_min(1e-30)).item()

    return {name: distance(a, e) for name, a, e in zip(names, actual, exact, strict=True)}


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
