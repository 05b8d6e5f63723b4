"""Long video sparse attention: near frames, and anchor frames that are others in every step.

Source: Glorian et al., "LVSA: Training-Free Sparse Attention for Long Video Diffusion",
arXiv:2605.31057. Beyond the length that a model was trained on, full attention lets a video freeze
or repeat itself. Here a frame reads those near to it and one of every so many frames of the whole
video, which others take turns at from step to step, for anchors that stayed would show as a rhythm
in the video. A video of no more frames than there are anchors is read whole. What its authors tell
in public is that there are a local window and rotating global anchors, about as many as frames at
training; how far the window reaches and how anchors take turns is chosen here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from vidattn.grid import Grid, frame_layout
from vidattn.plan import Plan
from vidattn.planning.method import check_share, run_state
from vidattn.planning.pattern import PatternMethod

# of anchors, after which they begin again: each has a plan, which is kept
TURNS = 8


@dataclass(frozen=True, kw_only=True)
class Lvsa(PatternMethod):
    """Frames up to a distance, and every so many frames, which take turns in the steps.

    Args:
        near: frames to each side that a frame reads.
        anchors: frames of the whole video that all read, about as many as the model was trained
            on; those of a longer video are equally far apart.
        density: kept share of the video pairs, above 0 and at most 1; sets ``near`` and
            ``anchors``, four anchors to a near frame, to come as close to it as whole frames allow.
        tile: its tokens make a block; a block lies within a frame, whatever the shape of a tile.

    Raises:
        ValueError: a value out of range; from ``plan``, a density below that of the own frame.
    """

    near: int = 2
    anchors: int = 20
    density: float | None = None
    step: int = run_state(0)

    def __post_init__(self):
        super().__post_init__()
        for name, least in (("near", 0), ("anchors", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        check_share("density", self.density)

    def in_step(self, step: int) -> Lvsa:
        """The anchors of a denoising step."""
        return replace(self, step=step % TURNS)

    def check(self, grid: Grid) -> None:
        """Refuse a density below that of the own frame."""
        self._reach(grid.t)

    def pattern(self, grid: Grid) -> Plan:
        """Whole frames."""
        layout = frame_layout(grid, math.prod(self.tile_of(grid)))
        frame = torch.arange(layout.num_video_blocks) * grid.t // layout.num_video_blocks
        frames = _frames(grid.t, *self._reach(grid.t), self.step)
        return Plan.from_blocks(grid, layout, frames[frame[:, None], frame][None, None])

    def _reach(self, num_frames: int) -> tuple[int, int]:
        """How many frames to each side, and how many frames lie from one anchor to the next."""
        if self.density is None:
            return self.near, _interval(num_frames, self.anchors)
        return _fit(num_frames, self.density, self.step)


def _frames(num_frames: int, near: int, interval: int, step: int) -> Tensor:
    """(T, T) bool, which frame reads which."""
    frame = torch.arange(num_frames)
    return ((frame[:, None] - frame).abs() <= near) | (frame % interval == _first(interval, step))


def _first(interval: int, step: int) -> int:
    """The first anchor in a step: the next frame in each, in longer intervals one further on."""
    return step * max(interval, TURNS) // TURNS % interval


def _interval(num_frames: int, anchors: int) -> int:
    return -(-num_frames // anchors)


@lru_cache(maxsize=256)
def _fit(num_frames: int, density: float, step: int) -> tuple[int, int]:
    """What comes nearest to a density: frames to each side, and from one anchor to the next."""
    choices = {(round(n / 8), _interval(num_frames, n)): 0.0 for n in range(1, num_frames + 1)}
    for near, interval in choices:
        choices[near, interval] = _share(num_frames, near, interval, step)
    least = min(choices.values())
    if density < least * (1 - 1e-9):
        raise ValueError(
            f"density {density} is out of reach on {num_frames} frames: those that read themselves "
            f"and one anchor have {least:.3g}; raise it"
        )
    return min(choices, key=lambda choice: abs(choices[choice] - density))


def _share(num_frames: int, near: int, interval: int, step: int) -> float:
    """Share of the pairs of frames that read each other."""
    frame = torch.arange(num_frames)
    first, end = (frame - near).clamp(min=0), (frame + near + 1).clamp(max=num_frames)
    # anchors in front of each frame, and of the end
    before = (torch.arange(num_frames + 1) - _first(interval, step) + interval - 1) // interval
    before = before.clamp(min=0)
    kept = end - first + before[-1] - (before[end] - before[first])
    return kept.sum().item() / num_frames**2
