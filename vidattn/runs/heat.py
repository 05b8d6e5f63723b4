"""Heat maps over frames.

Letters: F frames, H height, W width, t, h, w tokens along each axis.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# from least to most: the frame in grey, then dark red, orange and light yellow over it
COLOURS = ((0.0, 0.0, 0.0), (0.55, 0.05, 0.15), (0.98, 0.55, 0.1), (1.0, 0.97, 0.7))


def over(frames: Tensor, heat: Tensor) -> Tensor:
    """(F, 3, H, W) floats in [0, 1], the frames in grey under the colours of a map.

    Args:
        frames: (F, 3, H, W) floats in [0, 1].
        heat: (t, h, w), any numbers; the frames are spread over t evenly, the first token of an
            autoencoder that makes one frame of it being that frame alone where F = 4 t - 3.
    """
    num_frames, (height, width) = len(frames), frames.shape[-2:]
    low, high = heat.min(), heat.max()
    level = (heat - low) / (high - low).clamp(min=1e-12)
    level = F.interpolate(level[:, None], (height, width), mode="bicubic").clamp(0, 1)
    level = level[_tokens_of(num_frames, len(heat))]
    grey = frames.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    return (1 - level) * 0.6 * grey + level * _colours(level[:, 0])


def _tokens_of(num_frames: int, num_tokens: int) -> Tensor:
    """(F,) int64, which token along time each frame belongs to."""
    frame = torch.arange(num_frames)
    if num_tokens > 1 and (num_frames - 1) % (num_tokens - 1) == 0:
        stride = (num_frames - 1) // (num_tokens - 1)
        return (frame + stride - 1) // stride
    return frame * num_tokens // num_frames


def _colours(level: Tensor) -> Tensor:
    """(F, 3, H, W) of levels (F, H, W) in [0, 1]."""
    table = torch.tensor(COLOURS)
    place = level * (len(table) - 1)
    below = place.long().clamp(max=len(table) - 2)
    share = (place - below)[..., None]
    return ((1 - share) * table[below] + share * table[below + 1]).permute(0, 3, 1, 2)
