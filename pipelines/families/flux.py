"""Flux 1 with Kontext, Fill and the like, and models of its layout: text before the picture.

The positions of reference pictures stand behind its own, and are read like text.
"""

from torch import nn

from vidattn.pipelines.families.positions import first_picture
from vidattn.pipelines.family import Arguments, Family, Place


def locate(model: nn.Module, arguments: Arguments) -> Place:
    """The picture that is made is the first of those behind the text."""
    positions = arguments["img_ids"]
    # some pipelines give each sample its own, all alike
    positions = positions[0] if positions.dim() == 3 else positions
    return first_picture(positions, arguments["txt_ids"].shape[-2])


FAMILY = Family(
    models=(
        "FluxTransformer2DModel",
        "ChromaTransformer2DModel",
        "LongCatImageTransformer2DModel",
        "OvisImageTransformer2DModel",
        "BriaTransformer2DModel",
        "BriaFiboTransformer2DModel",
    ),
    layers=r"(single_)?transformer_blocks\.\d+\.attn",
    beside="before",
    locate=locate,
    joins=True,
)
