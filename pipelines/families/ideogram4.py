"""Ideogram 4: padding and text before the picture, each padding a segment of its own."""

from torch import nn

from vidattn.pipelines.families.positions import first_picture
from vidattn.pipelines.family import Arguments, Family, Place


def locate(model: nn.Module, arguments: Arguments) -> Place:
    """The tokens at the end of the sequence that are of one kind."""
    kinds = arguments["indicator"]
    counts = (kinds != kinds[:, -1:]).sum(1)
    if (counts != counts[0]).any():
        raise ValueError(
            f"its pictures begin at the tokens {counts.tolist()}: all of a batch must begin at the "
            "same, so make one at a time"
        )
    num_before = int(counts[0])
    return first_picture(arguments["position_ids"][0, num_before:], num_before)


FAMILY = Family(
    models=("Ideogram4Transformer2DModel",),
    layers=r"layers\.\d+\.attention",
    beside="before",
    locate=locate,
)
