"""Krea 2: text before the picture, its padding masked; positions of both in one list."""

from torch import nn

from vidattn.pipelines.families.positions import first_picture
from vidattn.pipelines.family import Arguments, Family, Place


def locate(model: nn.Module, arguments: Arguments) -> Place:
    """The picture, behind the text."""
    num_text = arguments["encoder_hidden_states"].shape[1]
    return first_picture(arguments["position_ids"][num_text:], num_text)


FAMILY = Family(
    models=("Krea2Transformer2DModel",),
    layers=r"transformer_blocks\.\d+\.attn",
    beside="before",
    locate=locate,
)
