"""The frames that a stream begins with, from a picture or a video file.

Letters: T frames, H height, W width.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def read_start(path: Path, size: tuple[int, int], factor: int) -> Tensor:
    """(T, 3, H, W) frames in [0, 1], cropped and scaled to a size.

    Of a video the last frames are taken, as many as make whole latent frames: one, and ``factor``
    for each of the others.

    Raises:
        ValueError: it cannot be read.
    """
    import imageio.v2 as imageio
    import numpy as np
    from PIL import Image, ImageOps

    try:
        if path.suffix.lower() in PICTURES:
            pictures = [Image.open(path)]
        else:
            with imageio.get_reader(path, format="FFMPEG") as reader:
                pictures = [Image.fromarray(frame) for frame in reader]
    except (OSError, ValueError, RuntimeError, IndexError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"--start '{path}' cannot be read: {first}") from error
    if not pictures:
        raise ValueError(f"--start '{path}' has no frames")
    pictures = pictures[(len(pictures) - 1) % factor :]
    fitted = [ImageOps.fit(picture.convert("RGB"), size[::-1]) for picture in pictures]
    frames = torch.from_numpy(np.stack([np.asarray(picture) for picture in fitted]))
    return frames.permute(0, 3, 1, 2).float() / 255
