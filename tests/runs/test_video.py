"""Video files, and videos beside each other."""

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from tests.commands.cli_cases import frames_of
from vidattn.runs.video import beside, write_video


@pytest.mark.parametrize("ending", [".MP4", ".Gif"])
def test_endings_in_capitals_are_written(ending, tmp_path):
    path = tmp_path / f"x{ending}"
    write_video(path, torch.rand(3, 3, 16, 16), fps=8)
    assert len(imageio.mimread(path)) == 3


@pytest.mark.parametrize("size", [(16, 32), (17, 33)])
def test_a_written_video_looks_like_its_frames(size, tmp_path):
    frames = torch.linspace(0, 1, 5)[:, None, None, None].expand(5, 3, *size)
    write_video(tmp_path / "x.mp4", frames, fps=5)
    read, _ = frames_of(tmp_path / "x.mp4")
    assert len(read) == 5 and read[0].shape == (size[0] + size[0] % 2, size[1] + size[1] % 2, 3)
    means = torch.stack([frame.float().mean() / 255 for frame in read])
    assert_close(means, torch.linspace(0, 1, 5), atol=0.02, rtol=0)
    with pytest.raises(ValueError, match=".mp4, .gif or .webp"):
        write_video(tmp_path / "x.avi", frames, fps=5)


def test_a_picture_that_moves_holds_every_frame_and_its_time(tmp_path):
    frames = torch.linspace(0, 1, 5)[:, None, None, None].expand(5, 3, 16, 24)
    write_video(tmp_path / "x.webp", frames, fps=10)
    with Image.open(tmp_path / "x.webp") as picture:
        assert (picture.size, picture.n_frames, picture.info["loop"]) == ((24, 16), 5, 0)
        for i, value in enumerate(torch.linspace(0, 255, 5)):
            picture.seek(i)
            mean = torch.from_numpy(np.array(picture.convert("RGB"))).float().mean()
            assert_close(mean, value, atol=4, rtol=0)
            assert picture.info["duration"] == 100


def test_videos_beside_each_other_keep_their_colors():
    videos = [torch.full((2, 3, 16, 16), x) for x in (0.25, 0.75)]
    wide = beside(videos, ["one\nsmall", "two"], min_width=64)
    height, width = wide.shape[2:]
    assert wide.shape[:2] == (2, 3) and width >= 2 * 64
    assert_close(wide[:, :, height // 2 + 20, width // 4], torch.full((2, 3), 0.25))
    assert_close(wide[:, :, height // 2 + 20, 3 * width // 4], torch.full((2, 3), 0.75))


@pytest.mark.parametrize(("number", "shape"), [(4, (1, 4)), (5, (2, 3)), (16, (4, 4))])
def test_many_videos_stand_in_rows(number, shape):
    values = torch.linspace(0.1, 0.9, number)
    panel = beside([torch.zeros(1, 3, 16, 16)], ["x"], min_width=32)[0, 0]
    videos = [torch.full((1, 3, 16, 16), float(x)) for x in values]
    all_ = beside(videos, ["x"] * number, min_width=32)[0, 0]
    height, width = panel.shape[0] - 8, panel.shape[1]
    assert all_.shape == (shape[0] * height + 8, shape[1] * width)
    for i, value in enumerate(values):
        row, column = divmod(i, shape[1])
        assert_close(all_[row * height + 60, column * width + width // 2], value)


def test_the_prompt_stands_above_the_videos():
    videos = [torch.full((1, 3, 16, 16), 0.5)] * 2
    plain, short = (beside(videos, ["x", "y"], title=title) for title in ("", "a red boot"))
    long = beside(videos, ["x", "y"], title="a red boot " * 20)
    assert plain.shape[2] < short.shape[2] < long.shape[2]
    assert short.shape[3] == plain.shape[3] and short[0, 0, :28].min() < 0.5
    assert_close(short[:, :, -plain.shape[2] :], plain)
