"""HunyuanImage 2.1: text behind the picture, its padding masked."""

from torch import nn

from vidattn.pipelines.family import Arguments, Family, Place, patched_size


def locate(model: nn.Module, arguments: Arguments) -> Place:
    """Pictures come with an axis of time or without."""
    latents = arguments["hidden_states"]
    return Place(patched_size(model, latents, "BCTHW" if latents.dim() == 5 else "BCHW"))


FAMILY = Family(
    models=("HunyuanImageTransformer2DModel",),
    layers=r"(single_)?transformer_blocks\.\d+\.attn",
    beside="after",
    locate=locate,
)
