"""An mp4 that plays while it grows, and after whatever ended it.

It is made of fragments of a second, each of which stands for itself (ISO 14496-12): nothing has to
be written at the end. ffmpeg writes it in a session of its own, so that Ctrl-C ends the one who
feeds it first; when that one is gone, however, ffmpeg finishes what it was given.

Letters: T frames, H height, W width.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from vidattn.runs.video import to_bytes


class GrowingVideo:
    """A video file that frames are appended to.

    Args:
        path: of the mp4; what is there is replaced by the first frames.
    """

    def __init__(self, path: Path, fps: float):
        self.path, self._fps, self.num_frames = path, fps, 0
        self._ffmpeg: subprocess.Popen | None = None
        self._log: Any = None

    def append(self, frames: Tensor) -> None:
        """Write (T, 3, H, W) frames in [0, 1].

        Raises:
            OSError: ffmpeg cannot write them; what it said is named.
        """
        pictures = to_bytes(frames)
        height, width = pictures.shape[1:3]
        # H.264 needs even sizes
        pictures = np.pad(pictures, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        if self._ffmpeg is None:
            self._start(*pictures.shape[1:3])
        assert self._ffmpeg is not None and self._ffmpeg.stdin is not None
        try:
            self._ffmpeg.stdin.write(pictures.tobytes())
            self._ffmpeg.stdin.flush()
        except BrokenPipeError:
            self.close()
            raise
        self.num_frames += len(pictures)

    def close(self) -> None:
        """Let the last fragment be written; a second time does nothing.

        Raises:
            OSError: ffmpeg failed; what it said is named.
        """
        if self._ffmpeg is None:
            return
        ffmpeg, self._ffmpeg = self._ffmpeg, None
        assert ffmpeg.stdin is not None
        try:
            ffmpeg.stdin.close()
        except BrokenPipeError:
            pass
        code = ffmpeg.wait()
        with self._log as log:
            log.seek(0)
            said = log.read().decode(errors="replace").strip().splitlines()
        if code != 0:
            why = said[-1] if said else f"it ended with {code}"
            raise OSError(f"ffmpeg could not write '{self.path}': {why}")

    def __enter__(self) -> GrowingVideo:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, height: int, width: int) -> None:
        from imageio_ffmpeg import get_ffmpeg_exe

        given = [
            # nothing is to be found out about the input: that would wait for many frames
            "-probesize", "32", "-analyzeduration", "0",
            "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}",
            "-r", f"{self._fps:g}", "-i", "-",
        ]  # fmt: skip
        coded = [
            "-an", "-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "18",
            # without frames that wait for later ones; a fragment begins at each key frame
            "-tune", "zerolatency", "-g", str(max(1, round(self._fps))),
            "-movflags", "+frag_keyframe+empty_moov+default_base_moof", "-flush_packets", "1",
        ]  # fmt: skip
        self._log = tempfile.TemporaryFile()
        self._ffmpeg = subprocess.Popen(
            [get_ffmpeg_exe(), "-y", "-loglevel", "error", *given, *coded, "-f", "mp4", self.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._log,
            start_new_session=True,
        )
