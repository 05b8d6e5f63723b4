"""Captioned clips of 3-D emoji that move in front of a painted background.

T frames, H height, W width; clips are (3, T, H, W) float32 in [-1, 1].
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from fetching.packages import FLUENT_EMOJI, unpack
from PIL import Image
from t2v.backgrounds import paint_background
from t2v.motion import ITEM_PX, boxes_of, cycle_of, path_of, turns_of
from t2v.scenes import (
    FLYING,
    LOOKING_LEFT,
    NUM_PROMPTS,
    SHARE_OF_PAIRS,
    SHARE_SLOW,
    SPELLINGS,
    THINGS,
    WORDS,
    Actor,
    Scene,
    all_scenes,
    held_out_prompts,
    held_out_scenes,
    tuning_prompts,
    vary_caption,
)
from torch import Tensor

__all__ = [
    "NUM_PROMPTS",
    "SPELLINGS",
    "WORDS",
    "Clips",
    "fetch_items",
    "held_out_prompts",
    "tuning_prompts",
    "unseen_clips",
    "vary_caption",
]

INNER = "package/assets"
# The shortest side in which two things pass each other.
PAIR_PX = 2 * ITEM_PX + 8


def fetch_items(folder: str | Path) -> Path:
    """Download and unpack the npm package with the pictures, checked by SHA-256."""
    folder = Path(folder)
    if not (folder / INNER).is_dir():
        unpack(FLUENT_EMOJI, folder)
    return folder / INNER


def load_sprite(folder: str | Path, thing: str) -> Tensor:
    """One picture as (4, P, P) in [0, 1], P = 2 * ITEM_PX: colours times opacity, opacity."""
    picture = Image.open(fetch_items(folder) / f"{THINGS[thing]}.webp").convert("RGBA")
    picture = picture.crop(picture.getbbox())
    # Turned by an eighth, what is drawn along the diagonal is longer than wide.
    side = round(max(picture.size) * (1.1 if thing in FLYING else 1))
    square = Image.new("RGBA", (side, side))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    square = square.convert("RGBa").resize((2 * ITEM_PX, 2 * ITEM_PX), Image.LANCZOS)
    planes = torch.from_numpy(np.asarray(square).copy()).float().permute(2, 0, 1) / 255
    # A 2x2 box on the doubled item is the area filter of the move by a fraction of a pixel.
    return F.avg_pool2d(F.pad(planes, (0, 1, 0, 1)), 2, 1)


def draw_actor(planes: Tensor, centre: Tensor, turn: Tensor, height: int, width: int) -> Tensor:
    """The planes (4, P, P) of a picture at (T, 2) centres under (T,) turns: (T, 4, H, W)."""
    y = ((torch.arange(height) + 0.5 - centre[:, :1]) / (ITEM_PX / 2))[:, :, None]
    x = ((torch.arange(width) + 0.5 - centre[:, 1:]) / (ITEM_PX / 2))[:, None, :]
    cos, sin = turn.cos()[:, None, None], turn.sin()[:, None, None]
    grid = torch.stack([cos * x + sin * y, cos * y - sin * x], dim=-1).float()
    planes = planes.expand(len(centre), -1, -1, -1)
    return F.grid_sample(planes, grid, padding_mode="zeros", align_corners=False)


class Clips:
    """Endless captioned clips; clip i of a seed is always the same."""

    def __init__(self, folder: str | Path, seed: int) -> None:
        self.sprites = {thing: load_sprite(folder, thing) for thing in THINGS}
        self.seed = seed
        held_out = set(held_out_scenes())
        self.scenes = [s for s in all_scenes() if s not in held_out]
        self.trained = set(self.scenes)

    def scene(self, index: int, size: tuple[int, int, int]) -> Scene:
        """What clip number `index` of a size shows."""
        rng = np.random.default_rng((self.seed, index, 0))
        first = self.scenes[rng.integers(len(self.scenes))]
        actor = Actor(first.thing, first.motion, bool(rng.random() < SHARE_SLOW))
        alone = Scene((actor,), first.background)
        lanes = (
            ("left", "right") if actor.motion in ("left", "right") else ("up", "down", "bouncing")
        )
        small = min(size[1:]) < PAIR_PX or actor.motion == "circling"
        if small or rng.random() >= SHARE_OF_PAIRS:
            return alone
        thing, motion = rng.choice(list(THINGS)), rng.choice(lanes)
        second = Scene((Actor(str(thing), str(motion)),), first.background)
        if thing == actor.thing or second not in self.trained:
            return alone
        return Scene((actor, *second.actors), first.background)

    def render(self, scene: Scene, size: tuple[int, int, int], rng: np.random.Generator) -> Tensor:
        """One clip (3, T, H, W)."""
        num_frames, height, width = size
        tone = torch.from_numpy(rng.uniform(-0.03, 0.03, (3, 1, 1)) + rng.uniform(-0.05, 0.05))
        frames = paint_background(scene.background, height, width, tone.float()).expand(
            num_frames, -1, -1, -1
        )
        for actor, box in zip(scene.actors, boxes_of(scene, height, width), strict=True):
            sprite = self.sprites[actor.thing]
            if actor.thing in LOOKING_LEFT and actor.motion == "right":
                sprite = sprite.flip(2)
            cycle = cycle_of(actor, num_frames, rng)
            centre, turns = path_of(actor, cycle, box, rng), turns_of(actor, cycle)
            drawn = draw_actor(sprite, centre, turns, height, width)
            frames = drawn[:, :3] + (1 - drawn[:, 3:]) * frames
        return (frames * 2 - 1).transpose(0, 1).contiguous()

    def sample(
        self, index: int, size: tuple[int, int, int], scene: Scene | None = None
    ) -> tuple[Tensor, Scene]:
        """Clip number `index` as (3, T, H, W) with what it shows."""
        scene = scene or self.scene(index, size)
        return self.render(scene, size, np.random.default_rng((self.seed, index, 1))), scene


def unseen_clips(folder: str | Path) -> Clips:
    """Clips in poses and places that training does not have."""
    return Clips(folder, 1)
