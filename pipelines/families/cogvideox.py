"""CogVideoX 1.0 and 1.5, text, image and video to video, and ConsisID: text before the video."""

from vidattn.pipelines.family import Family

FAMILY = Family(
    models=("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel"),
    axes="BTCHW",
    beside="before",
)
