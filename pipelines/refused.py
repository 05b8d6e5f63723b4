"""Models that cannot be patched, and why."""

from vidattn.pipelines.family import Family

FAMILY = (
    Family(
        models=(
            "AnyFlowFARTransformer3DModel",
            "SanaWMLTX2RefinerTransformer3DModel",
            "WanAnimate2Transformer3DModel",
        ),
        refuse="its attention reads a cache of earlier keys through a block mask of its own",
    ),
    Family(
        models=(
            "I2VGenXLUNet",
            "LatteTransformer3DModel",
            "UNet3DConditionModel",
            "UNetMotionModel",
            "UNetSpatioTemporalConditionModel",
        ),
        refuse="it attends within each frame and across time at each place separately, never over "
        "a (t, h, w) grid",
    ),
    Family(
        models=("SanaVideoTransformer3DModel", "SanaWMTransformer3DModel"),
        refuse="its self-attention is linear and never forms pairs of tokens, so that leaving "
        "pairs out saves nothing",
    ),
)
