"""AnyFlow: frames before channels, video alone in the sequence."""

from vidattn.pipelines.family import Family

FAMILY = Family(models=("AnyFlowTransformer3DModel",), layers=r"blocks\.\d+\.attn1", axes="BTCHW")
