"""Small models trained from scratch: every method sees the same, and what is done is kept."""

import json
import sys

import bench_from_scratch as bench
import pytest

from tests.scripts import world_cases as cases


def test_a_window_of_everything_learns_what_dense_attention_does(tmp_path, monkeypatch, capsys):
    data = cases.write_sprites(tmp_path / "sprites")
    given = ["--out", tmp_path / "out", "--work", tmp_path / "work", "--data", data]
    given += ["--size", 5, 48, 48, "--clips", 4, "--held-out", 2, "--steps", 3, "--seeds", 2]
    given += ["--layers", 1, "--heads", 1]
    methods = ["--methods", "neighborhood:window=99", "radial:density=0.3"]
    monkeypatch.setattr(sys, "argv", ["bench", *map(str, given + methods[:2])])
    bench.main()
    steps = []
    monkeypatch.setattr(bench.Run, "held_out_loss", lambda *given: steps.append(given) or 7.0)
    monkeypatch.setattr(sys, "argv", ["bench", *map(str, given + methods)])
    bench.main()
    # the second call trained the new method alone
    assert len(steps) == 2
    rows = json.loads((tmp_path / "out/from_scratch.json").read_text())["rows"]
    dense, window, radial = rows
    assert dense["losses"] == pytest.approx(window["losses"], abs=2e-3)
    assert dense["losses"][0] != pytest.approx(dense["losses"][1], abs=2e-3)
    assert radial["losses"] == [7.0, 7.0] and radial["density"] < 1 == window["density"]
    text = (tmp_path / "out/from_scratch.md").read_text()
    assert "of 72 tokens each" in text and text in capsys.readouterr().out
