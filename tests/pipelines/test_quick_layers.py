"""Quick layers beside those they stand for."""

from types import SimpleNamespace

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm
from torch import nn

from tests.commands.cli_cases import tiny_wan
from vidattn.pipelines.quick_layers import quicken

SHAPES = {
    "pytorch": ((2, 7, 24), lambda: nn.RMSNorm(24, eps=1e-6)),
    "pytorch, usual eps": ((3, 24), lambda: nn.RMSNorm(24)),
    "pytorch, two axes": ((2, 5, 4, 6), lambda: nn.RMSNorm((4, 6))),
    "clip": ((2, 24, 3, 5, 7), lambda: WanRMS_norm(24, images=False)),
    "pictures": ((4, 24, 5, 7), lambda: WanRMS_norm(24)),
    "channels last": ((4, 5, 24), lambda: WanRMS_norm(24, channel_first=False, bias=True)),
}


def made(name: str, dtype: torch.dtype) -> tuple[nn.Module, torch.Tensor]:
    shape, make = SHAPES[name]
    torch.manual_seed(0)
    norm = make()
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, -1, 1)
    x = 3 * torch.randn(shape)
    x[0] *= 1e-13  # shorter than the least length of Wan's
    x[-1, 0] = 0
    return norm.to(dtype), x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_numbers_are_those_of_the_norm(name, dtype):
    norm, x = made(name, dtype)
    exact = made(name, torch.float32)[0].double()
    given = x.clone()
    with torch.no_grad():
        plain, wanted = norm(x), exact(x.double())
        assert quicken(SimpleNamespace(part=norm)) == 1
        found = norm(x)
    assert found.dtype == dtype and torch.equal(x, given)
    error = (found - wanted).abs().max()
    # PyTorch rounds once, this at every product
    assert error <= 3 * (plain - wanted).abs().max() + 1e-6


def test_gradients_and_other_dtypes_keep_the_code_they_have():
    norm, x = made("clip", torch.float32)
    quicken(SimpleNamespace(part=norm))
    x = x.requires_grad_()
    norm(x).square().sum().backward()
    found, grads = x.grad.clone(), [p.grad.clone() for p in norm.parameters()]
    x.grad = None
    norm.zero_grad()
    WanRMS_norm.forward(norm, x).square().sum().backward()
    assert torch.equal(found, x.grad) and torch.equal(grads[0], norm.gamma.grad)
    half = norm.half()
    with torch.no_grad():
        assert torch.equal(half(x.detach().half()), WanRMS_norm.forward(half, x.detach().half()))


def test_clips_of_an_autoencoder_stay_what_they_are():
    vae = tiny_wan().vae.eval()
    clip, latents = torch.randn(1, 3, 9, 32, 48), torch.randn(1, 4, 3, 4, 6)
    with torch.no_grad():
        wanted = vae.decode(latents).sample, vae.encode(clip).latent_dist.mean
        assert quicken(SimpleNamespace(vae=vae, scheduler=None)) > 10
        found = vae.decode(latents).sample, vae.encode(clip).latent_dist.mean
    for x, y in zip(found, wanted):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)
    assert vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last_3d)
