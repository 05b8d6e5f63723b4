"""Which figures about clips can be had, and that each is what its name says."""

import pytest
import torch

from vidattn.quality.likeness import psnr
from vidattn.quality.measures import MEASURES, choose_measures


def test_by_default_the_fast_ones_that_can_be_had(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    wanted = ["psnr_db", "ssim", "ms_ssim"]
    assert [x.key for x in choose_measures(None, side_px=128, num_clips=3)] == wanted
    monkeypatch.setattr("vidattn.quality.measures.has_weights", lambda network: True)
    found = choose_measures(None, side_px=128, num_clips=3)
    assert [x.key for x in found] == [*wanted, "lpips"]
    assert [x.key for x in choose_measures(None, side_px=8, num_clips=1)] == ["psnr_db"]


def test_those_named_come_in_their_order():
    found = choose_measures("ssim, psnr,ssim", side_px=64, num_clips=1)
    assert found == [MEASURES["ssim"], MEASURES["psnr"]]


def test_a_figure_is_the_mean_over_clips():
    clips, dense = torch.rand(2, 3, 2, 3, 16, 16)
    expected = sum(psnr(a, b) for a, b in zip(clips, dense)) / 3
    assert MEASURES["psnr"].compute(list(clips), list(dense)) == pytest.approx(expected)
    assert MEASURES["psnr"].cell(expected) == f"{expected:.2f}"
    assert MEASURES["psnr"].column == "PSNR, dB" and MEASURES["ssim"].column == "SSIM"
