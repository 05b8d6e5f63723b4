"""Kandinsky 5: channels last, video alone in the sequence."""

from torch import nn

from vidattn.pipelines.family import Family


def refuse(model: nn.Module) -> str | None:
    """Checkpoints with NABLA are sparse already, and order their tokens in their own way."""
    if model.config.attention_type == "nabla":
        return "attention_type='nabla' is sparse attention of its own, with its own token order"
    return None


FAMILY = Family(
    models=("Kandinsky5Transformer3DModel",),
    layers=r"visual_transformer_blocks\.\d+\.self_attention",
    axes="BTHWC",
    refuse=refuse,
)
