"""SwiFT, with weights under the names of its authors, is what their model was."""

import itertools

import pytest
import timm
import torch
import torch.nn.functional as F

import vidattn.backbones  # noqa: F401
from tests.backbones.slow_models import draw, layer, linear, norm
from tests.backbones.slow_windows import slow_window_attention

DIM, HEADS, DEPTHS, PATCH, WINDOW = 4, (1, 2, 4), (2, 1, 2), (2, 3, 2, 1), (2, 3, 2, 2)
SCAN = (8, 12, 8, 3)
OURS = {"embed_dim": DIM, "num_heads": HEADS, "depths": DEPTHS, "patch": PATCH, "window": WINDOW}
OURS |= {"scan_size": SCAN, "num_classes": 3}


def authors_shapes():
    """Names and shapes of a checkpoint; those of the authors' trainer, less what it wraps."""
    shapes = layer("model.patch_embed.fc", DIM, 12) | layer("output_head.head", 3, 4 * DIM)
    shapes |= layer("model.norm", 4 * DIM)
    size = [4, 4, 4]
    for i, depth in enumerate(DEPTHS):
        dim = DIM * 2**i
        shapes[f"model.pos_embeds.{i}.pos_embed"] = (1, dim, *size, 1)
        shapes[f"model.pos_embeds.{i}.time_embed"] = (1, dim, 1, 1, 1, 3)
        for j in range(depth):
            block = f"model.layers.{i}.blocks.{j}."
            shapes |= layer(f"{block}norm1", dim) | layer(f"{block}norm2", dim)
            shapes |= layer(f"{block}attn.qkv", 3 * dim, dim) | layer(f"{block}attn.proj", dim, dim)
            shapes |= layer(f"{block}mlp.linear1", 4 * dim, dim)
            shapes |= layer(f"{block}mlp.linear2", dim, 4 * dim)
        if i < len(DEPTHS) - 1:
            shapes |= layer(f"model.layers.{i}.downsample.norm", 8 * dim)
            shapes[f"model.layers.{i}.downsample.reduction.weight"] = (2 * dim, 8 * dim)
        size = [cells // 2 for cells in size]
    return shapes


def slow_swift(p, scans):
    """Class scores of (B, 1, X, Y, Z, T) scans, from weights under the authors' names."""
    cells = []
    for x, y, z in itertools.product(*(range(0, n, s) for n, s in zip(SCAN[:3], PATCH[:3]))):
        patch = scans[:, 0, x : x + PATCH[0], y : y + PATCH[1], z : z + PATCH[2]]
        cells.append(linear(p, "model.patch_embed.fc", patch.flatten(1, 3).mT))
    x = torch.stack(cells, 1).unflatten(1, (4, 4, 4))
    for i, depth in enumerate(DEPTHS):
        x = x + p[f"model.pos_embeds.{i}.pos_embed"].movedim(1, -1)
        x = x + p[f"model.pos_embeds.{i}.time_embed"].movedim(1, -1)[:, :, :, :, : x.shape[4]]
        is_last = i == len(DEPTHS) - 1
        window = (*x.shape[1:4], WINDOW[3]) if is_last else WINDOW
        for j in range(depth):
            name = f"model.layers.{i}.blocks.{j}."
            shift = [w // 2 if j % 2 and not is_last else 0 for w in window]
            x = x + slow_window_attention(
                p,
                f"{name}attn",
                norm(p, f"{name}norm1", x),
                heads=HEADS[i],
                window=window,
                shift=shift,
            )
            hidden = F.gelu(linear(p, f"{name}mlp.linear1", norm(p, f"{name}norm2", x)))
            x = x + linear(p, f"{name}mlp.linear2", hidden)
        if not is_last:
            name = f"model.layers.{i}.downsample."
            parts = itertools.product((0, 1), repeat=3)
            x = torch.cat([x[:, a::2, b::2, c::2] for a, b, c in parts], -1)
            x = linear(p, f"{name}reduction", norm(p, f"{name}norm", x))
    return linear(p, "output_head.head", x.flatten(1, 4).mean(1))


@pytest.mark.parametrize("frames", [3, 2])
@torch.no_grad()
def test_authors_weights(frames, tmp_path):
    state = draw(authors_shapes())
    torch.save({"state_dict": state}, tmp_path / "weights.ckpt")
    overlay = {"file": str(tmp_path / "weights.ckpt"), "num_classes": 3}
    model = timm.create_model("swift", pretrained=True, pretrained_cfg_overlay=overlay, **OURS)
    scans = torch.randn(2, 1, *SCAN[:3], frames).double()
    answer = slow_swift({name: x.double() for name, x in state.items()}, scans)
    torch.testing.assert_close(model.double().eval()(scans), answer)


def test_the_released_head_of_two_classes_has_one_output(tmp_path):
    options = {name: x for name, x in OURS.items() if name != "num_classes"}
    state = draw(authors_shapes() | layer("output_head.head", 1, 4 * DIM))
    torch.save({"state_dict": state}, tmp_path / "weights.ckpt")
    overlay = {"file": str(tmp_path / "weights.ckpt")}
    model = timm.create_model("swift", pretrained=True, pretrained_cfg_overlay=overlay, **options)
    assert model.num_classes == 1
    torch.testing.assert_close(model.head.fc.weight, state["output_head.head.weight"])


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="depths and num_heads must have one entry for each"):
        timm.create_model("swift", depths=(1, 1))
    model = timm.create_model("swift", **OURS)
    with pytest.raises(ValueError, match="create the model with the scan_size of these scans"):
        model(torch.randn(1, 1, *SCAN[:3], 4))
