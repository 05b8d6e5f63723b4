"""Video files: frames to mp4 or gif, several videos beside each other with their labels.

Letters: F frames, C channels, H height, W width.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

INK, PAPER = (24, 30, 42), (255, 255, 255)


def write_video(path: Path, frames: Tensor, *, fps: float) -> None:
    """Write an mp4 (H.264), a gif or an animated WebP, or a png of one frame, as ``path`` ends.

    An odd height or width is padded by one repeated line, as H.264 needs; nothing is rescaled.

    Args:
        frames: (F, 3, H, W) floats in [0, 1].

    Raises:
        ValueError: another ending, or several frames for a png.
    """
    import imageio.v2 as imageio

    ending = path.suffix.lower()
    if ending not in (".mp4", ".gif", ".webp", ".png"):
        raise ValueError(
            f"a video is written as .mp4, .gif or .webp, a picture as .png, got '{path.name}'"
        )
    pictures = to_bytes(frames)
    if ending == ".png":
        if len(pictures) != 1:
            raise ValueError(f"a png holds one frame, got {len(pictures)}: write an mp4 or a gif")
        imageio.imwrite(path, pictures[0], format="PNG")
        return
    if ending != ".mp4":
        _write_loop(path, pictures, fps)
        return
    height, width = pictures.shape[1:3]
    pictures = np.pad(pictures, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    writer: Any = imageio.get_writer(
        path, format="FFMPEG", fps=fps, codec="libx264", quality=8, macro_block_size=1
    )
    with writer:
        for picture in pictures:
            writer.append_data(picture)


def _write_loop(path: Path, pictures: np.ndarray, fps: float) -> None:
    """A picture that moves again and again."""
    from PIL import Image

    images = [Image.fromarray(picture) for picture in pictures]
    kind, options = path.suffix[1:].upper(), {"quality": 85, "method": 4}
    if kind == "GIF":
        # one palette for all frames, or the colors flicker
        palette = Image.fromarray(np.concatenate(pictures[:: max(1, len(pictures) // 6)]))
        palette = palette.quantize(128)
        images = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
        options = {"optimize": True}
    # browsers slow down frames shorter than 20 ms
    duration_ms = max(20, round(1000 / fps))
    images[0].save(
        path, format=kind, save_all=True, append_images=images[1:], duration=duration_ms, loop=0,
        **options,
    )  # fmt: skip


def to_bytes(frames: Tensor) -> np.ndarray:
    """(F, H, W, 3) uint8 from (F, 3, H, W) floats in [0, 1]."""
    frames = frames.detach().float().clamp(0, 1).mul(255).round().byte()
    return frames.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def beside(
    videos: Sequence[Tensor],
    labels: Sequence[str],
    *,
    title: str = "",
    min_width: int = 256,
    columns: int = 4,
) -> Tensor:
    """Several videos beside each other, each under its label, in rows of a few.

    Args:
        videos: (F, 3, H, W) floats in [0, 1], all of one shape.
        labels: one per video; the first line is set larger.
        title: stands above all of them.
        min_width: narrower videos are enlarged by a whole factor up to this width.
        columns: the most to a row; the rows are as even as can be.

    Returns:
        (F, 3, H', W') floats in [0, 1].
    """
    factor = max(1, -(-min_width // videos[0].shape[-1]))
    gap = 8
    panels = []
    for video, label in zip(videos, labels):
        video = F.interpolate(video.float(), scale_factor=factor, mode="bicubic").clamp(0, 1)
        band = _label(label, video.shape[-1]).expand(len(video), -1, -1, -1)
        panels.append(F.pad(torch.cat([band, video], dim=2), (gap, gap), value=1.0))
    num_rows = -(-len(panels) // columns)
    columns = -(-len(panels) // num_rows)
    panels += [torch.ones_like(panels[0])] * (num_rows * columns - len(panels))
    rows = [torch.cat(panels[i : i + columns], 3) for i in range(0, len(panels), columns)]
    if title:
        width = rows[0].shape[-1] - 2 * gap
        lines = textwrap.wrap(title, max(20, width // 9))
        band = _label("\n".join(lines), width, 8 + 20 * len(lines)).expand(len(rows[0]), -1, -1, -1)
        rows.insert(0, F.pad(band, (gap, gap), value=1.0))
    return F.pad(torch.cat(rows, dim=2), (0, 0, 0, gap), value=1.0)


def _label(text: str, width: int, height: int = 44) -> Tensor:
    """(1, 3, height, width): the lines of a label, dark on white, shrunk where they are long."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(image)
    y = 5
    for i, line in enumerate(text.split("\n")):
        size = 16 if i == 0 else 12
        while size > 7 and pen.textlength(line, font=ImageFont.load_default(size)) > width:
            size -= 1
        pen.text((0, y), line, fill=INK, font=ImageFont.load_default(size))
        y += 20
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
