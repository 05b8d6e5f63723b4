"""Finds the video among tokens that are told apart by their positions alone."""

from __future__ import annotations

import torch
from torch import Tensor

from vidattn.pipelines.family import Place


def longest_video(coords: Tensor) -> Place:
    """The longest stretch of whole frames in which time moves forward.

    Args:
        coords: (3, S) positions (t, h, w) of the tokens, each frame in raster order.
    """
    coords = coords.cpu()
    t, h, _ = coords
    starts = _starts(coords)
    lengths = torch.diff(starts, append=torch.tensor([t.numel()]))
    goes_on = (t[starts][1:] > t[starts][:-1]) & (lengths[1:] == lengths[:-1])
    run_of_frame = torch.cat([torch.zeros(1, dtype=torch.long), (~goes_on).long().cumsum(0)])
    run = torch.bincount(run_of_frame, weights=lengths.double()).argmax()
    frames = (run_of_frame == run).nonzero().flatten()
    first, length = starts[frames[0]].item(), lengths[frames[0]].item()
    width = (h[first : first + length] == h[first]).sum().item()
    return Place((frames.numel(), length // width, width), first)


def last_video(rows: Tensor, positions: Tensor, times: Tensor) -> Place:
    """The whole frames that end a sequence, of one raster and one noise level, as time moves on.

    Args:
        rows: (N,) where the tokens of videos stand in the sequence, in rising order.
        positions: (N, 3) their (t, h, w), each frame in raster order.
        times: (N,) noise level of each.
    """
    t, is_next = positions[:, 0], (rows.diff() == 1) & (times.diff() == 0)
    starts = _starts(positions.T, is_next)
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


def first_picture(positions: Tensor, num_before: int) -> Place:
    """The picture that positions begin with, before others such as references.

    Args:
        positions: (S, 3 or more) their (t, h, w, ...), each picture in raster order.
        num_before: tokens in front of it.

    Raises:
        ValueError: it is no raster of evenly spaced rows and columns.
    """
    coords = positions[:, :3].T.float().cpu()
    starts = _starts(coords).tolist()
    _, h, w = coords[:, : starts[1] if len(starts) > 1 else None]
    width = int((h == h[0]).sum())
    rows, columns = h[::width], w[:width]
    is_raster = torch.equal(torch.cartesian_prod(rows, columns), torch.stack([h, w], 1))
    if not (is_raster and _is_even(rows) and _is_even(columns)):
        raise ValueError(
            f"the positions of its {len(h)} first tokens are no raster of evenly spaced rows and "
            "columns: attention over them is no (t, h, w) grid. Unpatch the transformer"
        )
    return Place((1, len(rows), width), num_before)


def _is_even(places: Tensor) -> bool:
    """Whether places on an axis are equally far apart, but for rounding."""
    steps = places.diff()
    return bool(((steps - steps[:1]).abs() <= steps[:1].abs() / 10).all())


def _starts(coords: Tensor, is_next: Tensor | bool = True) -> Tensor:
    """Where frames begin among (3, S) positions: where the raster does not move on.

    Args:
        is_next: (S - 1,) bool, whether a token can be of the frame of the one before.
    """
    t, h, w = coords.diff()
    forward = (t == 0) & ((h > 0) | (h == 0) & (w > 0)) & is_next
    return torch.cat([torch.zeros(1, dtype=torch.long), (~forward).nonzero()[:, 0] + 1])
