"""LTX-2: packed latents with sound beside them; condition tokens behind the video.

Only the self-attention of the video is made sparse. Perturbed guidance runs some layers without it.
"""

from torch import nn

from vidattn.pipelines.family import Arguments, Family, Place


def locate(model: nn.Module, arguments: Arguments) -> Place:
    """From the sizes in latents that the pipelines pass."""
    config = model.config
    patch = (config.patch_size_t, config.patch_size, config.patch_size)
    sizes = (arguments[name] for name in ("num_frames", "height", "width"))
    t, h, w = (-(-length // edge) for length, edge in zip(sizes, patch))
    return Place((t, h, w), 0)


FAMILY = Family(
    models=("LTX2VideoTransformer3DModel",), locate=locate, beside="after", may_skip=True
)
