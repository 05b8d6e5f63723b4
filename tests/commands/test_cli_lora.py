"""`vidattn generate --lora`: updates are added, with the attention that they were trained with."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

from tests.commands.cli_cases import SMALL, frames_of, run, tiny_wan

SCHEDULE = (
    "dense_layers: 0\ndense_steps: 0\nrules:\n- {method: neighborhood, options: {window: 1}}\n"
)


class Loaded(Exception):
    """Weights were about to be loaded."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, and updates for it that say what they were trained with, and others that do not."""
    root = tmp_path_factory.mktemp("lora")
    pipe = tiny_wan()
    pipe.save_pretrained(root / "model")
    pipe.transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"]))
    state = get_peft_model_state_dict(pipe.transformer)
    source = torch.Generator().manual_seed(0)
    state = {f"transformer.{k}": torch.randn(x.shape, generator=source) for k, x in state.items()}
    facts = {"component": "transformer", "schedule": SCHEDULE}
    save_file(state, root / "own.safetensors", {"format": "pt", "vidattn": json.dumps(facts)})
    save_file(state, root / "plain.safetensors")
    other = {k.replace("blocks.2.", "blocks.7."): x for k, x in state.items()}
    save_file(other, root / "other.safetensors")
    return root


def generate(capfd, world, output, *words):
    flags = ("--model", world / "model", "--output", output, *SMALL)
    code, out, err = run(capfd, "generate", "a red boot", *flags, *words)
    report = json.loads(output.with_suffix(".json").read_text()) if code == 0 else None
    return code, out + err, report


def test_updates_bring_their_attention_along(world, tmp_path, capfd):
    own = world / "own.safetensors"
    code, said, report = generate(capfd, world, tmp_path / "a.mp4", "--lora", own)
    assert code == 0, said
    assert f"attention as {own} was trained with; --method or --schedule overrules" in said
    assert report["method"] == "schedule of own.safetensors"
    assert report["loras"] == {str(own): 1.0}
    layers = report["report"]["layers"]
    assert all(list(layer["methods"]) == ["neighborhood:window=1"] for layer in layers)
    assert all(layer["num_sparse"] for layer in layers)


def test_another_attention_overrules_it(world, tmp_path, capfd):
    own, clips = world / "own.safetensors", {}
    for name, words in {
        "without": (),
        "with": ("--lora", own),
        "half": ("--lora", f"{own}:0.5"),
        "twice": ("--lora", f"{own}:0.3", "--lora", f"{world / 'plain.safetensors'}:0.7"),
        "none": ("--lora", f"{own}:0"),
    }.items():
        path = tmp_path / f"{name}.gif"
        # in bfloat16 the sum of two updates is rounded otherwise than the one
        words = ("--dtype", "float32", *words)
        code, said, report = generate(capfd, world, path, "--method", "dense", *words)
        assert code == 0 and report["method"] == "dense", said
        clips[name] = torch.stack(frames_of(path)[0]).float()
    torch.testing.assert_close(clips["none"], clips["without"], rtol=0, atol=0)
    assert (clips["twice"] - clips["with"]).abs().mean() < 1
    for one, other in (("with", "without"), ("half", "with"), ("half", "without")):
        assert (clips[one] - clips[other]).abs().mean() > 1


def test_updates_that_say_nothing_leave_the_default(world, tmp_path, capfd):
    path = tmp_path / "a.mp4"
    plain = world / "plain.safetensors"
    code, said, report = generate(capfd, world, path, "--lora", plain, "--dense-layers", "1")
    assert code == 0 and "was trained with" not in said
    assert report["method"].startswith("radial")


def test_updates_of_another_model_are_refused_before_weights_are_loaded(
    world, tmp_path, capfd, monkeypatch
):
    def load(*_):
        raise Loaded

    monkeypatch.setattr("vidattn.runs.serve.load_pipeline", load)
    words = ("--method", "dense", "--lora", world / "other.safetensors")
    code, said, _ = generate(capfd, world, tmp_path / "a.mp4", *words)
    assert code == 2 and "8 of 24 keys do not fit:" in said
    assert "transformer.blocks.7.attn1.to_q.lora_A.weight: no such layer" in said


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("nowhere.safetensors", "must be a .safetensors file that exists"),
        ("{own}:much", "the weight a number such as 0.8, got"),
        ("{broken}", "is no safetensors file"),
    ],
)
def test_bad_files_and_weights(world, tmp_path, capfd, value, message):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nothing")
    value = value.format(own=world / "own.safetensors", broken=broken)
    code, said, _ = generate(capfd, world, tmp_path / "a.mp4", "--lora", value)
    assert code == 2 and message in said
