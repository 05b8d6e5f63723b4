"""What timm asks of a model that is a stem, stages, a norm and a head.

Letters: B batch, C channels, H, W size of a feature map.
"""

# Annotations are not postponed here: FX would copy that of ``forward`` as text that TorchScript
# cannot read.

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, get_device_dtype, trunc_normal_
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from typing_extensions import TypedDict

FORMATS = ("NCHW", "NHWC")


def pretrained_cfg(
    first_conv: str | None, *, size: int = 224, reduction: int = 32, **fields
) -> dict:
    """timm's description of a model, or of its weights.

    Args:
        first_conv: name of the layer that reads the image; None where timm cannot adapt its weights
            to other channels.
        size: edge of the square images it was trained on.
        reduction: pixels to a cell of the last feature map.
        fields: of ``timm.models.PretrainedCfg``, such as ``url``.
    """
    return {
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": (size // reduction, size // reduction),
        "crop_pct": 0.875 if size == 224 else 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": first_conv,
        "classifier": "head.fc",
        **fields,
    }


class Options(TypedDict, total=False):
    """What every pyramid takes; its class says which defaults are others.

    Attributes:
        in_chans: channels of an image, 3 by default.
        num_classes: 1000 by default; 0 for no classifier.
        global_pool: pooling of the head, as timm names it, "avg" by default; "" for none.
        embed_dim: channels of the first stage, 96 by default.
        drop_rate: dropout before the classifier, 0 by default.
        drop_path_rate: rate at which the last block leaves a branch out; it grows from 0, and is
            0 by default.
        device: of the parameters.
        dtype: of the parameters.
    """

    in_chans: int
    num_classes: int
    global_pool: str
    embed_dim: int
    drop_rate: float
    drop_path_rate: float
    device: torch.device | str | None
    dtype: torch.dtype | None


class Stage(nn.Module):
    """Blocks at one resolution, behind the layer that leads to it.

    Args:
        downsample: from the resolution before; nn.Identity for the first stage.
        blocks: in order; they keep the shape of a feature map.
    """

    def __init__(self, downsample: nn.Module, blocks: Iterable[nn.Module]):
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Feature map after the last block."""
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            # of two kinds, this one lets a loss be taken inside a block, as head_routing.py does
            return checkpoint_seq(self.blocks, x, use_reentrant=False)
        return self.blocks(x)


class Pyramid(nn.Module):
    """A model with the methods and attributes that timm's programs use.

    Feature maps are NHWC or NCHW, as the head takes them: ``output_fmt``.

    Args:
        stem: from (B, C, H, W) images to the feature map of the first stage.
        stages: in order.
        norm: of the last feature map.
        head: pooling and classifier.
        in_chans: channels of an image.
        taps: channels, and pixels of the image to a cell, of the output of each stage.
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[Stage],
        norm: nn.Module,
        head: ClassifierHead,
        *,
        in_chans: int,
        taps: Sequence[tuple[int, int]],
    ):
        super().__init__()
        self.in_chans = in_chans
        self.num_classes = getattr(head.fc, "out_features", 0)
        self.num_features = head.in_features
        self.head_hidden_size = head.num_features
        self.global_pool = head.global_pool.pool_type
        self.output_fmt = head.input_fmt
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": channels, "reduction": reduction, "module": f"stages.{i}"}
            for i, (channels, reduction) in enumerate(taps)
        ]
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.norm = norm
        self.head = head
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Draw the weights from which training starts.

        Args:
            needs_reset: whether the tensors hold nothing yet, as after ``to_empty``.
        """
        for module in self.modules():
            if needs_reset and hasattr(module, "reset_parameters"):
                module.reset_parameters()
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters, as patterns, that weight decay leaves alone."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Patterns of parameter names that belong to one layer."""
        blocks = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute activations again in the backward pass instead of keeping them."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new last layer in place, none for 0 classes; the pooling stays unless named."""
        dd = get_device_dtype(self)
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, in_features=self.num_features, **dd)
        self.global_pool = self.head.global_pool.pool_type
        self.head_hidden_size = self.head.num_features

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Feature maps of stages beside the last one.

        Args:
            x: (B, C, H, W) images.
            indices: the stages: the last so many, those listed, or all for None.
            norm: whether the last feature map is taken after the norm.
            stop_early: whether stages behind the last one asked for are left out.
            output_fmt: of the feature maps, "NCHW" or "NHWC".
            intermediates_only: whether the last feature map is left out.

        Returns:
            What ``forward_features`` gives, with the list of feature maps; or the list alone.
        """
        if output_fmt not in FORMATS:
            raise ValueError(f"output_fmt must be one of {FORMATS}, got {output_fmt!r}")
        taken, deepest = feature_take_indices(len(self.stages), indices)
        last = len(self.stages) - 1
        x, maps = self.stem(x), []
        for i, stage in enumerate(self.stages):
            if stop_early and i > deepest:
                break
            x = stage(x)
            tap = self.norm(x) if norm and i == last else x
            if i in taken:
                maps.append(self._in_format(tap, output_fmt))
        if intermediates_only:
            return maps
        return self.norm(x) if i == last else x, maps

    def _in_format(self, x: Tensor, output_fmt: str) -> Tensor:
        if output_fmt == self.output_fmt:
            return x
        x = x.movedim(-1, 1) if output_fmt == "NCHW" else x.movedim(1, -1)
        return x.contiguous()

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the feature maps of these stages do not need; returns their indices."""
        taken, deepest = feature_take_indices(len(self.stages), indices)
        is_cut = deepest < len(self.stages) - 1
        self.stages = self.stages[: deepest + 1]
        if is_cut:
            self.num_features = self.feature_info[deepest]["num_chs"]
        if prune_norm or is_cut:
            # the norm is as wide as the last stage
            self.norm = nn.Identity()
        if prune_head or is_cut:
            self.reset_classifier(0, "")
        return taken

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map, normed, of (B, C, H, W) images."""
        return self.norm(self.stages(self.stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Class scores of the last feature map, or what the classifier reads."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores (B, num_classes) of (B, C, H, W) images."""
        return self.forward_head(self.forward_features(x))
