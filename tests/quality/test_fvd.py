"""FVD: the distance of normal distributions, the padding of I3D, and what noise does."""

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from tests.quality.networks import needs, noisy
from vidattn.quality.fvd import frechet_distance, fvd, video_features
from vidattn.quality.i3d import Convolution, _max_pool


def by_definition(a, b):
    covariances = [np.cov(x.numpy(), rowvar=False) for x in (a, b)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    means = (a.mean(0) - b.mean(0)).square().sum().item()
    return means + np.trace(covariances[0] + covariances[1] - 2 * root)


def test_frechet_distance_is_its_definition():
    a, b = (
        torch.randn(31, 5).double(),
        (2 * torch.randn(17, 5) + 1).double() @ torch.rand(5, 5).double(),
    )
    assert frechet_distance(a, b) == pytest.approx(by_definition(a, b), rel=1e-6)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + 3) == pytest.approx(45)


def test_frechet_distance_with_fewer_rows_than_columns():
    a, b = torch.randn(4, 9).double(), torch.randn(3, 9).double()
    assert frechet_distance(a, b) == pytest.approx(by_definition(a, b), rel=1e-4)


@pytest.mark.parametrize("shapes", [((1, 4), (3, 4)), ((3, 4), (3, 5)), ((0, 4), (3, 4))])
def test_sets_that_have_no_distance_are_refused(shapes):
    with pytest.raises(ValueError, match="at least 2 feature vectors"):
        frechet_distance(*(torch.randn(shape) for shape in shapes))


@pytest.mark.parametrize("size", [(9, 14, 15), (8, 7, 4)])
@pytest.mark.parametrize(("kernel", "stride"), [(7, 2), (3, 1), (1, 1)])
def test_padding_puts_the_odd_place_behind(size, kernel, stride):
    """As TensorFlow pads: place o of the output sees inputs from o * stride - total // 2."""
    layer = Convolution(1, 1, kernel, stride=stride).requires_grad_(False)
    x = torch.randn(1, 1, *size)
    out = layer(x)
    assert out.shape[2:] == tuple(-(-extent // stride) for extent in size)
    padded = F.pad(x, (kernel,) * 6)
    before = [max((-(-n // stride) - 1) * stride + kernel - n, 0) // 2 for n in size]
    for place in ((0, 0, 0), tuple(n - 1 for n in out.shape[2:])):
        start = [o * stride - b + kernel for o, b in zip(place, before)]
        patch = padded[0, 0][tuple(slice(s, s + kernel) for s in start)]
        expected = ((patch * layer.weight[0, 0]).sum() + layer.bias[0]).relu()
        assert_close(out[0, 0][place], expected)


def test_pooling_does_not_see_the_padding():
    x = -torch.ones(1, 1, 3, 5, 4)
    assert_close(_max_pool(x, (3, 3, 3), (2, 2, 2)), -torch.ones(1, 1, 2, 3, 2))


@needs("i3d")
def test_fvd_grows_with_noise():
    coarse = torch.rand(2, 9, 3, 4, 4)
    videos = [F.interpolate(x, (32, 32), mode="bilinear") for x in coarse]
    assert fvd(videos, videos) == pytest.approx(0, abs=1e-6)
    low, high = ([noisy(x, sigma) for x in videos] for sigma in (0.03, 0.3))
    assert 0 < fvd(low, videos) < fvd(high, videos)


def test_what_i3d_cannot_take_is_refused():
    with pytest.raises(ValueError, match="at least 9 frames of 3 channels, got \\(8, 3, 16, 16\\)"):
        video_features(torch.rand(8, 3, 16, 16))
    with pytest.raises(ValueError, match="must lie in"):
        video_features(300 * torch.rand(9, 3, 16, 16))
    with pytest.raises(ValueError, match="at least 2 feature vectors"):
        fvd([], [])
