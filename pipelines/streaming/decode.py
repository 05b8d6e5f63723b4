"""Decodes a video of any length chunk by chunk, as if it were decoded at once.

The autoencoder of Wan is causal in time: what it has to know of earlier frames are the last two
inputs of each convolution. These are kept here between chunks, so that memory does not grow and no
seam shows; what the autoencoder itself keeps during ``vae.decode`` is left alone.

Letters: B batch, C channels, F latent frames, h, w their size; T, H, W those of the pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# of an autoencoder, what its convolutions remember
Features = list[Any]


class Decoder:
    """The autoencoder of a pipeline, with the memory of one video.

    Args:
        vae: an ``AutoencoderKLWan``; its tiling holds here too.
    """

    def __init__(self, vae: nn.Module):
        self._vae: Any = vae
        self._features: dict[tuple[int, int], Features] = {}

    def __call__(self, latents: Tensor) -> Tensor:
        """The frames of the chunk that comes next.

        Args:
            latents: (B, C, F, h, w), normalised as the transformer makes them.

        Returns:
            (B, T, 3, H, W) float32 in [0, 1]: one frame for the first latent of a video, as many as
            the autoencoder makes of one for each later.
        """
        vae = self._vae
        hook = getattr(vae, "_hf_hook", None)
        if hook is not None:
            # brings the autoencoder to its device where it is kept elsewhere
            hook.pre_forward(vae)
        latents = denormalise(latents.to(_device(vae), vae.dtype), vae)
        frames = torch.cat([self._frame(frame) for frame in latents.split(1, 2)], 2)
        return (frames.transpose(1, 2).float() / 2 + 0.5).clamp(0, 1)

    def _frame(self, latents: Tensor) -> Tensor:
        """(B, 3, T, H, W) in [-1, 1] of one latent frame."""
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

        vae = self._vae
        edge = vae.config.patch_size
        out = self._tiled(latents) if self._is_tiled(latents) else self._tile((0, 0), latents)
        if edge is not None:
            out = unpatchify(out, patch_size=edge)
        return out.clamp(-1, 1)

    def _tile(self, place: tuple[int, int], latents: Tensor) -> Tensor:
        """What the decoder makes of one latent frame of a tile."""
        vae = self._vae
        is_first = place not in self._features
        features = self._features.setdefault(place, [None] * vae._cached_conv_counts["decoder"])
        x = vae.post_quant_conv(latents)
        return vae.decoder(x, feat_cache=features, feat_idx=[0], first_chunk=is_first)

    def _is_tiled(self, latents: Tensor) -> bool:
        vae = self._vae
        height, width = (size * vae.spatial_compression_ratio for size in latents.shape[-2:])
        is_large = height > vae.tile_sample_min_height or width > vae.tile_sample_min_width
        return vae.use_tiling and is_large

    def _tiled(self, latents: Tensor) -> Tensor:
        """The tiles of one latent frame, blended where they overlap as the autoencoder does it."""
        vae = self._vae
        edge, factor = vae.config.patch_size or 1, vae.spatial_compression_ratio
        least = (vae.tile_sample_min_height, vae.tile_sample_min_width)
        stride = (vae.tile_sample_stride_height, vae.tile_sample_stride_width)
        tops, lefts = (
            range(0, size, step // factor) for size, step in zip(latents.shape[-2:], stride)
        )
        height, width = (size // factor for size in least)
        tiles = [
            [self._tile((i, j), latents[..., i : i + height, j : j + width]) for j in lefts]
            for i in tops
        ]
        step_down, step_right = (step // edge for step in stride)
        blend_down, blend_right = (size // edge - step // edge for size, step in zip(least, stride))
        rows = []
        for i, row in enumerate(tiles):
            for j, tile in enumerate(row):
                if i > 0:
                    tile = vae.blend_v(tiles[i - 1][j], tile, blend_down)
                if j > 0:
                    tile = vae.blend_h(row[j - 1], tile, blend_right)
                row[j] = tile
            rows.append(torch.cat([tile[..., :step_down, :step_right] for tile in row], -1))
        bottom, right = (size * factor // edge for size in latents.shape[-2:])
        return torch.cat(rows, 3)[..., :bottom, :right]


def denormalise(latents: Tensor, vae: Any) -> Tensor:
    """(B, C, F, h, w) latents as the autoencoder takes them."""
    mean, scale = _statistics(vae, latents)
    return latents / scale + mean


def encode(frames: Tensor, vae: Any) -> Tensor:
    """(B, C, F, h, w) float32 normalised latents of (B, T, 3, H, W) frames in [0, 1]."""
    video = (frames.to(_device(vae), vae.dtype) * 2 - 1).transpose(1, 2)
    latents = vae.encode(video).latent_dist.mode()
    mean, scale = _statistics(vae, latents)
    return ((latents - mean) * scale).float()


def _statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal deviation of the channels."""
    shape = (1, vae.config.z_dim, 1, 1, 1)
    mean, deviation = (
        torch.tensor(x).view(shape) for x in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean.to(like), (1.0 / deviation.to(like.device, like.dtype))


def _device(vae: Any) -> torch.device:
    """Where the autoencoder runs, also where it is kept elsewhere meanwhile."""
    found = getattr(getattr(vae, "_hf_hook", None), "execution_device", None)
    return vae.device if found is None else torch.device(found)
