"""HunyuanVideo 1.5: text behind the video, its padding masked for queries and keys alike."""

from vidattn.pipelines.family import Family

FAMILY = Family(
    models=("HunyuanVideo15Transformer3DModel",),
    layers=r"transformer_blocks\.\d+\.attn",
    beside="after",
    paired_mask=True,
)
