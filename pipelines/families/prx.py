"""PRX: the picture reads text, which has keys before its own, and no queries."""

from vidattn.pipelines.family import Family

FAMILY = Family(
    models=("PRXTransformer2DModel",),
    layers=r"blocks\.\d+\.attention",
    axes="BCHW",
    beside="before",
    prefix=True,
)
