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

    def bench(*policies, more=()):
        words = ["--model", tmp_path / "model", "--out", tmp_path, "--latents", 14, "--full", 6]
        argv = ["bench_streaming.py", *map(str, words), *more, "--policies", *policies]
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


def test_a_run_ends_in_time_and_the_next_one_goes_on(bench, capfd):
    small = "rolling:window=5,sink=1"
    # no time for more than the shortest video
    rows = bench(small, more=("--minutes", "1e-9"))["rows"]
    assert [(row["policy"], row["latents"], row["is_cut"]) for row in rows] == [("full", 2, True)]
    assert f"no time left for {small}" in capfd.readouterr().out
    rows = bench(small)["rows"]
    assert [(row["latents"], row["is_cut"]) for row in rows] == [(6, False), (14, False)]


def test_the_judge_sees_the_last_clips(bench, monkeypatch):
    world = bench_streaming.load_world("emoji")
    scene, seen = world.held_out_prompts()[0], []

    class Witness:
        ASPECTS = ("motion", "thing")

        def load_classifier(self, path):
            return path.name

        def look(self, video, classifier):
            assert classifier == "judge.safetensors" and 0 <= video.min() < video.max() <= 1
            seen.append(video.shape)
            return {"motion": "left", "thing": "cup"}

        def right(self, scene, aspect, what):
            return aspect == "thing"

    monkeypatch.setattr(bench_streaming, "load_witness", lambda name: Witness())
    more = ("--world", "emoji", "--prompt", scene.caption)
    rows = bench("rolling:window=5,sink=1", more=more)["rows"]
    # 53 frames have one clip of 33 at their end, and the 21 of full none
    assert [row["judge"] for row in rows] == [None, 0.5] and seen == [(33, 32, 32, 3)]
    with pytest.raises(ValueError, match="must be one of the world's"):
        bench("rolling:window=6,sink=1", more=("--world", "emoji"))


def test_drift_is_that_of_the_last_third():
    assert bench_streaming.drift([9, 9, 9, 1, 1, 1, 1.1, 1.1, 1.1]) == pytest.approx(0.1)
