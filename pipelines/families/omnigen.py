"""OmniGen: references and text before the picture, which read what is before them alone."""

from vidattn.pipelines.family import Family

FAMILY = Family(
    models=("OmniGenTransformer2DModel",),
    layers=r"layers\.\d+\.self_attn",
    axes="BCHW",
    beside="before",
)
