"""Helios: compressed history before the new chunk of video."""

from vidattn.pipelines.family import Family

FAMILY = Family(models=("HeliosTransformer3DModel",), layers=r"blocks\.\d+\.attn1", beside="before")
