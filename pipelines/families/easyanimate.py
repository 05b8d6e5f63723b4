"""EasyAnimate: text before the video."""

from vidattn.pipelines.family import Family

FAMILY = Family(models=("EasyAnimateTransformer3DModel",), beside="before")
