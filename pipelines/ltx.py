"""LTX-Video: packed latents, condition tokens before or behind the video in the same sequence."""

import torch
from torch import Tensor, nn

from vidattn.pipelines.family import Arguments, Family, Place


def locate(model: nn.Module, arguments: Arguments) -> Place:
    """From the coordinates of the tokens where they are given, else from the sizes of the grid.

    Pipelines that pass coordinates pass sizes of 1, or none.
    """
    if (coords := arguments.get("video_coords")) is not None:
        return longest_video(coords[0])
    return Place(tuple(arguments[name] for name in ("num_frames", "height", "width")))


def longest_video(coords: Tensor) -> Place:
    """The longest stretch of whole frames in which time moves forward.

    Args:
        coords: (3, S) positions (t, h, w) of the tokens, each frame in raster order.
    """
    t, h, w = coords.cpu()
    forward = (h[1:] > h[:-1]) | (h[1:] == h[:-1]) & (w[1:] > w[:-1])
    forward &= t[1:] == t[:-1]
    starts = torch.cat([torch.zeros(1, dtype=torch.long), (~forward).nonzero().flatten() + 1])
    lengths = torch.diff(starts, append=torch.tensor([t.numel()]))
    goes_on = (t[starts][1:] > t[starts][:-1]) & (lengths[1:] == lengths[:-1])
    run_of_frame = torch.cat([torch.zeros(1, dtype=torch.long), (~goes_on).long().cumsum(0)])
    run = torch.bincount(run_of_frame, weights=lengths.double()).argmax()
    frames = (run_of_frame == run).nonzero().flatten()
    first, length = starts[frames[0]].item(), lengths[frames[0]].item()
    width = (h[first : first + length] == h[first]).sum().item()
    return Place((frames.numel(), length // width, width), first)


FAMILY = Family(models=("LTXVideoTransformer3DModel",), locate=locate, beside="before")
