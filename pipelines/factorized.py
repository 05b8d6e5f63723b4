"""Models whose attention is split into space and time, each too short to be worth a plan."""

from vidattn.pipelines.family import Family

FAMILY = Family(
    models=(
        "I2VGenXLUNet",
        "LatteTransformer3DModel",
        "UNet3DConditionModel",
        "UNetMotionModel",
        "UNetSpatioTemporalConditionModel",
    ),
    refuse="it attends within each frame and across time at each place separately, never over a "
    "(t, h, w) grid",
)
