"""Stable Diffusion 3 and 3.5: text behind the picture, and in some blocks the picture alone."""

from vidattn.pipelines.family import Family

FAMILY = Family(
    models=("SD3Transformer2DModel",),
    layers=r"transformer_blocks\.\d+\.attn(2)?",
    axes="BCHW",
    beside="after",
)
