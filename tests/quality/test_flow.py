"""Flow-warp error: nothing for pure motion, the flicker for flicker; RAFT on a moved picture."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from tests.quality.networks import needs
from vidattn.quality import flow as module
from vidattn.quality.flow import optical_flow, warp, warp_error


def moving(num_frames, dx, dy, size=(128, 136)):
    """Frames of a smooth picture that moves by whole pixels."""
    height, width = size
    margin = num_frames * max(abs(dx), abs(dy), 1)
    big = torch.rand(1, 3, height // 16 + 8, width // 16 + 8)
    big = F.interpolate(big, (height + 2 * margin, width + 2 * margin), mode="bicubic").clamp(0, 1)
    starts = [(margin - i * dy, margin - i * dx) for i in range(num_frames)]
    return torch.cat([big[..., y : y + height, x : x + width] for y, x in starts])


def known(dx, dy):
    """A flow that knows the motion: forward between a frame and the next, back for the reverse."""
    calls = []

    def flow(a, b):
        sign = -1 if len(calls) % 2 else 1
        calls.append(a)
        shape = (len(a), 1, *a.shape[2:])
        return sign * torch.cat([torch.full(shape, float(dx)), torch.full(shape, float(dy))], 1)

    return flow


def test_warp_moves_a_picture_back():
    a, b = moving(2, 5, -3)[:, None]
    back, inside = warp(b, torch.tensor([5.0, -3.0]).view(1, 2, 1, 1).expand(1, 2, 128, 136))
    assert inside.shape == (1, 1, 128, 136)
    assert not inside[..., :3, :].any() and not inside[..., -5:].any()
    assert inside[..., 3:, :-5].all()
    assert_close(back[..., 3:, :-5], a[..., 3:, :-5], atol=1e-4, rtol=0)


def test_motion_costs_nothing_and_flicker_its_square(monkeypatch):
    monkeypatch.setattr(module, "optical_flow", known(2, 3))
    video = 0.2 + 0.5 * moving(6, 2, 3, size=(24, 40))
    assert warp_error(video) < 1e-8
    monkeypatch.setattr(module, "optical_flow", known(2, 3))
    video[1::2] += 0.1
    assert warp_error(video) == pytest.approx(0.01, rel=1e-3)


def test_pixels_that_do_not_come_back_are_not_counted(monkeypatch):
    """Left half: there and back again; right half: lost on the way."""

    def flow(a, b):
        found = torch.zeros(len(a), 2, *a.shape[2:])
        found[:, 0, :, a.shape[3] // 2 :] = 9.0
        return found

    monkeypatch.setattr(module, "optical_flow", flow)
    video = torch.zeros(2, 3, 8, 8)
    video[1, :, :, :4], video[1, :, :, 4:] = 0.2, 0.9
    assert warp_error(video) == pytest.approx(0.04, rel=1e-4)


@needs("raft")
def test_raft_sees_how_a_picture_moves():
    a, b = moving(2, 4, 2)[:, None]
    found = optical_flow(a, b)
    assert found.shape == (1, 2, 128, 136)
    middle = found[0, :, 32:-32, 32:-32].flatten(1).median(1).values
    assert_close(middle, torch.tensor([4.0, 2.0]), atol=0.3, rtol=0)


@pytest.mark.parametrize(
    ("video", "words"),
    [
        (torch.rand(1, 3, 128, 128), "at least 2 frames"),
        (torch.rand(2, 3, 128, 127), "at least 128 x 128 pixels, got \\(3, 128, 127\\)"),
        (torch.rand(2, 3, 128, 128) * 9, "must lie in"),
    ],
)
def test_what_has_no_flow_is_refused(video, words):
    with pytest.raises(ValueError, match=words):
        warp_error(video)
