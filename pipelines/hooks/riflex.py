"""Slows what repeats in the rotary embedding of time, for videos longer than a model repeats in.

Source: Zhao et al., "RIFLEx: A Free Lunch for Length Extrapolation in Video Diffusion
Transformers", arXiv:2502.15894. Each pair of channels turns with the frame at an angular speed of
its own. A video that is longer than one turn of the pair whose period is that at which the model
begins anew repeats itself: the pair is slowed, so that the whole video is nine tenths of a turn.
Speeds are read from the tables that the model makes, so nothing is told of its channels.

Letters: S tokens of the video, C channels of the tables, in the layout of the model.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from vidattn.grid import Size
from vidattn.pipelines.family import family_of, patched_size

# of a turn, which a whole video is; the authors leave some room
TURN = 0.9


def install(model: nn.Module, period: float) -> Callable[[], None]:
    """Slow the rotation of a transformer; what undoes it.

    Args:
        period: latent frames after which its videos begin anew. The channels whose period is the
            first at or above it are slowed, in videos of more frames than that period.

    Raises:
        ValueError: the transformer has no table of rotations that is made of its input alone.
    """
    rope = getattr(model, "rope", None)
    if rope is None or _inputs(rope) != ["hidden_states"]:
        raise ValueError(
            f"repeats_after needs a transformer whose rope makes its rotations of hidden_states "
            f"alone, as those of Wan, SkyReels-V2 and HunyuanVideo do, got {type(model).__name__}: "
            "leave repeats_after out"
        )
    axes = family_of(model).axes

    def slowed(module: nn.Module, given: tuple[Tensor], tables: tuple[Tensor, Tensor]):
        return _slowed(tables, patched_size(model, given[0], axes), period)

    return rope.register_forward_hook(slowed).remove


def _inputs(rope: nn.Module) -> list[str]:
    return list(inspect.signature(type(rope).forward).parameters)[1:]


def _slowed(tables: tuple[Tensor, Tensor], size: Size, period: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each of S x C numbers in any shape whose last axis is C."""
    cos, sin = (table.reshape(-1, table.shape[-1]) for table in tables)
    (t, h, w), (rows, _) = size, cos.shape
    if rows != t * h * w:
        raise ValueError(f"the rotations are of {rows} tokens, the video has {t} x {h} x {w}")
    if t == 1:
        return tables
    # what a channel turns by from one frame to the next; those of height and width stand still
    turn = torch.atan2(sin[h * w], cos[h * w]).abs().double()
    periods = torch.where(turn > 1e-7, 2 * math.pi / turn, 0.0)
    long = periods >= period * (1 - 1e-4)
    if not long.any():
        return tables
    found = periods[long].min()
    if t <= found:
        return tables
    angle = torch.arange(t, device=cos.device) * (TURN * 2 * math.pi / t)
    angle = angle.double().repeat_interleave(h * w)[:, None]
    mine = (periods - found).abs() <= 1e-4 * found
    cos = torch.where(mine, angle.cos().to(cos), cos)
    sin = torch.where(mine, angle.sin().to(sin), sin)
    return cos.reshape(tables[0].shape), sin.reshape(tables[1].shape)
