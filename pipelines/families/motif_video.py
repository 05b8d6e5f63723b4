"""Motif-Video: image and text tokens behind the video, their padding masked."""

from vidattn.pipelines.family import Family

FAMILY = Family(
    models=("MotifVideoTransformer3DModel",),
    layers=r"(single_)?transformer_blocks\.\d+\.attn",
    beside="after",
)
