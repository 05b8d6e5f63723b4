"""InLine-Swin against a slow model from the paper, one query at a time, on the authors' names."""

import pytest
import timm
import torch
import torch.nn.functional as F

import vidattn.backbones  # noqa: F401
from tests.backbones.loading import CLASSES, assert_same, load
from tests.backbones.slow_models import conv, draw, layer, linear, merge_patches, norm
from tests.backbones.slow_windows import slow_window_attention

DIM, HEADS, DEPTHS, WINDOW = 8, (1, 2), (1, 2), 3


def shapes():
    """Names and shapes of a released InLine-Swin whose second and last stage is not linear."""
    found = layer("patch_embed.proj", DIM, 3, 4, 4) | layer("patch_embed.norm", DIM)
    for i, depth in enumerate(DEPTHS):
        dim = DIM * 2**i
        for j in range(depth):
            block = f"layers.{i}.blocks.{j}"
            found |= layer(f"{block}.norm1", dim) | layer(f"{block}.norm2", dim)
            found |= layer(f"{block}.attn.qkv", 3 * dim, dim)
            found |= layer(f"{block}.attn.proj", dim, dim)
            if i == 0:
                wide = dim // HEADS[i]
                found |= layer(f"{block}.attn.residual.0", dim, wide, 1)
                found |= layer(f"{block}.attn.residual.2", 9 * dim, wide, 1)
            else:
                pairs = (2 * WINDOW - 1) ** 2
                found[f"{block}.attn.relative_position_bias_table"] = (pairs, HEADS[i])
                found[f"{block}.attn.relative_position_index"] = (WINDOW**2, WINDOW**2)
            found |= layer(f"{block}.mlp.fc1", 4 * dim, dim)
            found |= layer(f"{block}.mlp.fc2", dim, 4 * dim)
        if i < len(DEPTHS) - 1:
            found[f"layers.{i}.downsample.reduction.weight"] = (2 * dim, 4 * dim)
            found |= layer(f"layers.{i}.downsample.norm", 4 * dim)
    return found | layer("norm", dim) | layer("head", CLASSES, dim)


def injective(p, name, x, heads):
    """Injective linear attention of (B, H, W, C), and the convolution that the image asks for."""
    B, H, W, C = x.shape
    q, k, v = linear(p, f"{name}.qkv", x).view(B, H * W, 3, heads, -1).permute(2, 0, 3, 1, 4)
    out = torch.empty_like(q)
    for i in range(H * W):
        scores = (k @ q[:, :, i, :, None]).squeeze(-1) * q.shape[-1] ** -0.5
        weights = (scores - scores.mean(-1, keepdim=True) + 1) / (H * W)
        out[:, :, i] = (weights[..., None] * v).sum(2)
    out = out.transpose(1, 2).reshape(x.shape)
    values = F.pad(v.transpose(1, 2).reshape(x.shape), (0, 0, 1, 1, 1, 1))
    options = {"groups": heads}
    for b in range(B):
        mean = x[b].mean((0, 1))[None, :, None]
        for index in (0, 2):
            key = f"{name}.residual.{index}"
            mean = F.conv1d(mean, p[f"{key}.weight"], p[f"{key}.bias"], **options)
            mean = F.gelu(mean) if index == 0 else mean
        kernels = mean.view(C, 3, 3)
        for y in range(3):
            for z in range(3):
                out[b] += kernels[:, y, z] * values[b, y : y + H, z : z + W]
    return linear(p, f"{name}.proj", out)


def slow_inline(state, images):
    p = {name: x.double() for name, x in state.items()}
    x = conv(p, "patch_embed.proj", images.double().permute(0, 2, 3, 1), stride=4)
    x = norm(p, "patch_embed.norm", x)
    for i, depth in enumerate(DEPTHS):
        for j in range(depth):
            block = f"layers.{i}.blocks.{j}"
            y = norm(p, f"{block}.norm1", x)
            if i == 0:
                y = injective(p, f"{block}.attn", y, HEADS[i])
            else:
                options = {"window": (WINDOW, WINDOW), "shift": (j % 2, j % 2)}
                p[f"{block}.attn.rpb"] = p[f"{block}.attn.relative_position_bias_table"]
                y = slow_window_attention(p, f"{block}.attn", y, heads=HEADS[i], **options)
            x = x + y
            y = F.gelu(linear(p, f"{block}.mlp.fc1", norm(p, f"{block}.norm2", x)))
            x = x + linear(p, f"{block}.mlp.fc2", y)
        if i < len(DEPTHS) - 1:
            x = merge_patches(p, f"layers.{i}.downsample", x)
    return linear(p, "head", norm(p, "norm", x).mean((1, 2)))


# the windows are in maps of 4 x 5; of 2 x 3, where no axis is longer than one
@pytest.mark.parametrize("size", [(28, 36), (12, 20)])
@torch.no_grad()
def test_released_weights(size, tmp_path):
    state, images = draw(shapes()), torch.randn(2, 3, *size)
    options = {"embed_dim": DIM, "depths": DEPTHS, "num_heads": HEADS, "window": WINDOW}
    model = load(
        "inline_swin_tiny", {"model": state}, tmp_path, are_linear=(True, False), **options
    )
    assert_same(model, images, slow_inline(state, images))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"are_linear": (True,)}, "depths, num_heads and are_linear must have one entry for each"),
        ({"num_heads": (3, 5, 6, 6)}, "dim must be a multiple of num_heads, got 192 and 5"),
        ({"num_heads": (3, 6, 6, 5)}, "dim must be a multiple of num_heads, got 768 and 5"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("inline_swin_tiny", device="meta", **options)
