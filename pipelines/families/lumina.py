"""Lumina Next: the picture alone. Lumina 2: text before it, without its padding."""

from torch import nn

from vidattn.pipelines.family import Arguments, Family, Place, patched_size


def locate(model: nn.Module, arguments: Arguments) -> Place:
    """Behind text that is equally long in all samples."""
    lengths = arguments["encoder_attention_mask"].sum(1)
    if (lengths != lengths[0]).any():
        raise ValueError(
            f"its prompts have {lengths.tolist()} tokens, and a picture begins where its prompt "
            "ends: give prompts of equal length, or one at a time"
        )
    return Place(patched_size(model, arguments["hidden_states"], "BCHW"))


FAMILY = (
    Family(models=("LuminaNextDiT2DModel",), layers=r"layers\.\d+\.attn1", axes="BCHW"),
    Family(
        models=("Lumina2Transformer2DModel",),
        layers=r"(noise_refiner|layers)\.\d+\.attn",
        beside="before",
        locate=locate,
    ),
)
