"""What is settled before weights are loaded: the method, the grid, words and sizes unknown."""

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel

from tests.commands.cli_cases import SMALL, run
from vidattn.grid import Grid
from vidattn.methods.paro import Paro
from vidattn.methods.radial import Radial
from vidattn.runs.choices import AllMethods
from vidattn.runs.clip import Guards
from vidattn.runs.request import Request
from vidattn.runs.serve import Outlook, foresee


class Loaded(Exception):
    """Weights were about to be loaded."""


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    """A command that loads weights fails otherwise than with a ValueError."""

    def load(*_, **__):
        raise Loaded

    monkeypatch.setattr("vidattn.runs.serve.load_pipeline", load)


def refuse(grid):
    raise ValueError(f"it cannot serve {grid.size}")


@pytest.mark.parametrize(
    "line",
    [
        "generate a --method radial --output {tmp}/x.mp4",
        "generate a --schedule {tmp}/radial.yaml --output {tmp}/x.mp4",
        "compare a --method topk --method radial --output {tmp}",
        "compare a --method topk --schedule {tmp}/radial.yaml --output {tmp}",
        "tune --prompts {tmp}/radial.yaml --budget density=1 --method radial --output {tmp}/y.yml",
        "calibrate --prompts {tmp}/radial.yaml --output {tmp}/p.safetensors",
    ],
)
def test_a_method_that_cannot_serve_is_refused_before_anything_is_loaded(
    original, line, capfd, tmp_path, monkeypatch, nothing_is_loaded
):
    (tmp_path / "radial.yaml").write_text("rules:\n- {method: radial}\n")
    for method in (Radial, Paro):
        monkeypatch.setattr(method, "check", lambda self, grid: refuse(grid))
    words = [word.format(tmp=tmp_path) for word in line.split()]
    code, _, err = run(capfd, *words, "--model", original, *SMALL)
    assert code == 2 and "it cannot serve (3, 6, 8)" in err
    # it does get that far otherwise
    for method in (Radial, Paro):
        monkeypatch.setattr(method, "check", lambda self, grid: None)
    assert "Loaded" in run(capfd, *words, "--model", original, *SMALL)[2]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--method", "radial:density=2"), "density must be above 0 and at most 1, got 2.0"),
        (("--schedule", "ltx-2"), "it was made for transformer LTX2VideoTransformer3DModel"),
        (("--dense-steps", "0.5", "--frames", "10"), "it must be 4n + 1; the nearest are 9 and 13"),
    ],
)
def test_what_needs_no_weights_is_checked_without(
    original, flags, words, capfd, tmp_path, nothing_is_loaded
):
    argv = ("a", "--model", original, "--output", tmp_path / "x.mp4", *SMALL, *flags)
    code, _, err = run(capfd, "generate", *argv)
    assert code == 2 and words in err


def test_all_methods_get_one_density(original, capfd, tmp_path, monkeypatch, nothing_is_loaded):
    names = ["freeswim", "neighborhood", "radial", "svg", "topk"]
    monkeypatch.setattr("vidattn.runs.serve.list_sparse_methods", lambda: names)
    monkeypatch.setattr(Radial, "check", lambda self, grid: refuse(grid))
    args = SimpleNamespace(model=str(original), device="auto", offload="none")
    outlook = foresee(args, [Request("a", num_frames=9, height=48, width=64)])
    found, left_out = outlook.everything(AllMethods(0.25), Guards())
    assert outlook.grid.size == (3, 6, 8)
    assert [choice.label for choice in found] == [
        "freeswim:window=3,4,sharpen=false", "neighborhood:window=2,4,5", "svg:density=0.25",
        "topk:density=0.25",
    ]  # fmt: skip
    assert left_out == {"radial:density=0.25": "it cannot serve (3, 6, 8)"}
    assert all(0.1 < x.create().plan(outlook.grid).density < 0.5 for x in found[:2])
    found, _ = outlook.everything(AllMethods(), Guards())
    assert [choice.label for choice in found] == ["freeswim", "neighborhood", "svg", "topk"]


def test_without_a_method_the_default_is_taken_and_said(original, capfd, tmp_path):
    path = tmp_path / "x.mp4"
    argv = ("a red boot", "--model", original, "--output", path, *SMALL)
    code, out, err = run(capfd, "generate", *argv)
    assert code == 0, err
    assert "no method given, and no preset for this model: taking radial:density=0.3" in out
    assert json.loads(path.with_suffix(".json").read_text())["method"] == "radial:density=0.3"


def test_the_preset_of_a_published_model_is_taken_and_said(capfd):
    with torch.device("meta"):
        transformer = WanTransformer3DModel(num_attention_heads=12, num_layers=30)
        pipe = WanPipeline(None, None, AutoencoderKLWan(), None, transformer)
    outlook = Outlook(pipe, [], Grid(21, 30, 52))
    preset = outlook.default()
    assert preset.label == "schedule 'wan2.1-1.3b'" and preset.arguments == {}
    assert "taking the preset of this model, schedule 'wan2.1-1.3b'" in capfd.readouterr().out
    outlook.check(preset, Guards())


def test_words_and_sizes_that_the_model_does_not_know_are_warned_of(model, capfd, tmp_path):
    head = "---\nvidattn: {prompt: a boot, sizes: [[9, 48, 64], [5, 48, 64]]}\n---\n"
    (model / "README.md").write_text(head)
    argv = ("--model", model, "--method", "topk", "--output", tmp_path / "x.mp4", *SMALL)
    _, _, err = run(capfd, "generate", "a red cat, a Boot", *argv)
    assert "warning: the model does not know 'cat', 'Boot': its" in " ".join(err.split())
    assert "not trained" not in err
    _, _, err = run(capfd, "generate", *argv, "--frames", "13")
    words = " ".join(err.split())
    assert "not trained at 13x48x64 (frames x height x width) but at 9x48x64, 5x48x64" in words
    assert "does not know" not in words


def test_the_default_output_is_never_written_over(original, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("video", "video-2"):
        argv = ("a", "--model", original, "--method", "topk", *SMALL)
        code, out, err = run(capfd, "generate", *argv)
        assert code == 0 and f"wrote outputs/{name}.mp4 and outputs/{name}.json" in out, err
    files = {path.name for path in (tmp_path / "outputs").iterdir()}
    assert files == {"video.mp4", "video.json", "video-2.mp4", "video-2.json"}
