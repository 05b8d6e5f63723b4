"""The planning benchmark: its figures are those of the plans, and its limits hold here."""

import json
import math
import sys
from pathlib import Path

import bench_planning as bench
import pytest
import torch

from vidattn.catalog import list_sparse_methods
from vidattn.grid import Grid
from vidattn.methods import create_method, plan

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("label", bench.METHODS)
def test_a_plan_is_measured(label):
    name, options = bench.METHODS[label]
    size = (24, 32, 32)
    row = bench.measure(label, size, rounds=1)
    expected = plan(name, Grid(*size), **options).summary()
    assert (row["tokens"], row["num_blocks"]) == (24_576, expected["num_blocks"])
    assert (row["density"], row["held_mib"]) == (expected["density"], expected["memory_mib"])
    assert row["time_s"] > 0 and row["within_limits"]


@pytest.mark.parametrize("label", ["radial", "neighborhood"])
def test_a_published_size_keeps_its_limits(label):
    row = bench.measure(label, bench.GRIDS[0], rounds=1)
    assert row["tokens"] == 118_800 and row["within_limits"], row


def test_limits_are_looked_up():
    row = {"tokens": 1_000_000, "time_s": 9.0, "held_mib": 1000.0}
    assert bench.is_within(row) and bench.is_within({**row, "tokens": 5})
    assert not bench.is_within({**row, "time_s": 11.0})
    assert not bench.is_within({**row, "held_mib": 1100.0})
    assert {math.prod(size) for size in bench.GRIDS} == set(bench.LIMITS)


def test_exponent_of_a_power():
    assert bench.exponent([(n, 7 * n**1.3) for n in (2, 5, 90, 4000)]) == pytest.approx(1.3)


def test_radial_grows_like_n_log_n(monkeypatch):
    monkeypatch.setattr(bench, "LENGTHS", (4096, 8192, 16384, 32768))
    grown = bench.growth((16, 16))
    grid = Grid(128, 16, 16)
    expected = round(plan("radial", grid, tile=(1, 8, 8)).visited_density * grid.num_tokens**2)
    assert grown["rows"][-1] == {"tokens": 32768, "frames": 128, "visited_pairs": expected}
    keys = [row["visited_pairs"] / row["tokens"] for row in grown["rows"]]
    added = [later - earlier for earlier, later in zip(keys, keys[1:])]
    assert max(added) < 1.1 * min(added)
    # 16 to 128 frames, log2 from 4 to 7
    assert grown["n_log_frames_exponent"] == pytest.approx(
        1 + math.log(7 / 4) / math.log(8), abs=0.01
    )
    assert grown["exponent"] == pytest.approx(grown["n_log_frames_exponent"], abs=0.03)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """The program on small grids, given further flags; what it wrote."""
    monkeypatch.setattr(bench, "GRIDS", ((2, 16, 16),))
    monkeypatch.setattr(bench, "METHODS", {"radial": ("radial", {})})
    monkeypatch.setattr(bench, "SEARCHED", (2, 16, 16))
    monkeypatch.setattr(bench, "MOST", math.inf)
    monkeypatch.setattr(bench, "in_own_process", bench.measure)
    monkeypatch.setattr(bench, "LENGTHS", (4096, 8192))
    threads = torch.get_num_threads()

    def run(*flags):
        out = ["--rounds", "1", "--out", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["bench", *out, *flags])
        bench.main()
        return json.loads((tmp_path / "planning.json").read_text())

    yield run
    torch.set_num_threads(threads)


def test_the_program_writes_both_files(run, tmp_path, monkeypatch, capsys):
    report = run()
    assert [x["frame"] for x in report["growth"]] == [[16, 16], [32, 32]]
    assert [row["tokens"] for row in report["growth"][0]["rows"]] == [4096, 8192]
    assert report["plans"][0]["tokens"] == 512 and report["hardware"]["cpu"]
    names = [row["method"] for row in report["searches"]["rows"]]
    methods = {x: create_method(x) for x in list_sparse_methods() if x != "paro"}
    reading = [name for name, method in methods.items() if method.reads_content]
    rectified = [name for name, method in methods.items() if not method.rectify]
    assert sorted(names) == sorted([*reading, *(f"{x}:rectify=true" for x in rectified)])
    text = (tmp_path / "planning.md").read_text()
    assert text in capsys.readouterr().out
    assert "| radial | 512 |" in text and "| topk | 0." in text
    assert f"N^{report['growth'][1]['exponent']:.2f};" in text
    monkeypatch.setattr(bench, "is_within", lambda row: False)
    with pytest.raises(SystemExit, match="radial on 512 tokens is over its limit"):
        run("--part", "plans")


def test_a_part_leaves_the_others_as_they_are(run, tmp_path, monkeypatch):
    first = run("--part", "plans")
    assert "## Plans" in (tmp_path / "planning.md").read_text() and "growth" not in first
    monkeypatch.setattr(bench, "content_methods", lambda: [create_method("topk")])
    monkeypatch.setattr(bench, "MOST", 0.0)
    with pytest.raises(SystemExit, match="topk searches for"):
        run("--part", "searches")
    second = json.loads((tmp_path / "planning.json").read_text())
    assert second["plans"] == first["plans"] and len(second["searches"]["rows"]) == 1
    text = (tmp_path / "planning.md").read_text()
    assert "## Plans" in text and "## Searches" in text and "## Growth" not in text


def test_the_searches_of_a_generation_are_counted(monkeypatch):
    method = create_method("topk", every=20)
    assert bench.search_steps(method, 50) == [0, 20, 40]
    seconds = iter([2.0, 4.0])
    monkeypatch.setattr(bench, "cpu_seconds", lambda function, rounds: next(seconds))
    grid = Grid(2, 8, 8)
    row = bench.search(method, grid, bench.smooth_reading(grid, 16), dense_s=10.0, rounds=1)
    # one of 2 seconds, two of 4
    assert row["num_searches"] == 3 and row["overhead"] == pytest.approx(10 / 500)
    # in every way that layers cut the video
    seconds = iter([1.0, 4.0, 2.0, 5.0, 3.0, 6.0])
    row = bench.search(create_method("vmoba"), grid, bench.smooth_reading(grid, 16), 10.0, 1)
    assert (row["first_s"], row["later_s"]) == (2.0, 5.0)
