"""timm's contract, quickly: on small models of every family. test_timm_suite.py has the rest."""

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2

import vidattn.backbones  # noqa: F401

SMALL = {"embed_dim": 8, "depths": (2, 2, 1, 1), "num_heads": (1, 2, 4, 4), "window": 3}
SMALLER = {"embed_dim": 8, "depths": (2, 1, 1), "num_heads": (2, 2, 4)}
MODELS = {
    "nat_mini": SMALL,
    "dinat_base": SMALL,
    "dinat_s_tiny": SMALL,
    "dinat_iso_small": {"embed_dim": 8, "num_heads": 2, "depth": 3},
    "biformer_tiny": {"embed_dim": 32, "depths": (1, 1, 1, 1)},
    "biformer_stl": {"embed_dim": 32, "depths": (1, 1, 1, 1)},
    "inline_swin_tiny": SMALL,
    "moh_vit_tiny": {
        "embed_dim": 8,
        "depths": (2, 1, 1, 1),
        "num_heads": (2, 4, 4, 4),
        "num_shared": (2, 2, 1, 0),
        "num_routed": (0, 1, 2, 3),
        "mlp_ratios": (2, 2, 2, 2),
    },
    "l2vit_tiny": SMALL,
    "favit_b0": {"embed_dim": 16, "depths": (1, 1, 1, 1), "mlp_ratios": (2, 2, 2, 2)},
    "vsa_swin_tiny": SMALLER | {"window": 3},
    "gated_swinrmt_retention_tiny": SMALLER | {"window": 3, "decay_ranges": (4, 6, 6)},
    "gated_swinrmt_swat_tiny": SMALLER | {"window": 3, "decay_ranges": (4, 6, 6)},
    "video_swin_tiny": SMALLER | {"window": (2, 3, 3)},
    "swift": SMALLER | {"window": (2, 2, 2, 2), "patch": (2, 2, 2, 1), "scan_size": (8, 12, 4, 3)},
}
# without a table of biases
NO_TABLES = (
    "biformer_tiny",
    "biformer_stl",
    "l2vit_tiny",
    "favit_b0",
    "gated_swinrmt_retention_tiny",
    "gated_swinrmt_swat_tiny",
    "vsa_swin_tiny",
)
IMAGES = (2, 3, 64, 96)
OTHER_INPUT = {"video_swin_tiny": (2, 3, 2, 32, 48), "swift": (2, 1, 8, 12, 4, 3)}
SPACE = {"video_swin_tiny": (3, 4), "swift": (2, 3, 4)}


def inputs_of(name):
    return torch.randn(OTHER_INPUT.get(name, IMAGES))


def create(name, **options):
    return timm.create_model(name, num_classes=4, drop_path_rate=0.0, **MODELS[name] | options)


@pytest.mark.parametrize("name", MODELS)
def test_training_reaches_every_parameter(name):
    model, images = create(name), inputs_of(name)
    model(images).square().sum().backward()
    without = [key for key, x in model.named_parameters() if x.grad is None or not x.grad.any()]
    # the bias of keys, or of a layer before a norm of batches, changes no output
    assert [key for key in without if not key.endswith("bias")] == []


@pytest.mark.parametrize("name", MODELS)
def test_checkpointing_changes_no_gradient(name, monkeypatch):
    model, images = create(name).eval(), inputs_of(name)
    answers = torch.autograd.grad(model(images).sum(), list(model.parameters()))
    model.set_grad_checkpointing()
    assert all(stage.grad_checkpointing for stage in model.stages)
    found = torch.autograd.grad(model(images).sum(), list(model.parameters()))
    torch.testing.assert_close(found, answers)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_feature_maps(name):
    model, images = create(name).eval(), inputs_of(name)
    last, maps = model.forward_intermediates(images)
    torch.testing.assert_close(last, model.forward_features(images))
    torch.testing.assert_close(model.forward_head(last), model(images))
    for x, info in zip(maps, model.feature_info, strict=True):
        assert x.dim() == images.dim() and x.shape[:2] == (2, info["num_chs"])
        for axis in SPACE.get(name, (2, 3)):
            assert x.shape[axis] == -(-images.shape[axis] // info["reduction"])
    (normed,) = model.forward_intermediates(images, 1, norm=True, intermediates_only=True)
    channels_first = last if model.output_fmt == "NCHW" else last.movedim(-1, 1)
    torch.testing.assert_close(normed, channels_first)
    with pytest.raises(ValueError, match="output_fmt must be one of"):
        model.forward_intermediates(images, output_fmt="NLC")


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_pruned_models_keep_their_feature_maps(name):
    model, images = create(name).eval(), inputs_of(name)
    maps = model.forward_intermediates(images, intermediates_only=True, output_fmt="NHWC")
    assert model.prune_intermediate_layers([1]) == [1]
    assert len(model.stages) == 2 and model.num_features == model.feature_info[1]["num_chs"]
    features = model.forward_features(images)
    if model.output_fmt == "NCHW":
        features = features.movedim(1, -1)
    torch.testing.assert_close(features, maps[1])


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_drawn_anew_on_another_device(name):
    with torch.device("meta"):
        model = create(name)
    # memory that nobody wrote is NaN in tests
    model = model.to_empty(device="cpu")
    for x in [*model.parameters(), *model.buffers()]:
        x.data.fill_(float("nan") if x.is_floating_point() else 0)
    model.init_weights()
    assert all(x.isfinite().all() for x in [*model.parameters(), *model.buffers()])
    assert model.eval()(inputs_of(name)).isfinite().all()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_scripted_and_saved(name, tmp_path):
    model, images = create(name).eval(), inputs_of(name)
    torch.jit.save(torch.jit.script(model), tmp_path / "model.pt")
    torch.testing.assert_close(torch.jit.load(tmp_path / "model.pt")(images), model(images))


@pytest.mark.parametrize("name", MODELS)
def test_position_biases_do_not_decay(name):
    model = create(name)
    groups = create_optimizer_v2(model, weight_decay=0.1).param_groups
    decayed = {id(x) for group in groups if group["weight_decay"] for x in group["params"]}
    tables = [x for key, x in model.named_parameters() if key.endswith(("rpb", "_embed"))]
    assert not any(id(x) in decayed for x in tables)
    assert bool(tables) != (name in NO_TABLES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (1, 1)}, "depths, num_heads and dilations must have one entry for each"),
        ({"num_heads": (3, 2, 4, 4)}, "dim must be a multiple of num_heads, got 8 and 3"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        create("nat_mini", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (1, 1)}, "depths and topks must have one entry for each stage"),
        ({"topks": (1, 4, 50, None)}, "topk must be 1 to the 49 regions, got 50"),
    ],
)
def test_bad_options_of_biformer_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        create("biformer_tiny", **options)
