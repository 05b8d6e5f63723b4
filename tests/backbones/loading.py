"""A model with the weights of a file, and what it computes."""

import timm
import torch

CLASSES = 5


def load(name, state, folder, **options):
    """A model with the weights of a file, in float64."""
    torch.save(state, folder / "weights.pth")
    overlay = {"file": str(folder / "weights.pth"), "num_classes": CLASSES}
    options = {"num_classes": CLASSES} | options
    return (
        timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **options)
        .double()
        .eval()
    )


def assert_same(model, images, answer):
    torch.testing.assert_close(model(images.double()), answer, atol=1e-9, rtol=1e-9)
