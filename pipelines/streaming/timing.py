"""Tells a transformer the noise level of each frame of a chunk.

Letters: F latent frames, S tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

WAN, SKYREELS = "WanTransformer3DModel", "SkyReelsV2Transformer3DModel"
FAR = "AnyFlowFARTransformer3DModel"


def timing_of(
    model: nn.Module, times: Sequence[float], frame_tokens: int, fps: int, device: torch.device
) -> dict[str, Any]:
    """What the forward pass of a transformer is given about time.

    Args:
        times: (F,) of 1000.
        fps: frames of the decoded video to a second, of which SkyReels-V2 knows 16 and others.
    """
    by_frame = torch.tensor([times], device=device)
    if type(model).__name__ == SKYREELS:
        rate = [0 if fps == 16 else 1]
        return {"timestep": by_frame, "enable_diffusion_forcing": True, "fps": rate}
    if len(set(times)) == 1:
        return {"timestep": by_frame[:, 0]}
    return {"timestep": by_frame.repeat_interleave(frame_tokens, dim=1)}
