"""Qwen-Image 2.1: the picture reads text and references that read what is before them alone."""

import math

from torch import nn

from vidattn.pipelines.family import Arguments, Family, Place


def locate(model: nn.Module, arguments: Arguments) -> Place:
    """The last picture, which ends the sequence; a slot of a picture is four tokens."""
    slots = arguments["img_mask"][0]
    size = tuple(arguments["img_shapes"][0][-1])
    return Place(size, len(slots) + 3 * int(slots.sum()) - math.prod(size))


FAMILY = Family(
    models=("QwenImage21Transformer2DModel",),
    layers=r"transformer_blocks\.\d+\.attn",
    beside="before",
    locate=locate,
    prefix=True,
)
