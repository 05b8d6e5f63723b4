"""A growing video plays at any moment, whatever ends it."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.commands.cli_cases import frames_of
from vidattn.runs.growing import GrowingVideo

ROOT = Path(__file__).resolve().parents[2]


def num_frames(path: Path) -> int:
    """Frames that play, 0 where it does not yet."""
    try:
        return len(frames_of(path)[0])
    except (OSError, IndexError, RuntimeError):
        return 0


def shades(num_frames: int, height: int = 33, width: int = 48) -> torch.Tensor:
    """Frames that grow brighter."""
    levels = torch.linspace(0.1, 0.9, num_frames)[:, None, None, None]
    return levels.expand(-1, 3, height, width)


def soon(check, seconds: float = 30.0) -> bool:
    """Whether something becomes true in a while."""
    end = time.monotonic() + seconds
    while not (found := check()) and time.monotonic() < end:
        time.sleep(0.1)
    return found


def test_a_closed_video_has_all_frames(tmp_path):
    with GrowingVideo(tmp_path / "x.mp4", 8) as file:
        for chunk in shades(21).split(9):
            file.append(chunk)
    frames, _ = frames_of(tmp_path / "x.mp4")
    assert file.num_frames == len(frames) == 21
    # an odd height is padded
    assert frames[0].shape == (34, 48, 3)
    means = torch.stack([frame.float().mean() for frame in frames]) / 255
    torch.testing.assert_close(means, torch.linspace(0.1, 0.9, 21), rtol=0, atol=0.02)


def test_it_plays_before_it_is_closed(tmp_path):
    path = tmp_path / "x.mp4"
    with GrowingVideo(path, 4) as file:
        file.append(shades(22))
        # all but those that wait for their second to be full
        assert soon(lambda: num_frames(path) == 20)
        file.append(shades(4))
    assert num_frames(path) == 26


def test_it_plays_when_its_maker_was_killed(tmp_path):
    path = tmp_path / "x.mp4"
    code = (
        "import os, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from vidattn.runs.growing import GrowingVideo\n"
        "file = GrowingVideo(Path(sys.argv[1]), 4)\n"
        "file.append(torch.rand(10, 3, 32, 48))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True)
    assert done.returncode == -9, done.stderr

    assert soon(lambda: num_frames(path) == 10)


def test_what_ffmpeg_cannot_write_is_said(tmp_path):
    with pytest.raises(OSError, match="ffmpeg could not write '.*x.mp4'"):
        with GrowingVideo(tmp_path / "nowhere" / "x.mp4", 8) as file:
            for _ in range(50):
                file.append(shades(60, 128, 128))
