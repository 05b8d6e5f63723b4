"""Released causal weights become a folder that a stream runs, and compute what they did."""

import pickle
import sys

import convert_causal
import pytest
import torch
from convert_causal import add_lora, build_transformer, read_weights
from diffusers import WanPipeline
from safetensors.torch import save_file
from torch.testing import assert_close

import vidattn
from tests.commands.cli_cases import tiny_wan
from tests.pipelines.causal_wan import random_state, velocity
from vidattn.pipelines.streaming.recipe import RECIPES, Recipe, find_recipe

HEADS, CHANNELS, TEXT = 2, 4, 16


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return random_state(
        heads=HEADS, head_dim=128, layers=1, channels=CHANNELS, text=TEXT, ffn=8, patch=(1, 2, 2)
    )


def save(path, state):
    if path.suffix == ".safetensors":
        save_file({name: x.contiguous() for name, x in state.items()}, path)
    else:
        torch.save(state, path)
    return path


def _sharded(name):
    """A name as FSDP and activation checkpointing write it."""
    name = name.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module.")
    return f"model._fsdp_wrapped_module.{name}"


# how the releases wrap the names of Wan's own code
LAYOUTS = {
    "self-forcing": lambda x: {
        "generator": {f"model.{k}": v + 1 for k, v in x.items()},
        "generator_ema": {f"model.{k}": v for k, v in x.items()},
    },
    "fsdp": lambda x: {"generator_ema": {_sharded(k): v for k, v in x.items()}},
    "causvid": lambda x: {"generator": {f"model.{k}": v for k, v in x.items()}},
    "longlive": lambda x: {"generator": {f"model.{k}": v for k, v in x.items()}, "step": 3},
    "krea": lambda x: {f"model.{k}": v for k, v in x.items()},
    "plain": dict,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_converted_weights_compute_what_they_did(state, tmp_path, layout):
    ending = "safetensors" if layout == "krea" else "pt"
    found = read_weights(save(tmp_path / f"x.{ending}", LAYOUTS[layout](state)))
    model = build_transformer(found, RECIPES["self-forcing"])
    latents, text = torch.randn(CHANNELS, 2, 6, 4), torch.randn(7, TEXT)
    expected = velocity(state, latents, torch.full((2,), 640.0), text, [2], HEADS)
    with torch.no_grad():
        out = model(latents[None], torch.tensor([640.0]), text[None], return_dict=False)[0][0]
    assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
    assert find_recipe(model, None) == RECIPES["self-forcing"]


def test_what_is_missing_or_left_over_is_named(state):
    changed = dict(state)
    del changed["blocks.0.self_attn.q.weight"]
    changed["blocks.0.extra.weight"] = torch.zeros(2)
    changed["blocks.0.self_attn.k.bias"] = torch.zeros(3)
    with pytest.raises(ValueError) as caught:
        build_transformer(changed, Recipe())
    said = str(caught.value)
    assert "missing: blocks.N.attn1.to_q.weight" in said
    assert "left over: blocks.N.extra.weight" in said
    assert "of another shape: blocks.N.attn1.to_k.bias" in said
    with pytest.raises(ValueError, match="no weights of a Wan model: patch_embedding.weight"):
        build_transformer({"a": torch.zeros(1)}, Recipe())


@pytest.mark.parametrize("alpha", [None, 8.0])
def test_a_lora_is_added(state, tmp_path, alpha):
    name, rank = "blocks.0.self_attn.q", 4
    down, up = torch.randn(rank, 256), torch.randn(256, rank)
    lora = {
        f"base_model.model.model.{name}.lora_A.default.weight": down,
        f"base_model.model.model.{name}.lora_B.default.weight": up,
    }
    if alpha is not None:
        lora[f"base_model.model.model.{name}.alpha"] = torch.tensor(alpha)
    found = read_weights(save(tmp_path / "lora.pt", {"generator_lora": lora}))
    merged = add_lora(state, found)
    factor = 1.0 if alpha is None else alpha / rank
    assert_close(merged[f"{name}.weight"], state[f"{name}.weight"] + factor * up @ down)
    assert all(merged[x] is state[x] for x in state if x != f"{name}.weight")


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({}, "no low-rank update"),
        ({"a.lora_A.weight": 1}, "a has lora_A only"),
        ({"a.lora_A.weight": 1, "a.lora_B.weight": 1}, "updates a.weight, which the model"),
        ({"a.weight": 1}, "a.weight is no low-rank update"),
    ],
)
def test_a_lora_that_does_not_fit_is_refused(state, lora, words):
    with pytest.raises(ValueError, match=words):
        add_lora(state, {name: torch.ones(2, 2) for name in lora})


class Code:
    def __reduce__(self):
        return (print, ("code ran",))


def test_code_in_a_file_is_not_run(tmp_path, capsys):
    path = tmp_path / "x.pt"
    path.write_bytes(pickle.dumps({"generator": Code()}))
    with pytest.raises(ValueError, match="cannot be read without running its code"):
        read_weights(path)
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("gone.pt", None, "is no file"),
        ("x.zip", {}, "must end in .pt or .safetensors"),
        ("x.pt", [1, 2], "holds no weights by name"),
        ("x.pt", {"a": torch.ones(1), "model.a": torch.ones(1)}, "a stands twice"),
    ],
)
def test_a_file_that_holds_no_weights_is_refused(tmp_path, name, content, words):
    if content is not None:
        torch.save(content, tmp_path / name)
    with pytest.raises(ValueError, match=words):
        read_weights(tmp_path / name)


def test_the_program_writes_a_folder_that_streams(state, tmp_path, monkeypatch, capsys):
    base, out = tmp_path / "base", tmp_path / "out"
    pipe = tiny_wan()
    pipe.save_pretrained(base)
    weights = save(tmp_path / "x.pt", LAYOUTS["self-forcing"](state))
    words = [weights, "--recipe", "longlive", "--base", base, "--output", out, "--dtype", "float32"]
    monkeypatch.setattr(sys, "argv", ["convert_causal.py", *map(str, words)])
    convert_causal.main()
    assert f"vidattn stream --model {out}" in capsys.readouterr().out
    made = WanPipeline.from_pretrained(out)
    video = vidattn.stream(made, "full", prompt="a red boot", size=(32, 32), num_frames=9)
    assert video.recipe == RECIPES["longlive"]
    assert next(video).shape == (9, 3, 32, 32)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--recipe", "self-forcin", "--base", "."], "did you mean 'self-forcing'"),
        (["--recipe", "krea", "--base", "nowhere"], "hf download"),
    ],
)
def test_what_the_program_cannot_do_is_said(tmp_path, monkeypatch, capsys, words, said):
    argv = ["convert_causal.py", "x.pt", "--output", str(tmp_path / "out"), *words]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as stop:
        convert_causal.main()
    assert stop.value.code == 2 and said in capsys.readouterr().err
