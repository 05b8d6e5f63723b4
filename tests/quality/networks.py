"""The networks whose weights have been fetched; tests of the others are skipped."""

import pytest

from vidattn.quality.weights import has_weights


def needs(network):
    """Skip a test unless the weights of a network are there."""
    command = f"python scripts/fetch_metric_weights.py {network}"
    return pytest.mark.skipif(not has_weights(network), reason=f"not fetched: {command}")


def noisy(video, sigma):
    """A video with noise of a standard deviation."""
    import torch

    return (video + sigma * torch.randn_like(video)).clamp(0, 1)
