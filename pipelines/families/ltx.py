"""LTX-Video: packed latents, condition tokens before or behind the video in the same sequence."""

from torch import nn

from vidattn.pipelines.families.positions import longest_video
from vidattn.pipelines.family import Arguments, Family, Place


def locate(model: nn.Module, arguments: Arguments) -> Place:
    """From the coordinates of the tokens where they are given, else from the sizes of the grid.

    Pipelines that pass coordinates pass sizes of 1, or none.
    """
    if (coords := arguments.get("video_coords")) is not None:
        return longest_video(coords[0])
    return Place(tuple(arguments[name] for name in ("num_frames", "height", "width")))


FAMILY = Family(models=("LTXVideoTransformer3DModel",), locate=locate, beside="before")
