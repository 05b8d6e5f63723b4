"""Models by name, weights that fit or do not, and what each way of tuning moves."""

import argparse
import re

import pytest
import timm
import torch
from backbone_training import model as models
from backbone_training import probe as probes
from safetensors.torch import save_file

from tests.scripts import backbone_cases as cases

settings = cases.settings


def make(given: dict = cases.VIT, num_classes: int = 3, **options) -> torch.nn.Module:
    return models.create_model(given["name"], num_classes, 1, given["options"] | options)


def test_near_models_and_wrong_options_are_named():
    with pytest.raises(ValueError, match=r"unknown model 'swin_tny.*near are .*swin_tiny"):
        models.create_model("swin_tny_patch4_window7_224", 3, 1, {})
    with pytest.raises(ValueError, match="'vit_tiny_patch16_224' does not take options.*deepth"):
        make(deepth=3)


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
def test_weights_are_read(tmp_path, ending, wrapper):
    state, file = make().state_dict(), tmp_path / f"a.{ending}"
    if ending == "safetensors":
        save_file(state, file)
    else:
        prefixed = {f"module.{key}": value for key, value in state.items()}
        torch.save({wrapper: prefixed, "epoch": 3} if wrapper else prefixed, file)
    model = make()
    assert models.load_weights(model, file, new_head=False) == []
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)


def test_checkpoints_of_timm_are_read(tmp_path):
    state = make().state_dict()
    averaged = {key: value + 1 for key, value in state.items()}
    checkpoint = {"epoch": 3, "arch": "vit", "args": argparse.Namespace(lr=1.0, mean=(0.5,))}
    checkpoint |= {"state_dict": state, "state_dict_ema": averaged, "metric": 61.3}
    torch.save(checkpoint, tmp_path / "model_best.pth.tar")
    model = make()
    models.load_weights(model, tmp_path / "model_best.pth.tar", new_head=False)
    torch.testing.assert_close(dict(model.state_dict()), averaged, rtol=0, atol=0)


class Evil:
    """Runs code where a pickle of it is loaded."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('the pickle ran')",))


def test_pickles_and_broken_files_are_refused(tmp_path):
    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="holds more than tensors, and a pickle can run code"):
        models.read_weights(tmp_path / "evil.pth")
    torch.save({"model": 3}, tmp_path / "number.pth")
    with pytest.raises(ValueError, match="no dictionary of tensors"):
        models.read_weights(tmp_path / "number.pth")
    for name in ("cut.safetensors", "cut.pth"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 and no more")
        with pytest.raises(ValueError, match=f"{name}' cannot be read"):
            models.read_weights(tmp_path / name)
    with pytest.raises(ValueError, match="no weights file"):
        models.read_weights(tmp_path / "missing.pth")


def test_weights_of_another_variant_list_their_keys(tmp_path):
    save_file(make(depth=1, embed_dim=24).state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(ValueError) as caught:
        models.load_weights(make(), tmp_path / "a.safetensors", new_head=True)
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("holds the weights of another model:")
    assert lines[1].startswith("  12 missing: blocks.1.norm1.weight,") and "6 more" in lines[1]
    assert "of another shape: cls_token (1, 1, 24), needed (1, 1, 16)" in lines[2]
    save_file(make(depth=3).state_dict(), tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="12 unexpected: blocks.2.attn"):
        models.load_weights(make(), tmp_path / "b.safetensors", new_head=True)


def test_a_head_for_other_classes_starts_anew_or_is_refused(tmp_path):
    before, file = make(num_classes=7), tmp_path / "a.safetensors"
    save_file(before.state_dict(), file)
    model = make()
    own = {key: value.clone() for key, value in model.state_dict().items()}
    assert models.load_weights(model, file, new_head=True) == ["head.weight", "head.bias"]
    for key, value in model.state_dict().items():
        expected = own[key] if key.startswith("head.") else before.state_dict()[key]
        torch.testing.assert_close(value, expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"head.weight \(7, 16\), needed \(3, 16\)"):
        models.load_weights(make(), file, new_head=False)


def test_a_model_converts_the_layout_of_its_authors(tmp_path):
    options = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "dilations": [1, 1]}
    state, theirs = models.create_model("nat_mini", 3, 1, options).state_dict(), {}
    for name, value in state.items():
        for pattern, replacement in (
            (r"^stem\.", "patch_embed."),
            (r"^stages\.1\.downsample", "levels.0.downsample"),
            (r"^stages\.", "levels."),
            (r"^head\.fc", "head"),
        ):
            name = re.sub(pattern, replacement, name)
        theirs[name] = value
    torch.save(theirs, tmp_path / "a.pth")
    model = models.create_model("nat_mini", 3, 1, options)
    assert models.load_weights(model, tmp_path / "a.pth", new_head=False) == []
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)
    # neither theirs nor ours
    torch.save({f"x.{name}": value for name, value in state.items()}, tmp_path / "b.pth")
    with pytest.raises(ValueError, match="unexpected: x.stem.proj.0.weight"):
        models.load_weights(model, tmp_path / "b.pth", new_head=False)


def test_description_comes_back(tmp_path):
    form = settings.Input(size=cases.SIZE, channels=1, mean=(0.1,), std=(0.2,))
    given = cases.VIT
    description = models.Description(given["name"], cases.CLASSES, form, given["options"])
    model = models.build_described(description)
    models.save_weights(tmp_path / "a.safetensors", model.state_dict(), description)
    assert models.describe(tmp_path / "a.safetensors") == description
    save_file(model.state_dict(), tmp_path / "b.safetensors")
    assert models.describe(tmp_path / "b.safetensors") is None


def trainable(model: torch.nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("given", [cases.VIT, cases.RESNET])
@pytest.mark.parametrize("method", ["full", "linear", "probe", "lora"])
def test_each_method_moves_its_weights(given, method):
    targets = ("qkv",) if given is cases.VIT else ("conv2",)
    tune = settings.Tune(method=method, queries=4, rank=2, targets=targets)
    model = models.prepare_tuning(make(given), tune, 3)
    names, everything = trainable(model), {name for name, _ in model.named_parameters()}
    if method == "full":
        assert names == everything
    elif method == "linear":
        heads = models.classifier_prefixes(model)
        assert names == {name for name in everything if name.startswith(heads)} and names
    elif method == "probe":
        assert names == {name for name in everything if name.startswith("probe.")}
        assert not any(name.startswith(("backbone.head", "backbone.fc")) for name in everything)
    else:
        heads = {name for name in names if "modules_to_save" in name}
        assert len(heads) == 2 and all("lora_" in name for name in names - heads)
    models.set_training(model, method)
    loss = model(torch.randn(4, 1, cases.SIZE, cases.SIZE)).square().sum()
    loss.backward()
    assert names == {name for name, p in model.named_parameters() if p.grad is not None}


def test_a_frozen_backbone_computes_as_in_a_test():
    images = torch.randn(4, 1, cases.SIZE, cases.SIZE)
    for method in ("linear", "probe"):
        model = models.prepare_tuning(make(cases.RESNET), settings.Tune(method, queries=4), 3)
        backbone = getattr(model, "backbone", model)
        expected = backbone.eval().forward_features(images)
        models.set_training(model, method)
        torch.testing.assert_close(backbone.forward_features(images), expected, rtol=0, atol=0)


def test_lora_keeps_statistics_and_merges_exactly():
    tune = settings.Tune("lora", rank=2, targets=("conv2",))
    plain = make(cases.RESNET)
    start = {key: value.clone() for key, value in plain.state_dict().items()}
    model = models.prepare_tuning(plain, tune, 3)
    models.set_training(model, "lora")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.1)
    images = torch.randn(4, 1, cases.SIZE, cases.SIZE)
    model(images)
    given = cases.RESNET
    form = settings.Input(size=cases.SIZE, channels=1)
    description = models.Description(given["name"], cases.CLASSES, form, given["options"])
    merged = models.merge(model.state_dict(), description, tune)
    assert merged.keys() == start.keys()
    changed = {key for key in start if not torch.equal(start[key], merged[key])}
    assert len(changed) == 4 and all(name.endswith("conv2.weight") for name in changed)
    again = make(given)
    again.load_state_dict(merged)
    torch.testing.assert_close(again.eval()(images), model.eval()(images), rtol=1e-4, atol=1e-5)


SWIN = {"window_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]}


def test_a_model_of_one_size_is_made_for_that_of_the_images():
    given = settings.Model("swin_tiny_patch4_window7_224", SWIN)
    form = settings.Input(size=cases.SIZE, channels=1)
    made = models.build_start(given, settings.Tune(), 3, form)
    assert made(torch.zeros(1, 1, cases.SIZE, cases.SIZE)).shape == (1, 3)
    assert made.training
    description = models.Description(given.name, cases.CLASSES, form, SWIN)
    again = models.build_described(description)
    assert again(torch.zeros(1, 1, cases.SIZE, cases.SIZE)).shape == (1, 3)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("swin_tiny_patch4_window7_224", SWIN | {"img_size": 32}),
        ("video_swin_tiny", {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]}),
    ],
)
def test_images_that_a_model_does_not_take_are_named(name, options):
    form = settings.Input(size=cases.SIZE, channels=1)
    message = f"'{name}' does not take images of 1 x 16 x 16: .* Set input.size to what it takes"
    with pytest.raises(ValueError, match=message):
        models.build_start(settings.Model(name, options), settings.Tune(), 3, form)


def test_targets_that_no_layer_has_are_refused():
    with pytest.raises(ValueError, match=r"tune.targets \['query'\]"):
        models.prepare_tuning(make(), settings.Tune("lora", targets=("query",)), 3)


def test_probe_equals_a_loop():
    torch.manual_seed(0)
    probe = probes.EfficientProbe(12, 5, 3).double().eval()
    probe.norm.running_mean.copy_(torch.randn(12))
    probe.norm.running_var.copy_(torch.rand(12) + 0.5)
    tokens = torch.randn(2, 7, 12, dtype=torch.float64)
    values = tokens @ probe.values.weight.T
    for b in range(2):
        pooled = torch.zeros(12, dtype=torch.float64)
        for q in range(3):
            scores = torch.stack([probe.queries[q] @ tokens[b, n] / 12**0.5 for n in range(7)])
            weights = scores.exp() / scores.exp().sum()
            part = slice(4 * q, 4 * q + 4)
            pooled[part] = sum(weights[n] * values[b, n, part] for n in range(7))
        mean, var = probe.norm.running_mean, probe.norm.running_var
        normed = (pooled - mean) / (var + 1e-6).sqrt()
        expected = probe.classifier.weight @ normed + probe.classifier.bias
        torch.testing.assert_close(probe(tokens)[b], expected)
    with pytest.raises(ValueError, match="tune.queries is 5; it must divide the 12 .* such as 4"):
        probes.EfficientProbe(12, 5, 5)


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        # a class token that the probe leaves out
        ("vit_tiny_patch16_224", cases.VIT["options"], 4),
        # channels last
        (
            "swin_tiny_patch4_window7_224",
            {
                "img_size": 16,
                "window_size": 2,
                "embed_dim": 8,
                "depths": [1, 1],
                "num_heads": [1, 2],
            },
            4,
        ),
        ("test_resnet", {}, 1),
    ],
)
def test_every_layout_becomes_tokens(name, options, count):
    model = timm.create_model(name, num_classes=0, in_chans=1, **options).eval()
    features = model.forward_features(torch.randn(2, 1, 16, 16))
    tokens = probes.as_tokens(model, features)
    assert tokens.shape == (2, count, model.num_features)
    if name.startswith("swin"):
        torch.testing.assert_close(tokens[:, 1], features[:, 0, 1])
