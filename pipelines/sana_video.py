"""Sana Video: linear attention, which has no pairs to leave out."""

from vidattn.pipelines.family import Family

FAMILY = Family(
    models=("SanaVideoTransformer3DModel", "SanaWMTransformer3DModel"),
    refuse="its self-attention is linear and never forms pairs of tokens, so that leaving pairs "
    "out saves nothing",
)
