"""Tuning a sparse pipeline with low-rank adapters: what is trained, and what is written."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
sys.path.insert(0, str(Path(__file__).parent))
program = importlib.import_module("lora_t2v")
write_items = importlib.import_module("test_t2v_data").write_items


def test_adapters_alone_are_trained_and_can_be_loaded_again(tmp_path, monkeypatch, capsys):
    write_items(tmp_path / "data")
    out, model = tmp_path / "out", str(ROOT / "assets" / "tiny-t2v")
    flags = {"steps": 3, "clips": 2, "frames": 17, "side": 64, "prompts": 1, "sampling-steps": 2}
    flags |= {"data": tmp_path / "data", "out": out, "model": model, "peak": 0.01, "rank": 2}
    words = [str(x) for name, value in flags.items() for x in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["lora_t2v.py", *words])
    monkeypatch.setattr(program, "NUM_TEST_CLIPS", 1)
    program.main()
    before, _, after = capsys.readouterr().out.splitlines()[:3]
    assert before.startswith("before: loss 0.") and after.startswith("after: loss 0.")
    assert before.split()[2] != after.split()[2]

    pipe = WanPipeline.from_pretrained(model)
    weights = {name: x.clone() for name, x in pipe.transformer.state_dict().items()}
    pipe.load_lora_weights(out)
    found = pipe.transformer.state_dict()
    for name, x in weights.items():
        # adapted layers stand one level deeper
        own = found.get(name, found.get(name.replace(".weight", ".base_layer.weight")))
        own = found[name.replace(".bias", ".base_layer.bias")] if own is None else own
        assert torch.equal(own, x)
    adapters = [x for name, x in found.items() if "lora_B" in name]
    assert len(adapters) == 24 and all(x.abs().sum() > 0 for x in adapters)


def test_bad_flags_are_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lora_t2v.py", "--rank", "0"])
    with pytest.raises(SystemExit):
        program.parse()
