"""Attention inputs made of real video: clips on the latent grid of Wan, as q, k and v.

No pretrained encoder or transformer is involved. An orthonormal PCA of patches of 4x8x8 pixels
stands for the autoencoder, fixed random projections for the layers in front of attention; query
and key of a token share one projection, are normalized and rotated by their position as in Wan. So
attention goes to what looks alike and is near, which is the structure of the clip and not that of
a trained model.

Letters: F frames, H height, W width, t latent frames, S tokens, D head dim.
"""

from dataclasses import dataclass
from pathlib import Path

import imageio.v2 as imageio
import torch
import torch.nn.functional as F
from torch import Tensor

from vidattn.grid import Grid

FRAMES, EDGE = 4, 8
CHANNELS = 16
NUM_SAMPLES = 16384
ROPE_BASE = 10000.0


def read_clip(path: Path) -> Tensor:
    """(F, H, W, 3) uint8 frames of a video file."""
    with imageio.get_reader(path) as reader:
        return torch.stack([torch.from_numpy(frame.copy()) for frame in reader])


def patches(clip: Tensor, index: int) -> Tensor:
    """The pixels of every patch of one latent frame.

    As in Wan the first latent frame is of one frame alone, which is repeated here, and each other
    one of four frames.

    Returns:
        (H / 8, W / 8, 768) floats in [-1, 1].
    """
    first = FRAMES * (index - 1) + 1
    frames = clip[first : first + FRAMES] if index else clip[:1].expand(FRAMES, -1, -1, -1)
    height, width = frames.shape[1] // EDGE, frames.shape[2] // EDGE
    cut = frames.float().view(FRAMES, height, EDGE, width, EDGE, 3) / 127.5 - 1
    return cut.permute(1, 3, 0, 2, 4, 5).flatten(2)


def num_latent_frames(clip: Tensor) -> int:
    """Latent frames of a clip of 4n + 1 frames whose sides are multiples of 16.

    Raises:
        ValueError: another size.
    """
    num_frames, height, width = clip.shape[:3]
    if num_frames % FRAMES != 1 or height % (2 * EDGE) or width % (2 * EDGE):
        raise ValueError(
            f"a clip must have 4n + 1 frames and sides that are multiples of 16, got "
            f"{num_frames} frames of {height}x{width}"
        )
    return (num_frames - 1) // FRAMES + 1


@dataclass(frozen=True, eq=False)
class Pca:
    """The directions in which patches differ most, and how far they spread along them."""

    mean: Tensor  # (768,)
    basis: Tensor  # (768, 16)
    spread: Tensor  # (16,)

    def encode(self, clip: Tensor) -> Tensor:
        """(t, H / 8, W / 8, 16) latents of unit variance on the clips it was fitted to."""
        return torch.stack(
            [
                (patches(clip, i) - self.mean) @ self.basis / self.spread
                for i in range(num_latent_frames(clip))
            ]
        )


def fit_pca(clips: list[Tensor]) -> Pca:
    """The PCA of patches drawn from some clips."""
    source, drawn = torch.Generator().manual_seed(0), []
    for clip in clips:
        num = num_latent_frames(clip)
        each = -(-NUM_SAMPLES // (num * len(clips)))
        for i in range(num):
            flat = patches(clip, i).flatten(0, 1)
            drawn.append(flat[torch.randperm(len(flat), generator=source)[:each]])
    samples = torch.cat(drawn)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, values, vectors = torch.pca_lowrank(samples, q=2 * CHANNELS, niter=4)
    spread = (values / len(samples) ** 0.5).clamp_min(1e-6)
    return Pca(samples.mean(0), vectors[:, :CHANNELS], spread[:CHANNELS])


def tokens_of(latents: Tensor) -> tuple[Tensor, Grid]:
    """(S, 64) tokens of 1x2x2 latents, as the patch embedding of Wan takes them, and their grid."""
    t, height, width, channels = latents.shape
    cut = latents.view(t, height // 2, 2, width // 2, 2, channels).permute(0, 1, 3, 2, 4, 5)
    return cut.flatten(0, 2).flatten(1), Grid(t, height // 2, width // 2)


def heads_of(
    tokens: Tensor, grid: Grid, *, num_heads: int, head_dim: int = 128
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, (1, num_heads, S, head_dim) each, by fixed random projections.

    Queries equal keys: both are the projected token, of root mean square 1, rotated by its place.
    """
    source = torch.Generator().manual_seed(0)
    shape = (2, num_heads, head_dim, tokens.shape[1])
    # orthonormal columns keep distances
    directions, value_directions = torch.linalg.qr(torch.randn(shape, generator=source))[0]
    x = tokens @ directions.mT
    x = rotate(F.rms_norm(x, (head_dim,), eps=1e-6), grid)
    return x[None], x[None], (tokens @ value_directions.mT)[None]


def rotate(x: Tensor, grid: Grid) -> Tensor:
    """(..., S, D) rotated by position in time, height and width, in the shares that Wan has."""
    pairs = x.shape[-1] // 2
    shares = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    angles = []
    for place, share in zip(grid.coords().float().T, shares):
        angles.append(place[:, None] * ROPE_BASE ** -(torch.arange(share) / share))
    turn = torch.polar(torch.ones(()), torch.cat(angles, dim=1))
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn
    return torch.view_as_real(turned).flatten(-2)
