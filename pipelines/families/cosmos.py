"""Cosmos 1, 2 and 2.5, predict and transfer: video alone in the sequence."""

from vidattn.pipelines.family import Family

FAMILY = Family(models=("CosmosTransformer3DModel",))
