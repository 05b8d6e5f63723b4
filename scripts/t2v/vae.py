"""The clip autoencoder: building it, running it on whole clips, training it.

B batch, T frames, H height, W width, C latent channels, t = 1 + (T - 1) / 4.
Clips are (B, 3, T, H, W) in [-1, 1]; latents are (B, C, t, H / 8, W / 8).
"""

import functools

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanResample,
    WanRMS_norm,
    patchify,
    unpatchify,
)
from t2v.muon import Muon
from t2v.precision import fast_dtype, fast_products
from t2v.stage import Stage, phase_of
from t2v.team import Team

# Clips are rendered this many pixels larger than the windows cut from them.
MARGIN = 32


def build_vae(z_dim: int, **options) -> AutoencoderKLWan:
    """An untrained autoencoder: 8x in space, the first 2x by pixel unshuffling, 4x in time."""
    vae = AutoencoderKLWan(
        z_dim=z_dim,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * z_dim,
        latents_std=[1.0] * z_dim,
        **options,
    )
    with torch.no_grad():
        for parameter in vae.parameters():
            if parameter.ndim >= 4:
                # The default draw shrinks every layer's output by sqrt(3).
                parameter.mul_(3**0.5)
        # A posterior as wide as the prior would drown the signal for the first steps.
        vae.quant_conv.bias[z_dim:] = -6.0
    return vae


class RootMeanSquareNorm(torch.autograd.Function):
    """The norm of WanRMS_norm in the arithmetic of its input, which keeps one tensor of its size.

    The original computes in float32 and takes most of the time of a training step.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        """Features (B, C, ...) of unit root mean square over C, times gamma (C, 1, ...)."""
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
        scale = (x.shape[1] ** 0.5 / norm.clamp_min(1e-12)).to(x.dtype)
        unit = x * scale
        ctx.save_for_backward(unit, scale, gamma)
        return unit * gamma.to(x.dtype)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of the features and of gamma."""
        unit, scale, gamma = ctx.saved_tensors
        product = grad * unit
        others = [0, *range(2, grad.ndim)]
        grad_gamma = product.sum(others, keepdim=True, dtype=torch.float32)[0]
        gamma = gamma.to(grad.dtype)
        along = (product * gamma).mean(1, keepdim=True)
        return (grad * gamma - unit * along) * scale, grad_gamma


def _training_norm(layer: WanRMS_norm, x: torch.Tensor) -> torch.Tensor:
    if torch.is_autocast_enabled("cpu"):
        x = x.to(fast_dtype())
    return RootMeanSquareNorm.apply(x, layer.gamma)


def use_training_layers(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Switch to channels last and a norm without float32 copies, about twice as fast."""
    for layer in vae.modules():
        if isinstance(layer, torch.nn.Conv3d):
            layer.to(memory_format=torch.channels_last_3d)
        elif isinstance(layer, torch.nn.Conv2d):
            layer.to(memory_format=torch.channels_last)
        elif isinstance(layer, WanRMS_norm):
            layer.forward = functools.partial(_training_norm, layer)
    return vae


def _resample(layer: WanResample, x: torch.Tensor) -> torch.Tensor:
    """What the chunked layer does with a whole clip (B, C, T, H, W)."""
    several = x.shape[2] > 1
    if several and layer.mode == "upsample3d":
        late = layer.time_conv(x[:, :, 1:])
        batch, double, frames, height, width = late.shape
        late = late.view(batch, 2, double // 2, frames, height, width)
        late = late.permute(0, 2, 3, 1, 4, 5).reshape(batch, double // 2, -1, height, width)
        x = torch.cat([x[:, :, :1], late], dim=2)
    batch, _, frames, _, _ = x.shape
    x = layer.resample(x.transpose(1, 2).flatten(0, 1))
    x = x.unflatten(0, (batch, frames)).transpose(1, 2)
    if several and layer.mode == "downsample3d":
        x = torch.cat([x[:, :, :1], layer.time_conv(x)], dim=2)
    return x


def encode_moments(vae: AutoencoderKLWan, clips: torch.Tensor) -> torch.Tensor:
    """Mean and log-variance (B, 2C, t, H / 8, W / 8), equal to the chunked encode."""
    encoder = vae.encoder
    x = encoder.conv_in(patchify(clips, 2).contiguous(memory_format=torch.channels_last_3d))
    for layer in encoder.down_blocks:
        x = _resample(layer, x) if isinstance(layer, WanResample) else layer(x)
    x = encoder.conv_out(encoder.nonlinearity(encoder.norm_out(encoder.mid_block(x))))
    return vae.quant_conv(x)


def decode_clips(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Clips (B, 3, T, H, W), equal to the chunked decode before its clamp."""
    decoder = vae.decoder
    x = decoder.mid_block(decoder.conv_in(vae.post_quant_conv(latents)))
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = resnet(x)
        if block.upsamplers is not None:
            x = _resample(block.upsamplers[0], x)
    x = decoder.conv_out(decoder.nonlinearity(decoder.norm_out(x)))
    return unpatchify(x, 2)


def vae_loss(
    vae: AutoencoderKLWan, clips: torch.Tensor, noise_seed: int, kl_weight: float
) -> dict[str, torch.Tensor]:
    """Training loss with the mean absolute error and the peak signal-to-noise ratio in dB."""
    with fast_products():
        mean, log_var = encode_moments(vae, clips).float().chunk(2, dim=1)
        log_var = log_var.clamp(-20, 10)
        generator = torch.Generator().manual_seed(noise_seed)
        noise = torch.randn(mean.shape, generator=generator)
        out = decode_clips(vae, mean + noise * (0.5 * log_var).exp()).float()
    l1, square = (out - clips).abs().mean(), (out - clips).square().mean()
    # Differences between neighbours weigh edges, which plain L1 leaves soft.
    edges = sum((out.diff(dim=d) - clips.diff(dim=d)).abs().mean() for d in (3, 4))
    kl = 0.5 * (mean**2 + log_var.exp() - 1 - log_var).mean()
    loss = l1 + 5 * square + 0.5 * edges + kl_weight * kl
    return {"loss": loss, "l1": l1, "psnr": -10 * torch.log10(square / 4)}


def crop_batch(clips, size: list[int], first: int) -> torch.Tensor:
    """Random windows (B, 3, T, H, W) of clips `first`, ...; size is T, H, W, B."""
    frames, height, width, batch = size
    windows = []
    for index in range(first, first + batch):
        clip = clips.sample(index, (frames, height + MARGIN, width + MARGIN))[0]
        y, x = np.random.default_rng((clips.seed, index, 2)).integers(0, MARGIN + 1, 2)
        windows.append(clip[:, :, y : y + height, x : x + width])
    return torch.stack(windows)


def decoder_of(vae: AutoencoderKLWan) -> torch.nn.ModuleDict:
    """What turns latents into clips: it can train on without making encoded clips stale."""
    return torch.nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})


def vae_stage(
    vae: AutoencoderKLWan, clips, options: dict, team: Team, decoder_only: bool = False
) -> Stage:
    """The training of an autoencoder on windows of clips, or of its decoder with the rest fixed."""
    use_training_layers(vae).requires_grad_(not decoder_only)
    module = decoder_of(vae).requires_grad_(True) if decoder_only else vae
    kernels = [p for p in module.parameters() if p.ndim >= 4]
    others = [p for p in module.parameters() if p.ndim < 4]
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.98))
    name = "decoder" if decoder_only else "vae"

    def loss_at(step: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng((clips.seed, step, 1))
        phase = phase_of(options, step)
        size = phase["sizes"][rng.choice(len(phase["sizes"]), p=phase["shares"])]
        number = step * team.size + team.rank
        windows = crop_batch(clips, size, 64 * number)
        return vae_loss(vae, windows, number, options["kl_weight"])

    return Stage(name, module, {"muon": Muon(kernels, team), "adamw": adamw}, loss_at, options)


@torch.no_grad()
def set_latent_statistics(vae: AutoencoderKLWan, clips, count: int) -> None:
    """Measure mean and deviation of each latent channel, and register them in the config."""
    means = []
    for i in range(count):
        clip = clips.sample(10**8 + i, (33, 96, 96))[0][None]
        mean = encode_moments(vae, clip).chunk(2, dim=1)[0]
        means.append(mean.transpose(0, 1).flatten(1))
    values = torch.cat(means, dim=1)
    vae.register_to_config(
        latents_mean=[round(v, 5) for v in values.mean(1).tolist()],
        latents_std=[round(v, 5) for v in values.std(1).tolist()],
    )


def normalise(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Latents as the transformer sees them: zero mean, unit deviation per channel."""
    mean = torch.tensor(vae.config.latents_mean).view(-1, 1, 1, 1)
    return (latents - mean) / torch.tensor(vae.config.latents_std).view(-1, 1, 1, 1)
