"""Flux 3: blocks of the picture alone, then with text before it and references behind it."""

from torch import nn

from vidattn.pipelines.families.positions import first_picture
from vidattn.pipelines.family import Arguments, Family, Place


def locate(model: nn.Module, arguments: Arguments) -> Place:
    """The picture, which only blocks of all streams see behind text."""
    return first_picture(arguments["img_ids"], arguments["txt_ids"].shape[-2])


FAMILY = Family(
    models=("Flux3Transformer2DModel",),
    layers=r"(mode_blocks\.image|single_transformer_blocks)\.\d+\.attn",
    beside="before",
    locate=locate,
)
