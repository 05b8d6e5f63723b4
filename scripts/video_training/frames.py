"""Frames of video files and pictures: by decord, or PyAV or OpenCV where it cannot read one.

Letters: F frames, H height, W width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np


@dataclass(frozen=True)
class Footage:
    """How much there is in a file; a picture has one frame and no rate."""

    num_frames: int
    fps: float | None
    height: int
    width: int


def probe(path: Path, is_picture: bool) -> Footage:
    """How much there is in a file.

    Raises:
        ValueError: nothing can be read from it; what each reader said is listed.
    """
    if is_picture:
        height, width = read_picture(path).shape[:2]
        return Footage(1, None, height, width)
    return _first_that_can(path, [_probe_decord, _probe_av, _probe_opencv])


def read_frames(path: Path, indices: Sequence[int], is_picture: bool) -> np.ndarray:
    """Frames (F, H, W, 3) in RGB bytes.

    Args:
        indices: of frames, not falling.

    Raises:
        ValueError: not all of them can be read.
    """
    if is_picture:
        return read_picture(path)[None]
    readers = [lambda p, read=read: read(p, indices) for read in (_decord, _av, _opencv)]
    return _first_that_can(path, readers)


def read_picture(path: Path) -> np.ndarray:
    """A picture (H, W, 3) in RGB bytes.

    Raises:
        ValueError: it cannot be read.
    """
    content = np.fromfile(path, np.uint8)
    picture = cv2.imdecode(content, cv2.IMREAD_COLOR) if content.size else None
    if picture is None:
        raise ValueError("no picture that OpenCV can read")
    return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)


def fit(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Frames (F, H, W, 3) scaled until they cover a size, and cut to it in the middle."""
    old_height, old_width = frames.shape[1:3]
    if (old_height, old_width) == (height, width):
        return frames
    scale = max(height / old_height, width / old_width)
    new_height = max(height, round(old_height * scale))
    new_width = max(width, round(old_width * scale))
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    top, left = (new_height - height) // 2, (new_width - width) // 2
    scaled = (cv2.resize(frame, (new_width, new_height), interpolation=way) for frame in frames)
    return np.stack([frame[top : top + height, left : left + width] for frame in scaled])


def _first_that_can(path: Path, readers: Sequence[Callable[[Path], object]]) -> object:
    reasons = []
    for reader in readers:
        try:
            return reader(path)
        # every library has errors of its own, down to bare Exception
        except Exception as error:
            lines = str(error).strip().splitlines()
            reasons.append(lines[0][:100] if lines else type(error).__name__)
    raise ValueError(f"cannot be read: {'; '.join(dict.fromkeys(reasons))}")


def _footage(num_frames: int, fps: float, height: int, width: int) -> Footage:
    if num_frames < 1:
        raise ValueError("no frames in it")
    if not 0 < fps < 1000:
        raise ValueError(f"{fps} frames per second")
    return Footage(num_frames, float(fps), height, width)


def _open_decord(path: Path) -> object:
    import decord

    # what cannot be read is told by exceptions
    decord.logging.set_level(decord.logging.QUIET)
    return decord.VideoReader(str(path), num_threads=1)


def _probe_decord(path: Path) -> Footage:
    reader = _open_decord(path)
    height, width = reader[0].shape[:2]
    return _footage(len(reader), reader.get_avg_fps(), height, width)


def _probe_av(path: Path) -> Footage:
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        count = stream.frames or sum(1 for _ in container.decode(stream))
        return _footage(count, float(stream.average_rate or 0), stream.height, stream.width)


def _probe_opencv(path: Path) -> Footage:
    reader = cv2.VideoCapture(str(path))
    try:
        names = (cv2.CAP_PROP_FRAME_COUNT, cv2.CAP_PROP_FPS)
        count, fps = (reader.get(name) for name in names)
        read, frame = reader.read()
        if not read:
            raise ValueError("no frames in it")
        return _footage(int(count), fps, *frame.shape[:2])
    finally:
        reader.release()


def _decord(path: Path, indices: Sequence[int]) -> np.ndarray:
    return _open_decord(path).get_batch(list(indices)).asnumpy()


def _av(path: Path, indices: Sequence[int]) -> np.ndarray:
    import av

    with av.open(str(path)) as container:
        frames = (frame.to_ndarray(format="rgb24") for frame in container.decode(video=0))
        return _pick(frames, indices)


def _opencv(path: Path, indices: Sequence[int]) -> np.ndarray:
    reader = cv2.VideoCapture(str(path))

    def frames():
        while True:
            read, frame = reader.read()
            if not read:
                return
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)

    try:
        return _pick(frames(), indices)
    finally:
        reader.release()


def _pick(frames, indices: Sequence[int]) -> np.ndarray:
    """The frames of these numbers out of those that come one after another."""
    wanted, found = set(indices), {}
    for number, frame in enumerate(frames):
        if number in wanted:
            found[number] = frame
        if number >= indices[-1]:
            break
    if len(found) < len(wanted):
        raise ValueError(f"{len(found)} of the {len(wanted)} frames wanted can be read")
    return np.stack([found[index] for index in indices])
