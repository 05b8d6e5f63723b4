"""`vidattn tune` and `vidattn calibrate` on a pipeline of random weights."""

import json

import pytest
import torch

from tests.commands.cli_cases import SMALL, run
from vidattn.commands.tune import reach
from vidattn.methods import create_method
from vidattn.methods.dense import Dense
from vidattn.pipelines.tuning import Losses
from vidattn.planning.calibration import load_calibration
from vidattn.schedule import DenseGuard, Model
from vidattn.schedule_file import load_schedule


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red boot\n\n  a boot \n")
    return path


def test_a_budget_is_met_and_the_schedule_runs(original, prompts, capfd, tmp_path):
    path = tmp_path / "tuned.yaml"
    code, out, err = run(
        capfd, "tune", "--model", original, "--prompts", prompts, "--budget", "density=0.4",
        "--method", "topk", "--method", "neighborhood:window=3", "--looks", "1",
        "--dense-steps", "1", "--output", path, *SMALL,
    )  # fmt: skip
    assert code == 0, err
    schedule = load_schedule(path)
    assert schedule.guard == DenseGuard(1, 1)
    assert schedule.model == Model("WanTransformer3DModel", 3, 2)
    assert {layer for rule in schedule.rules for layer in rule.layers} <= {1, 2}
    assert path.read_text().startswith("# vidattn tune --model") and "on 2 prompts" in out
    code, _, err = run(
        capfd, "generate", "a boot", "--model", original, "--schedule", path,
        "--output", tmp_path / "x.mp4", *SMALL,
    )  # fmt: skip
    assert code == 0, err
    layers = json.loads((tmp_path / "x.json").read_text())["report"]["layers"]
    assert layers[0]["density"] is None
    density = sum(layer["density"] or 1.0 for layer in layers[1:]) / 2
    assert density <= 0.45


def test_calibration_is_written_and_used(original, prompts, capfd, tmp_path):
    path = tmp_path / "paro.safetensors"
    code, _, err = run(
        capfd, "calibrate", "--model", original, "--prompts", prompts, "--density", "0.3",
        "--early", "2", "--block", "16", "--output", path, *SMALL,
    )  # fmt: skip
    assert code == 0, err
    found = load_calibration(path)
    assert found.size == (3, 6, 8) and found.masks.shape == (2, 3, 2, 9, 9)
    code, _, err = run(
        capfd, "generate", "a boot", "--model", original, "--method", f"paro:calibration={path}",
        "--output", tmp_path / "x.mp4", *SMALL,
    )  # fmt: skip
    assert code == 0, err
    layers = json.loads((tmp_path / "x.json").read_text())["report"]["layers"]
    assert 0.25 < layers[1]["density"] < 0.45


def losses():
    """One layer of four heads, two methods and dense attention."""
    methods = [create_method("topk", density=x) for x in (0.2, 0.5)]
    densities = torch.tensor([0.2, 0.5, 1.0])[:, None, None].expand(3, 1, 4)
    errors = (1 - densities) * torch.tensor([4.0, 1.0, 2.0, 3.0])
    places, models = (("transformer", 0),), {"transformer": Model("X", 1, 4)}
    return Losses((*methods, Dense()), places, errors, densities, densities, {}, models)


@pytest.mark.parametrize("target", [11.0, 20.0, 27.0])
def test_a_target_is_met_with_the_least_density(target):
    tried = []

    def likeness_db(schedule):
        parts = schedule.parts("transformer", 0, num_heads=4)
        heads = [len(part.heads or range(4)) for part in parts]
        density = sum(getattr(p.method, "density", 1.0) * n for p, n in zip(parts, heads)) / 4
        tried.append(10 + 20 * density)
        return tried[-1]

    choice = reach(target, losses(), DenseGuard(), likeness_db)
    density = losses().mean(losses().densities, choice)
    assert 10 + 20 * density >= target and len(tried) <= 5
    sparser = losses().choose(max(density - 1 / 16, 0.2))
    assert target == 11.0 or 10 + 20 * losses().mean(losses().densities, sparser) < target


def test_a_target_beyond_reach():
    with pytest.raises(ValueError, match="no mix below a density of 0.97 reaches 40 dB"):
        reach(40.0, losses(), DenseGuard(), lambda schedule: 39.9)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--budget density=0.25 --prompts {empty}", "'{empty}' is empty: write one prompt"),
        ("--budget density=0.25 --prompts {empty}x", "--prompts '{empty}x' cannot be read"),
        ("--budget 0.25 --prompts {prompts}", "--budget must be density=X"),
        ("--budget density=0 --prompts {prompts}", "a density above 0 and at most 1, got 0"),
        ("--target ssim=1 --prompts {prompts}", "--target must be psnr=X"),
        ("--target psnr=-3 --prompts {prompts}", "from 0 to 100 dB, got -3"),
        ("--budget density=0.3 --method topp --prompts {prompts}", "did you mean 'topk'"),
        ("--prompts {prompts}", "one of the arguments --budget --target is required"),
    ],
)
def test_mistakes_are_named_before_the_model_is_loaded(flags, words, prompts, capfd, tmp_path):
    (tmp_path / "empty").write_text("\n \n")
    names = {"prompts": prompts, "empty": tmp_path / "empty"}
    flags = [flag.format(**names) for flag in flags.split()]
    code, _, err = run(capfd, "tune", "--model", tmp_path / "none", *flags)
    assert code != 0 and words.format(**names) in err


def test_a_budget_that_no_method_meets_is_named_before_the_runs(original, prompts, capfd, tmp_path):
    code, _, err = run(
        capfd, "tune", "--model", original, "--prompts", prompts, "--budget", "density=0.05",
        "--method", "neighborhood:window=5", "--output", tmp_path / "x.yaml", *SMALL,
    )  # fmt: skip
    assert code != 0 and "density of 0.05 or less, the sparsest have" in err
    assert not (tmp_path / "x.yaml").exists() and "measuring methods" not in err


def test_learned_methods_are_for_whole_layers(original, prompts, capfd, tmp_path):
    argv = ("--model", original, "--prompts", prompts, "--budget", "density=0.5", *SMALL)
    code, _, err = run(capfd, "tune", *argv, "--method", "vsa", "--output", tmp_path / "x.yaml")
    assert code != 0 and "tune gives every head a method of its own" in err
    assert not list(tmp_path.glob("x*"))
