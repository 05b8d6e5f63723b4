"""`vidattn generate` and `vidattn compare` on a pipeline of random weights, Ctrl-C included."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.commands.cli_cases import SMALL, WEIGHTS, frames_of, run

ROOT = Path(__file__).resolve().parents[2]


def test_generate_writes_a_video_and_what_made_it(original, capfd, tmp_path):
    path = tmp_path / "out" / "boot.mp4"
    code, out, err = run(
        capfd, "generate", "a red boot", "--model", original, "--method", "radial", "--near", "0",
        "--no-sink", "--dense-steps", "1", "--output", path, *SMALL,
    )  # fmt: skip
    assert code == 0, err
    assert str(path) in out and "radial" in err
    frames, meta = frames_of(path)
    assert len(frames) == 9 and frames[0].shape == (48, 64, 3) and meta["fps"] == 8
    report = json.loads(path.with_suffix(".json").read_text())
    assert report["method"] == "radial:near=0,sink=false"
    assert report["request"]["prompt"] == "a red boot" and report["request"]["seed"] == 0
    assert report["request"]["guidance_scale"] == 5.0, "defaults of the pipeline belong in it too"
    assert torch.__version__.startswith(report["versions"]["torch"]) and report["hardware"]["cpu"]
    assert report["dense_layers"] == 1 and report["dense_steps"] == 1
    assert len(report["timing"]["steps_ms"]) == 3
    # 3 steps, 2 passes each; the first layer and the first step stay dense
    assert [layer["num_sparse"] for layer in report["report"]["layers"]] == [0, 4, 4]
    assert {x.name for x in path.parent.iterdir()} == {"boot.mp4", "boot.json"}


def test_a_video_above_the_trained_size(original, capfd, tmp_path):
    path = tmp_path / "large.mp4"
    argv = ("a red boot", "--model", original, "--target", "90x130", "--output", path, *SMALL)
    code, _, err = run(capfd, "generate", *argv, "--strength", "0.67")
    assert code == 0, err
    frames, _ = frames_of(path)
    assert len(frames) == 9 and frames[0].shape == (90, 130, 3)
    report = json.loads(path.with_suffix(".json").read_text())
    assert report["method"] == "freeswim" and report["target"] == [90, 130]
    # 3 steps at 48 x 64, of which two thirds again; the full path in the first of them
    assert len(report["timing"]["steps_ms"]) == 5
    first = report["report"]["layers"][0]
    assert first["num_sparse"] == 4 and first["num_dense"] == {"full path": 1}


def test_a_guided_video(original, capfd, tmp_path):
    paths = [tmp_path / name for name in ("plain.mp4", "pag.mp4", "motion.mp4")]
    guides = ([], ["--guide", "softpag:heads=1:0,2,scale=2"], ["--guide", "broadway:motion=9"])
    for path, guide in zip(paths, guides):
        argv = ("a boot", "--model", original, "--method", "radial", "--output", path, *SMALL)
        code, _, err = run(capfd, "generate", *argv, *guide)
        assert code == 0, err
    assert len({path.read_bytes() for path in paths}) == 3
    reports = [json.loads(path.with_suffix(".json").read_text()) for path in paths]
    labels = [None, "softpag:heads=1:0,2,scale=2.0", "broadway:motion=9.0"]
    assert [x["guide"] for x in reports] == labels
    # a pass more in each step; the first of 3 is dense
    passes = [x["report"]["layers"][2]["num_sparse"] for x in reports]
    assert passes == [4, 6, 4] and reports[0]["method"].startswith("radial")


def test_a_seed_makes_the_same_video(original, capfd, tmp_path):
    paths = [tmp_path / f"{i}.mp4" for i in range(3)]
    for path, seed in zip(paths, (5, 5, 6)):
        argv = ("a", "--model", original, "--seed", seed, "--output", path, *SMALL)
        assert run(capfd, "generate", *argv)[0] == 0
    same, again, other = (path.read_bytes() for path in paths)
    assert same == again != other


def test_compare_shows_methods_beside_dense(original, capfd, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    folder = tmp_path / "compare"
    code, out, err = run(
        capfd, "compare", "a red boot", "a boot", "--model", original, "--gif",
        "--method", "neighborhood:window=99", "--method", "radial:near=0,sink=no,decay=0.1",
        "--output", folder, "--dense-layers", "0", "--dense-steps", "0", *SMALL,
    )  # fmt: skip
    assert code == 0, err
    report = json.loads((folder / "report.json").read_text())
    dense, whole, radial = report["methods"].values()
    assert list(report["methods"])[0] == "dense" and report["prompts"] == ["a red boot", "a boot"]
    assert dense["psnr_db"] == 100 and dense["ssim"] == pytest.approx(1)
    assert whole["density"] == 1 and whole["psnr_db"] > 90, "a window over everything is dense"
    assert radial["density"] == radial["density_in_all"] < 0.9
    assert radial["psnr_db"] < whole["psnr_db"]
    assert 0 < dense["attention_share"] < 1
    assert all(row["step_ms"] > 0 and len(row["clips"]) == 2 for row in report["methods"].values())
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "report.json", "report.md", "side_by_side.mp4", "side_by_side.gif",
        "dense-1.mp4", "dense-2.mp4",
        "neighborhood-window=99-1.mp4", "neighborhood-window=99-2.mp4",
        "radial-near=0,sink=false,decay=0.1-1.mp4", "radial-near=0,sink=false,decay=0.1-2.mp4",
    }  # fmt: skip
    frames, _ = frames_of(folder / "side_by_side.mp4")
    assert len(frames) == 9 and frames[0].shape[1] > 3 * 256 and frames[0].shape[0] > 2 * 192
    table = (folder / "report.md").read_text()
    assert table.count("|\n") == 5 and "`neighborhood:window=99`" in table and "Grid(" not in table
    shown = [line for line in out.splitlines() if str(tmp_path) not in line]
    assert shown and max(map(len, shown)) <= 80
    words = " ".join(out.split())
    assert "speed-up" in words and "of a dense step; the sparse ones ran on the engine" in words
    assert dense["engines"] == {} and sum(radial["engines"].values()) > 0
    assert "144 video tokens (3x6x8)" in words


def test_a_schedule_is_made_and_compared(original, capfd, tmp_path):
    schedule, folder = tmp_path / "mine.yaml", tmp_path / "out"
    schedule.write_text(
        "dense_layers: 0\n"
        "rules:\n"
        "- {layers: 1, heads: 0, method: radial, options: {near: 0, sink: false, decay: 0.1}}\n"
        "- {layers: 1-2, steps: [0.5, null], method: neighborhood, options: {window: 3}}\n"
    )
    given = ("--model", original, "--schedule", schedule, *SMALL)
    code, out, err = run(capfd, "compare", "a", "--output", folder, *given)
    assert code == 0, err
    report = json.loads((folder / "report.json").read_text())
    assert list(report["methods"]) == ["dense", f"schedule:{schedule}"]
    mine = report["methods"][f"schedule:{schedule}"]["clips"][0]["report"]
    assert (mine["dense_layers"], mine["dense_steps"]) == (0, 0)
    calls = [(layer["num_sparse"], layer["num_dense"]) for layer in mine["layers"]]
    assert calls == [(0, {"dense method": 6}), (6, {}), (2, {"dense method": 4})]
    # the guards on the command line win over those in the file
    code, out, err = run(
        capfd, "generate", "a", "--dense-steps", "2", "--output", tmp_path / "x.mp4", *given
    )
    assert code == 0, err
    report = json.loads((tmp_path / "x.json").read_text())
    assert (report["dense_layers"], report["dense_steps"]) == (0, 2)
    assert report["method"] == f"schedule:{schedule}" and "neighborhood:window=3 on head 1" in err


def test_compare_runs_every_method_and_leaves_out_what_cannot(
    original, capfd, tmp_path, monkeypatch
):
    monkeypatch.setattr("vidattn.runs.serve.list_sparse_methods", lambda: ["radial", "topk"])
    code, out, err = run(
        capfd, "compare", "a red boot", "--model", original, "--output", tmp_path,
        "--method", "all:density=0.001", "--metrics", "ssim,psnr,ms-ssim", *SMALL,
        "--frames", "5", "--steps", "2",
    )  # fmt: skip
    assert code == 0, err
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["methods"]) == ["dense", "topk:density=0.001"]
    assert "left out: radial:density=0.001: radial cannot go down" in out
    row = report["methods"]["topk:density=0.001"]
    assert row["ms_ssim"] == pytest.approx(1, abs=0.1) and "lpips" not in row
    head = (tmp_path / "report.md").read_text().splitlines()[0]
    assert head.endswith("| SSIM | PSNR, dB | MS-SSIM |")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--metrics", "psnr,lpisp"), "unknown measure 'lpisp': did you mean 'lpips'?"),
        (("--metrics", "fvd"), "--metrics fvd needs at least 2 clips"),
        (("--metrics", "warp"), "--metrics warp needs frames of at least 128 pixels"),
        (("--metrics", "lpips"), "fetch_metric_weights.py lpips"),
        (("--method", "all:near=1"), "all takes a density and no other option, got 'all:near=1'"),
    ],
)
def test_what_compare_cannot_measure_is_said_before_it_runs(
    original, flags, words, capfd, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    argv = ("a", "--model", original, "--output", tmp_path / "x", *SMALL, *flags)
    code, _, err = run(capfd, "compare", *argv)
    assert code == 2 and words in err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ("--frames", "10"),
            "--frames 10 is not possible with this WanPipeline: it must be 4n + 1",
        ),
        (("--frames", "10"), "it must be 4n + 1; the nearest are 9 and 13"),
        (("--target", "48x64"), "48 x 64 is not above the trained size of 48 x 64"),
        (("--target", "96"), "must be a height and a width such as 1080x1920, got '96'"),
        (("--target", "96x128", "--method", "radial"), "FreeSwim, which does not take --method"),
        (("--target", "96x128", "--guide", "softpag"), "FreeSwim, which does not take --guide"),
        (("--guide", "softpag:heads=9:0"), "heads has '9:0', and the model has layers 0 to 2"),
        (("--guide", "softpag", "--cache", "taylorseer"), "would serve both: leave one out"),
        (("--guide", "broadway:motion=x"), "motion must be a number, got 'x'"),
        (("--strength", "0.5"), "--strength says how much --target makes anew"),
        (("--height", "50"), "a multiple of 16; the nearest are 48 and 64"),
        (("--width", "7"), "a multiple of 16; the nearest are 16"),
        (("--image", __file__), "makes videos from text"),
        (
            ("--method", "radial:density=0.01,near=0"),
            "radial cannot go down to density 0.01",
        ),
    ],
)
def test_what_the_model_cannot_do_is_said_before_it_runs(original, flags, words, capfd, tmp_path):
    argv = ("a", "--model", original, "--output", tmp_path / "x.mp4", *SMALL, *flags)
    code, _, err = run(capfd, "generate", *argv)
    assert code != 0 and words in err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_latents_that_turn_nan_stop_the_run(model, capfd, tmp_path):
    path = model / "transformer" / WEIGHTS
    weights = load_file(path)
    weights["proj_out.bias"][0] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    out = tmp_path / "x.mp4"
    code, _, err = run(capfd, "generate", "a", "--model", model, "--output", out, *SMALL)
    assert code != 0 and "step" in err.splitlines()[-2] and not out.exists()


def test_a_broken_model_folder_is_named(model, capfd, tmp_path):
    def complaint():
        argv = ("a", "--model", model, "--output", tmp_path / "x.mp4", *SMALL)
        code, _, err = run(capfd, "generate", *argv)
        assert code != 0 and str(model) in err and "Traceback" not in err
        return err

    weights = model / "vae" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:100])
    assert "cannot be loaded" in complaint()
    weights.rename(weights.with_name("diffusion_pytorch_model.bin"))
    assert "pickle weights only (diffusion_pytorch_model.bin)" in complaint()
    (model / "vae").rename(model / "vea")
    assert "names 'vae', which is not there" in complaint()
    (model / "model_index.json").write_text("{")
    assert "no valid JSON" in complaint()


def test_a_hub_model_without_network_says_what_to_do(capfd, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    argv = ("a", "--model", "nobody/nothing", "--output", tmp_path / "x.mp4")
    code, _, err = run(capfd, "generate", *argv)
    assert code != 0 and "hf download nobody/nothing --local-dir DIR" in err


def test_ctrl_c_while_writing_leaves_nothing(original, capfd, tmp_path, monkeypatch):
    def interrupted(path, frames, *, fps):
        path.write_bytes(b"half a video")
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("vidattn.commands.generate.write_video", interrupted)
    out = tmp_path / "x.mp4"
    code, _, err = run(capfd, "generate", "a", "--model", original, "--output", out, *SMALL)
    assert code == 130 and "stopped" in err and not list(tmp_path.iterdir())


def test_ctrl_c_in_the_middle_of_a_generation(original, tmp_path):
    out = tmp_path / "x.mp4"
    out.write_bytes(b"the old video")
    process = subprocess.Popen(
        [sys.executable, "-m", "vidattn.cli", "generate", "a", "--model", original, "--output", out,
         *SMALL, "--steps", "100000"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE,
        # a shell that runs us in the background may have made its children deaf to Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    limit = threading.Timer(240, process.kill)
    limit.start()
    seen = b""
    while b"2/100000" not in seen and process.poll() is None:
        seen += process.stderr.read1()
    process.send_signal(signal.SIGINT)
    rest = process.communicate()[1]
    limit.cancel()
    assert process.returncode == 130, (seen + rest).decode()
    assert b"Traceback" not in rest
    assert [path.name for path in tmp_path.iterdir()] == ["x.mp4"]
    assert out.read_bytes() == b"the old video"
