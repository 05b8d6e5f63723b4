"""Painted backgrounds that look alike at every size.

Pictures are (3, H, W) float32 in [0, 1]. Places of large things follow the height, sizes of small
ones are in pixels; nothing is finer than three pixels, which an 8x autoencoder would lose.
"""

import functools

import numpy as np
import torch
from torch import Tensor

SOFT_PX = 1.2


def _colour(*rgb: float) -> Tensor:
    return torch.tensor(rgb)[:, None, None]


def _mix(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    return a + (b - a) * share.clamp(0, 1)


def _fade(rows: Tensor, top: Tensor, bottom: Tensor, begin: float = 0.0, end: float = 1.0):
    """A vertical gradient between two heights, given as shares of the picture's."""
    return _mix(top, bottom, ((rows / len(rows) - begin) / (end - begin))[None])


def _below(distance: Tensor) -> Tensor:
    """1 where a signed distance in pixels is positive, with a soft edge."""
    return torch.sigmoid(distance / SOFT_PX * 2)[None]


def _specks(rows: Tensor, columns: Tensor, cell: int, radius: tuple[float, float], seed: int):
    """Soft dots, one for each square cell, of random place, radius and strength: (1, H, W)."""
    height, width = rows.shape
    light = torch.zeros(height, width)
    for i in range(-(-height // cell)):
        for j in range(-(-width // cell)):
            rng = np.random.default_rng((seed, i, j))
            y, x = (np.array([i, j]) + rng.uniform(0.2, 0.8, 2)) * cell
            spread = rng.uniform(*radius)
            distance = (rows - y) ** 2 + (columns - x) ** 2
            light += rng.uniform(0.6, 1.0) * torch.exp(-distance / (2 * spread**2))
    return light.clamp(max=1)[None]


def _night_sky(y: Tensor, x: Tensor) -> Tensor:
    sky = _fade(y, _colour(0.04, 0.05, 0.20), _colour(0.20, 0.13, 0.42))
    return _mix(sky, _colour(1.0, 0.97, 0.85), _specks(y, x, 28, (1.3, 1.9), 1))


def _meadow(y: Tensor, x: Tensor) -> Tensor:
    height = len(y)
    picture = _fade(y, _colour(0.45, 0.76, 0.98), _colour(0.86, 0.95, 1.0), 0, 0.55)
    far = y - height * (0.52 + 0.05 * torch.sin(x / 19 + 2))
    near = y - height * (0.64 + 0.05 * torch.sin(x / 27))
    picture = _mix(picture, _colour(0.58, 0.84, 0.42), _below(far))
    grass = _fade(y, _colour(0.42, 0.74, 0.28), _colour(0.22, 0.55, 0.17), 0.6, 1)
    picture = _mix(picture, grass, _below(near))
    flowers = _specks(y, x, 26, (1.5, 2.0), 2) * _below(near - 8)
    return _mix(picture, _colour(1.0, 0.95, 0.55), flowers)


def _sea(y: Tensor, x: Tensor) -> Tensor:
    height = len(y)
    picture = _fade(y, _colour(0.62, 0.86, 0.97), _colour(0.90, 0.97, 0.98), 0, 0.3)
    water = _fade(y, _colour(0.10, 0.55, 0.75), _colour(0.03, 0.25, 0.50), 0.3, 1)
    wave = 0.5 + 0.5 * torch.sin(y * (2 * np.pi / 16) + 1.3 * torch.sin(x * (2 * np.pi / 32)))
    water = _mix(water, _colour(0.40, 0.78, 0.90), 0.35 * wave[None] ** 2)
    return _mix(picture, water, _below(y - height * 0.3))


def _desert(y: Tensor, x: Tensor) -> Tensor:
    height = len(y)
    picture = _fade(y, _colour(0.99, 0.90, 0.66), _colour(1.0, 0.95, 0.80), 0, 0.5)
    far = y - height * (0.50 + 0.07 * torch.sin(x / 24 + 1))
    near = y - height * (0.70 + 0.08 * torch.sin(x / 33 + 4))
    picture = _mix(picture, _colour(0.93, 0.74, 0.44), _below(far))
    sand = _fade(y, _colour(0.86, 0.62, 0.33), _colour(0.74, 0.48, 0.24), 0.62, 1)
    return _mix(picture, sand, _below(near))


def _sunset(y: Tensor, x: Tensor) -> Tensor:
    height, width = y.shape
    sky = _fade(y, _colour(0.30, 0.14, 0.46), _colour(0.92, 0.36, 0.40), 0, 0.36)
    sky = _mix(sky, _colour(1.0, 0.72, 0.36), (y / height - 0.36)[None] / 0.34)
    distance = ((y - 0.68 * height) ** 2 + (x - 0.5 * width) ** 2).sqrt()
    sky = _mix(sky, _colour(1.0, 0.90, 0.55), _below(0.17 * height - distance))
    ground = _fade(y, _colour(0.42, 0.16, 0.38), _colour(0.20, 0.07, 0.26), 0.68, 1)
    return _mix(sky, ground, _below(y - 0.70 * height))


def _city(y: Tensor, x: Tensor) -> Tensor:
    height, width = y.shape
    picture = _fade(y, _colour(0.06, 0.09, 0.24), _colour(0.34, 0.22, 0.46), 0, 0.8)
    for j in range(-(-width // 24)):
        rng = np.random.default_rng((3, j))
        top = height * rng.uniform(0.36, 0.66)
        tone = rng.uniform(0.0, 0.05)
        inside = _below(y - top) * _below(x - 24 * j - 1) * _below(24 * j + 23 - x)
        picture = _mix(picture, _colour(0.07 + tone, 0.08 + tone, 0.16 + tone), inside)
        for i in range(int((height - top) // 12)):
            for k in range(2):
                if rng.random() < 0.6:
                    square = (y - top - 8 - 12 * i) ** 4 + (x - 24 * j - 7.5 - 9 * k) ** 4
                    picture = _mix(picture, _colour(1.0, 0.82, 0.40), torch.exp(-square / 40)[None])
    return picture


def _snow(y: Tensor, x: Tensor) -> Tensor:
    height = len(y)
    picture = _fade(y, _colour(0.34, 0.50, 0.74), _colour(0.66, 0.78, 0.92), 0, 0.8)
    ground = y - height * (0.78 + 0.04 * torch.sin(x / 22))
    picture = _mix(picture, _colour(0.90, 0.94, 0.99), _below(ground))
    return _mix(picture, _colour(1.0, 1.0, 1.0), _specks(y, x, 20, (1.7, 2.4), 4) * _below(-ground))


def _checkered(y: Tensor, x: Tensor) -> Tensor:
    wave = torch.sin(y * (np.pi / 16)) * torch.sin(x * (np.pi / 16))
    share = torch.sigmoid(12 * wave)[None]
    return _mix(_colour(0.91, 0.86, 0.76), _colour(0.66, 0.60, 0.56), share)


PAINTERS = {
    "night sky": _night_sky,
    "meadow": _meadow,
    "sea": _sea,
    "desert": _desert,
    "sunset": _sunset,
    "city": _city,
    "snow": _snow,
    "checkered floor": _checkered,
}


@functools.lru_cache(maxsize=256)
def _painted(name: str, height: int, width: int) -> Tensor:
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return PAINTERS[name](y, x)


def paint_background(name: str, height: int, width: int, tone: Tensor | float = 0.0) -> Tensor:
    """The background called `name` as (3, H, W), `tone` added: a number or (3, 1, 1)."""
    return (_painted(name, height, width) + tone).clamp(0, 1)
