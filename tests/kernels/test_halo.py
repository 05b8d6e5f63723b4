"""Runs of tiles say exactly what the windows of an axis said."""

import random

import pytest
import torch

from vidattn.kernels.windows.halo import HIDDEN_PAIR, Axis, Halo, every_pair, window_axis


def seen(runs, reach) -> dict[int, set[int]]:
    """The keys that every query reads, tile by tile."""
    found: dict[int, set[int]] = {}
    for run in runs:
        for tile in range(run.count):
            query = run.first_query + tile * run.query_step
            key = run.first_key + tile * run.key_step
            for i, row in enumerate(run.table.tolist()):
                assert query + i not in found, "a query stands in two tiles"
                found[query + i] = {key + j for j, x in enumerate(row) if x != HIDDEN_PAIR}
                for j, x in enumerate(row):
                    assert x in (HIDDEN_PAIR, key + j - query - i + reach)
    return found


@pytest.mark.parametrize("edge", [1, 2, 3, 5, 64])
@pytest.mark.parametrize("seed", range(8))
def test_any_windows(seed, edge):
    generator = random.Random(seed)
    extent = generator.choice([1, 2, 7, 24])
    # few values, so that tiles look alike at unequal distances
    first = [max(0, x - generator.choice([0, 0, 1])) for x in range(extent)]
    last = [min(extent - 1, x + generator.choice([0, 0, 2])) for x in range(extent)]
    cut = generator.randint(0, extent)
    groups = [(a, b) for a, b in ((0, cut), (cut, extent)) if a < b]
    runs = window_axis(first, last, groups, edge, extent)
    expected = {x: set(range(a, b + 1)) for x, (a, b) in enumerate(zip(first, last))}
    assert seen(runs, extent) == expected
    assert all(run.table.shape[0] <= edge for run in runs)


def test_windows_that_go_back():
    first, last = [3, 0, 2, 1, 0], [4, 4, 2, 1, 3]
    runs = window_axis(first, last, [(0, 5)], 2, 5)
    assert seen(runs, 5) == {x: set(range(first[x], last[x] + 1)) for x in range(5)}


def test_tiles_away_from_the_borders_are_one_run():
    first = [min(max(x - 2, 0), 95) for x in range(100)]
    last = [x + 4 for x in first]
    runs = window_axis(first, last, [(0, 100)], 4, 4)
    assert [run.count for run in runs] == [1, 23, 1]
    assert (runs[1].query_step, runs[1].key_step) == (4, 4)


def test_unequal_distances_are_no_run():
    # tiles of two places with gaps of one and of two places between them
    runs = window_axis(list(range(9)), list(range(9)), [(0, 2), (3, 5), (7, 9)], 2, 1)
    assert [(run.first_query, run.query_step, run.count) for run in runs] == [(0, 3, 2), (7, 1, 1)]


@pytest.mark.parametrize("num_queries", [1, 255, 256, 257, 700])
def test_every_pair(num_queries):
    halo = every_pair(num_queries, 3)
    runs = halo.axes[2].runs
    queries = [
        run.first_query + tile * run.query_step + i
        for run in runs
        for tile in range(run.count)
        for i in range(run.table.shape[0])
    ]
    assert sorted(queries) == list(range(num_queries))
    assert all(run.first_key == run.key_step == 0 and run.table.shape[1] == 3 for run in runs)


def test_pairs_of_three_axes():
    axes = [
        Axis(window_axis(first, last, [(0, len(first))], 8, reach), reach)
        for first, last, reach in (([0], [0], 0), ([0, 0], [1, 1], 1), ([0, 1, 1], [1, 2, 2], 2))
    ]
    halo = Halo(tuple(axes))
    assert halo.table_size == (1, 3, 5)
    ((t, h, w),) = halo.runs
    pairs, has_hidden = halo.pairs((t, h, w), torch.device("cpu"))
    pairs = pairs.view(2, 3, 2, 3)
    assert has_hidden and pairs[0, 0, 0, 2] == pairs[1, 1, 0, 0] == 15
    # one row down, one column to the left
    assert pairs[0, 2, 1, 1] == (1 + 1) * 5 + (-1 + 2)
