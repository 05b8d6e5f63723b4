"""Kandinsky 6: channels last, video alone in its sequence, sound in another."""

from vidattn.pipelines.family import Family

FAMILY = Family(
    models=("Kandinsky6Transformer3DModel",),
    layers=r"visual_transformer_blocks\.\d+\.video_dec_block\.self_attention",
    axes="BTHWC",
)
