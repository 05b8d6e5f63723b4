"""Bytes and work of several processes: counted, by hand, and in processes that are there."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from vidattn.grid import Grid
from vidattn.head_plan import HeadPlan
from vidattn.methods import create_method

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
counts = importlib.import_module("benchmarks.parallel_counts")
layer = importlib.import_module("benchmarks.parallel_layer")
bench = importlib.import_module("bench_parallel")

GRID = Grid(2, 4, 8)
# both read everything: 4 blocks of 16 tokens that span both frames, or stay in one
ACROSS, WITHIN = (
    create_method("neighborhood", window=9, tile=tile).plan(GRID) for tile in ((2, 2, 4), (1, 4, 4))
)


def sent(*lengths, ulysses, num_heads):
    """Values of one head and token that each process sends."""
    return counts.bytes_sent(lengths, ulysses, num_heads=num_heads, head_dim=1, itemsize=1)


@pytest.mark.parametrize("num", [1, 2, 4])
def test_an_even_exchange_sends_all_but_its_share_four_times(num):
    given = {"num_heads": 8, "head_dim": 16, "itemsize": 2}
    expected = 4 * (num - 1) * (40 // num) * (8 // num) * 16 * 2
    assert counts.bytes_sent([40 // num] * num, num, **given) == [expected] * num


def test_uneven_tokens_and_heads():
    # the first has 2 heads and 5 tokens: q, k and v of 1 head away, 2 heads of 4 tokens back
    assert sent(5, 4, ulysses=2, num_heads=3) == [3 * 5 + 2 * 4, 3 * 4 * 2 + 5]
    # a process without a head takes none and gives none back
    assert sent(2, 2, 2, ulysses=3, num_heads=2) == [6 + 4, 6 + 4, 12]


def test_a_ring_sends_keys_values_and_queries_to_all_others():
    assert sent(5, 4, 4, ulysses=1, num_heads=2) == [3 * 2 * 5 * 2, 48, 48]
    # the last two tokens of each go through the next one
    owner = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0])
    given = {"num_heads": 2, "head_dim": 1, "itemsize": 1, "owner": owner}
    assert counts.bytes_sent([5, 4, 4], 1, **given) == [60 + 2 * 2, 48 + 2 * 2, 48 + 2 * 2]
    # two heads between two processes, then what both have to the other two
    assert sent(2, 2, 2, 2, ulysses=2, num_heads=2) == [(3 * 2 + 2) + 3 * 4] * 4


def test_work_of_a_ring():
    for plan in (ACROSS, WITHIN):
        assert counts.visited_pairs(plan, 1, 3) == 3 * 64 * 64
    # every process has some whole blocks, wherever their tokens are
    for plan in (ACROSS, WITHIN):
        assert counts.pairs_of_ranks(plan, 2, 1, 3) == [3 * 32 * 64] * 2
        assert counts.pairs_of_ranks(plan, 2, 2, 3) == [2 * 32 * 64, 32 * 64] * 2
        assert counts.pairs_of_ranks(plan, 3, 1, 3) == [3 * n * 16 * 64 for n in (2, 1, 1)]
    assert counts.balance([2, 1, 1]) == 1.5


def test_work_of_plans_by_head():
    narrow = create_method("neighborhood", window=1, tile=(1, 4, 4)).plan(GRID)
    plan = HeadPlan.join([narrow, ACROSS], [(1,), (0, 2)])
    expected = 2 * (64 * 16 + 2 * 64 * 64)
    assert counts.visited_pairs(plan, 2, 3) == expected


def test_another_plan_is_another_video():
    case = bench.Case((), (3, 4, 6), 2, 12)
    outs = [layer.run_layer(case, f"topk:density={n}", bench.Spread())[0] for n in (0.5, 0.5, 0.9)]
    assert torch.equal(outs[0], outs[1])
    assert (outs[0] - outs[2]).norm() > 1e-3 * outs[0].norm()


def test_processes_do_what_is_modelled(monkeypatch, tmp_path):
    case = bench.Case(("sliding_tile", "topk:density=0.5"), (3, 4, 6), 2, 12)
    monkeypatch.setattr(bench, "MEASURED", case)
    monkeypatch.setattr(bench, "MODELLED", case._replace(methods=("sliding_tile",)))
    monkeypatch.setattr(bench, "COUNTS", (1, 2))
    monkeypatch.setattr(bench, "ITEMSIZE", 4)
    # this process keeps its threads
    monkeypatch.setattr(bench.torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(sys, "argv", ["bench", "--processes", "2", "--out", str(tmp_path)])
    bench.main()
    report = json.loads((tmp_path / "parallel.json").read_text())
    measured = report["measured"]["rows"]
    assert [(row["method"], row["ulysses"], row["ring"]) for row in measured] == [
        (method, *degrees)
        for part in ([(1, 1)], [(2, 1), (1, 2)])
        for method in case.methods
        for degrees in part
    ]
    modelled = {(row["ulysses"], row["ring"]): row for row in report["modelled"]["rows"]}
    for row in measured:
        model = modelled[row["ulysses"], row["ring"]]
        assert max(row["error"]) < 1e-5 and min(row["cpu_seconds"]) > 0
        if row["method"] == "sliding_tile":
            assert row["sent"] == model["sent"]["sliding_tile"]
            assert row["pairs"] == model["pairs"]["sliding_tile"]
    text = (tmp_path / "parallel.md").read_text()
    assert "72 tokens (3x4x6), 2 heads of 12" in text
    assert "| `topk:density=0.5` | ulysses 2 |" in text and "| 2 | ring 2 |" in text
