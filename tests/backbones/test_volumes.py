"""timm's contract on models of videos and scans, which timm's own tests cannot feed."""

import pytest
import timm
import torch

import vidattn.backbones  # noqa: F401

SMALL = {"embed_dim": 4, "depths": (2, 1, 1), "num_heads": (1, 2, 4)}
SCAN = (8, 12, 4, 3)
MODELS = {
    "video_swin_tiny": (SMALL | {"window": (2, 3, 2)}, (2, 3, 5, 34, 28)),
    "swift": (
        SMALL | {"window": (2, 2, 2, 2), "patch": (2, 2, 2, 1), "scan_size": SCAN},
        (2, 1, *SCAN),
    ),
}


def create(name, **options):
    small, shape = MODELS[name]
    return timm.create_model(name, **small | options).eval(), torch.randn(shape)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_every_kind_of_feature_extraction(name):
    def extractor(**kind):
        torch.manual_seed(0)
        return create(name, features_only=True, **kind)

    model, x = extractor(feature_cls="getter")
    maps = model(x)
    assert [y.shape[1] for y in maps] == model.feature_info.channels() == [4, 8, 16]
    for kind in ({}, {"feature_cls": "hook"}, {"feature_cls": "fx"}):
        found = extractor(**kind)[0](x)
        torch.testing.assert_close([y.movedim(-1, 1) for y in found], maps)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_heads(name):
    model, x = create(name)
    features = model.forward_features(x)
    pooled = features.flatten(1, -2).mean(1)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), pooled)
    torch.testing.assert_close(model(x), model.get_classifier()(pooled))
    model.reset_classifier(3, "max")
    assert model(x).shape == (2, 3)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), features.flatten(1, -2).amax(1))
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), features)


@pytest.mark.parametrize("name", MODELS)
def test_half_precision_on_meta(name):
    model, x = create(name, device="meta", dtype=torch.bfloat16)
    assert {y.dtype for y in model.parameters()} == {torch.bfloat16}
    assert all(y.is_meta for y in model.parameters())
    assert model(x.to("meta", torch.bfloat16)).dtype == torch.bfloat16
