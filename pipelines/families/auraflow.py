"""AuraFlow: text before the picture."""

from vidattn.pipelines.family import Family

FAMILY = Family(
    models=("AuraFlowTransformer2DModel",),
    layers=r"(joint|single)_transformer_blocks\.\d+\.attn",
    axes="BCHW",
    beside="before",
)
