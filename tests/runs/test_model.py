"""In which types a model is loaded."""

import pytest
import torch
from diffusers import AutoencoderKLWan

from vidattn.quality.likeness import psnr
from vidattn.runs import model
from vidattn.runs.model import vae_dtype
from vidattn.support.resources import resource

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("device", "asked", "is_measured", "has_products", "expected"),
    [
        (CPU, "auto", True, True, torch.bfloat16),
        (CPU, "bfloat16", True, True, torch.bfloat16),
        (CPU, "float32", True, True, torch.float32),
        (CPU, "auto", False, True, torch.float32),
        (CPU, "auto", True, False, torch.float32),
        (torch.device("cuda"), "auto", True, True, torch.float32),
    ],
)
def test_the_autoencoder_of_wan_is_in_bfloat16_where_it_may_and_gains(
    device, asked, is_measured, has_products, expected, monkeypatch
):
    monkeypatch.setattr(model, "has_bfloat16_products", lambda: has_products)
    assert vae_dtype(device, asked, is_measured) == expected


@torch.no_grad()
def test_frames_of_the_bundled_autoencoder_stay_in_bfloat16():
    """More than 45 dB to those of float32, for latents as a transformer gives them."""
    frames = []
    for dtype in (torch.float32, torch.bfloat16):
        vae = AutoencoderKLWan.from_pretrained(resource("assets/tiny-t2v/vae"), torch_dtype=dtype)
        mean, std = (
            torch.tensor(x).view(1, -1, 1, 1, 1)
            for x in (vae.config.latents_mean, vae.config.latents_std)
        )
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(1, vae.config.z_dim, 3, 12, 10, generator=generator) * std + mean
        found = vae.decode(latents.to(dtype)).sample[0].float().clamp(-1, 1)
        frames.append((found.transpose(0, 1) + 1) / 2)
    assert psnr(frames[1], frames[0]) > 45
