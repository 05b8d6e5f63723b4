"""The comparison with NATTEN, which a slow twin stands for."""

import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import bench_natten as bench
import pytest
import torch

from vidattn.kernels.cpp.processor import instruction_set
from vidattn.neighborhood import neighborhood_attention

ROOT = Path(__file__).parents[2]


def slow(q, k, v, kernel_size, wider=0):
    window = (kernel_size[0] + wider, *kernel_size[1:])
    options = {"layout": "heads_last", "backend": "reference"}
    return neighborhood_attention(q, k, v, window, **options).to(q.dtype)


def test_without_the_peer_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "natten", None)
    monkeypatch.setattr(sys, "argv", ["bench"])
    with pytest.raises(SystemExit, match="NATTEN, which is not installed: pip install"):
        bench.main()


def test_it_writes_both_files(monkeypatch, tmp_path):
    peer = SimpleNamespace(na3d=slow, __version__="0.0")
    monkeypatch.setitem(sys.modules, "natten", peer)
    monkeypatch.setattr(bench, "SIZE", (3, 7, 5))
    monkeypatch.setattr(bench, "WINDOW", (2, 3, 3))
    monkeypatch.setattr(bench.torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(sys, "argv", ["bench", "--rounds", "1", "--out", str(tmp_path)])
    bench.main()
    name = f"natten_{instruction_set(torch.bfloat16)}"
    report = json.loads((tmp_path / f"{name}.json").read_text())
    assert 0 < report["error"] < 1e-6
    peer_ms = report["rows"][bench.NATTEN]["cpu_ms"]
    for row in report["rows"].values():
        assert row["cpu_ms"] > 0 and row["times_natten"] == pytest.approx(peer_ms / row["cpu_ms"])
    text = (tmp_path / f"{name}.md").read_text()
    assert "3x7x5 = 105 tokens, window 2x3x3" in text
    assert all(f"| {label} |" in text for label in report["rows"])


def test_another_window_is_another_output():
    report = bench.measure(partial(slow, wider=1), (3, 7, 5), (2, 3, 3), 1)
    assert report["error"] > 0.1
