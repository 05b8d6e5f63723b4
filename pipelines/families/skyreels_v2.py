"""SkyReels-V2, also with diffusion forcing: video alone in the sequence."""

from torch import nn

from vidattn.pipelines.family import Family


def chunk(model: nn.Module) -> int | None:
    """Frames to a block, which waits for those before it; one frame is no block."""
    frames = model.config.num_frame_per_block
    return frames if frames > 1 else None


FAMILY = Family(models=("SkyReelsV2Transformer3DModel",), layers=r"blocks\.\d+\.attn1", chunk=chunk)
