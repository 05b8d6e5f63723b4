"""Cluster attention against loops over tokens and clusters, written from the definition."""

import itertools
import math

import pytest
import torch

from tests.grids import AWKWARD
from tests.kernels.attention_cases import relative_rms, results
from tests.planning.content_cases import coherent
from vidattn.grid import Grid
from vidattn.methods import create_method
from vidattn.methods.cluster import k_means
from vidattn.planning.reading import Reading

GRIDS = [g for g in AWKWARD if g.num_video_tokens < 150]
SMALL = {"tile": (1, 2, 4), "block": 4}


def slow_k_means(features, centers, iterations):
    """Cluster of each feature, one at a time."""

    def nearest():
        return [((centers - x) ** 2).sum(-1).argmin().item() for x in features]

    for _ in range(iterations):
        labels = torch.tensor(nearest())
        for c in range(len(centers)):
            if (labels == c).any():
                centers[c] = features[labels == c].mean(0)
    return nearest()


def clusters(grid: Grid, q, k, iterations) -> list[list[int]]:
    """Tokens of every cluster of one head, from (S, D) queries and keys."""
    tokens = list(range(grid.video_start, grid.video_start + grid.num_video_tokens))
    parts = [x[tokens].double() for x in (q, k)]
    parts = [x - x.mean(0) for x in parts]
    features = torch.cat([x / x.square().mean().sqrt().clamp_min(1e-30) for x in parts], -1)
    tiles: dict[tuple, list[int]] = {}
    for i, place in enumerate(itertools.product(*map(range, grid.size))):
        tiles.setdefault(tuple(x // n for x, n in zip(place, SMALL["tile"])), []).append(i)
    centers = torch.stack([features[rows].mean(0) for rows in tiles.values()])
    labels = slow_k_means(features, centers, iterations)
    return [[t for t, x in zip(tokens, labels) if x == c] for c in sorted(set(labels))]


def chosen(method, groups, q, k, scale) -> set[tuple[int, int]]:
    """The pairs of clusters that are read, from (S, D) queries and keys."""
    pairs = set()
    center = torch.cat([k[g] for g in groups]).mean(0)
    for i, rows in enumerate(groups):
        query = q[rows].mean(0)
        weights = [
            len(g) * math.exp(scale * float(query @ (k[g].mean(0) - center))) for g in groups
        ]
        if method.density is not None:
            weights[i] = math.inf
        ranked = sorted(range(len(groups)), key=lambda j: -weights[j])
        if method.density is None:
            held, count = 0.0, 0
            while held < method.mass * sum(weights):
                held, count = held + weights[ranked[count]], count + 1
            count = max(count, math.ceil(method.least * len(groups)))
        else:
            sizes = [sum(len(groups[j]) for j in ranked[:n]) for n in range(1, len(groups) + 1)]
            off = [abs(size - method.density * sizes[-1]) for size in sizes]
            count = off.index(min(off)) + 1
        pairs |= {(i, j) for j in (i, *ranked[:count])}
    return pairs


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("options", [{"mass": 0.6, "least": 0.3}, {"density": 0.39}], ids=str)
def test_clusters_and_pairs_follow_the_definition(grid, options):
    method = create_method("cluster", iterations=3, **SMALL, **options)
    q, k, _ = (x.double() for x in coherent(grid, heads=2, dim=8))
    k = k[:, :1]
    plan = method.plan(grid, Reading(q, k, scale=0.3))
    mask = plan.mask()
    assert mask.shape[:2] == (2, 2)
    for b, h in itertools.product(range(2), range(2)):
        groups = clusters(grid, q[b, h], k[b, 0], 3)
        expected = torch.ones(grid.num_tokens, grid.num_tokens, dtype=torch.bool)
        pairs = chosen(method, groups, q[b, h], k[b, 0], 0.3)
        for (i, rows), (j, keys) in itertools.product(enumerate(groups), repeat=2):
            expected[torch.tensor(rows)[:, None], keys] = (i, j) in pairs
        assert torch.equal(mask[b, h], expected)


def test_a_cluster_without_features_stays():
    features = torch.tensor([[0.0], [1.0], [10.0]])
    label, centers = k_means(features, torch.tensor([[0.0], [9.0], [99.0]]), 2)
    assert label.tolist() == [0, 0, 1]
    assert centers.flatten().tolist() == [0.5, 10.0, 99.0]


def test_a_later_step_begins_where_the_last_one_ended():
    grid = Grid(3, 5, 7)
    q, k, _ = coherent(grid)
    long = create_method("cluster", iterations=6, **SMALL)
    long, ends = long.plan_with_memory(grid, Reading(q, k))
    method = create_method("cluster", iterations=4, warm_iterations=2, **SMALL)
    _, memory = method.plan_with_memory(grid, Reading(q, k))
    second, later = method.plan_with_memory(grid, Reading(q, k, last=memory))
    assert len(memory) == 2 and len(memory[0]) == 3
    torch.testing.assert_close(later, ends)
    assert torch.equal(second.mask(), long.mask())
    # what belongs to another number of heads is of no use
    _, alone = method.plan_with_memory(grid, Reading(q[:, :1], k[:, :1], last=memory))
    torch.testing.assert_close(alone[0], memory[0][:1])


def test_a_sample_is_planned_alone():
    grid = Grid(3, 5, 7, text=3)
    q, k, _ = coherent(grid)
    method = create_method("cluster", density=0.4, **SMALL)
    together = method.plan(grid, Reading(q, k)).mask()
    for b in range(2):
        assert torch.equal(
            method.plan(grid, Reading(q[b : b + 1], k[b : b + 1])).mask()[0], together[b]
        )


def test_full_budget_is_dense():
    grid = Grid(3, 5, 7, text=3)
    q, k, _ = coherent(grid)
    for options in ({"density": 1.0}, {"mass": 1.0}, {"least": 1.0}):
        assert create_method("cluster", **SMALL, **options).plan(grid, Reading(q, k)).is_dense


@pytest.mark.parametrize("rectify", [False, True])
def test_it_is_run_right(rectify):
    grid = Grid(3, 5, 7, text=3)
    q, k, v = coherent(grid, heads=2)
    inputs = [x.double() for x in (q, k, v, torch.randn_like(v))] + [torch.randn(v.shape[:3])]
    method = create_method("cluster", density=0.3, rectify=rectify, **SMALL)
    plan = method.plan(grid, Reading(*inputs[:2]))
    for ours, right in zip(results(inputs, plan, "torch"), results(inputs, plan, "reference")):
        assert relative_rms(ours, right) < 1e-7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mass": 0.0}, "mass must be above 0"),
        ({"least": 2.0}, "least must be above 0"),
        ({"iterations": -1}, "iterations must be an integer of at least 0"),
        ({"block": 0}, "block must be an integer of at least 1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        create_method("cluster", **options)
