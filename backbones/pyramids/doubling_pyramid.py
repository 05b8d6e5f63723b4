"""A pyramid whose stages each have twice the channels of the one before, and half the cells a side.

Letters: B batch, C channels, H, W size of a feature map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from timm.layers import ClassifierHead, calculate_drop_path_rates
from timm.models import build_model_with_cfg
from torch import nn

from vidattn.backbones.pyramids.pyramid import Pyramid, Stage


class DoublingPyramid(Pyramid):
    """A stem, stages that double their channels, a norm and a head.

    Args:
        stem: makes what leads from images to the feature map of the first stage from the channels
            of both.
        block: makes a block from its channels, the rate at which it leaves a branch out, its stage
            and its place in the stage, the last two from 0.
        downsample: makes the layer between two stages from the channels before and behind it.
        norm: makes the norm of the last feature map from its channels. All four take ``device``
            and ``dtype`` too.
        depths: blocks of each stage.
        patch: pixels of the image to a cell of the first stage.
        growth: channels of a stage over those of the one before, and cells to a side the other way;
            1 for stages that are all alike.
        output_fmt: layout of feature maps, "NHWC" or "NCHW".
        in_chans, num_classes, global_pool, embed_dim, drop_rate, drop_path_rate: as in ``Options``.
    """

    def __init__(
        self,
        stem: Callable[..., nn.Module],
        block: Callable[..., nn.Module],
        downsample: Callable[..., nn.Module],
        norm: Callable[..., nn.Module] = nn.LayerNorm,
        *,
        depths: Sequence[int],
        patch: int = 4,
        growth: int = 2,
        output_fmt: str = "NHWC",
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        dd = {"device": device, "dtype": dtype}
        entry = stem(in_chans, embed_dim, **dd)
        widths = [embed_dim * growth**i for i in range(len(depths))]
        rates = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        stages = []
        for i, dim in enumerate(widths):
            down = downsample(widths[i - 1], dim, **dd) if i else nn.Identity()
            blocks = [block(dim, rate, i, j, **dd) for j, rate in enumerate(rates[i])]
            stages.append(Stage(down, blocks))
        options = {"input_fmt": output_fmt, **dd}
        super().__init__(
            entry,
            stages,
            norm(widths[-1], **dd),
            ClassifierHead(widths[-1], num_classes, global_pool, drop_rate, **options),
            in_chans=in_chans,
            taps=[(dim, patch * growth**i) for i, dim in enumerate(widths)],
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
