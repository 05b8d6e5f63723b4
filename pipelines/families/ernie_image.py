"""ERNIE-Image: text behind the picture, its padding masked."""

from vidattn.pipelines.family import Family

FAMILY = Family(
    models=("ErnieImageTransformer2DModel",),
    layers=r"layers\.\d+\.self_attention",
    axes="BCHW",
    beside="after",
)
