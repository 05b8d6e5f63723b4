"""MoH-ViT: TransNeXt in which every token weighs the heads of attention, and leaves some out.

Jin et al., "MoH: Multi-Head Attention as Mixture-of-Head Attention", arXiv:2410.11842; Shi,
"TransNeXt: Robust Foveal Visual Perception for Vision Transformers", arXiv:2311.17132.

The paper has no smaller model than MoH-ViT-S. ``moh_vit_tiny`` is TransNeXt-Tiny with the heads of
MoH-ViT-S-75.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from typing_extensions import Unpack

from vidattn.backbones.layers.aggregated_attention import AggregatedAttention, CosineAttention
from vidattn.backbones.layers.convolved_block import ConvolvedBlock, GatedConvolution
from vidattn.backbones.layers.head_routing import HeadRouter
from vidattn.backbones.pyramids.checkpoints import rename
from vidattn.backbones.pyramids.doubling_pyramid import build, check_stages
from vidattn.backbones.pyramids.overlapping_patches import OverlappingPyramid, names_of_pvt
from vidattn.backbones.pyramids.pyramid import Options, pretrained_cfg

# cells to a side of the first stage at 224 pixels
SIDE = 56


class MoHViT(OverlappingPyramid):
    """MoH-ViT; takes images of any size.

    In training, ``vidattn.backbones.layers.head_routing`` has the ``balance_losses`` that are added
    to the loss.

    Args:
        depths: blocks of each stage.
        num_heads: of each stage.
        num_shared: heads that every token takes, for each stage.
        num_routed: heads that a token takes of the others, for each stage.
        strides: cells to a side of what attention pools, for each stage; 1 for full attention.
        mlp_ratios: hidden channels over width, were there no gates, for each stage.
        options: as every pyramid takes them.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int] = (5, 5, 22, 5),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        num_shared: Sequence[int] = (3, 6, 3, 4),
        num_routed: Sequence[int] = (0, 0, 6, 12),
        strides: Sequence[int] = (8, 4, 2, 1),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        **options: Unpack[Options],
    ):
        check_stages(
            depths=depths,
            num_heads=num_heads,
            num_shared=num_shared,
            num_routed=num_routed,
            strides=strides,
            mlp_ratios=mlp_ratios,
        )

        def block(dim: int, rate: float, stage: int, index: int, **dd) -> ConvolvedBlock:
            heads = num_heads[stage]
            if dim % heads:
                raise ValueError(f"dim must be a multiple of num_heads, got {dim} and {heads}")
            numbers = {"num_shared": num_shared[stage], "num_routed": num_routed[stage]}
            router = HeadRouter(dim, heads, **numbers, **dd)
            options = {"num_heads": heads, "side": SIDE // 2**stage, **dd}
            if strides[stage] == 1:
                attn = CosineAttention(dim, router, **options)
            else:
                attn = AggregatedAttention(dim, router, stride=strides[stage], **options)
            # with gates, two thirds of the hidden channels have the size of a perceptron
            mlp = GatedConvolution(dim, int(2 * int(dim * mlp_ratios[stage]) / 3), **dd)
            return ConvolvedBlock(attn, mlp, dim, rate, **dd)

        super().__init__(
            block,
            depths=depths,
            **Options(embed_dim=72) | options,
        )

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """What scores are scaled, moved and biased with."""
        return {"*.rpb", "*.temperature", "*.queries.embedding", "*.position_bias.*"}


# from the names of the authors, which begin as those of PVT v2
NAMES = (
    (r"\.dwconv\.dwconv\.", ".dwconv."),
    (r"\.attn\.cpb_", ".attn.position_bias."),
    (r"\.attn\.temperature", ".attn.queries.temperature"),
    (r"\.attn\.query_embedding", ".attn.queries.embedding"),
    (r"\.attn\.relative_pos_bias_local", ".attn.rpb"),
    (r"\.attn\.learnable_tokens", ".attn.tokens"),
    (r"\.attn\.learnable_bias", ".attn.token_bias"),
    (r"\.attn\.wg_0\.", ".attn.router.kinds."),
    (r"\.attn\.wg_1\.", ".attn.router.shared."),
    (r"\.attn\.wg\.", ".attn.router.routed."),
)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict of ``model`` from one of the authors, or in its own layout."""
    rules = *names_of_pvt(len(model.feature_info)), *NAMES
    return rename(rules)(state_dict, model)


def _create(name: str, pretrained: bool, **options) -> MoHViT:
    options = {"pretrained_filter_fn": checkpoint_filter_fn} | options
    return build(MoHViT, name, pretrained, **options)


SMALL = {"depths": (5, 5, 22, 5), "drop_path_rate": 0.45}
default_cfgs = generate_default_cfgs(
    {
        name: pretrained_cfg("stem.proj", license="apache-2.0")
        for name in ("moh_vit_tiny", "moh_vit_small_75", "moh_vit_small_80")
    }
)


@register_model
def moh_vit_tiny(pretrained: bool = False, **options) -> MoHViT:
    """28 M parameters, 5.7 G multiply-adds."""
    defaults = {"depths": (2, 2, 15, 2), "drop_path_rate": 0.3}
    return _create("moh_vit_tiny", pretrained, **defaults | options)


@register_model
def moh_vit_small_75(pretrained: bool = False, **options) -> MoHViT:
    """50 M parameters, 10.3 G multiply-adds; a token takes 75 % of the heads."""
    return _create("moh_vit_small_75", pretrained, **SMALL | options)


@register_model
def moh_vit_small_80(pretrained: bool = False, **options) -> MoHViT:
    """50 M parameters, 10.3 G multiply-adds; a token takes 80 % of the heads."""
    defaults = SMALL | {"num_shared": (3, 6, 3, 8)}
    return _create("moh_vit_small_80", pretrained, **defaults | options)
