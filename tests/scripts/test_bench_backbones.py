"""The benchmark of vision backbones: its settings are what they say, and it writes its figures."""

import json
import sys
from pathlib import Path

import bench_backbones as bench
import pytest
import timm
import torch

from vidattn.backbones.faster.windows import FasterSwinBlock
from vidattn.backbones.layers.neighborhood_attention import NeighborhoodAttention2d

ROOT = Path(__file__).parents[2]


@pytest.fixture
def small(monkeypatch):
    """Two small models in place of those that are timed."""
    swin = bench.Family("swin_tiny_patch4_window7_224", ("plain", "fused", bench.OURS), True)
    monkeypatch.setattr(bench, "FAMILIES", {bench.SWIN: swin})
    monkeypatch.setattr(bench, "MODELS", ("resnet10t", bench.NATTEN))
    monkeypatch.setattr(bench, "find_spec", lambda name: name != "natten")
    own = timm.create_model

    def create(name, **options):
        sizes = {"depths": (1, 1), "embed_dim": 32, "num_heads": (1, 2)} if "swin" in name else {}
        return own(name, **options, **sizes)

    monkeypatch.setattr(bench.timm, "create_model", create)


def test_it_writes_both_files(small, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["bench", "--quick", "--out", str(tmp_path)])
    bench.main()
    report = json.loads((tmp_path / "backbones_quick.json").read_text())
    text = (tmp_path / "backbones_quick.md").read_text()
    lines = ["resnet10t", "swin_tiny, plain", "swin_tiny, fused", "swin_tiny, accelerated"]
    assert [row["model"] for row in report["rows"]] == lines
    speeds = [row[name] for row in report["rows"] for name in ("forward", "train")]
    assert min(speeds) > 0 and {row["size"] for row in report["rows"]} == {64}
    found = [(row["model"], row["other"]) for row in report["ratios"]]
    assert found == [(lines[-1], "swin_tiny, timm"), ("resnet10t", "swin_tiny, timm")]
    assert all(f"| {line} |" in text for line in lines)


def test_settings_are_what_they_say(small):
    blocks = {}
    for setting in bench.FAMILIES["swin_tiny"].settings:
        model = bench.create(f"swin_tiny, {setting}", 64)
        block = model.layers[0].blocks[0]
        is_accelerated = isinstance(vars(block).get("_attn"), FasterSwinBlock)
        blocks[setting] = is_accelerated, block.attn.fused_attn, block.window_size
    assert blocks == {
        "plain": (False, False, (7, 7)),
        "fused": (False, True, (7, 7)),
        bench.OURS: (True, False, (7, 7)),
    }


def test_natten_takes_over_the_windows():
    model = bench.create(bench.NATTEN, 224)
    kinds = [type(x) for x in model.modules() if isinstance(x, NeighborhoodAttention2d)]
    assert set(kinds) == {bench.NattenAttention}
    assert bench.NATTEN not in bench.labels(64) + bench.labels(448)


def test_images_fit_the_models():
    assert [bench.edge("halonet26t, plain", size) for size in (224, 256, 448)] == [256, 256, 512]
    assert bench.edge("swin_tiny, plain", 224) == bench.edge("dinat_tiny", 224) == 224


def test_ratios_are_medians_beside_the_faster_setting():
    times = {
        ("swin_tiny, plain", "forward"): [4.0, 6.0, 8.0],
        ("swin_tiny, fused", "forward"): [9.0, 9.0, 1.0],
        ("swin_tiny, accelerated", "forward"): [2.0, 2.0, 8.0],
    }
    row = bench.ratio(times, "swin_tiny, accelerated", "swin_tiny", 224)
    assert row["other"] == "swin_tiny, timm" and row["size"] == 224
    assert row["forward"] == pytest.approx(2.0) and row["train"] is None
    other = bench.ratio(times, "swin_tiny, plain", "swin_tiny, fused", 224)
    assert other["other"] == "swin_tiny, fused" and other["forward"] == pytest.approx(1.5)


def test_cpu_time_is_used_on_one_thread():
    before = torch.get_num_threads()
    try:
        for threads, clock in ((1, "CPU time"), (2, "wall time")):
            torch.set_num_threads(threads)
            assert bench.clock_name() == clock
    finally:
        torch.set_num_threads(before)
