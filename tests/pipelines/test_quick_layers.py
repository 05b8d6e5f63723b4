"""Quick layers beside those they stand for."""

from types import SimpleNamespace

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm
from torch import nn

from tests.commands.cli_cases import tiny_wan
from vidattn.pipelines.quick_layers import QuickNorm, quicken

SHAPES = {
    "clip": ((2, 24, 3, 5, 7), {"images": False}),
    "pictures": ((4, 24, 5, 7), {}),
    "channels last": ((4, 5, 24), {"channel_first": False, "bias": True}),
}


def made(name: str, dtype: torch.dtype) -> tuple[nn.Module, torch.Tensor]:
    shape, options = SHAPES[name]
    torch.manual_seed(0)
    norm = WanRMS_norm(24, **options)
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, -1, 1)
    x = 3 * torch.randn(shape)
    x[0] *= 1e-13  # shorter than the least length
    x[-1, 0] = 0
    return norm.to(dtype), x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_numbers_are_those_of_the_norm(name, dtype):
    norm, x = made(name, dtype)
    wanted = made(name, torch.float32)[0].double()(x.double())
    given, plain, found = x.clone(), norm(x), QuickNorm(norm)(x)
    assert found.dtype == dtype and torch.equal(x, given)
    error = (found - wanted).abs().max()
    assert error <= 1.5 * (plain - wanted).abs().max() + 1e-6


def test_gradients_and_other_dtypes_keep_the_code_they_have():
    norm, x = made("clip", torch.float32)
    x = x.requires_grad_()
    QuickNorm(norm)(x).square().sum().backward()
    found, gamma = x.grad.clone(), norm.gamma.grad.clone()
    x.grad = None
    norm.zero_grad()
    norm(x).square().sum().backward()
    assert torch.equal(found, x.grad) and torch.equal(gamma, norm.gamma.grad)
    half, x = norm.half(), x.detach().half()
    with torch.no_grad():
        assert torch.equal(QuickNorm(half)(x), half(x))


def test_clips_of_an_autoencoder_stay_what_they_are():
    vae = tiny_wan().vae.eval()
    clip, latents = torch.randn(1, 3, 9, 32, 48), torch.randn(1, 4, 3, 4, 6)
    with torch.no_grad():
        wanted = vae.decode(latents).sample, vae.encode(clip).latent_dist.mean
        quicken(SimpleNamespace(vae=vae))
        found = vae.decode(latents).sample, vae.encode(clip).latent_dist.mean
    for x, y in zip(found, wanted):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)
    norms = [x for x in vae.modules() if isinstance(x, WanRMS_norm)]
    assert norms and all(isinstance(x.forward, QuickNorm) for x in norms)
    assert vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last_3d)


def test_other_pipelines_are_left_alone():
    for pipe in (SimpleNamespace(), SimpleNamespace(vae=nn.Conv3d(2, 3, 3)), object()):
        quicken(pipe)
