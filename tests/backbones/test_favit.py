"""FaViT against slow attention from the paper, one query at a time."""

import pytest
import timm
import torch
import torch.nn.functional as F

import vidattn.backbones  # noqa: F401
from tests.backbones.slow_models import conv, linear, norm
from vidattn.backbones.factorized_attention import FactorizedAttention


def softly(q, keys, values):
    """Attention of one query (B, D) to a list of keys."""
    keys, values = torch.stack(keys), torch.stack(values)
    weights = ((keys * q).sum(-1) * q.shape[-1] ** -0.5).softmax(0)
    return (weights[..., None] * values).sum(0)


def folded(place, extent):
    """A place on an axis that is reflected at its ends."""
    while extent > 1 and place >= extent:
        place = abs(2 * (extent - 1) - place)
    return place if extent > 1 else 0


def mean_window(x, window, dilation):
    """The mean of all the windows that tile (B, H, W, C), cell by cell."""
    H, W = x.shape[1:3]
    span = dilation * (window - 1) + 1
    out = x.new_zeros(len(x), window, window, x.shape[3])
    corners = [(y, z) for y in range(0, H, span) for z in range(0, W, span)]
    for y, z in corners:
        for i in range(window):
            for j in range(window):
                row, column = folded(y + i * dilation, H), folded(z + j * dilation, W)
                out[:, i, j] += x[:, row, column] / len(corners)
    return out


def slow_factorized(p, x, heads, stride, window):
    """Factorized attention of (B, H, W, C)."""
    B, H, W, C = x.shape
    eighth, out = C // 8, []
    q = linear(p, "q", x)
    patches = F.pad(x[..., :eighth], (0, 0, 0, -W % stride, 0, -H % stride))
    patches = norm(p, "coarse.norm", conv(p, "coarse.sr", patches, stride=stride))
    k, v = linear(p, "coarse.kv", patches).chunk(2, -1)
    v = v + conv(p, "coarse.local_conv", v, padding=1, groups=eighth)
    sources = [(q[..., None, :eighth], k[..., None, :], v[..., None, :])]
    mixed = conv(p, "mix.0", x[..., eighth:], padding=1, groups=C - eighth)
    mixed = conv(p, "mix.1", mixed)
    number = 1 if stride == 1 else 2
    fine = q[..., eighth:].view(B, H, W, heads, -1)
    for i, (part, query) in enumerate(zip(mixed.chunk(number, -1), fine.chunk(number, -1))):
        cells = mean_window(part, window, stride if i else 1).view(B, window, window, heads, -1)
        k, v = linear(p, f"fine.{i}.kv", linear(p, f"fine.{i}.fc", cells)).chunk(2, -1)
        options = {"padding": 1, "groups": part.shape[-1]}
        v = v + conv(p, f"fine.{i}.local_conv", v.flatten(3), **options).view(v.shape)
        sources.append((query, k, v))
    for query, k, v in sources:
        found = torch.empty_like(query)
        for i in range(H):
            for j in range(W):
                keys, values = (list(x.flatten(1, 2).unbind(1)) for x in (k, v))
                found[:, i, j] = softly(query[:, i, j], keys, values)
        out.append(found.flatten(3))
    return linear(p, "proj", torch.cat(out, -1))


# whole windows and patches, ragged ones, and maps smaller than either
@pytest.mark.parametrize("size", [(6, 3), (5, 7), (1, 2)])
@pytest.mark.parametrize("stride", [1, 2])
@torch.no_grad()
def test_factorized_attention(size, stride):
    layer = FactorizedAttention(32, 2, stride, window=3).double()
    for x in layer.parameters():
        x.normal_(std=0.5)
    x = torch.randn(2, *size, 32).double()
    answer = slow_factorized(dict(layer.named_parameters()), x, 2, stride, 3)
    torch.testing.assert_close(layer(x), answer, atol=1e-9, rtol=1e-9)


@torch.no_grad()
def test_model():
    options = {"depths": (1, 1), "num_heads": (1, 2), "strides": (2, 1), "mlp_ratios": (2, 1)}
    options |= {"embed_dim": 16, "window": 3, "num_classes": 5, "drop_path_rate": 0.0}
    model = timm.create_model("favit_b0", **options).double().eval()
    state = model.state_dict()
    for x in state.values():
        x.normal_(std=0.5)
    images = torch.randn(2, 3, 19, 28).double()
    x = conv(state, "stem.proj", images.permute(0, 2, 3, 1), stride=4, padding=3)
    x = norm(state, "stem.norm", x)
    for i, heads, stride in ((0, 1, 2), (1, 2, 1)):
        if i:
            x = norm(state, "stages.1.downsample.prenorm", x, 1e-6)
            x = conv(state, "stages.1.downsample.proj", x, stride=2, padding=1)
            x = norm(state, "stages.1.downsample.norm", x)
        block = f"stages.{i}.blocks.0"
        attn = {
            name.removeprefix(f"{block}.attn."): each
            for name, each in state.items()
            if name.startswith(f"{block}.attn.")
        }
        x = x + slow_factorized(attn, norm(state, f"{block}.norm1", x, 1e-6), heads, stride, 3)
        y = linear(state, f"{block}.mlp.fc1", norm(state, f"{block}.norm2", x, 1e-6))
        y = F.gelu(conv(state, f"{block}.mlp.dwconv", y, padding=1, groups=y.shape[-1]))
        x = x + linear(state, f"{block}.mlp.fc2", y)
    answer = linear(state, "head.fc", norm(state, "norm", x, 1e-6).mean((1, 2)))
    torch.testing.assert_close(model(images), answer, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strides": (8, 4)}, "depths, num_heads, strides and mlp_ratios must have one entry"),
        ({"embed_dim": 24}, "dim must be a multiple of 16, and the 10 channels of a group one of"),
        ({"num_heads": (3, 2, 4, 8)}, "and the 14 channels of a group one of num_heads, got 32"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("favit_b0", device="meta", **options)
