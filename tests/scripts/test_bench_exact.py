"""The benchmarks of full attention, and of types, write their tables."""

import json
import sys

import bench_exact
import bench_types
import pytest
import torch

from vidattn.kernels.cpp import compiler
from vidattn.kernels.cpp.processor import instruction_set


@pytest.mark.skipif(compiler.find_compiler() is None, reason="needs a C++ compiler")
def test_it_times_both_engines_and_models(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_exact, "SHAPES", [(1, 2, 64), (1, 1, 512)])
    monkeypatch.setattr(bench_exact, "IMAGES", 1)
    monkeypatch.setattr(bench_exact, "VITS", {"vit_tiny_patch16_224": 224})
    given = ["--out", tmp_path, "--rounds", 1, "--most-tokens", 100]
    given += ["--models", "vit_tiny_patch16_224"]
    monkeypatch.setattr(sys, "argv", ["bench", *map(str, given)])
    bench_exact.main()
    name = f"exact_{instruction_set(torch.bfloat16)}"
    report = json.loads((tmp_path / f"{name}.json").read_text())
    assert [row["shape"] for row in report["rows"]] == [[1, 2, 64]] * 4
    assert all(row["forward_on"] == "pytorch" for row in report["rows"])
    assert all(min(row["train_ms"].values()) > 0 for row in report["rows"] + report["models"])
    assert (tmp_path / f"{name}.md").read_text() in capsys.readouterr().out


def test_types_are_compared_with_the_first(tmp_path, monkeypatch):
    small = ["--out", tmp_path, "--rounds", 1, "--frames", 5, "--size", 32, "--steps", 2]
    monkeypatch.setattr(sys, "argv", ["bench", *map(str, small)])
    settings = [bench_types.SETTINGS[i] for i in (0, 1, -1)]
    monkeypatch.setattr(bench_types, "SETTINGS", settings)
    bench_types.main()
    name = f"types_{instruction_set(torch.bfloat16)}"
    rows = json.loads((tmp_path / f"{name}.json").read_text())["rows"]
    assert rows[0]["psnr"] >= 100 > rows[1]["psnr"] > 40 and rows[0]["engines"]["dense"]
    text = (tmp_path / f"{name}.md").read_text()
    assert "| float32 | float32 | usual | `dense` |" in text
    assert "| 1.00x | dense on pytorch |" in text
