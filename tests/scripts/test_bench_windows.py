"""The table of windows names its instruction set, and times both ways of the engine."""

import json
import sys

import bench_windows as bench
import pytest

from vidattn.grid import Grid
from vidattn.kernels.cpp import compiler, processor

pytestmark = pytest.mark.skipif(compiler.find_compiler() is None, reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def sets(monkeypatch):
    """The sets of this processor again behind the test."""
    monkeypatch.setattr(processor, "instruction_sets", processor.instruction_sets)
    yield
    processor.instruction_set.cache_clear()


def test_it_writes_a_table_of_one_set(monkeypatch, tmp_path):
    ways = []

    def watched(q, k, v, plan, backend):
        ways.append((processor.instruction_set(q.dtype), "windows" in plan.lists.cache))
        return q * k * v

    monkeypatch.setattr(bench, "WINDOWS", [(Grid(1, 5, 7), (1, 3, 3))])
    monkeypatch.setattr(bench, "SCALED", [Grid(2, 5, 7)])
    monkeypatch.setattr(bench, "attend", watched)
    monkeypatch.setattr(bench, "measured_rates", lambda dtype: (1e9, 1e9))
    monkeypatch.setattr(bench.torch, "set_num_threads", lambda count: None)
    flags = ["--rounds", "1", "--set", "portable", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bench", *flags])
    bench.main()
    assert set(ways) == {("portable", True), ("portable", False)}
    report = json.loads((tmp_path / "windows_portable.json").read_text())
    assert report["instruction_sets"] == {"float32": "portable", "bfloat16": "portable"}
    for row in report["rows"]:
        pairs = bench.HEADS * row["density"] * row["tokens"] ** 2
        least_ms = 1e3 * pairs * (4 * row["head_dim"] + 1) / 1e9
        assert row["cpp_share"] == pytest.approx(least_ms / row["cpp_ms"])
    text = (tmp_path / "windows_portable.md").read_text()
    assert "portable for float32" in text and report["hardware"]["date"] in text
    assert all(f"| {bench.show(row['grid'])} |" in text for row in report["rows"])
