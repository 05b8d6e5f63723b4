"""HunyuanVideo, text and image to video: text behind the video, its padding masked."""

from vidattn.pipelines.family import Family

FAMILY = Family(
    models=("HunyuanVideoTransformer3DModel",),
    layers=r"(single_)?transformer_blocks\.\d+\.attn",
    beside="after",
)
