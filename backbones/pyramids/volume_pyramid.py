"""A pyramid whose maps have more than two axes.

Letters: B batch, C channels.
"""

# annotations are not postponed, as in pyramid.py

from torch import Tensor

from vidattn.backbones.pyramids.doubling_pyramid import DoublingPyramid


class VolumePyramid(DoublingPyramid):
    """A pyramid for videos (B, C, T, H, W) and volumes with still more axes.

    A map has its channels last, (B, T, H, W, C), which ``output_fmt`` calls NHWC; NCHW puts them
    first. The head pools all axes.
    """

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Class scores of the last map, or what the classifier reads."""
        if self.global_pool != "":
            # the head pools two axes
            x = x.flatten(1, -2).unsqueeze(1)
        return self.head(x, pre_logits=pre_logits)
