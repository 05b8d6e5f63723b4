"""Whole runs in seconds: what they learn and write, and that a killed one loses nothing."""

import csv
import math
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import train_backbone as program
import validate_backbone as validation
import yaml
from accelerate import Accelerator
from backbone_training import checkpoint as checkpoints
from backbone_training import model as models
from backbone_training import scores
from backbone_training import trainee as trainees
from backbone_training.log import COLUMNS
from peft import PeftModel
from runs import checkpoints as folders
from runs import log as logs
from runs import settings_file as files
from safetensors.torch import load_file

from tests.scripts import backbone_cases as cases
from vidattn.backbones.layers.head_routing import balance_losses

settings = cases.settings
fresh_accelerator = cases.fresh_accelerator


CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "backbones").glob("*.yaml"))


class Killed(BaseException):
    """As abrupt as a signal."""


def die_at(monkeypatch, owner, name: str, call: int, after: bool) -> None:
    """Let a function die at its n-th call, before or after it did its work."""
    function, calls = getattr(owner, name), []

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) != call:
            return function(*args, **kwargs)
        if after:
            function(*args, **kwargs)
        raise Killed

    monkeypatch.setattr(owner, name, dying)


def lines_of(folder: Path) -> list[dict]:
    """The log without the time, which no run repeats."""
    with (folder / "log.csv").open(newline="") as file:
        return [{k: v for k, v in x.items() if k != "seconds"} for x in csv.DictReader(file)]


@pytest.mark.parametrize("model", [cases.VIT, cases.RESNET])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, monkeypatch, model):
    source = cases.write_set(tmp_path / "set.npz")
    changes = {"model": model, "schedule": {"epochs": 3}, "run": {"save_every": 2}}
    whole = cases.make_settings(source, tmp_path / "whole", **changes)
    program.train(whole)
    parts = cases.make_settings(source, tmp_path / "parts", **changes)
    folder = tmp_path / "parts" / "checkpoints"
    # in a step; when all files of a checkpoint are written but it has no name yet; at its end
    for owner, name, call, after, left in (
        (program, "take_step", 4, False, "step-00000002"),
        (program.Accelerator, "save_state", 1, True, "step-00000002"),
        (program, "take_step", 4, True, "step-00000004"),
    ):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            die_at(patch, owner, name, call, after)
            program.train(parts)
        assert folders.find_checkpoint(folder).name == left
    program.train(parts)
    for name in ("best", "last"):
        expected = load_file(tmp_path / "whole" / f"{name}.safetensors")
        found = load_file(tmp_path / "parts" / f"{name}.safetensors")
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert lines_of(tmp_path / "parts") == lines_of(tmp_path / "whole")
    assert [path.name for path in folder.iterdir()] == ["step-00000006"]
    # what is finished takes no step, and still tells its result
    monkeypatch.setattr(program, "take_step", None)
    program.train(parts)


def test_other_settings_do_not_go_on(tmp_path):
    source = cases.write_set(tmp_path / "set.npz")
    program.train(cases.make_settings(source, tmp_path / "out", schedule={"epochs": 1}))
    program.train(
        cases.make_settings(
            source, tmp_path / "out", schedule={"epochs": 1}, run={"save_every": 5, "log_every": 5}
        )
    )
    message = r"optimizer.lr was 0.01, is 0.02; schedule.epochs was 1, is 2. Set them back"
    with pytest.raises(ValueError, match=message):
        program.train(cases.make_settings(source, tmp_path / "out", optimizer={"lr": 0.02}))


@pytest.mark.parametrize("method", ["full", "linear", "probe", "lora"])
def test_every_method_learns_and_its_file_stands_alone(tmp_path, monkeypatch, capsys, method):
    source = cases.write_set(tmp_path / "set.npz", train=48, test=12)
    run = cases.make_settings(
        source,
        tmp_path / "out",
        tune={"method": method, "queries": 4, "rank": 4},
        data={"batch_size": 8},
        augment={"scale": [1, 1], "ratio": [1, 1], "hflip": 0, "mixup": 0, "re_prob": 0},
        optimizer={"lr": 0.02, "layer_decay": 0.9 if method == "full" else None},
        schedule={"epochs": 6},
        run={"accumulate": 1, "evaluate_every": 3},
    )
    program.train(run)
    lines = lines_of(tmp_path / "out")
    losses = [float(line["loss"]) for line in lines]
    assert np.mean(losses[-6:]) < 0.9 * np.mean(losses[:6])
    tested = [line for line in lines if line["top1"]]
    assert [float(line["epoch"]) for line in tested] == [3, 6]
    assert (tmp_path / "out" / "curves.png").stat().st_size > 1000
    file = tmp_path / "out" / "last.safetensors"
    arguments = ["validate", str(file), "--data", str(source), "--json", str(tmp_path / "a.json")]
    monkeypatch.setattr(sys, "argv", arguments)
    validation.main()
    assert f"top-1 {float(tested[-1]['top1']):.2f} %" in capsys.readouterr().out
    found = yaml.safe_load((tmp_path / "a.json").read_text())
    assert found["count"] == 12 and math.isclose(
        found["loss"], float(tested[-1]["test_loss"]), rel_tol=1e-4
    )
    if method == "lora":
        plain = models.create_model(run.model.name, len(cases.CLASSES), 1, run.model.options)
        # the folder of updates loads the way of the library
        PeftModel.from_pretrained(plain, str(tmp_path / "out" / "last-lora"))


def validate_file(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["validate", *map(str, arguments)])
    validation.main()


def test_a_file_from_elsewhere_is_tested(tmp_path, monkeypatch, capsys):
    source = cases.write_folders(tmp_path / "set")
    options = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "dilations": [1, 1]}
    model = models.create_model("nat_mini", 3, None, options)
    with torch.no_grad():
        model.head.fc.bias.copy_(torch.tensor([0.0, 9.0, 0.0]))
    torch.save({"model": model.state_dict()}, tmp_path / "tuned.pth")
    given = [tmp_path / "tuned.pth", "--model", "nat_mini", "--data", source, "--size", cases.SIZE]
    validate_file(monkeypatch, *given, "--options", yaml.safe_dump(options))
    assert "top-1 33.33 %" in capsys.readouterr().out
    for extra, message in (
        (["--options", "depths"], "--options takes a mapping such as '{img_size: 64}'"),
        ([], "holds the weights of another model"),
    ):
        with pytest.raises(SystemExit):
            validate_file(monkeypatch, *given, *extra)
        assert message in " ".join(capsys.readouterr().err.split())


def test_averages_follow_a_loop_and_leave_the_model():
    model = torch.nn.BatchNorm1d(3)
    average = checkpoints.Average(model, 0.7)
    slow = {key: value.clone() for key, value in model.state_dict().items()}
    for step in range(1, 8):
        with torch.no_grad():
            model.weight.normal_()
            model.running_mean.normal_()
            model.num_batches_tracked.add_(1)
        average.update(model, step)
        keep = min(0.7, (1 + step) / (10 + step))
        for key, value in model.state_dict().items():
            is_count = key == "num_batches_tracked"
            slow[key] = value.clone() if is_count else keep * slow[key] + (1 - keep) * value
    own = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(Killed), average.in_place(model):
        torch.testing.assert_close(dict(model.state_dict()), slow)
        raise Killed
    torch.testing.assert_close(dict(model.state_dict()), own, rtol=0, atol=0)


def test_scores_leave_out_what_cannot_be_read():
    torch.manual_seed(0)
    logits, labels = torch.randn(9, 7), torch.tensor([0, 1, 2, 3, 4, 5, 6, 0, -1])
    batches = [(logits[i : i + 4], labels[i : i + 4], None) for i in range(0, 9, 4)]
    found = scores.score(torch.nn.Identity(), batches, program.Accelerator())
    ranks = [(logits[i] > logits[i, labels[i]]).sum().item() for i in range(8)]
    loss = sum(-logits[i].log_softmax(0)[labels[i]].item() for i in range(8)) / 8
    assert (found.count, found.unreadable) == (8, 1)
    assert found.top1 == 100 * sum(r < 1 for r in ranks) / 8
    assert found.top5 == 100 * sum(r < 5 for r in ranks) / 8 > found.top1
    assert math.isclose(found.loss, loss, rel_tol=1e-5)
    with pytest.raises(ValueError, match="none of the 1 test images"):
        scores.score(torch.nn.Identity(), batches[2:], program.Accelerator())


def test_corrupt_images_are_counted_or_end_the_run(tmp_path, monkeypatch, capsys):
    root = cases.write_folders(tmp_path / "set")
    (root / "train" / "bat" / "4.png").write_text("no picture")
    (root / "test" / "cat" / "2.png").write_bytes(b"")
    config = tmp_path / "run.yaml"
    given = cases.make_settings(root, tmp_path / "out", schedule={"epochs": 1})
    config.write_text(as_yaml(given))
    monkeypatch.setattr(sys, "argv", ["train", str(config)])
    program.main()
    out = capsys.readouterr().out
    assert "on 8 images; 1 cannot be read" in out
    assert "skipped 1 images that cannot be read: " in out and "bat/4.png'" in out
    assert lines_of(tmp_path / "out")[-1]["unreadable"] == "1"
    monkeypatch.setattr(
        sys, "argv", ["train", str(config), "--strict", "--output", str(tmp_path / "other")]
    )
    with pytest.raises(SystemExit) as caught:
        program.main()
    assert caught.value.code == 2
    assert "bat/4.png': cannot identify image file" in capsys.readouterr().err


def as_yaml(given) -> str:
    """YAML of every setting."""
    sections = {}
    for name, value in files.flat(given).items():
        section, key = name.split(".")
        value = list(value) if isinstance(value, tuple) else value
        sections.setdefault(section, {})[key] = value
    return yaml.safe_dump(sections)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optimiser.lr=1", "optimiser"),
        ("optimizer.lrr=1", "did you mean 'lr'"),
        ("optimizer.lr=fast", "lr of optimizer .* must be a number, got 'fast'"),
        ("lr=1", "--set takes section.key=value, got 'lr=1'"),
        ("data.batch_size=3", "mixup needs an even data.batch_size, got 3"),
        ("data.batch_size=0", "data.batch_size must be at least 1"),
        ("data.batch_size=64", "a step takes 128 images, .* has 22 to train on"),
        ("run.log_every=2", "run.save_every must be a multiple of run.log_every, got 1 and 2"),
        ("model.weights=none.pth", "no weights file 'none.pth'"),
        ("optimizer.name=adamm", "adamm"),
        ("data.test=val", "lacks val_images"),
    ],
)
def test_bad_settings_say_what_is_wrong(tmp_path, monkeypatch, capsys, change, message):
    source = cases.write_set(tmp_path / "set.npz")
    config = tmp_path / "run.yaml"
    config.write_text(as_yaml(cases.make_settings(source, tmp_path / "out")))
    monkeypatch.setattr(sys, "argv", ["train", str(config), "--set", change])
    with pytest.raises(SystemExit) as caught:
        program.main()
    assert caught.value.code == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


def test_a_loss_that_is_not_finite_ends_the_run_before_a_checkpoint(tmp_path):
    source = cases.write_set(tmp_path / "set.npz")
    run = cases.make_settings(source, tmp_path / "out", optimizer={"lr": 1e30, "clip": None})
    with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf) at step \d.*optimizer.lr"):
        program.train(run)
    kept = folders.find_checkpoint(tmp_path / "out" / "checkpoints")
    state = load_file(kept / "model.safetensors")
    assert all(value.isfinite().all() for value in state.values())


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_shipped_settings_are_whole(config):
    found = files.read_settings(settings.Settings, config, [])
    assert Path(found.run.output).name == config.stem
    assert models.timm.is_model(found.model.name)


def test_the_log_drops_what_comes_again(tmp_path):
    log = logs.Log(tmp_path, COLUMNS, 0, tensorboard=False)
    for step in range(1, 6):
        log.add(step, epoch=step / 2, loss=1 / step)
    # a run that was killed while it wrote
    with log.path.open("a") as file:
        file.write("6,3.0")
    logs.Log(tmp_path, COLUMNS, 3, tensorboard=False)
    assert [line["step"] for line in lines_of(tmp_path)] == ["1", "2", "3"]


def test_tensorboard_gets_the_same_numbers(tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder, purge_step):
            written.append(purge_step)

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def close(self):
            written.append("closed")

    module = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    log = logs.Log(tmp_path, COLUMNS, 4, tensorboard=True)
    log.add(5, epoch=1.0, loss=0.5)
    log.close()
    assert written == [5, ("epoch", 1.0, 5), ("loss", 0.5, 5), "closed"]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        logs.Log(tmp_path, COLUMNS, 0, tensorboard=True)


def test_the_learning_rate_follows_the_schedule():
    weight = torch.nn.Parameter(torch.zeros(1))

    def rates(**schedule):
        given = cases.make_settings("a.npz", "out", schedule={"epochs": 4} | schedule)
        optimizer = torch.optim.SGD([weight], lr=1.0)
        scheduler, steps = trainees.make_scheduler(optimizer, given, 5)
        found = []
        for step in range(steps):
            found.append(optimizer.param_groups[0]["lr"])
            scheduler.step_update(step + 1)
        return found

    linear = rates(name="linear", warmup_epochs=0)
    np.testing.assert_allclose(linear, 1 - np.arange(20) / 20)
    cosine = rates(name="cosine", warmup_epochs=1, warmup_lr=0.0, min_lr=0.1, cooldown_epochs=1)
    expected = 0.1 + 0.45 * (1 + np.cos(np.pi * np.arange(20) / 20))
    np.testing.assert_allclose(cosine[:5], np.arange(5) / 5)
    np.testing.assert_allclose(cosine[5:20], expected[5:])
    np.testing.assert_allclose(cosine[20:], 0.1)
    assert rates(name="constant", warmup_epochs=0) == [1.0] * 20


def test_published_rates_scale_with_the_images_of_a_step():
    model = torch.nn.Linear(2, 2)
    given = cases.make_settings("a.npz", "out", optimizer={"lr": 1e-3, "base_batch": 512})
    assert trainees.make_optimizer(model, given, 128).param_groups[0]["lr"] == 1e-3 / 4


def test_steps_keep_all_heads_in_use(monkeypatch):
    options = {"embed_dim": 8, "depths": (1, 1), "num_heads": (2, 4), "num_shared": (2, 1)}
    options |= {"num_routed": (0, 2), "strides": (2, 1), "mlp_ratios": (2, 2), "drop_path_rate": 0}
    given = cases.make_settings(
        "a.npz",
        "out",
        model={"name": "moh_vit_tiny", "options": options},
        augment={"mixup": 0.0},
        run={"accumulate": 1, "ema": 0.0},
    )
    batch = torch.randn(4, 1, 16, 16), torch.tensor([0, 1, 2, 0]), torch.full((4,), -1)
    found = []
    for weight in (0.0, 10.0):
        monkeypatch.setattr(trainees, "BALANCE", weight)
        trainee = trainees.make_trainee(given, Accelerator(cpu=True), cases.CLASSES, 8)
        with balance_losses(trainee.model) as balances:
            found.append(trainees.take_step(trainee, iter([batch]), set()))
    torch.testing.assert_close(found[1], found[0] + 10 * balances[0].detach())
