"""MiniMax-H3: text, references, sound and the video that is made, packed in one sequence."""

from torch import nn

from vidattn.pipelines.families.positions import last_video
from vidattn.pipelines.family import Arguments, Family, Place


def locate(model: nn.Module, arguments: Arguments) -> Place:
    """The video that is made is the last; keyframes and references before it are other videos."""
    rows = arguments["video_indices"].cpu()
    positions = arguments["position_ids"].cpu()[rows]
    times = arguments["timestep_indices"].cpu()[rows]
    return last_video(rows, positions, times)


FAMILY = Family(
    models=("MiniMaxH3Transformer3DModel",),
    layers=r"transformer_blocks\.\d+\.attn",
    beside="before",
    locate=locate,
)
