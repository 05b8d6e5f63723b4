"""Z-Image: padding and text behind the picture."""

from torch import nn

from vidattn.pipelines.family import Arguments, Family, Place


def locate(model: nn.Module, arguments: Arguments) -> Place:
    """The picture of every sample, all of one size."""
    pictures = arguments["x"]
    if isinstance(pictures[0], list):
        raise ValueError(
            "it reads reference pictures before the one it makes, where each sample may have "
            "others: ZImageOmniPipeline is not served, ZImagePipeline is; unpatch it"
        )
    if any(x.shape != pictures[0].shape for x in pictures):
        raise ValueError(
            f"its pictures have the shapes {[tuple(x.shape) for x in pictures]}: all of a batch "
            "must have the same, so make one at a time"
        )
    _, *extent = pictures[0].shape
    edge = arguments.get("patch_size", 2)
    t, h, w = (n // size for n, size in zip(extent, (arguments.get("f_patch_size", 1), edge, edge)))
    return Place((t, h, w), 0)


FAMILY = Family(
    models=("ZImageTransformer2DModel",),
    layers=r"(noise_refiner|layers)\.\d+\.attention",
    beside="after",
    locate=locate,
    latents="x",
    times="t",
)
