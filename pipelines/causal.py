"""Streaming models that read a cache of keys through block masks of their own."""

from vidattn.pipelines.family import Family

FAMILY = Family(
    models=(
        "AnyFlowFARTransformer3DModel",
        "SanaWMLTX2RefinerTransformer3DModel",
        "WanAnimate2Transformer3DModel",
    ),
    refuse="its attention reads a cache of earlier keys through a block mask of its own",
)
