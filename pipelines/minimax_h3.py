"""MiniMax-H3: text, references, sound and the video that is made, packed in one sequence."""

import torch
from torch import Tensor, nn

from vidattn.pipelines.family import Arguments, Family, Place


def locate(model: nn.Module, arguments: Arguments) -> Place:
    """The video that is made is the last; keyframes and references before it are other videos."""
    rows = arguments["video_indices"].cpu()
    positions = arguments["position_ids"].cpu()[rows]
    times = arguments["timestep_indices"].cpu()[rows]
    return last_video(rows, positions, times)


def last_video(rows: Tensor, positions: Tensor, times: Tensor) -> Place:
    """The whole frames that end a sequence, of one raster and one noise level, as time moves on.

    Args:
        rows: (N,) where the tokens of videos stand in the sequence, in rising order.
        positions: (N, 3) their (t, h, w), each frame in raster order.
        times: (N,) noise level of each.
    """
    t, h, w = positions.T
    is_next = (rows.diff() == 1) & (times.diff() == 0)
    forward = is_next & (t.diff() == 0)
    forward &= (h.diff() > 0) | (h.diff() == 0) & (w.diff() > 0)
    starts = torch.cat([torch.zeros(1).long(), 1 + (~forward).nonzero()[:, 0]])
    first = int(starts[-1])
    length, num_frames = len(rows) - first, 1
    frame = positions[first:, 1:]
    for start in starts.flip(0)[1:].tolist():
        goes_on = start + length == first and bool(is_next[first - 1]) and bool(t[start] < t[first])
        if not goes_on or not torch.equal(positions[start:first, 1:], frame):
            break
        first, num_frames = start, num_frames + 1
    width = int((frame[:, 0] == frame[0, 0]).sum())
    return Place((num_frames, length // width, width), int(rows[first]))


FAMILY = Family(
    models=("MiniMaxH3Transformer3DModel",),
    layers=r"transformer_blocks\.\d+\.attn",
    beside="before",
    locate=locate,
)
