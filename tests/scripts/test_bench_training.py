"""The benchmark of training steps times every method and writes a table for each case."""

import json
import sys

import bench_training
import pytest


def test_it_times_steps_of_every_method(tmp_path, monkeypatch, capsys):
    given = ["--out", tmp_path, "--rounds", 1, "--clips", "9x64x64"]
    given += ["--methods", "radial:density=0.3", "vsa:density=0.5", "--rank", 2]
    monkeypatch.setattr(sys, "argv", ["bench", *map(str, given)])
    bench_training.main()
    name = f"training_{bench_training.machine()}"
    report = json.loads((tmp_path / f"{name}.json").read_text())
    assert [table["precision"] for table in report["tables"]] == ["fp32", "bf16"]
    for table in report["tables"]:
        assert table["tokens"] == 3 * 8 * 8 and 0 < table["attention_share"] < 1
        methods = [row["method"] for row in table["rows"]]
        assert methods == ["dense", "radial:density=0.3", "vsa:density=0.5"]
        density = [row["density"] for row in table["rows"]]
        assert density[0] == 1 and max(density[1:]) < 1
        assert all(row["seconds"] > 0 for row in table["rows"])
    text = (tmp_path / f"{name}.md").read_text()
    assert "## 9 frames of 64x64, 192 tokens, bf16" in text and text in capsys.readouterr().out


def test_an_unknown_method_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "--out", str(tmp_path), "--methods", "radiel"])
    with pytest.raises(SystemExit):
        bench_training.main()
    assert "radiel" in capsys.readouterr().err and not list(tmp_path.iterdir())
