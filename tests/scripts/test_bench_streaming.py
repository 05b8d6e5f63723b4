"""The benchmark of streaming measures every policy once."""

import json
import sys

import bench_streaming
import pytest

from tests.commands.cli_cases import tiny_wan
from vidattn.pipelines.streaming.recipe import Recipe


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Runs the program on a model of random weights."""
    pipe = tiny_wan()
    recipe = Recipe(chunk=1, times=(1000.0,), size=(32, 32))
    pipe.transformer.register_to_config(**recipe.to_config())
    pipe.save_pretrained(tmp_path / "model")

    def bench(*policies):
        words = ["--model", tmp_path / "model", "--out", tmp_path, "--latents", 14, "--full", 6]
        argv = ["bench_streaming.py", *map(str, words), "--policies", *policies]
        monkeypatch.setattr(sys, "argv", argv)
        bench_streaming.main()
        return json.loads((tmp_path / "streaming.json").read_text())

    return bench


def test_policies_are_measured_once(bench, tmp_path, monkeypatch):
    small = "rolling:window=5,sink=1"
    rows = {row["policy"]: row for row in bench(small)["rows"]}
    assert list(rows) == ["full", small]
    assert [len(row["ms"]) for row in rows.values()] == [6, 14]
    assert rows["full"]["tokens"] == [16 * (i + 1) for i in range(6)]
    assert rows[small]["tokens"][-1] == 4 * 16 and 5 < rows[small]["psnr"] < 99
    page = (tmp_path / "streaming.md").read_text()
    assert f"| `{small}` |" in page and (tmp_path / "streaming.png").stat().st_size > 5000
    ran, run = [], bench_streaming.run
    monkeypatch.setattr(bench_streaming, "run", lambda *x: ran.append(x[1]) or run(*x))
    assert bench(small)["rows"] == list(rows.values()) and ran == []
    bench(small, "ema_sink:window=5,sink=1")
    # the reference is made again for what is new
    assert ran == ["full", "ema_sink:window=5,sink=1"]


def test_drift_is_that_of_the_last_third():
    assert bench_streaming.drift([9, 9, 9, 1, 1, 1, 1.1, 1.1, 1.1]) == pytest.approx(0.1)
