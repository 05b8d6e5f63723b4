"""The patches of Swin, with which several models begin."""

from __future__ import annotations

from timm.layers import PatchEmbed
from torch import nn


def patchify(patch: int, in_chans: int, dim: int, **dd) -> PatchEmbed:
    """A layer that turns every patch into a cell; images are padded to whole patches.

    Args:
        patch: pixels to a side of a patch.
        in_chans: channels of an image.
        dim: channels of a cell.
        dd: device and dtype.
    """
    return PatchEmbed(
        None,
        patch,
        in_chans,
        dim,
        norm_layer=nn.LayerNorm,
        output_fmt="NHWC",
        dynamic_img_pad=True,
        **dd,
    )
