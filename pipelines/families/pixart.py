"""PixArt alpha and sigma, DiT and HunyuanDiT: the picture alone in the sequence."""

from vidattn.pipelines.family import Family

FAMILY = (
    Family(models=("PixArtTransformer2DModel", "DiTTransformer2DModel"), axes="BCHW"),
    Family(models=("HunyuanDiT2DModel",), layers=r"blocks\.\d+\.attn1", axes="BCHW"),
)
