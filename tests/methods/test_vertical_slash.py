"""Vertical-slash attention against loops over lines, written from the definition."""

import itertools

import pytest
import torch

from tests.grids import AWKWARD
from tests.kernels.attention_cases import relative_rms, results
from tests.planning.content_cases import coherent, dense_weights
from vidattn.grid import Grid
from vidattn.methods import create_method
from vidattn.planning.reading import Reading
from vidattn.planning.sampled import sample

GRIDS = [g for g in AWKWARD if g.num_video_tokens < 150]
TILE, BLOCK = (1, 1, 2), 2


def diagonals(attention, samples, cells, priced):
    """Mass and cost of every distance between tiles, from the (R, N) attention of samples."""
    mass, cost = {}, {}
    for i, q in enumerate(cells):
        for j, k in enumerate(cells):
            gap = tuple(b - a for a, b in zip(q, k))
            cost[gap] = cost.get(gap, 0) + (i in priced and j in priced)
            if i in samples and j in priced:
                mass[gap] = mass.get(gap, 0.0) + attention[samples.index(i)][j]
    return mass, cost


def take(lines, budget, always):
    """Names of the best lines, (rate, cost, name), until their cost reaches a budget."""
    held = sum(cost for _, cost, name in lines if name in always)
    kept = set(always)
    for _, cost, name in sorted(lines, key=lambda x: -x[0]):
        if name in always:
            continue
        if held >= budget:
            break
        kept.add(name)
        held += cost
    return kept


def oracle(method, grid: Grid, weights) -> torch.Tensor:
    """(S, S) bool from the (S, S) attention of one head."""
    N, start, own = grid.num_video_tokens, grid.video_start, (0, 0, 0)
    places = list(itertools.product(*map(range, grid.size)))
    cells = [tuple(x // n for x, n in zip(place, TILE)) for place in places]
    samples = sample(N, method.samples).tolist()
    attention = weights[start : start + N, start : start + N][samples].tolist()
    budget = method.density * N**2

    def rates(priced):
        mass, cost = diagonals(attention, samples, cells, priced)
        doubt = BLOCK * N / len(samples)
        return [(mass.get(gap, 0.0) / (cost[gap] + doubt), cost[gap], gap) for gap in cost]

    def gap(i, j):
        return tuple(b - a for a, b in zip(cells[i], cells[j]))

    slashes = rates(set(range(N)))
    there = take(slashes, budget, {own})
    left_out = [
        [0.0 if gap(i, j) in there else x for j, x in enumerate(row)]
        for i, row in zip(samples, attention)
    ]
    halves = [[sum(row[j] for row in left_out[i::2]) for j in range(N)] for i in (0, 1)]
    columns = [2 * min(pair) for pair in zip(*halves)]
    lines = [(x / (2 * N), 2 * N, j) for j, x in enumerate(columns) if x] + slashes
    count = sum(isinstance(name, int) for name in take(lines, budget, {own}))
    count = min(count, int(method.vertical * budget / (2 * N))) // BLOCK * BLOCK
    vertical = set(sorted(range(N), key=lambda j: -columns[j])[:count])
    left = budget - (2 * N - count) * count
    kept = take(rates(set(range(N)) - vertical), left, {own})
    mask = torch.ones(grid.num_tokens, grid.num_tokens, dtype=torch.bool)
    for i, j in itertools.product(range(N), repeat=2):
        seen = i in vertical or j in vertical or gap(i, j) in kept
        mask[start + i, start + j] = seen
    return mask, count


def striking(grid: Grid, heads: int):
    """q and k (2, heads, S, 8) with some keys that everybody looks at in the first head."""
    q, k, v = (x.double() for x in coherent(grid, heads=heads, dim=8))
    loud = torch.randperm(grid.num_video_tokens)[:8] + grid.video_start
    q[:, 0] += 2
    k[:, 0, loud] += 2
    return q, k, v


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("options", [{"vertical": 0.5}, {"density": 0.6}], ids=str)
def test_lines_follow_the_definition(grid, options):
    method = create_method("vertical_slash", tile=TILE, samples=60, **options)
    q, k, _ = striking(grid, 2)
    mask = method.plan(grid, Reading(q, k, scale=0.4)).mask()
    weights = dense_weights(q, k, 0.4)
    counts = []
    for b, h in itertools.product(range(2), range(2)):
        expected, count = oracle(method, grid, weights[b, h])
        counts.append(count)
        assert torch.equal(mask.expand(2, 2, -1, -1)[b, h], expected)
    if grid.num_video_tokens > 100 and "vertical" in options:
        assert max(counts) > 0


def test_padded_text_is_not_looked_at():
    grid = Grid(3, 5, 7, text=20)
    q, k, _ = striking(grid, 2)
    key_mask = torch.ones(2, grid.num_tokens, dtype=torch.bool)
    key_mask[:, -9:] = False
    method = create_method("vertical_slash", tile=TILE)
    mask = method.plan(grid, Reading(q, k, key_mask=key_mask)).mask()
    k[:, :, -9:] += 100
    assert torch.equal(method.plan(grid, Reading(q, k, key_mask=key_mask)).mask(), mask)


def test_samples_are_spread_over_everything():
    places = sample(1000, 64)
    assert len(places) == 64 and places.diff().max() < 30
    assert sample(3, 64).tolist() == [0, 1, 2]


def test_density_is_met_and_full_budget_is_dense():
    grid = Grid(9, 12, 10)
    q, k, _ = striking(grid, 3)
    for density in (0.25, 0.6):
        plan = create_method("vertical_slash", density=density, tile=TILE).plan(grid, Reading(q, k))
        assert plan.density == pytest.approx(density, rel=0.03)
    for vertical in (0.0, 0.5):
        method = create_method("vertical_slash", density=1.0, vertical=vertical, tile=TILE)
        assert method.plan(grid, Reading(q, k)).mask().all()


def test_a_sample_is_planned_alone():
    grid = Grid(3, 5, 7, text=3)
    q, k, _ = striking(grid, 2)
    method = create_method("vertical_slash", tile=TILE, density=0.4)
    together = method.plan(grid, Reading(q, k)).mask()
    for b in range(2):
        mask = method.plan(grid, Reading(q[b : b + 1], k[b : b + 1])).mask()
        assert torch.equal(mask[0], together[b])


@pytest.mark.parametrize("rectify", [False, True])
def test_it_is_run_right(rectify):
    grid = Grid(3, 5, 7, text=3)
    q, k, v = striking(grid, 2)
    inputs = [q, k[:, :1], v[:, :1], torch.randn_like(q), torch.randn(q.shape[:3])]
    method = create_method("vertical_slash", tile=TILE, rectify=rectify)
    plan = method.plan(grid, Reading(*inputs[:2]))
    for ours, right in zip(results(inputs, plan, "torch"), results(inputs, plan, "reference")):
        assert relative_rms(ours, right) < 1e-7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0}, "density must be above 0"),
        ({"vertical": 1.5}, "vertical must be a share between 0 and 1, got 1.5"),
        ({"samples": 0}, "samples must be an integer of at least 1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        create_method("vertical_slash", **options)
