"""Mochi: the valid text tokens behind the video, one attention call for each sample."""

from vidattn.pipelines.family import Family

FAMILY = Family(models=("MochiTransformer3DModel",), beside="after")
