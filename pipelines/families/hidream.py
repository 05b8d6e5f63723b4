"""HiDream: padding and text behind the picture."""

from torch import nn

from vidattn.pipelines.family import Arguments, Family, Place, patched_size


def locate(model: nn.Module, arguments: Arguments) -> Place:
    """The picture, which comes whole, or in patches with its size."""
    latents = arguments["hidden_states"]
    if latents.dim() == 4:
        return Place(patched_size(model, latents, "BCHW"))
    sizes = [tuple(map(int, size)) for size in arguments["img_sizes"]]
    if any(size != sizes[0] for size in sizes):
        raise ValueError(
            f"its pictures have the sizes {sizes}: all of a batch must have the same, so make one "
            "at a time"
        )
    h, w = sizes[0]
    return Place((1, h, w))


FAMILY = Family(
    models=("HiDreamImageTransformer2DModel",),
    layers=r"(double|single)_stream_blocks\.\d+\.block\.attn1",
    beside="after",
    locate=locate,
    times="timesteps",
)
