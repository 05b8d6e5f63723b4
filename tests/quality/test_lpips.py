"""LPIPS: equal pictures, more noise, and the numbers of the class of torchmetrics."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tests.quality.networks import needs, noisy
from vidattn.quality.lpips import AlexLpips, lpips
from vidattn.quality.weights import load_weights


@pytest.fixture
def video():
    coarse = torch.rand(2, 3, 5, 6)
    return nn.functional.interpolate(coarse, (64, 72), mode="bicubic").clamp(0, 1)


@needs("lpips")
def test_equal_videos_have_no_distance_and_noise_adds_to_it(video):
    values = [lpips(noisy(video, sigma), video) for sigma in (0.0, 0.02, 0.1, 0.3)]
    assert values[0] == 0 and values == sorted(values) and 0.2 < values[-1] < 1.5
    assert lpips(torch.zeros_like(video), torch.ones_like(video)) > 0.2


@needs("lpips")
def test_bytes_and_floats_are_the_same(video):
    other, eight = noisy(video, 0.2), (255 * video).round().byte()
    assert lpips(other, eight) == pytest.approx(lpips(other, eight.double() / 255), rel=1e-5)


@needs("lpips")
def test_it_is_the_published_distance(video):
    pytest.importorskip("torchvision")
    from torchmetrics.functional.image.lpips import _LPIPS

    published, weights = _LPIPS(pretrained=False, pnet_rand=True, net="alex"), load_weights("lpips")
    convolutions = [x for x in published.net.modules() if isinstance(x, nn.Conv2d)]
    for i, layer in enumerate(convolutions):
        layer.load_state_dict({x: weights[f"trunk.{i}.{x}"] for x in ("weight", "bias")})
        linear = getattr(published, f"lin{i}").model[-1]
        linear.load_state_dict({"weight": weights[f"weight.{i}"].view(1, -1, 1, 1)})
    other = noisy(video, 0.2)
    with torch.no_grad():
        expected = published.eval()(2 * video - 1, 2 * other - 1).mean().item()
    assert lpips(video, other) == pytest.approx(expected, rel=1e-4)


def test_frames_are_compared_one_by_one():
    network = AlexLpips().requires_grad_(False)
    for weight in network.weight:
        nn.init.uniform_(weight)
    a, b = torch.rand(2, 3, 3, 40, 33)
    distances = network(a, b)
    assert distances.shape == (3,) and (distances > 0).all()
    assert_close(distances[1:2], network(b[1:2], a[1:2]))
    assert_close(network(a, a), torch.zeros(3))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda x: x[:1], "share one shape"),
        (lambda x: x * 255, "must lie in"),
    ],
)
def test_what_is_no_pair_of_videos_is_refused(spoil, words, video):
    with pytest.raises(ValueError, match=words):
        lpips(spoil(video), video)


def test_frames_must_be_large_enough(video):
    with pytest.raises(ValueError, match="at least 32 x 32 pixels, got \\(3, 31, 72\\)"):
        lpips(video[:, :, :31], video[:, :, :31])
