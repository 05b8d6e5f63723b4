"""The UNets of Stable Diffusion 1, 2 and XL: the picture alone, at several sizes."""

from vidattn.pipelines.family import Family

FAMILY = Family(
    models=("UNet2DConditionModel",),
    layers=r"((down|up)_blocks\.\d+|mid_block)\.attentions\.\d+\.transformer_blocks\.\d+\.attn1",
    axes="BCHW",
    latents="sample",
    halves=True,
)
