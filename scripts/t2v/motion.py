"""Where the things of a scene are in every frame, and how they are turned.

T frames; places are rows y, x in pixels.
"""

import math

import numpy as np
import torch
from t2v.scenes import FLYING, STEPS, Actor, Scene
from torch import Tensor

ITEM_PX = 48
# What one place of the latents holds. Things start at whole ones, and motions that repeat start at
# whole frames of them: a small model then meets each of their looks often enough to know it.
CELL_PX, CELL_FRAMES = 8, 4
# Pixels a frame on a straight way; whole latent cells for four frames.
SPEED_PX = {False: 2.0, True: 1.0}
BOUNCE_PX = 30
BOUNCE_FRAMES = {False: 24, True: 40}
CIRCLE_PX = 22
CIRCLE_FRAMES = {False: 48, True: 80}
WOBBLE_FRAMES = 32
WOBBLE = 0.12


def _place(low: float, high: float, rng: np.random.Generator) -> float:
    """A random place between two bounds, or their middle where they cross, at a whole cell."""
    share = rng.random()
    return _whole(low + (high - low) * share if low < high else (low + high) / 2)


def _whole(place: float) -> float:
    return CELL_PX * round(place / CELL_PX)


def cycle_of(actor: Actor, num_frames: int, rng: np.random.Generator) -> Tensor:
    """Where an actor is in what it repeats, in every frame: (T,) in periods, from a random start.

    A thing that bounces or circles turns in step with that.
    """
    frames = {"circling": CIRCLE_FRAMES, "bouncing": BOUNCE_FRAMES}.get(actor.motion)
    period = frames[actor.slow] if frames else WOBBLE_FRAMES
    start = CELL_FRAMES * int(rng.random() * (period / CELL_FRAMES))
    return (torch.arange(num_frames, dtype=torch.float32) + start) / period


def path_of(
    actor: Actor, cycle: Tensor, box: tuple[float, float, float, float], rng: np.random.Generator
) -> Tensor:
    """Centre of an actor in every frame of its cycle (T,) as (T, 2) rows y, x in pixels.

    A straight way that leaves the box (top, left, bottom, right) goes on at its other side;
    whatever its length, some part of the thing is to be seen in every frame.
    """
    lows, highs = np.array(box[:2]), np.array(box[2:])
    num_frames, half = len(cycle), ITEM_PX / 2
    if actor.motion == "circling":
        middle = [
            _place(a + half + CIRCLE_PX, b - half - CIRCLE_PX, rng) for a, b in zip(lows, highs)
        ]
        angle = 2 * math.pi * cycle
        return torch.tensor(middle) + CIRCLE_PX * torch.stack([angle.sin(), angle.cos()], 1)
    if actor.motion == "bouncing":
        floor = _place(lows[0] + half + BOUNCE_PX, highs[0] - half, rng)
        y = floor - BOUNCE_PX * 4 * (cycle % 1) * (1 - cycle % 1)
        return torch.stack([y, torch.full_like(y, _place(lows[1] + half, highs[1] - half, rng))], 1)
    columns = []
    for low, high, sign in zip(lows, highs, STEPS[actor.motion], strict=True):
        way = SPEED_PX[actor.slow] * sign * (num_frames - 1)
        room = abs(high - low - ITEM_PX - abs(way))
        start = _whole((low + high - way) / 2 + room * (rng.random() - 0.5))
        place = start + SPEED_PX[actor.slow] * sign * torch.arange(num_frames)
        columns.append((place - low + half) % (high - low + ITEM_PX) + low - half)
    return torch.stack(columns, 1)


def boxes_of(scene: Scene, height: int, width: int) -> list[tuple[float, float, float, float]]:
    """The part of the picture that each actor keeps to: (top, left, bottom, right)."""
    if len(scene.actors) == 1:
        return [(0, 0, height, width)]
    if scene.motion in ("left", "right"):
        return [(0, 0, height / 2, width), (height / 2, 0, height, width)]
    return [(0, 0, height, width / 2), (0, width / 2, height, width)]


def turns_of(actor: Actor, cycle: Tensor) -> Tensor:
    """The angle (T,) by which its picture is turned clockwise, in radians, over its cycle (T,)."""
    turn = WOBBLE * (2 * math.pi * cycle).sin()
    if actor.thing in FLYING and actor.motion in STEPS:
        turn = turn + math.pi / 4 + math.atan2(*STEPS[actor.motion])
    return turn
