"""Stand-ins for the pictures of the emoji package."""

from pathlib import Path

import numpy as np
from PIL import Image
from t2v import scenes, world


def write_sprites(folder: Path) -> Path:
    """The unpacked package: an ellipse for each thing, of its own colour, white up and right."""
    root = folder / world.INNER
    root.mkdir(parents=True)
    y, x = np.mgrid[:64, :64] - 31.5
    for i, code in enumerate(scenes.THINGS.values()):
        picture = np.zeros((64, 64, 4), np.uint8)
        picture[..., :3] = 40 + 35 * (i % 5), 40 + 35 * (i // 5 % 5), 60 + 70 * (i // 25)
        picture[(x - y) > 30] = 255
        inside = (x / 31) ** 2 + (y / (24 + i % 8)) ** 2 < 1
        picture[..., 3] = 255 * inside
        Image.fromarray(picture).save(root / f"{code}.webp", lossless=True)
    return folder


def video_of(clip) -> np.ndarray:
    """A (3, T, H, W) clip in [-1, 1] as a (T, H, W, 3) video in [0, 1]."""
    return (clip.permute(1, 2, 3, 0).numpy() + 1) / 2
