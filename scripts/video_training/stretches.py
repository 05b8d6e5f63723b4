"""The stretches of frames that are cut from clips, and the bucket that each is trained in."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from video_training.clips import Clip
from video_training.frames import Footage
from video_training.settings import Data

# (frames, height, width)
Bucket = tuple[int, int, int]


@dataclass(frozen=True)
class Stretch:
    """Frames of a clip that are trained on together.

    Args:
        indices: of the frames in the file.
        bucket: frames, height and width that they are brought to.
    """

    clip: Clip
    indices: tuple[int, ...]
    bucket: Bucket


def check_buckets(buckets: Sequence[Bucket], temporal: int, spatial: int) -> None:
    """Compare sizes with what the model can do.

    Args:
        temporal: frames of a clip per frame of its latents.
        spatial: what height and width must be multiples of.

    Raises:
        ValueError: one that it cannot; the nearest are named.
    """
    for frames, height, width in buckets:
        if frames < 1 or (frames - 1) % temporal:
            low = max(frames - 1, 0) // temporal * temporal + 1
            raise ValueError(
                f"data.buckets: {frames} frames are not possible with this model, it takes "
                f"{temporal}n + 1; the nearest are {low} and {low + temporal}"
            )
        for name, value in (("height", height), ("width", width)):
            if value < 1 or value % spatial:
                low = max(value // spatial * spatial, spatial)
                raise ValueError(
                    f"data.buckets: a {name} of {value} is not possible with this model, it takes "
                    f"multiples of {spatial}; the nearest are {low} and {low + spatial}"
                )


def cut(clip: Clip, footage: Footage, data: Data, seed: int) -> list[Stretch]:
    """The stretches of a clip.

    Args:
        seed: of the "random" ones.

    Raises:
        ValueError: no bucket is short enough for it.
    """
    times = resample(footage, data.fps)
    bucket = choose_bucket(len(times), footage, data.buckets)
    starts = _starts(len(times), bucket[0], data, (seed, *clip.name.encode()))
    return [
        Stretch(clip, tuple(times[start : start + bucket[0]].tolist()), bucket) for start in starts
    ]


def resample(footage: Footage, fps: float | None) -> np.ndarray:
    """Numbers of the frames that stand nearest to the times of another rate."""
    if fps is None or footage.fps is None:
        return np.arange(footage.num_frames)
    count = max(1, math.floor(footage.num_frames * fps / footage.fps + 1e-6))
    times = np.floor(np.arange(count) * (footage.fps / fps) + 0.5).astype(int)
    return times.clip(max=footage.num_frames - 1)


def choose_bucket(num_frames: int, footage: Footage, buckets: Sequence[Bucket]) -> Bucket:
    """The longest bucket that so many frames fill, among those of the nearest aspect ratio.

    Raises:
        ValueError: every bucket is longer.
    """
    if footage.fps is None:
        fitting = [bucket for bucket in buckets if bucket[0] == 1]
        if not fitting:
            raise ValueError("a picture, and data.buckets has none of one frame")
    else:
        fitting = [bucket for bucket in buckets if bucket[0] <= num_frames]
        if not fitting:
            shortest = min(bucket[0] for bucket in buckets)
            raise ValueError(
                f"too short: {num_frames} frames at this rate, the shortest of data.buckets takes "
                f"{shortest}"
            )
    ratio = math.log(footage.width / footage.height)

    def distance(bucket: Bucket) -> tuple[float, int, int]:
        frames, height, width = bucket
        return round(abs(math.log(width / height) - ratio), 6), -frames, -height * width

    return min(fitting, key=distance)


def _starts(total: int, length: int, data: Data, seed: tuple[int, ...]) -> list[int]:
    last = total - length
    if data.extract == "head":
        return [0]
    if data.extract == "chunk":
        return list(range(0, last + 1, length))
    if data.extract == "uniform":
        spots = np.linspace(0, last, data.samples) if data.samples > 1 else np.array([last / 2])
        return sorted({round(spot) for spot in spots.tolist()})
    picks = np.random.default_rng(seed).integers(0, last + 1, data.samples)
    return sorted(set(picks.tolist()))
