"""Allegro: video alone in the sequence."""

from vidattn.pipelines.family import Family

FAMILY = Family(models=("AllegroTransformer3DModel",))
