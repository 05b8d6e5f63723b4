"""FaViT: a pyramid of factorized attention.

Qin et al., "Factorization Vision Transformer: Modeling Long Range Dependency with Local Window
Cost", arXiv:2312.08614.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.layers import calculate_drop_path_rates
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from vidattn.backbones.convolved_block import ConvolvedBlock, ConvolvedMlp
from vidattn.backbones.factorized_attention import FactorizedAttention
from vidattn.backbones.overlapping_patches import OverlappingPyramid
from vidattn.backbones.pyramid import pretrained_cfg


class FaViT(OverlappingPyramid):
    """FaViT; takes images of any size.

    Args:
        in_chans: channels of an image.
        num_classes: 0 for no classifier.
        global_pool: pooling of the head, as timm names it; "" for none.
        embed_dim: channels of the first stage; each stage doubles them.
        depths: blocks of each stage.
        num_heads: of each stage.
        strides: cells to a side of the patches that attention reads, for each stage.
        mlp_ratios: hidden channels of the perceptrons over their width, for each stage.
        window: cells to a side of the windows that attention reads.
        drop_rate: dropout before the classifier.
        drop_path_rate: rate at which the last block leaves a branch out; it grows from 0.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 32,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        strides: Sequence[int] = (8, 4, 2, 1),
        mlp_ratios: Sequence[float] = (8, 6, 4, 4),
        window: int = 7,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if not len(depths) == len(num_heads) == len(strides) == len(mlp_ratios):
            raise ValueError(
                "depths, num_heads, strides and mlp_ratios must have one number for each stage, "
                f"got {depths}, {num_heads}, {strides} and {mlp_ratios}"
            )
        dd = {"device": device, "dtype": dtype}
        rates = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)

        def block(stage: int, rate: float) -> ConvolvedBlock:
            dim = embed_dim * 2**stage
            attn = FactorizedAttention(dim, num_heads[stage], strides[stage], window=window, **dd)
            mlp = ConvolvedMlp(dim, int(dim * mlp_ratios[stage]), **dd)
            return ConvolvedBlock(attn, mlp, dim, rate, **dd)

        super().__init__(
            [[block(i, rate) for rate in each] for i, each in enumerate(rates)],
            embed_dim,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )


def _create(name: str, pretrained: bool, **options) -> FaViT:
    stages = range(len(options["depths"]))
    return build_model_with_cfg(
        FaViT,
        name,
        pretrained,
        feature_cfg={"out_indices": tuple(stages), "flatten_sequential": True},
        **options,
    )


# no weights are released
default_cfgs = generate_default_cfgs({f"favit_b{i}": pretrained_cfg("stem.proj") for i in range(3)})


@register_model
def favit_b0(pretrained: bool = False, **options) -> FaViT:
    """3.4 M parameters, 0.6 G multiply-adds."""
    defaults = {"depths": (2, 2, 6, 2), "drop_path_rate": 0.1}
    return _create("favit_b0", pretrained, **defaults | options)


@register_model
def favit_b1(pretrained: bool = False, **options) -> FaViT:
    """13 M parameters, 2.4 G multiply-adds; paths are dropped as in the smallest."""
    defaults = {"embed_dim": 64, "depths": (2, 2, 6, 2), "drop_path_rate": 0.1}
    return _create("favit_b1", pretrained, **defaults | options)


@register_model
def favit_b2(pretrained: bool = False, **options) -> FaViT:
    """25 M parameters, 4.5 G multiply-adds; paths are dropped as in the smallest."""
    defaults = {"embed_dim": 64, "depths": (2, 3, 18, 3), "drop_path_rate": 0.1}
    return _create("favit_b2", pretrained, **defaults | options)
