"""VMoBA against a loop over chunks and queries, written from the definition."""

import itertools

import pytest
import torch

from tests.grids import AWKWARD
from tests.kernels.attention_cases import TOLERANCE, relative_rms, results
from tests.planning.content_cases import coherent, tokens_of
from tests.waits import Waits
from vidattn.grid import Grid
from vidattn.methods import create_method
from vidattn.methods.vmoba import _chunks
from vidattn.planning.reading import Reading

SMALL = [g for g in AWKWARD if g.num_video_tokens < 150]


def chunks_of(grid: Grid, chunk) -> dict[tuple, list[int]]:
    """The tokens of every chunk."""
    found: dict[tuple, list[int]] = {}
    for token, place in enumerate(itertools.product(*map(range, grid.size))):
        cell = tuple(x // length for x, length in zip(place, chunk))
        found.setdefault(cell, []).append(grid.video_start + token)
    return found


def select(gates, weights, own, sizes, method):
    """For one head, the (row, chunk) pairs to keep, by sorting them in Python."""
    rows, columns = range(len(gates)), range(len(sizes))
    groups = [rows] if method.select == "global" else [[row] for row in rows]
    kept = {(row, own[row]) for row in rows}
    for group in groups:
        pairs = [(row, c) for row in group for c in columns]
        others = sorted((p for p in pairs if own[p[0]] != p[1]), key=lambda p: -gates[p[0]][p[1]])
        if method.select == "topk":
            kept |= set(others[: method.topk])
            continue
        low = min(gates[r][c] for r, c in pairs)
        span = max(gates[r][c] for r, c in pairs) - low
        value = {(r, c): (gates[r][c] - low) / (span or 1) * weights[r] for r, c in pairs}
        share = method.tau
        if method.density is not None:
            value, share = {(r, c): weights[r] * sizes[c] for r, c in pairs}, method.density
        held, need = sum(value[row, own[row]] for row in group), share * sum(value.values())
        for pair in others:
            if held >= need - 1e-9:
                break
            kept.add(pair)
            held += value[pair]
    return kept


def oracle(method, plan, grid: Grid, q, k) -> torch.Tensor:
    """(B, H, S, S) bool."""
    chunks = list(chunks_of(grid, method.chunk_of(grid)).values())
    chunk_of = {token: c for c, tokens in enumerate(chunks) for token in tokens}
    units = [[token] for token in chunk_of]
    if method.granularity == "block":
        units = [tokens_of(plan.layout, block) for block in range(plan.layout.num_video_blocks)]
        units = [unit for unit in units if unit]
    own = [chunk_of[unit[0]] for unit in units]
    assert all(chunk_of[token] == c for unit, c in zip(units, own) for token in unit)
    mask = torch.ones(*q.shape[:2], grid.num_tokens, grid.num_tokens, dtype=torch.bool)
    group = q.shape[1] // k.shape[1]
    for b, h in itertools.product(*map(range, q.shape[:2])):
        means = torch.stack([k[b, h // group, tokens].double().mean(0) for tokens in chunks])
        means -= torch.cat([k[b, h // group, t].double() for t in chunks]).mean(0)
        queries = torch.stack([q[b, h, unit].double().mean(0) for unit in units])
        gates, weights = (queries @ means.T).tolist(), [len(unit) for unit in units]
        kept = select(gates, weights, own, [len(tokens) for tokens in chunks], method)
        for row, unit in enumerate(units):
            for c, tokens in enumerate(chunks):
                mask[b, h, torch.tensor(unit)[:, None], tokens] = (row, c) in kept
    return mask


@pytest.mark.parametrize("grid", SMALL, ids=str)
@pytest.mark.parametrize("granularity", ["block", "query"])
@pytest.mark.parametrize(
    ("partition", "options"),
    [
        ("time", {}),
        ("space", {"select": "query", "tau": 0.5}),
        ("cube", {"select": "topk", "topk": 2}),
        ("cube", {"density": 0.4}),
        ("space", {"select": "query", "density": 0.6}),
    ],
)
def test_pairs_are_those_of_the_definition(grid, granularity, partition, options):
    method = create_method(
        "vmoba", partition=partition, granularity=granularity, chunks=7, tile=(1, 2, 2), **options
    )
    q, k, _ = (x.double() for x in coherent(grid, heads=2, dim=8, noise=1.0))
    k = k[:, :1]
    plan = method.plan(grid, Reading(q, k))
    expected = oracle(method, plan, grid, q, k)
    assert torch.equal(plan.mask(), expected)
    video = slice(grid.video_start, grid.video_start + grid.num_video_tokens)
    assert plan.density == pytest.approx(expected[..., video, video].double().mean().item())


def test_layers_take_the_partitions_in_turn():
    method, grid = create_method("vmoba", chunks=8), Grid(8, 16, 16)
    sizes = [method.at(layer).chunk_of(grid) for layer in range(4)]
    assert sizes == [(1, 16, 16), (8, 6, 6), (6, 6, 6), (1, 16, 16)]
    assert method.chunk_of(Grid(1, 16, 16)) == (1, 6, 6), "one frame is cut in space"
    fixed = create_method("vmoba", partition="cube")
    assert fixed.at(1) is fixed


@pytest.mark.parametrize("granularity", ["block", "query"])
def test_a_sample_is_planned_alone(granularity):
    grid = Grid(3, 5, 7, text=3)
    q, k, _ = coherent(grid)
    method = create_method("vmoba", chunks=9, partition="cube", granularity=granularity)
    together = method.plan(grid, Reading(q, k)).mask()
    for b in range(2):
        assert torch.equal(
            method.plan(grid, Reading(q[b : b + 1], k[b : b + 1])).mask()[0], together[b]
        )


@pytest.mark.parametrize("granularity", ["block", "query"])
@pytest.mark.parametrize("options", [{"density": 1.0}, {"select": "topk", "topk": 99}], ids=str)
def test_full_budget_is_dense(granularity, options):
    grid = Grid(3, 5, 7, text=3)
    q, k, _ = coherent(grid)
    method = create_method("vmoba", chunks=9, granularity=granularity, **options)
    assert method.plan(grid, Reading(q, k)).is_dense


@pytest.mark.parametrize("granularity", ["block", "query"])
def test_output_and_gradients_are_those_of_masked_attention(granularity):
    grid = Grid(3, 5, 7, text=3)
    q, k, v = coherent(grid, heads=2)
    inputs = [q, k, v, torch.randn_like(v), torch.randn(v.shape[:3])]
    exact = [x.double() for x in inputs]
    plan = create_method("vmoba", chunks=9, partition="cube", granularity=granularity).plan(
        grid, Reading(q, k)
    )
    assert plan.density < 0.9
    expected = results(exact, plan, "reference")
    for given, dtype in ((exact, torch.float64), (inputs, torch.float32)):
        for ours, right in zip(results(given, plan, "torch"), expected):
            assert relative_rms(ours, right) < TOLERANCE[dtype]


def test_chunks_are_numbered_once_for_a_device():
    where = (4, 6, 8), (1, 2, 2), (2, 6, 8), torch.device("meta")
    number, count = _chunks(*where)
    assert number.device.type == "meta" and count == 2
    with Waits() as waits:
        assert _chunks(*where)[0] is number
    assert not waits.count


def test_the_gate_has_no_gradient():
    grid = Grid(2, 4, 4)
    q, k, _ = (x.requires_grad_() for x in coherent(grid))
    plan = create_method("vmoba", rectify=True, chunks=4).plan(grid, Reading(q, k))
    assert not plan.rest.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"partition": "tiem"}, "did you mean 'time'"),
        ({"select": "all"}, "unknown select 'all'"),
        ({"granularity": "token"}, "unknown granularity"),
        ({"tau": 0}, "tau must be above 0"),
        ({"topk": -1}, "topk must be an integer of at least 0"),
        ({"chunks": 0}, "chunks must be an integer of at least 1"),
        ({"select": "topk", "density": 0.2}, "'topk' has topk"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        create_method("vmoba", **options)
