"""SkyReels-V2, also with diffusion forcing: video alone in the sequence."""

from torch import nn

from vidattn.pipelines.family import Family


def refuse(model: nn.Module) -> str | None:
    """Blocks of frames that wait for each other have a mask of their own."""
    if model.config.num_frame_per_block > 1:
        return (
            f"num_frame_per_block={model.config.num_frame_per_block} makes its attention causal "
            "over blocks of frames, with a mask that no plan here keeps"
        )
    return None


FAMILY = Family(
    models=("SkyReelsV2Transformer3DModel",), layers=r"blocks\.\d+\.attn1", refuse=refuse
)
