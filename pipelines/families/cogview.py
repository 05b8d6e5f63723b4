"""CogView 3 and 4, with GLM-Image: text before the picture."""

from vidattn.pipelines.family import Family

FAMILY = Family(
    models=(
        "CogView3PlusTransformer2DModel",
        "CogView4Transformer2DModel",
        "GlmImageTransformer2DModel",
    ),
    axes="BCHW",
    beside="before",
)
