"""Weights that are not there are asked for by the command that fetches them."""

import pytest
import torch

from vidattn.quality import flow, fvd, lpips
from vidattn.quality.weights import has_weights, load_weights

VIDEO = torch.rand(9, 3, 128, 128)
MEASURES = {
    "lpips": (lpips._network, lambda: lpips.lpips(VIDEO, VIDEO)),
    "i3d": (fvd._network, lambda: fvd.video_features(VIDEO)),
    "raft": (flow._network, lambda: flow.warp_error(VIDEO)),
}


@pytest.mark.parametrize("network", MEASURES)
def test_a_measure_names_the_command(network, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    loaded, measure = MEASURES[network]
    loaded.cache_clear()
    assert not has_weights(network)
    with pytest.raises(ValueError, match=f"fetch_metric_weights.py {network}") as error:
        measure()
    assert str(tmp_path) in str(error.value)


def test_fetched_weights_are_read(monkeypatch, tmp_path):
    from safetensors.torch import save_file

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "vidattn" / "weights"
    folder.mkdir(parents=True)
    save_file({"x": torch.arange(3)}, folder / "raft_things.safetensors")
    assert has_weights("raft") and load_weights("raft")["x"].tolist() == [0, 1, 2]
