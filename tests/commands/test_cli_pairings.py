"""What `vidattn generate` puts beside a method, and processes that share videos."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

import vidattn
from tests.commands.cli_cases import SMALL, frames_of, run, tiny_wan
from vidattn.runs import pairings

ROOT = Path(__file__).resolve().parents[2]
METHOD = ("--method", "neighborhood:window=3", "--dense-layers", "0", "--dense-steps", "0")


class Loaded(Exception):
    """Weights were about to be loaded."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, and low-rank updates for it."""
    root = tmp_path_factory.mktemp("pairings")
    pipe = tiny_wan()
    pipe.save_pretrained(root / "model")
    pipe.transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"]))
    state = get_peft_model_state_dict(pipe.transformer)
    save_file({f"transformer.{k}": x for k, x in state.items()}, root / "own.safetensors")
    return root


@pytest.fixture
def started(monkeypatch):
    """Makes this process one of several."""

    def start(rank, count):
        for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", count)):
            monkeypatch.setenv(name, str(value))

    return start


def generate(capfd, world, output, *words, method=METHOD):
    flags = ("--model", world / "model", "--output", output, *SMALL, *method)
    code, out, err = run(capfd, "generate", "a red boot", *flags, *words)
    assert code == 0, err
    clip = torch.stack(frames_of(output)[0]).float()
    return clip, json.loads(output.with_suffix(".json").read_text())


def num_calls(report):
    return sum(layer["num_sparse"] for layer in report["report"]["layers"])


@pytest.mark.parametrize(
    ("count", "words", "message"),
    [
        (1, "--parallel ulysses=2", "needs 2 processes, and this is one of 1: start it with"),
        (3, "--parallel ulysses=2", "needs 2 processes, and this is one of 3: start it with"),
        (4, "--parallel ulysses=2,rings=2", "takes ulysses=N, ring=N or ulysses=N,ring=N"),
        (2, "--parallel ulysses", "takes ulysses=N, ring=N or ulysses=N,ring=N"),
        (1, "--parallel ring=1", "is for two processes or more"),
        (2, "--parallel ring=2 --cache first-block", "exclude each other: each process would"),
        (2, "", "2 processes for 1 videos: give a --prompt for each, or --parallel ulysses=2"),
        (1, "--compile --offload sequential", "--compile and --offload sequential exclude"),
        (4, "--parallel ulysses=4", "cannot share the 2 heads of WanTransformer3DModel equally"),
        (5, "--parallel ring=5", "cannot share 144 tokens (3x6x8) equally"),
        (2, "--parallel ulysses=2 --method strided", "Strided plans all heads of a layer together"),
        (1, "--cache pyramid", "which WanPipeline makes one after the other"),
    ],
)
def test_what_cannot_be_is_refused_before_weights_are_loaded(
    world, tmp_path, capfd, monkeypatch, started, count, words, message
):
    def load(*_):
        raise Loaded

    monkeypatch.setattr("vidattn.runs.serve.load_pipeline", load)
    started(0, count)
    flags = ("--model", world / "model", "--output", tmp_path / "a.mp4", *SMALL)
    method = () if "--method" in words else METHOD
    code, _, err = run(capfd, "generate", "a red boot", *flags, *method, *words.split())
    assert code == 2 and message in " ".join(err.split()), err


@pytest.mark.parametrize(
    "words",
    [
        ("compare", "a red boot"),
        ("tune", "--budget", "density=0.5", "--prompts", "prompts.txt"),
        ("calibrate", "--prompts", "prompts.txt"),
    ],
)
def test_what_is_for_one_process_is_refused_in_several(words, capfd, started):
    started(1, 2)
    code, _, err = run(capfd, *words)
    assert code == 2 and f"vidattn {words[0]} runs in one process, and this is one of 2" in err


@pytest.mark.parametrize("command", ["generate", "compare"])
def test_a_missing_package_is_named(world, capfd, monkeypatch, command):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda x: None if x == "torchao" else find(x))
    code, _, err = run(capfd, command, "a", "--model", world / "model", "--quantize", "int8")
    assert code == 2 and "needs the package torchao: pip install torchao" in err


@pytest.fixture
def eager_cache(monkeypatch):
    """Has the cache of first blocks skip what it would run of random weights, too."""

    def config_of(*args):
        config = cache_config(*args)
        if hasattr(config, "threshold"):
            config.threshold = 10.0
        return config

    cache_config = pairings._cache_config
    monkeypatch.setattr(pairings, "_cache_config", config_of)


@pytest.mark.usefixtures("eager_cache")
def test_caches_leave_attention_out(world, tmp_path, capfd):
    steps = ("--steps", "7")
    every, report = generate(capfd, world, tmp_path / "a.gif", *steps)
    assert num_calls(report) == 7 * 2 * 3
    assert report["beside"] == {"quantize": None, "cache": None, "compile": False}
    for cache in ("first-block", "taylorseer"):
        words = (*steps, "--cache", cache)
        clip, report = generate(capfd, world, tmp_path / f"{cache}.gif", *words)
        assert report["beside"]["cache"] == cache and 0 < num_calls(report) < 7 * 2 * 3
        assert 0 < (clip - every).abs().mean() < 20


@pytest.mark.usefixtures("eager_cache")
def test_compiled_blocks_make_the_same_video(world, tmp_path, capfd, monkeypatch):
    compile_blocks = WanTransformer3DModel.compile_repeated_blocks
    calls = []

    def compile_quickly(model):
        calls.append(model)
        compile_blocks(model, backend="eager")

    monkeypatch.setattr(WanTransformer3DModel, "compile_repeated_blocks", compile_quickly)
    for cache in ((), ("--cache", "first-block"), ("--cache", "taylorseer")):
        words = ("--steps", "7", *cache)
        eager, expected = generate(capfd, world, tmp_path / "a.gif", *words)
        compiled, report = generate(capfd, world, tmp_path / "b.gif", "--compile", *words)
        assert report["beside"]["compile"] and not expected["beside"]["compile"]
        assert num_calls(report) == num_calls(expected)
        assert (compiled - eager).abs().mean() < 1
    assert len(calls) == 3


def test_weights_in_8_bits(world, tmp_path, capfd, monkeypatch):
    pytest.importorskip("torchao")
    from vidattn.commands import generate as command

    put, kinds = command.put_beside, {}

    def put_and_look(pipe, wanted):
        put(pipe, wanted)
        layers = pipe.transformer.named_modules()
        kinds.update({name: type(x.weight) for name, x in layers if type(x) is torch.nn.Linear})

    monkeypatch.setattr(command, "put_beside", put_and_look)
    lora = functools.partial(generate, capfd, world)
    exact, _ = lora(tmp_path / "a.gif", "--lora", world / "own.safetensors")
    for kind in ("int8", "fp8"):
        words = ("--lora", world / "own.safetensors", "--quantize", kind)
        clip, report = lora(tmp_path / f"{kind}.gif", *words)
        assert report["beside"]["quantize"] == kind and "torchao" in report["versions"]
        assert (clip - exact).abs().mean() < 20
        plain = {name for name, weight in kinds.items() if weight is torch.nn.Parameter}
        assert "blocks.0.attn1.to_q.base_layer" not in plain
        assert {"blocks.0.attn1.to_q.lora_A.lora_0", "blocks.0.attn1.to_q.lora_B.lora_0"} <= plain
        assert "condition_embedder.time_embedder.linear_1" in plain


def test_parameters_of_a_learned_method(world, tmp_path, capfd, monkeypatch):
    method = ("--method", "vsa:density=0.5", "--dense-layers", "0", "--dense-steps", "0")
    gates = world / "gates.safetensors"
    with vidattn.patch(tiny_wan(), "vsa", dense_layers=0) as handle, torch.no_grad():
        for parameter in handle.parameters():
            parameter.fill_(0.5)
        handle.save_parameters(gates)
    zero, report = generate(capfd, world, tmp_path / "a.gif", method=method)
    assert report["parameters"] is None
    words = ("--parameters", gates)
    clip, report = generate(capfd, world, tmp_path / "b.gif", *words, method=method)
    assert report["parameters"] == str(gates) and (clip - zero).abs().mean() > 0

    def load(*_):
        raise Loaded

    monkeypatch.setattr("vidattn.runs.serve.load_pipeline", load)
    flags = ("--model", world / "model", "--output", tmp_path / "c.mp4", *SMALL)
    for name, words in (("radial", "radial has no method with parameters"), ("sla", "proj_l")):
        given = (*flags, "--method", name, "--dense-layers", "0", "--parameters", gates)
        code, _, err = run(capfd, "generate", "a red boot", *given)
        assert code == 2 and words in " ".join(err.split()), err


def test_processes_share_a_list_of_prompts(world, tmp_path, capfd, started):
    output = tmp_path / "clip.mp4"
    flags = ("--model", world / "model", "--output", output, *SMALL, *METHOD, "--steps", "1")
    prompts = ("a", "--prompt", "a red", "--prompt", "a boot")
    for rank, names in ((1, ["clip-2"]), (0, ["clip", "clip-2", "clip-3"])):
        started(rank, 2)
        code, _, err = run(capfd, "generate", *prompts, *flags)
        assert code == 0, err
        assert sorted(path.stem for path in tmp_path.glob("*.mp4")) == names
    reports = [json.loads((tmp_path / f"{name}.json").read_text()) for name in names]
    assert [report["request"]["prompt"] for report in reports] == ["a", "a red", "a boot"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ulysses", "ring"])
def test_two_processes_make_the_video_of_one(world, tmp_path, capfd, kind):
    alone, _ = generate(capfd, world, tmp_path / "one.gif")
    output = tmp_path / "two.gif"
    flags = ("--model", world / "model", "--output", output, *SMALL, *METHOD)
    words = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
        "--standalone", "-m", "vidattn", "generate", "a red boot", "--device", "cpu",
        *flags, "--parallel", f"{kind}=2",
    ]  # fmt: skip
    done = subprocess.run(
        [str(word) for word in words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == 1
    report = json.loads(output.with_suffix(".json").read_text())
    assert report["parallel"] == {"ulysses": 1, "ring": 1} | {kind: 2}
    together = torch.stack(frames_of(output)[0]).float()
    assert (together - alone).abs().mean() < 0.1
