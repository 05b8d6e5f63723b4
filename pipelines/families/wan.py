"""Wan 2.1, 2.2, VACE and Animate, with ChronoEdit, which shares their shape."""

from vidattn.pipelines.family import Family

FAMILY = Family(
    models=(
        "WanTransformer3DModel",
        "WanVACETransformer3DModel",
        "WanAnimateTransformer3DModel",
        "ChronoEditTransformer3DModel",
    ),
    layers=r"(vace_)?blocks\.\d+\.attn1",
    pixels=16,
)
