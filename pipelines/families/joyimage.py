"""JoyImage Edit and Edit Plus: references, padding and text behind the picture."""

from torch import nn

from vidattn.pipelines.family import Arguments, Family, Place, patched_size


def locate(model: nn.Module, arguments: Arguments) -> Place:
    """The last of several items, which the model puts first."""
    latents = arguments["hidden_states"]
    return Place(patched_size(model, latents[:, -1] if latents.dim() == 6 else latents))


def locate_packed(model: nn.Module, arguments: Arguments) -> Place:
    """The first shape of each sample."""
    sizes = [tuple(shapes[0]) for shapes in arguments["shape_list"]]
    if any(size != sizes[0] for size in sizes):
        raise ValueError(
            f"its pictures have the sizes {sizes}: all of a batch must have the same, so make one "
            "at a time"
        )
    return Place(sizes[0])


FAMILY = tuple(
    Family(models=(name,), layers=r"double_blocks\.\d+\.attn", beside="after", locate=place)
    for name, place in (
        ("JoyImageEditTransformer3DModel", locate),
        ("JoyImageEditPlusTransformer3DModel", locate_packed),
    )
)
