"""The GPU benchmark, rehearsed without a GPU: on the engine of a CPU, and up to the launches."""

import importlib
import json
import math
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch

from vidattn.attention import attend

ROOT = Path(__file__).parents[2]
bench, gpu_checks, gpu_peers, gpu_planning, gpu_times = map(
    importlib.import_module,
    ("bench_gpu", *(f"benchmarks.gpu_{x}" for x in ("checks", "peers", "planning", "times"))),
)
# what a bare machine does without
ABSENT = ("diffusers", "transformers", "torchvision", "peft", "timm", "rich")


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run the program on a CPU, and give what it wrote."""

    def call(*options):
        arguments = ["bench", "--device", "cpu", "--out", str(tmp_path), *options]
        monkeypatch.setattr(sys, "argv", arguments)
        bench.main()
        path = tmp_path / "gpu_trial_on_cpu.json"
        return json.loads(path.read_text())["parts"], path.with_suffix(".md").read_text()

    return call


def use_part(monkeypatch, name, *rows):
    """Stand rows in for those of a part, which the CPU engine has in plenty."""
    monkeypatch.setitem(bench.PARTS, name, (lambda sizes: iter(rows), bench.PARTS[name][1]))


def raising():
    raise RuntimeError("no kernel\nfor this")


def test_without_a_gpu_it_says_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench"])
    with pytest.raises(SystemExit, match="needs an NVIDIA GPU.*--device cpu"):
        bench.main()


def test_an_unknown_part_is_refused(run, capsys):
    with pytest.raises(SystemExit):
        run("--only", "dense,speed")
    assert "no part speed: there are ceilings, checks" in capsys.readouterr().err


def test_a_rehearsal_writes_both_files(run, monkeypatch):
    check, *_ = gpu_checks.checks("cpu", "torch")
    use_part(monkeypatch, "checks", bench.row_of(check))
    monkeypatch.setattr(gpu_planning, "METHODS", {"topk": {}})
    parts, text = run("--only", "ceilings,checks,dense,planning,peers,tiles,windows")
    assert list(parts) == [x for x in bench.PARTS if x not in ("sparse", "step")]
    assert parts["checks"][check.name]["passed"]
    assert parts["planning"]["topk"]["attend_ms"] > 0
    for name in ("ceilings", "checks", "dense", "planning"):
        assert f"## {name}" in text and all(f"| {row} |" in text for row in parts[name])


@pytest.mark.slow
def test_a_rehearsal_times_every_part(run, monkeypatch):
    some = [*islice(gpu_checks.checks("cpu", "torch"), 2)]
    use_part(monkeypatch, "checks", *map(bench.row_of, some))
    parts, text = run("--seconds", "300")
    assert list(parts) == list(bench.PARTS)
    for rows in parts.values():
        assert not any(bench.RAISED in row or bench.LEFT_OUT in row for row in rows.values()), rows
    assert all(row["passed"] and 0 < row["out"] < row["limit"] for row in parts["checks"].values())
    assert all(0 < row["visited"] <= 1 for row in parts["sparse"].values())
    for method in ("topk", "svg", "vmoba", "adaspa"):
        assert parts["planning"][method].keys() >= {"plan_ms", "visited_ms", "attend_ms"}
    assert len(parts["step"]) == 6
    for name in ("checks", "dense", "sparse", "planning", "step"):
        assert f"## {name}" in text and all(f"| {row} |" in text for row in parts[name])


def test_what_fails_costs_its_row_alone(run, monkeypatch):
    def broken(sizes):
        yield "first", lambda: {"ms": 1.0}
        raise ValueError("no plan")

    use_part(monkeypatch, "ceilings", ("a", raising), ("b", lambda: {"ms": 2.0}))
    monkeypatch.setitem(bench.PARTS, "dense", (broken, 1.0))
    parts, text = run("--only", "ceilings,dense")
    assert parts["ceilings"] == {"a": {"raised": "RuntimeError: no kernel"}, "b": {"ms": 2.0}}
    assert parts["dense"] == {
        "first": {"ms": 1.0},
        "the rest": {"raised": "ValueError: no plan"},
    }
    assert "| a | RuntimeError: no kernel |  |" in text


def test_a_plan_that_cannot_be_made_costs_its_row_alone(monkeypatch):
    monkeypatch.setattr(gpu_times, "plan_of", lambda *_, **__: raising())
    rows = dict(gpu_times.sparse(gpu_times.Sizes.of("cpu", "torch")))
    with pytest.raises(RuntimeError):
        rows["radial 0.9"]()
    assert rows["short blocks by head"]()["ms"] > 0


def test_a_part_ends_when_its_time_is_over(run, monkeypatch):
    clock = iter(range(0, 10_000, 20))
    monkeypatch.setattr(bench, "monotonic", lambda: next(clock))
    done = {"ms": 1.0}
    use_part(monkeypatch, "ceilings", *((name, lambda: done) for name in "abc"))
    use_part(monkeypatch, "windows", *((name, lambda: done) for name in "abc"))
    parts, _ = run("--only", "ceilings,windows", "--seconds", "100")
    # the first part may take a twentieth of the time, the last all of it
    assert parts["ceilings"] == {"the rest": {"left out": "from a on: no time"}}
    assert parts["windows"]["a"] == done and "left out" in parts["windows"]["the rest"]


@pytest.mark.parametrize("error", [math.nan, 0.5, None])
def test_a_check_that_fails_is_told(error, run, monkeypatch):
    compute = raising if error is None else lambda: {"out": error}
    use_part(monkeypatch, "checks", bench.row_of(gpu_checks.Check("a kernel", 0.1, compute)))
    with pytest.raises(SystemExit, match="1 checks failed: a kernel"):
        run("--only", "checks")


def test_every_engine_and_kernel_is_checked():
    names = [check.name for check in gpu_checks.checks("cuda", "triton")]
    assert len(set(names)) == len(names)
    for what in ("triton, blocks", "triton, short blocks", "flex, boxes", "torch, masks"):
        assert any(name.startswith(what) for name in names), what
    for what in ("neighborhood 3d", "block mass", "float32", "float16", "head dim 40"):
        assert any(what in name for name in names), what
    for what in ("int8_qk, masks, bfloat16", "int8, boxes, float16", "same bits twice"):
        assert any(what in name for name in names), what
    # what decides most is known first
    assert all(name.startswith("triton") and "bfloat16" in name for name in names[:8])


def test_published_windows_keep_what_they_kept():
    kept = [math.prod(window) / grid.num_tokens for grid, window, _ in gpu_peers.WINDOWS.values()]
    # as many per cent less as where they were published
    assert [round(100 * (1 - share)) for share in kept] == [91, 90, 92, 77]


def test_it_runs_from_a_checkout_without_what_a_bare_machine_lacks(tmp_path):
    """From another folder, with nothing installed and every large dependency out of reach."""
    for name in ABSENT:
        (tmp_path / f"{name}.py").write_text("raise ModuleNotFoundError(__name__)\n")
    command = [sys.executable, ROOT / "scripts" / "bench_gpu.py", "--device", "cpu"]
    command += ["--only", "dense", "--out", tmp_path]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| train PyTorch's choice |" in (tmp_path / "gpu_trial_on_cpu.md").read_text()


@pytest.fixture
def fake():
    pytest.importorskip("triton")
    return importlib.import_module("benchmarks.fake_gpu").fake_gpu


def test_the_way_to_a_launch_ends_in_a_compiled_kernel(fake, tmp_path, monkeypatch):
    """Forward and backward of bfloat16, with blocks that have gaps: the kernels a GPU would run."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    plan = gpu_checks.plans()["short blocks"]
    leaves = [x.requires_grad_() for x in gpu_checks._inputs(torch.bfloat16, 64, "cpu")[:3]]
    with fake(90) as launches:
        attend(*leaves, plan, backend="triton").sum().backward()
    kernels = [launch.kernel for launch in launches]
    assert kernels == ["forward_kernel", "query_gradient_kernel", "key_gradient_kernel"]
    assert all(launch.num_programs > 0 and launch.shared_bytes for launch in launches)
    assert any(tmp_path.rglob("*.cubin"))
    # afterwards nothing is faked
    with pytest.raises(ValueError, match="the tensors are on cpu"):
        attend(*leaves, plan, backend="triton")


@pytest.mark.slow
def test_all_launches_of_the_checks_compile(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with fake(90) as launches:
        for check in gpu_checks.checks("cpu", "triton"):
            check.run()
    assert len({launch.kernel for launch in launches}) == 7
