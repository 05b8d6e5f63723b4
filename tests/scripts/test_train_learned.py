"""Methods with parameters of their own are trained with a model, written, and read again."""

import json
from pathlib import Path

import pytest
import torch
import train_video as program
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file

import vidattn
from tests.scripts import video_cases as cases
from vidattn.methods import create_method
from vidattn.pipelines.learned import Learned
from vidattn.runs.lora import parse_lora
from vidattn.schedule import DenseGuard, Rule, Schedule

KEYS = {"vsa": "attn1.to_gate_compress", "sla": "attn1.proj_l"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    cases.write_set(root / "clips", 3, frames=9, height=32, width=48)
    cases.write_pipeline(root / "wan", "wan")
    return root


def train(world, work, method, steps=4, **sections):
    """A run whose first quarter of the noise levels is dense."""
    settings = cases.make_settings(
        world / "clips",
        work,
        model={"name": str(world / "wan"), "call": {"max_sequence_length": 12}},
        data={"cache": str(world / "cache"), "buckets": [[9, 32, 48]]},
        attention={
            "method": method,
            "options": {"density": 0.5},
            "dense_layers": 1,
            "dense_steps": 0.25,
        },
        run={"steps": steps},
        **sections,
    )
    program.train(settings, program.Signals())
    return work


@pytest.mark.parametrize("method", KEYS)
def test_they_are_trained_and_written_beside_the_updates(world, tmp_path, method):
    folder = train(world, tmp_path / "out", method)
    found = load_file(folder / program.LEARNED)
    # the first layer is dense
    names = {f"transformer.blocks.1.{KEYS[method]}.{part}" for part in ("weight", "bias")}
    assert set(found) == names and all(x.any() for x in found.values())
    lora = folder / "lora.safetensors"
    assert all("lora" in key for key in load_file(lora))
    with safe_open(lora, "pt") as file:
        assert json.loads(file.metadata()["vidattn"])["learned"] == program.LEARNED
    assert parse_lora(str(lora)).learned == folder / program.LEARNED
    pipe = DiffusionPipeline.from_pretrained(world / "wan")
    pipe.load_lora_weights(str(lora))
    with vidattn.patch(pipe, f"{method}:density=0.5", dense_layers=1) as handle:
        handle.load_parameters(folder / program.LEARNED)
        for ours, theirs in zip(handle.parameters(), found.values()):
            assert ours.shape in {x.shape for x in found.values()} and theirs.isfinite().all()
        handle.save_parameters(tmp_path / "again.safetensors")
    assert all(
        torch.equal(x, found[key]) for key, x in load_file(tmp_path / "again.safetensors").items()
    )
    (folder / program.LEARNED).unlink()
    with pytest.raises(ValueError, match="trained with 'learned.safetensors', which is not beside"):
        parse_lora(str(lora))


def test_a_run_goes_on_with_them(world, tmp_path):
    whole = train(world, tmp_path / "whole", "vsa", steps=4)
    half = train(world, tmp_path / "half", "vsa", steps=2)
    states = [load_file(x / program.LEARNED) for x in (whole, half)]
    assert any(not torch.equal(states[0][key], states[1][key]) for key in states[0])
    for folder, last in ((whole, 4), (half, 2)):
        kept = load_file(next(Path(folder).glob(f"checkpoints/*{last}*/transformer.safetensors")))
        assert {key for key in kept if "compress" in key} == {
            key.removeprefix("transformer.") for key in states[0]
        }


def test_all_weights(world, tmp_path):
    folder = train(world, tmp_path / "out", "sla", tune={"method": "full"})
    assert all(x.any() for x in load_file(folder / program.LEARNED).values())
    again = DiffusionPipeline.from_pretrained(world / "wan").transformer
    state = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert set(state) == set(again.state_dict())


def test_they_outlast_a_patch(world):
    model = DiffusionPipeline.from_pretrained(world / "wan").transformer
    names = list(model.state_dict())
    rule = Rule(create_method("vsa"))
    learned = Learned("transformer", model, Schedule((rule,), DenseGuard(0, 0)))
    for _ in range(2):
        with vidattn.patch(model, "vsa", dense_layers=0) as handle:
            assert handle.sites[0].learned.modules == learned.modules
    assert "blocks.0.attn1.to_gate_compress.weight" in model.state_dict()
    learned.remove()
    assert list(model.state_dict()) == names
