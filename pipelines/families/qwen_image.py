"""Qwen-Image, Edit and Layered: text before the picture, its padding masked.

References stand behind the picture, and are read like text.
"""

from torch import nn

from vidattn.pipelines.family import Arguments, Family, Place


def locate(model: nn.Module, arguments: Arguments) -> Place:
    """The first picture of each sample; of layers all but the last, which is a reference."""
    shapes = arguments["img_shapes"]
    # some pipelines give the one picture of each sample without a list around it
    samples = [sample if isinstance(sample, list) else [sample] for sample in shapes]
    if any(sample != samples[0] for sample in samples):
        raise ValueError(
            f"its pictures have the shapes {samples}: all samples of a batch must have the same, "
            "so make one picture at a time"
        )
    (t, h, w), *others = samples[0]
    if model.config.get("use_layer3d_rope"):
        t *= len(others)
    return Place((t, h, w), arguments["encoder_hidden_states"].shape[1])


FAMILY = Family(
    models=("QwenImageTransformer2DModel",),
    layers=r"transformer_blocks\.\d+\.attn",
    beside="before",
    locate=locate,
)
