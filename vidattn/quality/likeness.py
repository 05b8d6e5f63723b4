"""Likeness of two videos.

Letters: F frames, C channels, H height, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor

PSNR_CAP_DB = 100.0
SSIM_WINDOW_PX = 11
# of the scales of MS-SSIM, the finest first
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
# the frames that one scale, two scales, ... have room for
MS_SSIM_LEAST_PX = (SSIM_WINDOW_PX, 22, 44, 99, 176)


def psnr(video: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB: the mean over frames of each frame's own value.

    A frame equal to its reference counts as 100 dB, the most any frame can reach.

    Args:
        video: (F, C, H, W) floats in [0, 1], or uint8.
        reference: likewise, of the same shape.

    Raises:
        ValueError: shapes that differ, or values that are no pictures.
    """
    video, reference = pictures(video, reference)
    error = (video - reference).square().mean((1, 2, 3))
    values = -10 * torch.log10(error)
    return values.clamp(max=PSNR_CAP_DB).mean().item()


def ssim(video: Tensor, reference: Tensor) -> float:
    """Structural similarity: the mean over frames of each frame's own value, 1 for equal videos.

    Source: Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity",
    2004, in its usual form with an 11 x 11 Gaussian window of sigma 1.5, averaged over channels.

    Args:
        video: (F, C, H, W) floats in [0, 1], or uint8; frames of at least 11 x 11 pixels.
        reference: likewise, of the same shape.

    Raises:
        ValueError: shapes that differ, frames too small, or values that are no pictures.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    video, reference = pictures(video, reference)
    if min(video.shape[2:]) < SSIM_WINDOW_PX:
        raise _too_small("SSIM", video)
    frames = [
        structural_similarity_index_measure(a[None], b[None], data_range=1.0)
        for a, b in zip(video.float(), reference.float())
    ]
    return torch.stack(frames).mean().item()


def ms_ssim(video: Tensor, reference: Tensor) -> float:
    """Structural similarity over several scales: the mean over frames, 1 for equal videos.

    Source: Wang et al., "Multiscale Structural Similarity for Image Quality Assessment", 2003. Its
    five scales need frames of 176 pixels; smaller ones are compared at as many as they have room
    for, with the weights of those scaled to a sum of 1.

    Args:
        video: (F, C, H, W) floats in [0, 1], or uint8; frames of at least 11 x 11 pixels.
        reference: likewise, of the same shape.

    Raises:
        ValueError: shapes that differ, frames too small, or values that are no pictures.
    """
    from torchmetrics.functional.image import (
        multiscale_structural_similarity_index_measure as similarity,
    )

    video, reference = pictures(video, reference)
    least = min(video.shape[2:])
    if least < SSIM_WINDOW_PX:
        raise _too_small("MS-SSIM", video)
    num_scales = sum(least >= px for px in MS_SSIM_LEAST_PX)
    weights = torch.tensor(MS_SSIM_WEIGHTS[:num_scales])
    betas = tuple((weights / weights.sum()).tolist())
    frames = [
        similarity(a[None], b[None], data_range=1.0, betas=betas, normalize="relu")
        for a, b in zip(video.float(), reference.float())
    ]
    return torch.stack(frames).mean().item()


def _too_small(what: str, video: Tensor) -> ValueError:
    return ValueError(
        f"{what} needs frames of at least 11 x 11 pixels, got {tuple(video.shape[2:])}"
    )


def pictures(*videos: Tensor) -> list[Tensor]:
    """The videos as float64 in [0, 1]; integers are scaled before any arithmetic wraps them.

    Args:
        videos: (F, C, H, W) floats in [0, 1], or uint8, all of one shape.

    Raises:
        ValueError: shapes that differ, or values that are no pictures.
    """
    if len({tuple(x.shape) for x in videos}) > 1 or videos[0].dim() != 4:
        shapes = " and ".join(str(tuple(x.shape)) for x in videos)
        raise ValueError(f"videos must share one shape (F, C, H, W), got {shapes}")
    scaled = []
    for x in videos:
        if x.dtype != torch.uint8 and not x.is_floating_point():
            raise ValueError(f"a video must be uint8, or float in [0, 1], got {x.dtype}")
        x = x.double() / 255 if x.dtype == torch.uint8 else x.double()
        if not (x.min() >= -1e-3 and x.max() <= 1 + 1e-3):
            raise ValueError(
                f"a float video must lie in [0, 1], got {x.min().item():.3g} to "
                f"{x.max().item():.3g}: rescale it first"
            )
        scaled.append(x)
    return scaled
