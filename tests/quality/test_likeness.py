"""Likeness of videos against its definition."""

import math

import pytest
import torch

from vidattn.quality.likeness import ms_ssim, psnr, ssim


@pytest.fixture
def video():
    return torch.rand(3, 3, 17, 23)


def noisy(video, sigma):
    return (video + sigma * torch.randn_like(video)).clamp(0, 1)


def test_psnr_is_the_mean_of_its_frames(video):
    other = video.clone()
    other[0] = (other[0] + 0.1) % 1
    errors = (video - other).square().mean((1, 2, 3))
    expected = (-10 * math.log10(errors[0]) + 100 + 100) / 3
    assert psnr(other, video) == pytest.approx(expected, rel=1e-5)


def test_psnr_of_equal_and_opposite_videos(video):
    black, white = torch.zeros_like(video), torch.ones_like(video)
    assert psnr(video, video) == 100
    assert psnr(black, white) == pytest.approx(0)


def test_bytes_do_not_wrap():
    """In 8 bits, 200 - 10 and its square would come out small."""
    low, high = (torch.full((1, 3, 16, 16), x, dtype=torch.uint8) for x in (10, 200))
    expected = -20 * math.log10(190 / 255)
    assert psnr(low, high) == pytest.approx(expected)
    assert psnr(high, low) == pytest.approx(expected)
    assert psnr(low, high.float() / 255) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("measure", [psnr, ssim, ms_ssim])
def test_more_noise_is_less_alike(measure, video):
    values = [measure(noisy(video, sigma), video) for sigma in (0.0, 0.02, 0.05, 0.1, 0.3, 0.9)]
    assert values == sorted(values, reverse=True) and values[-1] < values[0] / 2


def test_ssim_of_equal_and_flat_videos(video):
    assert ssim(video, video) == pytest.approx(1)
    dark, light = torch.full_like(video, 0.2), torch.full_like(video, 0.7)
    c = 0.01**2
    expected = (2 * 0.2 * 0.7 + c) / (0.2**2 + 0.7**2 + c)
    assert ssim(dark, light) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("measure", [psnr, ssim, ms_ssim])
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda x: x[:2], "share one shape"),
        (lambda x: x * 255, "must lie in"),
        (lambda x: x * float("nan"), "must lie in"),
        (lambda x: (x * 255).int(), "must be uint8"),
    ],
)
def test_what_is_no_pair_of_videos_is_refused(measure, spoil, words, video):
    with pytest.raises(ValueError, match=words):
        measure(spoil(video), video)


@pytest.mark.parametrize("measure", [ssim, ms_ssim])
def test_ssim_needs_frames_as_large_as_its_window(measure, video):
    with pytest.raises(ValueError, match="11 x 11"):
        measure(video[..., :10], video[..., :10])


@pytest.mark.parametrize(("px", "num_scales"), [(11, 1), (22, 2), (44, 3), (99, 4), (176, 5)])
def test_ms_ssim_uses_the_scales_that_a_frame_has_room_for(px, num_scales):
    """Of flat frames only the luminance counts, at the coarsest scale, with its weight."""
    dark, light = torch.full((1, 1, px, px), 0.2), torch.full((1, 1, px, px), 0.7)
    weights = torch.tensor([0.0448, 0.2856, 0.3001, 0.2363, 0.1333])[:num_scales]
    c = 0.01**2
    luminance = (2 * 0.2 * 0.7 + c) / (0.2**2 + 0.7**2 + c)
    expected = luminance ** (weights[-1] / weights.sum()).item()
    assert ms_ssim(dark, light) == pytest.approx(expected, rel=1e-3)
    assert ms_ssim(dark, dark) == pytest.approx(1)


def test_ms_ssim_of_black_and_white_is_0():
    black, white = torch.zeros(2, 3, 24, 31), torch.ones(2, 3, 24, 31)
    assert ms_ssim(black, white) < 0.01 and ms_ssim(white, white) == pytest.approx(1)
