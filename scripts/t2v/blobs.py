"""Things told apart from the background: it is known, so what differs from it is a thing.

T frames, H height, W width; videos are (T, H, W, 3) float arrays in [0, 1].
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from t2v.backgrounds import PAINTERS, paint_background

MIN_CONTRAST = 0.13
MIN_PIXELS = 60
BORDER_PX = 5
# What a blob needs of the largest one's pixels to count as a second piece.
PIECE = 0.12


def background_of(video: np.ndarray) -> tuple[str, np.ndarray]:
    """The background nearest to what lasts in a video: its name and its picture (H, W, 3)."""
    lasting = np.median(video, axis=0)
    errors, pictures = {}, {}
    for name in PAINTERS:
        painted = paint_background(name, *lasting.shape[:2]).permute(1, 2, 0).numpy()
        tone = np.median(lasting - painted, axis=(0, 1))
        pictures[name] = painted + tone.clip(-0.15, 0.15)
        errors[name] = np.abs(lasting - pictures[name]).clip(0, 0.25).mean()
    nearest = min(errors, key=errors.get)
    return nearest, pictures[nearest]


@dataclass(frozen=True)
class Blobs:
    """What differs from the background in a frame: the largest blob, and how many there are."""

    mask: np.ndarray
    count: int

    @property
    def pixels(self) -> int:
        """The size of the largest blob."""
        return int(self.mask.sum())

    @property
    def centre(self) -> np.ndarray:
        """Its centroid (y, x)."""
        return np.array(ndimage.center_of_mass(self.mask))

    @property
    def cut(self) -> bool:
        """Whether it may go on beyond the frame."""
        edges = np.array(self.mask.shape) - 1
        near = bool(_sides(self.mask)) or np.minimum(self.centre, edges - self.centre).min() < 20
        return bool(near)


def _sides(mask: np.ndarray) -> list[int]:
    """The sides of the frame that a mask comes near."""
    strips = (mask[:BORDER_PX], mask[-BORDER_PX:], mask[:, :BORDER_PX], mask[:, -BORDER_PX:])
    return [side for side, strip in enumerate(strips) if strip.any()]


def blobs_of(frame: np.ndarray, background: np.ndarray) -> Blobs:
    """The blobs of a (H, W, 3) frame."""
    difference = ndimage.gaussian_filter(np.abs(frame - background).max(-1), 0.8)
    mask = ndimage.binary_opening(difference > MIN_CONTRAST, iterations=2)
    # Where a thing has the colour of its background it has holes and gaps.
    labels, count = ndimage.label(ndimage.binary_dilation(mask, iterations=3))
    if count == 0:
        return Blobs(mask, 0)
    sizes = ndimage.sum_labels(mask, labels, np.arange(1, count + 1))
    largest = mask & (labels == 1 + int(np.argmax(sizes)))
    if sizes.max() < MIN_PIXELS:
        return Blobs(np.zeros_like(mask), 0)
    largest = ndimage.binary_fill_holes(ndimage.binary_closing(largest, iterations=2))
    big = 1 + np.flatnonzero(sizes > max(PIECE * sizes.max(), MIN_PIXELS))
    # What comes near the same side may be one beyond it.
    groups = {(*_sides(mask & (labels == label)), -label)[0] for label in big.tolist()}
    return Blobs(largest, len(groups))
