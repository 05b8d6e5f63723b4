"""Whole runs in seconds: what they learn and write, and that one that was stopped loses nothing."""

import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import train_video as program
from accelerate import Accelerator
from runs import checkpoints as folders
from safetensors import safe_open
from safetensors.torch import load_file
from video_training import batches, prepare
from video_training import checkpoint as checkpoints
from video_training import step as steps
from video_training import trainee as trainees

from tests.scripts import video_cases as cases

Signals = program.Signals
SIZE = [9, 32, 48]


class Killed(BaseException):
    """As abrupt as a signal."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Clips, two pipelines, and a cache that the runs of this file share."""
    root = tmp_path_factory.mktemp("world")
    cases.write_set(root / "clips", 5, frames=9, height=32, width=48)
    cases.write_pipeline(root / "wan", "wan")
    cases.write_pipeline(root / "experts", "wan two experts")
    return root


def settings_of(world: Path, work: Path, pipeline: str = "wan", **sections):
    sections["model"] = {"name": str(world / pipeline), "call": {"max_sequence_length": 12}} | (
        sections.get("model", {})
    )
    sections["data"] = {"cache": str(world / "cache"), "buckets": [SIZE]} | (
        sections.get("data", {})
    )
    return cases.make_settings(world / "clips", work, **sections)


def config_of(*args, **sections) -> Path:
    """The file of such settings."""
    settings_of(*args, **sections)
    return args[1] / "config.yaml"


def train(settings) -> None:
    program.train(settings, Signals())


def lines_of(folder: Path) -> list[dict]:
    """The log without the times, which no run repeats."""
    with (folder / "log.csv").open(newline="") as file:
        return [
            {k: v for k, v in line.items() if k not in ("seconds", "waited")}
            for line in csv.DictReader(file)
        ]


def same_weights(one: Path, other: Path) -> None:
    names = sorted(path.name for path in one.glob("*.safetensors"))
    assert names == sorted(path.name for path in other.glob("*.safetensors")) and names
    for name in names:
        torch.testing.assert_close(
            load_file(one / name), load_file(other / name), rtol=0, atol=0, msg=name
        )


EVERYTHING = {
    "model": {"experts": ["transformer", "transformer_2"]},
    "data": {"batch_size": 2, "drop_caption": 0.5},
    "attention": {
        "method": "radial",
        "options": {"density": 0.7, "near": 0, "sink": False},
        "ramp": {"start": 0.9, "steps": 4, "every": 1},
        "align": 0.5,
    },
    "tune": {"lora_dropout": 0.3, "use_rslora": True},
    "noise": {"density": "uniform"},
    "optimizer": {"schedule": "cosine", "warmup_steps": 2, "lr": 0.02},
    "run": {"steps": 6, "accumulate": 2, "ema": 0.9, "checkpointing": True, "seed": 3},
}


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


def test_a_run_that_dies_goes_on_bit_for_bit(world, tmp_path, monkeypatch):
    whole = settings_of(world, tmp_path / "whole", "experts", **EVERYTHING)
    train(whole)
    parts = settings_of(world, tmp_path / "parts", "experts", **EVERYTHING)
    folder, rmtree = tmp_path / "parts" / "checkpoints", shutil.rmtree
    # in a step; when the files of a checkpoint are half there; when they have no name yet; behind
    for owner, name, call, after, left in (
        (program, "take_step", 4, False, 2),
        (checkpoints, "save_file", 1, True, 2),
        (checkpoints.torch, "save", 2, True, 2),
        (program, "save_checkpoint", 1, True, 4),
        (program, "write_weights", 1, False, 6),
    ):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            die_at(patch, owner, name, call, after)
            # as SIGKILL would have it, nothing is tidied up behind an exception
            patch.setattr(
                folders.shutil,
                "rmtree",
                lambda *args, **kwargs: sys.exc_info()[0] or rmtree(*args, **kwargs),
            )
            train(parts)
        assert folders.find_checkpoint(folder).name == f"step-{left:08d}"
    train(parts)
    same_weights(tmp_path / "parts", tmp_path / "whole")
    assert lines_of(tmp_path / "parts") == lines_of(tmp_path / "whole")
    # both experts were trained, with a loss that was measured
    for name in ("lora", "lora-transformer_2"):
        state = load_file(tmp_path / "whole" / f"{name}.safetensors")
        assert all(value.any() for key, value in state.items() if "lora_B" in key)
    assert all(float(line["align"]) > 0 for line in lines_of(tmp_path / "whole")[1:])


def run_program(config: Path, *words: str, **options):
    environment = dict(os.environ, PYTHONPATH=str(cases.ROOT), OMP_NUM_THREADS="1")
    command = [sys.executable, str(cases.ROOT / "scripts" / "train_video.py"), str(config), *words]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options
    )


def test_sigkill_loses_nothing(world, tmp_path):
    long = {"run": {"steps": 12, "save_every": 1}}
    killed = config_of(world, tmp_path / "killed", **long)
    process = run_program(killed)
    folder, deadline = tmp_path / "killed" / "checkpoints", time.monotonic() + 240
    while folders.find_checkpoint(folder) is None and time.monotonic() < deadline:
        assert process.poll() is None, process.stdout.read().decode()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    train(settings_of(world, tmp_path / "killed", **long))
    train(settings_of(world, tmp_path / "whole", **long))
    same_weights(tmp_path / "killed", tmp_path / "whole")
    assert lines_of(tmp_path / "killed") == lines_of(tmp_path / "whole")


def call_main(monkeypatch, *words: object) -> int | None:
    """The exit status of the program, in this process."""
    monkeypatch.setattr(sys, "argv", ["train_video.py", *map(str, words)])
    try:
        program.main()
    except SystemExit as end:
        return end.code
    return None


def test_sigterm_ends_behind_the_step_with_a_checkpoint(world, tmp_path, monkeypatch, capsys):
    config = config_of(world, tmp_path / "stopped", run={"save_every": 100})
    take_step = program.take_step

    def interrupted(trainee, found):
        if trainee.step == 1:
            signal.raise_signal(signal.SIGTERM)
        return take_step(trainee, found)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(program, "take_step", interrupted)
        assert call_main(patch, config) == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    assert "stopped by SIGTERM; the same command goes on from" in capsys.readouterr().out
    folder = tmp_path / "stopped" / "checkpoints"
    assert folders.find_checkpoint(folder).name == "step-00000002"
    assert call_main(monkeypatch, config) is None
    train(settings_of(world, tmp_path / "whole", run={"save_every": 100}))
    same_weights(tmp_path / "stopped", tmp_path / "whole")


def test_a_full_disk_leaves_the_checkpoint_before(world, tmp_path, monkeypatch, capsys):
    config = config_of(world, tmp_path / "full")
    save, calls = checkpoints.save_file, []

    def full(tensors, path, **options):
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(tensors, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", full)
        assert call_main(patch, config) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "the checkpoint of step 4 cannot be written ([Errno 28] No space left" in said
    folder = tmp_path / "full" / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["step-00000002"]
    train(settings_of(world, tmp_path / "full"))
    train(settings_of(world, tmp_path / "whole"))
    same_weights(tmp_path / "full", tmp_path / "whole")


def test_a_loss_that_is_not_finite_stops_the_run(world, tmp_path):
    run = settings_of(
        world,
        tmp_path / "out",
        optimizer={"lr": 1e25, "clip": None, "schedule": "constant"},
        run={"save_every": 1, "steps": 50},
    )
    with pytest.raises(FloatingPointError, match=r"is (nan|inf) at step \d+ on clip\d.mp4; no wei"):
        train(run)
    kept = folders.find_checkpoint(tmp_path / "out" / "checkpoints")
    state = load_file(kept / "transformer.safetensors")
    assert all(value.isfinite().all() for value in state.values())


def test_other_settings_do_not_go_on(world, tmp_path):
    train(settings_of(world, tmp_path / "out", run={"steps": 1}))
    train(settings_of(world, tmp_path / "out", run={"steps": 1, "save_every": 7}))
    message = r"run.steps was 1, is 2; tune.r was 2, is 3. Set them back"
    with pytest.raises(ValueError, match=message):
        train(settings_of(world, tmp_path / "out", run={"steps": 2}, tune={"r": 3}))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_steps_are_taken_with_sparse_attention(world, tmp_path, checkpointing):
    """The loss and its gradient are those of the model with the mask of the plan."""
    import vidattn
    from vidattn.pipelines.patch import find_handle

    given = {"method": "neighborhood", "options": {"window": 1}, "dense_steps": 0.0}
    given["dense_layers"] = 0
    found = {}
    for name, attention in (("sparse", given), ("dense", {"method": "dense", "options": {}})):
        run = settings_of(
            world, tmp_path / name, attention=attention, run={"checkpointing": checkpointing}
        )
        accelerator = Accelerator(cpu=True)
        prepared = prepare.Preparation(run, accelerator, print).run()
        trainee = trainees.make_trainee(run, accelerator)
        order = batches.Order(prepared.samples, 1, seed=0)
        loader = batches.Loader(
            prepared, order, run, device=torch.device("cpu"), dtype=trainee.dtype
        )
        batch = next(loader.batches(0, 1))
        expert = trainee.experts["transformer"]
        if name == "dense":
            # the same by patching it by hand
            vidattn.patch(expert.plain, "neighborhood", window=1, dense_layers=0)
        loss, _ = steps._loss(trainee, "transformer", batch, 3.0, (0.0, 1.0), 0)
        loss.backward()
        assert find_handle(expert.plain) is not None
        found[name] = [loss.detach(), *(p.grad for p in expert.trained.values())]
    assert any(x.any() for x in found["sparse"][1:])
    torch.testing.assert_close(found["sparse"], found["dense"], rtol=1e-5, atol=1e-7)


def test_the_first_loss_is_that_of_the_formula(world, tmp_path):
    run = settings_of(world, tmp_path / "out", attention={"method": "dense", "options": {}})
    accelerator = Accelerator(cpu=True)
    prepared = prepare.Preparation(run, accelerator, print).run()
    trainee = trainees.make_trainee(run, accelerator)
    order = batches.Order(prepared.samples, 1, seed=0)
    loader = batches.Loader(prepared, order, run, device=torch.device("cpu"), dtype=trainee.dtype)
    batch = next(loader.batches(0, 1))
    seen = []
    model = trainee.experts["transformer"].model
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    model.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    loss, align = steps._loss(trainee, "transformer", batch, 3.0, (0.0, 1.0), 0)
    given, answer = seen
    sigma = given["timestep"] / 1000
    level = sigma.view(-1, 1, 1, 1, 1)
    noise = (given["hidden_states"] - (1 - level) * batch.latents) / level
    assert abs(noise.std() - 1) < 0.1 and align == 0
    expected = (answer - (noise - batch.latents)).square().mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [*cases.PIPELINES, "picture"])
def test_every_kind_of_model_is_trained(tmp_path, name):
    size = cases.PIPELINES.get(name, (None, (9, 32, 48)))[1]
    frames, height, width = size
    clips = cases.write_set(tmp_path / "clips", 2, frames=frames, height=height, width=width)
    model = {"name": str(cases.write_pipeline(tmp_path / "model", name))}
    # the length of text that the model was built for
    model["call"] = {"max_sequence_length": 6}
    run = cases.make_settings(
        clips,
        tmp_path / "out",
        model=model,
        data={"buckets": [list(size)], "batch_size": 2, "drop_caption": 0.5},
        attention={"dense_layers": 0},
        run={"steps": 2, "log_every": 2},
    )
    seen = []
    forward = steps.predict

    def looking(model, batch, *rest):
        seen.append(batch)
        return forward(model, batch, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "predict", looking)
        train(run)
    (line,) = lines_of(tmp_path / "out")
    # random models answer nothing like the target, whose variance is between 1 and some
    assert 0.3 < float(line["loss"]) < 30 and float(line["norm"]) > 0
    state = load_file(tmp_path / "out" / "lora.safetensors")
    assert any(value.any() for key, value in state.items() if "lora_B" in key)
    for batch in seen:
        assert len(batch.latents) == len(batch.arguments["encoder_hidden_states"]) == 2
        if name == "picture":
            # the mask says that the first frame is known, the picture is that of each clip
            assert batch.condition.shape[:3] == (2, 8, 3)
            assert batch.condition[:, :4, 0].min() == 1 and not batch.condition[:, :4, 1:].any()
            assert batch.condition[:, 4:, 0].any()


def test_a_model_as_it_was_is_its_own_dense_model(world, tmp_path):
    """Before the first step low-rank updates are zero: dense attention differs by nothing."""
    for method, options, is_zero in (("dense", {}, True), ("neighborhood", {"window": 1}, False)):
        attention = {"method": method, "options": options, "align": 1.0, "dense_layers": 0}
        run = settings_of(world, tmp_path / method, attention=attention, run={"steps": 1})
        train(run)
        (line,) = lines_of(tmp_path / method)
        assert (float(line["align"]) == 0) == is_zero


def test_training_learns_its_clips(world, tmp_path):
    run = settings_of(
        world,
        tmp_path / "out",
        tune={"method": "full"},
        optimizer={"lr": 3e-3},
        data={"batch_size": 4, "drop_caption": 0.0},
        run={"steps": 40, "save_every": 40},
    )
    train(run)
    losses = [float(line["loss"]) for line in lines_of(tmp_path / "out")]
    assert np.mean(losses[-8:]) < 0.8 * np.mean(losses[:8])
    # all weights were moved and are there to load
    model, before = (
        program.load_transformer(folder, "transformer", torch.float32).state_dict()
        for folder in (world / "wan", world / "wan")
    )
    cls = program.load_transformer(world / "wan", "transformer", torch.float32).__class__
    model = cls.from_pretrained(tmp_path / "out" / "transformer").state_dict()
    trained = load_file(
        folders.find_checkpoint(tmp_path / "out" / "checkpoints") / "transformer.safetensors"
    )
    torch.testing.assert_close(dict(model), trained, rtol=0, atol=0)
    assert all(not torch.equal(model[key], before[key]) for key in trained)
    assert "neighborhood" in (tmp_path / "out" / "transformer-schedule.yaml").read_text()


def test_steps_hardly_wait_for_data(world, tmp_path):
    train(settings_of(world, tmp_path / "out", run={"steps": 12, "log_every": 12}))
    with (tmp_path / "out" / "log.csv").open(newline="") as file:
        (line,) = csv.DictReader(file)
    assert float(line["waited"]) < 0.05


def test_what_was_computed_is_not_computed_again(world, tmp_path, monkeypatch):
    clips, work = tmp_path / "clips", tmp_path / "work"
    shutil.copytree(world / "clips", clips)
    data = {"source": str(clips), "cache": str(tmp_path / "cache")}
    loaded, encoded, recorded = [], [], []
    for owner, name, calls in (
        (prepare, "load_frame", loaded),
        (prepare.Recorder, "latents", encoded),
        (prepare.Recorder, "own", recorded),
    ):
        function = getattr(owner, name)

        def counted(*args, function=function, calls=calls, **kwargs):
            calls.append(args)
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    def prepared(**sections):
        for calls in (loaded, encoded, recorded):
            calls.clear()
        found = prepare.Preparation(
            settings_of(world, work, data=data, **sections), Accelerator(cpu=True), print
        ).run()
        return len(found.samples), len(loaded), len(encoded), len(recorded)

    assert prepared() == (5, 1, 5, 5)
    assert prepared() == (5, 0, 0, 0)
    (clips / "clip1.txt").write_text("another caption")
    assert prepared() == (5, 1, 0, 1)
    cases.write_clip(clips / "clip2.mp4", frames=12, height=32, width=48)
    assert prepared() == (5, 1, 1, 0)
    assert prepared(model={"dtype": "bfloat16"}) == (5, 1, 5, 5)
    # one that cannot be read is tried again, and is none of the set
    (clips / "clip3.mp4").write_bytes(b"broken")
    assert prepared() == (4, 0, 0, 0)


def test_what_is_left_out_is_listed_or_ends_the_run(world, tmp_path, monkeypatch, capsys):
    clips = tmp_path / "clips"
    shutil.copytree(world / "clips", clips)
    (clips / "broken.mp4").write_bytes(b"nothing")
    (clips / "broken.txt").write_text("x")
    (clips / "lonely.txt").write_text("x")
    cases.write_clip(clips / "short.mp4", frames=4, height=32, width=48)
    (clips / "short.txt").write_text("x")
    config = config_of(world, tmp_path / "out", run={"steps": 1}, data={"source": str(clips)})
    assert call_main(monkeypatch, config) is None
    said = capsys.readouterr().out
    assert "left out 3 files:" in said and "lonely.txt: a caption without a clip" in said
    assert "broken.mp4: cannot be read" in said and "short.mp4: too short: 4 frames" in said
    assert "5 samples of 9 frames of 32 x 48" in said
    assert call_main(monkeypatch, config, "--strict") == 2
    assert "'lonely.txt': a caption without a clip" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.buckets=[[10, 32, 48]]", "10 frames are not possible with this model"),
        ("data.buckets=[]", "data.buckets is empty"),
        ("data.source=nowhere", "data.source 'nowhere' is neither a folder"),
        ("model.name=./nowhere", "no folder on this machine"),
        ("model.experts=[transformer_2]", "has no 'transformer_2'; it has transformer"),
        ("model.experts=[]", "model.experts must name components once"),
        ("tune.target_modules=[to_nothing]", "tune.target_modules"),
        ("tune.rank=4", "'rank'. Known: lora_alpha, .* r, target_modules"),
        ("optimizer.name=adamm", "optimizer 'adamm'"),
        ("attention.method=radiall", "did you mean 'radial'"),
        ("attention.options={densty: 1}", "densty"),
        ("noise.weighting=min_snr", "does not fit a model that predicts 'flow'"),
        ("output.also=[kohya]", "also of output .* must be"),
        ("run.steps=0", "run.steps must be at least 1, got 0"),
        ("run.ema=2.0", "run.ema must be between 0 and 1"),
        ("data.fps=0", "data.fps must be above 0"),
        ("run.steps", "--set takes section.key=value, got 'run.steps'"),
    ],
)
def test_bad_settings_say_what_is_wrong(world, tmp_path, monkeypatch, capsys, change, message):
    config = config_of(world, tmp_path / "out", run={"steps": 1})
    assert call_main(monkeypatch, config, "--set", change) == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


CONFIGS = sorted((cases.ROOT / "configs" / "training").glob("*.yaml"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_shipped_settings_are_whole(config):
    found = cases.settings_file.read_settings(cases.settings.Settings, config, [])
    assert Path(found.run.output).name == config.stem
    sparse = program.Trainee.__dataclass_fields__ and trainees.Sparse(found.attention)
    assert not sparse.schedule.is_dense
    assert all((frames - 1) % 4 == 0 for frames, _, _ in found.data.buckets)
    assert all(h % 16 == 0 and w % 16 == 0 for _, h, w in found.data.buckets)
    trainees.make_optimizer([torch.nn.Parameter(torch.zeros(2))], found.optimizer)
    assert found.model.name == "assets/tiny-t2v" or found.model.name.count("/") == 1


def test_batches_have_one_size_and_every_sample(world):
    sizes = [(9, 32, 48)] * 7 + [(1, 32, 48)] * 4 + [(5, 32, 48)]
    samples = [prepare.Sample(str(i), size, *"abcd") for i, size in enumerate(sizes)]
    orders = [batches.Order(samples, 2, seed=5, place=(rank, 2)) for rank in range(2)]
    assert orders[0].per_epoch == 2 + 1 + 1
    for epoch in range(3):
        numbers = range(4 * epoch, 4 * epoch + 4)
        seen = [sum((order[n] for order in orders), []) for n in numbers]
        assert all(len({sizes[i] for i in picks}) == 1 and len(picks) == 4 for picks in seen)
        assert set(sum(seen, [])) == set(range(12))
    again = batches.Order(samples, 2, seed=5)
    assert [again[n] for n in (9, 2, 9)][0] == again[9]
    assert batches.Order(samples, 2, seed=6)[0] != batches.Order(samples, 2, seed=5)[0]
    # a set smaller than a batch goes round
    assert batches.Order(samples[:1], 3, seed=0)[4] == [0, 0, 0]


def test_captions_are_dropped_as_often_as_asked(world, tmp_path):
    run = settings_of(world, tmp_path / "out", data={"drop_caption": 0.25})
    prepared = prepare.Preparation(run, Accelerator(cpu=True), print).run()
    order = batches.Order(prepared.samples, 4, seed=0)
    loader = batches.Loader(prepared, order, run, device=torch.device("cpu"), dtype=torch.float32)
    dropped = np.array([loader._picks(number)[1] for number in range(500)])
    assert abs(dropped.mean() - 0.25) < 0.03
    sample = prepared.samples[0]
    kept, empty = (
        loader.read([sample], [drop]).arguments["encoder_hidden_states"] for drop in (False, True)
    )
    base = prepared.arguments.get(sample.base)["encoder_hidden_states"]
    torch.testing.assert_close(empty, base)
    assert not torch.equal(kept, base)


def test_the_learning_rate_warms_up_and_falls():
    options = cases.settings.Optimizer(lr=1.0, schedule="linear", warmup_steps=4)
    run = cases.settings.Run("out", steps=12)
    found = [steps.learning_rate(step, options, run) for step in range(12)]
    expected = [0.25, 0.5, 0.75, 1.0, *np.arange(7, -1, -1) / 8]
    np.testing.assert_allclose(found, expected)
    flat = cases.settings.Optimizer(lr=0.5, schedule="constant", warmup_steps=4)
    assert steps.learning_rate(0, flat, run) == 0.5


def test_experts_share_the_noise_out():
    both = ("transformer", "transformer_2")
    assert trainees.expert_ranges(None, ("transformer",)) == {"transformer": (0.0, 1.0)}
    assert trainees.expert_ranges(0.875, both) == {
        "transformer": (0.875, 1.0),
        "transformer_2": (0.0, 0.875),
    }
    with pytest.raises(ValueError, match="has no boundary_ratio between experts"):
        trainees.expert_ranges(None, both)


def test_each_expert_sees_the_levels_that_the_pipeline_gives_it(world, tmp_path, monkeypatch):
    run = settings_of(world, tmp_path / "out", "experts", **EVERYTHING)
    seen = {"transformer": [], "transformer_2": []}
    forward = steps.predict

    def looking(model, batch, target, dtype):
        name = next(k for k, x in looking.trainee.experts.items() if x.model is model)
        seen[name] += target.timestep.tolist()
        return forward(model, batch, target, dtype)

    def start(*args):
        looking.trainee = trainees.make_trainee(*args)
        return looking.trainee

    monkeypatch.setattr(steps, "predict", looking)
    monkeypatch.setattr(program, "make_trainee", start)
    train(run)
    assert seen["transformer"] and min(seen["transformer"]) >= 875
    assert seen["transformer_2"] and max(seen["transformer_2"]) < 875


def test_metadata_tell_where_a_file_comes_from(world, tmp_path):
    run = settings_of(world, tmp_path / "out", "experts", **EVERYTHING)
    train(run)
    for name, component in (("lora", "transformer"), ("lora-transformer_2", "transformer_2")):
        with safe_open(tmp_path / "out" / f"{name}.safetensors", "pt") as file:
            facts = json.loads(file.metadata()["vidattn"])
        assert facts["component"] == component and facts["step"] == 6
        assert "density: 0.7" in facts["schedule"] and math.isfinite(facts["step"])
