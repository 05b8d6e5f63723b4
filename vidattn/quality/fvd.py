"""Fréchet video distance: how far one set of videos lies from another.

Source: Unterthiner et al., "Towards Accurate Generative Models of Video: A New Metric and
Challenges", arXiv:1812.01717: the distance of two normal distributions fitted to the logits of I3D.

Letters: N and M videos, F frames, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from vidattn.quality.i3d import I3D, LEAST_FRAMES, NUM_CLASSES, SIDE_PX
from vidattn.quality.likeness import pictures
from vidattn.quality.weights import load_weights


@lru_cache(maxsize=1)
def _network(device: torch.device) -> I3D:
    network = I3D()
    network.load_state_dict(load_weights("i3d"))
    return network.eval().requires_grad_(False).to(device)


def video_features(video: Tensor) -> Tensor:
    """What I3D sees in one video.

    Args:
        video: (F, 3, H, W) floats in [0, 1], or uint8, of at least 9 frames of any size.

    Returns:
        (400,) float64 logits.

    Raises:
        ValueError: a shape that does not fit, values that are no pictures, or weights that have not
            been fetched.
    """
    (video,) = pictures(video)
    if video.shape[1] != 3 or len(video) < LEAST_FRAMES:
        raise ValueError(
            f"FVD needs at least {LEAST_FRAMES} frames of 3 channels, got {tuple(video.shape)}"
        )
    frames = F.interpolate(video.float(), (SIDE_PX, SIDE_PX), mode="bilinear", align_corners=False)
    return _network(video.device)(2 * frames.transpose(0, 1)[None] - 1)[0].double()


def frechet_distance(features: Tensor, references: Tensor) -> float:
    """Squared Fréchet distance of the normal distributions fitted to two sets of features.

    Args:
        features: (N, C), at least two rows.
        references: (M, C), likewise.

    Raises:
        ValueError: too few rows, or rows of different length.
    """
    for x in (features, references):
        if x.dim() != 2 or len(x) < 2 or x.shape[1] != features.shape[1]:
            raise ValueError(
                "a Fréchet distance needs two sets of at least 2 feature vectors of one length, "
                f"got {tuple(features.shape)} and {tuple(references.shape)}"
            )
    means = [x.double().mean(0) for x in (features, references)]
    # rows whose products sum to the covariance
    a, b = (
        (x.double() - mean) / (len(x) - 1) ** 0.5 for x, mean in zip((features, references), means)
    )
    # the trace of the root of a product of covariances is the sum of these singular values
    cross = torch.linalg.svdvals(a @ b.T).sum()
    spread = a.square().sum() + b.square().sum() - 2 * cross
    return max(((means[0] - means[1]).square().sum() + spread).item(), 0.0)


def fvd(videos: Sequence[Tensor], references: Sequence[Tensor]) -> float:
    """Fréchet video distance of two sets of videos, 0 for equal sets.

    With fewer videos than its 400 dimensions it is far too large: compare values only
    between sets of equal size.

    Args:
        videos: at least two, each as in ``video_features``.
        references: likewise.

    Raises:
        ValueError: too few videos, or one that ``video_features`` refuses.
    """
    sets = [
        torch.stack([video_features(video) for video in some])
        if some
        else torch.empty(0, NUM_CLASSES)
        for some in (videos, references)
    ]
    return frechet_distance(*sets)
