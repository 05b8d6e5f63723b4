"""Flux 2: text before the picture, reference pictures behind it."""

from torch import nn

from vidattn.pipelines.families import flux
from vidattn.pipelines.family import Arguments, Family, Place


def locate(model: nn.Module, arguments: Arguments) -> Place:
    """As in Flux 1, unless the keys of references are kept from step to step."""
    if arguments.get("kv_cache_mode") is not None:
        raise ValueError(
            "the keys of its reference pictures are kept from step to step, and stand in the "
            "middle of others: use Flux2KleinPipeline, which keeps none, or unpatch it"
        )
    return flux.locate(model, arguments)


FAMILY = Family(
    models=("Flux2Transformer2DModel",),
    layers=r"(single_)?transformer_blocks\.\d+\.attn",
    beside="before",
    locate=locate,
    joins=True,
)
