"""A pyramid whose stages each have twice the channels of the one before, and half the cells a side.

Letters: B batch, C channels, H, W size of a feature map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from timm.layers import ClassifierHead, calculate_drop_path_rates
from timm.models import build_model_with_cfg
from torch import nn

from vidattn.backbones.pyramid import Pyramid, Stage


class DoublingPyramid(Pyramid):
    """A stem, stages that double their channels, a norm and a head.

    Args:
        stem: from images to the feature map of the first stage.
        block: makes a block from its channels, the rate at which it leaves a branch out, its stage
            and its place in the stage, the last two from 0.
        downsample: makes the layer between two stages from the channels before and behind it.
        norm: makes the norm of the last feature map from its channels.
        embed_dim: channels of the first stage.
        depths: blocks of each stage.
        patch: pixels of the image to a cell of the first stage.
        in_chans: channels of an image.
        num_classes: 0 for no classifier.
        global_pool: pooling of the head, as timm names it; "" for none.
        drop_rate: dropout before the classifier.
        drop_path_rate: rate at which the last block leaves a branch out; it grows from 0.
        output_fmt: layout of feature maps, "NHWC" or "NCHW".
    """

    def __init__(
        self,
        stem: nn.Module,
        block: Callable[[int, float, int, int], nn.Module],
        downsample: Callable[..., nn.Module],
        norm: Callable[..., nn.Module] = nn.LayerNorm,
        *,
        embed_dim: int,
        depths: Sequence[int],
        patch: int = 4,
        in_chans: int,
        num_classes: int,
        global_pool: str,
        drop_rate: float,
        drop_path_rate: float,
        output_fmt: str = "NHWC",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        dd = {"device": device, "dtype": dtype}
        widths = [embed_dim * 2**i for i in range(len(depths))]
        rates = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        stages = []
        for i, dim in enumerate(widths):
            down = downsample(widths[i - 1], dim, **dd) if i else nn.Identity()
            stages.append(Stage(down, [block(dim, rate, i, j) for j, rate in enumerate(rates[i])]))
        options = {"input_fmt": output_fmt, **dd}
        super().__init__(
            stem,
            stages,
            norm(widths[-1], **dd),
            ClassifierHead(widths[-1], num_classes, global_pool, drop_rate, **options),
            in_chans=in_chans,
            taps=[(dim, patch * 2**i) for i, dim in enumerate(widths)],
        )


def check_stages(**options: Sequence) -> None:
    """Raise a ValueError unless all options have one entry for each stage."""
    if len({len(entries) for entries in options.values()}) > 1:
        *names, last = options
        *given, final = map(str, options.values())
        raise ValueError(
            f"{', '.join(names)} and {last} must have one entry for each stage, got "
            f"{', '.join(given)} and {final}"
        )


def build(model_cls: type[Pyramid], name: str, pretrained: bool, **options) -> Pyramid:
    """A registered model, by the conventions of timm.

    Args:
        model_cls: its class.
        name: under which it is registered.
        pretrained: whether it gets released weights.
        options: of the class, ``depths`` among them, and of ``build_model_with_cfg``.
    """
    stages = range(len(options["depths"]))
    features = {"out_indices": tuple(stages), "flatten_sequential": True}
    return build_model_with_cfg(model_cls, name, pretrained, feature_cfg=features, **options)
