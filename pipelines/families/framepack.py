"""HunyuanVideo Framepack: compressed history before the new section, image and text behind it."""

import math

from torch import nn

from vidattn.pipelines.family import Arguments, Family, Place, patched_size


def locate(model: nn.Module, arguments: Arguments) -> Place:
    """The new section, behind the three stretches of history that were given."""
    stretches = {
        "clean": model.clean_x_embedder.proj,
        "history_2x": model.clean_x_embedder.proj_2x,
        "history_4x": model.clean_x_embedder.proj_4x,
    }
    num_before = 0
    for name, embedding in stretches.items():
        latents = arguments.get(f"latents_{name}")
        if latents is not None and arguments.get(f"indices_latents_{name}") is not None:
            # compressed history is padded to whole patches
            extents = zip(latents.shape[2:], embedding.kernel_size)
            num_before += math.prod(-(-length // edge) for length, edge in extents)
    return Place(patched_size(model, arguments["hidden_states"]), num_before)


FAMILY = Family(
    models=("HunyuanVideoFramepackTransformer3DModel",),
    layers=r"(single_)?transformer_blocks\.\d+\.attn",
    beside="after",
    locate=locate,
)
