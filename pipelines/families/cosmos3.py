"""Cosmos 3: the video reads text that reads itself alone; sound and actions stand behind it."""

from torch import nn

from vidattn.pipelines.family import Arguments, Family, Place


def locate(model: nn.Module, arguments: Arguments) -> Place:
    """The last video, behind the text and any others."""
    sizes = [tuple(size) for size in arguments["vision_token_shapes"]]
    others = sum(t * h * w for t, h, w in sizes[:-1])
    return Place(sizes[-1], int(arguments["vision_sequence_indexes"][others]))


FAMILY = Family(
    models=("Cosmos3OmniTransformer",),
    layers=r"layers\.\d+\.self_attn",
    beside="before",
    locate=locate,
    prefix=True,
    latents="vision_tokens",
    times="vision_timesteps",
)
