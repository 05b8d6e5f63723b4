"""Released weights: both layouts load, and the loaded model computes what the released one did."""

import pytest
import timm
import torch
import torch.nn.functional as F
from transformers import DinatConfig
from transformers.models.dinat import modeling_dinat

import vidattn.backbones  # noqa: F401
from tests.backbones.loading import CLASSES, assert_same, load
from tests.backbones.slow_models import (
    biformer_shapes,
    draw,
    neighborhood_shapes,
    slow_biformer,
    slow_neighborhood,
)

DIM, HEADS = 8, (1, 2, 4)
DEPTHS, DILATIONS = (2, 2, 1), (2, 3, 1)
# name, layout and what differs from the tiny size
NEIGHBORHOOD = {
    "nat_small": ("nat", {"scales": True}, {}),
    "dinat_mini": ("nat", {}, {"dilations": DILATIONS}),
    "dinat_s_tiny": ("dinat_s", {}, {"dilations": DILATIONS}),
}


def neighborhood(name):
    """Layout, state dict, and the options that our model and the slow one take."""
    family, extras, differences = NEIGHBORHOOD[name]
    ours = {"embed_dim": DIM, "depths": DEPTHS, "num_heads": HEADS, "window": 3, "mlp_ratio": 2.0}
    ours |= {"dilations": (1, 1, 1)} | differences
    shapes = neighborhood_shapes(
        family, dim=DIM, depths=DEPTHS, heads=HEADS, window=3, mlp=2, classes=CLASSES, **extras
    )
    slow = {"depths": DEPTHS, "heads": HEADS, "window": 3, "dilations": ours["dilations"]}
    return family, draw(shapes), ours, slow


# the last two stages are smaller than a window; 45 is no multiple of a patch
@pytest.mark.parametrize("name", NEIGHBORHOOD)
@torch.no_grad()
def test_neighborhood_models(name, tmp_path):
    family, state, ours, slow = neighborhood(name)
    images = torch.randn(2, 3, 32, 45)
    model = load(name, state, tmp_path, **ours)
    assert_same(model, images, slow_neighborhood(state, images, family, **slow))


@pytest.mark.parametrize(
    ("name", "window", "dilation"), [("dinat_iso_small", 3, 2), ("vitrpb_small", None, 1)]
)
@torch.no_grad()
def test_isotropic_models(name, window, dilation, tmp_path):
    shapes = neighborhood_shapes(
        "iso", dim=DIM, depths=(2,), heads=(2,), window=window or 14, mlp=4, classes=CLASSES
    )
    state = draw(shapes)
    if window is None:
        for i in range(2):
            state[f"layers.{i}.attn.relative_position_index"] = torch.zeros(196, 196).long()
    ours = {"embed_dim": DIM, "depth": 2, "num_heads": 2, "window": window}
    model = load(name, state, tmp_path, **ours)
    images = torch.randn(1, 3, *((224, 224) if window is None else (80, 112)))
    slow = {"depths": (2,), "heads": (2,), "window": window, "dilations": (dilation,)}
    assert_same(model, images, slow_neighborhood(state, images, "iso", **slow))


@pytest.mark.parametrize("family", ["dinat", "nat"])
@torch.no_grad()
def test_weights_of_transformers(family, tmp_path, monkeypatch):
    monkeypatch.setattr(modeling_dinat, "requires_backends", lambda *args: None)
    config = DinatConfig(
        embed_dim=DIM,
        depths=list(DEPTHS),
        num_heads=list(HEADS),
        kernel_size=3,
        dilations=[[1, 1], [1, 1], [1]],
        mlp_ratio=2.0,
        layer_scale_init_value=0.5,
        num_labels=CLASSES,
    )
    theirs = modeling_dinat.DinatForImageClassification(config)
    state = draw({name: x.shape for name, x in theirs.state_dict().items()})
    if family == "nat":
        # gone from transformers; its names were the same but for the first word
        state = {name.replace("dinat.", "nat."): x for name, x in state.items()}
    _, _, ours, slow = neighborhood("nat_small")
    images = torch.randn(1, 3, 24, 32)
    authors = {}
    for name, x in state.items():
        name = name.removeprefix(f"{family}.").removeprefix("encoder.")
        for old, new in TO_AUTHORS:
            name = name.replace(old, new)
        if name.endswith("layer_scale_parameters"):
            prefix = name.removesuffix("layer_scale_parameters")
            authors |= {f"{prefix}gamma1": x[0], f"{prefix}gamma2": x[1]}
        else:
            authors[name] = torch.cat([authors[name], x]) if name in authors else x
    model = load("nat_small", state, tmp_path, layer_scale=1.0, **ours)
    assert_same(model, images, slow_neighborhood(authors, images, "nat", **slow))


TO_AUTHORS = (
    ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("embeddings.norm", "patch_embed.norm"),
    (".layers.", ".blocks."),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    # in this order in the file, and behind each other in one tensor
    ("attention.self.query", "attn.qkv"),
    ("attention.self.key", "attn.qkv"),
    ("attention.self.value", "attn.qkv"),
    ("attention.self.rpb", "attn.rpb"),
    ("attention.output.dense", "attn.proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
    ("layernorm.", "norm."),
    ("classifier.", "head."),
)


@pytest.mark.parametrize(("name", "stl"), [("biformer_tiny", False), ("biformer_stl", True)])
@torch.no_grad()
def test_biformer(name, stl, tmp_path):
    depths, topks = (1, 2, 1), (1, 4, None)
    state = draw(biformer_shapes(dim=32, depths=depths, mlp=2, classes=CLASSES, stl=stl))
    ours = {"embed_dim": 32, "depths": depths, "topks": topks, "mlp_ratio": 2.0}
    model = load(name, {"model": state}, tmp_path, **ours)
    # 14 x 20 cells, then 7 x 10: regions of 2 x 3 and 1 x 2 on padded maps
    images = torch.randn(2, 3, 56, 80)
    answer = slow_biformer(state, images, depths=depths, topks=topks, head_dim=32, stl=stl)
    assert_same(model, images, answer)


def test_other_images_and_classes(tmp_path):
    _, state, ours, _ = neighborhood("dinat_mini")
    model = load("dinat_mini", state, tmp_path, **ours | {"num_classes": 3, "in_chans": 1})
    assert model(torch.randn(1, 1, 32, 32).double()).shape == (1, 3)
    torch.testing.assert_close(
        model.stages[1].downsample.reduction.weight,
        state["levels.0.downsample.reduction.weight"].double(),
    )


def test_weights_of_another_variant_are_named(tmp_path):
    _, state, ours, _ = neighborhood("dinat_mini")
    with pytest.raises(RuntimeError, match=r"stages\.0\.blocks\.0\.attn\.rpb"):
        load("dinat_mini", state, tmp_path, **ours | {"num_heads": (2, 2, 4)})


@pytest.mark.parametrize("layout", ["theirs", "ours"])
@torch.no_grad()
def test_biases_of_another_window_are_resized(layout, tmp_path):
    _, state, ours, _ = neighborhood("dinat_mini")
    table = state["levels.1.blocks.0.attn.rpb"].double()
    if layout == "ours":
        state = load("dinat_mini", state, tmp_path, **ours).state_dict()
    model = load("dinat_mini", state, tmp_path, **ours | {"window": 5})
    answer = F.interpolate(table[None], (9, 9), mode="bicubic")[0]
    torch.testing.assert_close(model.stages[1].blocks[0].attn.rpb, answer, rtol=1e-6, atol=1e-6)


def test_own_weights_load_as_they_are(tmp_path):
    _, _, ours, _ = neighborhood("dinat_mini")
    state = timm.create_model("dinat_mini", num_classes=CLASSES, **ours).state_dict()
    model = load("dinat_mini", state, tmp_path, **ours)
    assert all(x.equal(state[name].double()) for name, x in model.state_dict().items())
