"""Which tokens of MiniMax-H3's packed sequence are the video that is made."""

import pytest
import torch

from tests.pipelines.tiny_inputs import coordinates
from vidattn.pipelines.families.positions import last_video

# frames, rows, columns, time of the first frame
VIDEO = (3, 5, 7, 30.0)


@pytest.mark.parametrize(
    ("before", "noise", "gap"),
    [
        ([], [], 0),
        # a first keyframe has the time of the video's first frame, a last one that of its last
        ([(1, 5, 7, 30.0)], [0], 0),
        ([(1, 5, 7, 46.0)], [0], 0),
        # pictures and videos of the same size, each where only one thing tells them apart
        ([(1, 5, 7, 6.0)], [1], 0),
        ([(1, 5, 7, 6.0)], [0], 4),
        ([(2, 5, 7, 6.0)], [1], 0),
        ([(2, 7, 5, 6.0)], [0], 0),
        ([(2, 3, 7, 6.0), (1, 5, 7, 30.0)], [0, 0], 0),
    ],
)
@pytest.mark.parametrize("video", [VIDEO, (1, 5, 7, 30.0), (4, 1, 1, 30.0)])
def test_the_last_video_is_found(before, noise, gap, video):
    sizes = [t * h * w for t, h, w, _ in [*before, video]]
    levels = torch.tensor([*noise, 0]).repeat_interleave(torch.tensor(sizes))
    rows = torch.arange(sum(sizes)) + 6
    rows[-sizes[-1] :] += gap
    positions = coordinates(*before, video)[0].T
    place = last_video(rows, positions, levels)
    assert place == (video[:3], rows[-sizes[-1]])
