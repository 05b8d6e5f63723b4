"""The GPU benchmark, as far as it runs without a GPU."""

import importlib
import json
import math
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
bench = importlib.import_module("bench_gpu")
gpu_checks = importlib.import_module("gpu_checks")
gpu_times = importlib.import_module("gpu_times")


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run the program on a CPU with two checks and one timing, and give what it wrote."""
    chosen = [*islice(gpu_checks.checks("cpu"), 1), *list(gpu_checks.checks("cpu"))[-1:]]
    monkeypatch.setattr(bench, "checks", lambda device: chosen)
    monkeypatch.setattr(bench, "cases", lambda *_, **__: gpu_times.cases("cpu", quick=True)[:1])

    def call(*options):
        arguments = ["bench", "--device", "cpu", "--rounds", "1", "--out", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", [*arguments, *options])
        bench.main()
        path = tmp_path / "gpu_trial_on_cpu.json"
        return json.loads(path.read_text()), path.with_suffix(".md").read_text()

    return call


def test_without_a_gpu_it_says_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench"])
    with pytest.raises(SystemExit, match="needs an NVIDIA GPU.*--device cpu"):
        bench.main()


def test_it_writes_both_files_and_goes_on_where_it_stopped(run, monkeypatch):
    report, text = run()
    assert len(report["checks"]) == 2 and all(x["passed"] for x in report["checks"].values())
    (row,) = report["times"].values()
    assert row["visited"] <= 1 and row["ms"].keys() >= {"dense", "torch", "int8"}
    assert row["ratios"]["torch"]["speedup"] == row["ms"]["dense"] / row["ms"]["torch"]
    assert not row["left out"] and "dense" not in row["ratios"]
    for name in (*report["checks"], *report["times"]):
        assert f"| {name} |" in text
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("measured again"))
    assert run()[0]["times"] == report["times"]
    monkeypatch.setattr(bench, "source", lambda: "other kernels")
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        run()


@pytest.mark.parametrize("error", [math.nan, 0.5, RuntimeError("no kernel")])
def test_a_check_that_fails_is_told(error, run, monkeypatch):
    def compute():
        if isinstance(error, Exception):
            raise error
        return {"out": error}

    monkeypatch.setattr(
        bench, "checks", lambda device: [gpu_checks.Check("a kernel", 0.1, compute)]
    )
    with pytest.raises(SystemExit, match="1 checks failed: a kernel"):
        run()
    row = bench.checked(gpu_checks.Check("a kernel", 0.1, compute))
    assert not row["passed"] and ("no kernel" in row.get("raised", "") or "errors" in row)


def test_every_engine_and_kernel_is_checked():
    names = [check.name for check in gpu_checks.checks("cuda")]
    assert len(set(names)) == len(names)
    for what in ("triton, blocks", "flex, boxes", "torch, masks", "neighborhood 3d", "block mass"):
        assert any(name.startswith(what) for name in names), what
    for what in ("int8_qk, masks, bfloat16", "int8, boxes, float16", "same bits twice"):
        assert any(what in name for name in names), what


def test_the_sizes_asked_for_are_timed():
    cases = gpu_times.cases("cuda", quick=False)
    sizes = {(case.grid.num_tokens, case.heads) for case in cases if case.method == "radial"}
    assert sizes == {(75_600, 40), (118_800, 24)}
    assert len({case.name for case in cases}) == len(cases)
    kept = [math.prod(case.options["window"]) / case.grid.num_tokens for case in cases[-4:]]
    # as many per cent less as where they were published
    assert [round(100 * (1 - share)) for share in kept] == [91, 90, 92, 77]
    assert len(gpu_times.cases("cuda", quick=True)) == 1


def test_what_does_not_run_is_left_out():
    def broken():
        raise RuntimeError("too large\nfor this")

    calls, failures = gpu_times._working({"a": lambda: 1, "b": broken})
    assert calls.keys() == {"a"} and failures == {"b": "RuntimeError: too large"}
