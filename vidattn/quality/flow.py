"""Flow-warp error: how much a video changes beyond what its motion explains.

Source: Lai et al., "Learning Blind Video Temporal Consistency", arXiv:1808.00449, with the optical
flow of RAFT (Teed and Deng, arXiv:2003.12039) and the occlusion test of Ruder et al.,
arXiv:1604.08610.

Letters: F frames, C channels, H height, W width, P pairs of neighboring frames.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidattn.quality.likeness import pictures
from vidattn.quality.weights import load_weights

# RAFT pools its features, an eighth of a frame, three times
LEAST_PX = 128
NUM_UPDATES = 12


@lru_cache(maxsize=1)
def _network(device: torch.device) -> nn.Module:
    from torchvision.models.optical_flow import raft_large

    network = raft_large(weights=None)
    network.load_state_dict(load_weights("raft"))
    return network.eval().requires_grad_(False).to(device)


def optical_flow(a: Tensor, b: Tensor) -> Tensor:
    """Where every pixel of ``a`` is in ``b``.

    Args:
        a: (P, 3, H, W) floats in [0, 1], of at least 128 x 128 pixels.
        b: likewise.

    Returns:
        (P, 2, H, W) displacements in pixels, x first.

    Raises:
        ValueError: frames too small, or weights that have not been fetched.
    """
    height, width = a.shape[2:]
    if a.shape[1] != 3 or min(height, width) < LEAST_PX:
        raise ValueError(
            f"optical flow needs frames of 3 channels and at least {LEAST_PX} x {LEAST_PX} pixels, "
            f"got {tuple(a.shape[1:])}"
        )
    sides = (0, -width % 8, 0, -height % 8)
    a, b = (F.pad(2 * x - 1, sides, mode="replicate") for x in (a, b))
    flow = _network(a.device)(a, b, num_flow_updates=NUM_UPDATES)[-1]
    return flow[..., :height, :width]


def warp(x: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    """What ``x`` looks like from where the flow starts.

    Args:
        x: (P, C, H, W).
        flow: (P, 2, H, W) displacements in pixels, x first.

    Returns:
        (P, C, H, W), and (P, 1, H, W) bool, whether the flow stays inside the frame.
    """
    height, width = x.shape[2:]
    rows, columns = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    place = torch.stack([columns + flow[:, 0], rows[:, None] + flow[:, 1]], dim=-1)
    last = place.new_tensor([width - 1, height - 1])
    inside = ((place >= 0) & (place <= last)).all(-1)
    out = F.grid_sample(x, 2 * place / last - 1, align_corners=True, padding_mode="border")
    return out, inside[:, None]


def warp_error(video: Tensor) -> float:
    """Mean squared difference of each frame from the next one moved back along the flow.

    It counts the pixels that both frames show. 0 for a video in which everything only moves; it
    grows with flicker. A blurred or still video has a low one too: read it beside the others.

    Args:
        video: (F, 3, H, W) floats in [0, 1], or uint8; at least 2 frames of 128 x 128 pixels.

    Raises:
        ValueError: a shape that does not fit, values that are no pictures, or weights that have not
            been fetched.
    """
    (video,) = pictures(video)
    if len(video) < 2:
        raise ValueError(f"a warp error needs at least 2 frames, got {tuple(video.shape)}")
    frames = video.float()
    error = count = 0.0
    for a, b in zip(frames[:-1].split(4), frames[1:].split(4)):
        there, back = optical_flow(a, b), optical_flow(b, a)
        moved, inside = warp(torch.cat([b, back], dim=1), there)
        seen = inside & _is_consistent(there, moved[:, 3:])
        error += ((moved[:, :3] - a).square().mean(1, keepdim=True) * seen).sum().item()
        count += seen.sum().item()
    return error / max(count, 1)


def _is_consistent(there: Tensor, back: Tensor) -> Tensor:
    """(P, 1, H, W) bool: whether going there and back ends near the start."""
    gap = (there + back).square().sum(1, keepdim=True)
    length = there.square().sum(1, keepdim=True) + back.square().sum(1, keepdim=True)
    return gap <= 0.01 * length + 0.5
