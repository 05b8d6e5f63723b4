"""FaViT against a slow model from the paper and the released code, one query at a time."""

import pytest
import timm
import torch
import torch.nn.functional as F

import vidattn.backbones  # noqa: F401
from tests.backbones.loading import CLASSES, assert_same, load
from tests.backbones.slow_models import conv, draw, layer, linear, norm


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


def pooled_window(x, heads, window, dilation):
    """(B, window, window, n, D) the windows that tile (B, H, W, C), pooled cell by cell."""
    H, W = x.shape[1:3]
    x = x.unflatten(-1, (heads, -1))
    span = dilation * (window - 1) + 1
    out = x.new_zeros(len(x), window, window, *x.shape[3:])
    corners = [(y, z) for y in range(0, H, span) for z in range(0, W, span)]
    for i in range(window):
        for j in range(window):
            places = [
                (folded(y + i * dilation, H), folded(z + j * dilation, W)) for y, z in corners
            ]
            # window after window, as the authors pool them
            line = torch.cat([x[:, row, column] for row, column in places], -1)
            out[:, i, j] = F.adaptive_avg_pool1d(line, x.shape[-1])
    return out


def slow_factorized(p, name, x, heads, stride, window):
    """Factorized attention of (B, H, W, C)."""
    B, H, W, C = x.shape
    eighth, out = C // 8, []
    q = linear(p, f"{name}.q", x)
    # a map without a whole patch, which the authors' code does not take, is padded to one
    patches = F.pad(x[..., :eighth], (0, 0, 0, max(0, stride - W), 0, max(0, stride - H)))
    patches = norm(p, f"{name}.norm", conv(p, f"{name}.sr", patches, stride=stride))
    k, v = linear(p, f"{name}.kv_g", patches).chunk(2, -1)
    v = v + conv(p, f"{name}.local_conv_g", v, padding=1, groups=eighth)
    sources = [(q[..., None, :eighth], k[..., None, :], v[..., None, :])]
    mixed = conv(p, f"{name}.kv_l.depth_conv", x[..., eighth:], padding=1, groups=C - eighth)
    mixed = conv(p, f"{name}.kv_l.point_conv", mixed)
    number = 1 if stride == 1 else 2
    fine = q[..., eighth:].view(B, H, W, heads, -1)
    for i, (part, query) in enumerate(zip(mixed.chunk(number, -1), fine.chunk(number, -1))):
        cells = linear(p, f"{name}.fcs.{i}", pooled_window(part, heads, window, stride if i else 1))
        k, v = linear(p, f"{name}.single_heads.{i}", cells).chunk(2, -1)
        options = {"padding": 1, "groups": part.shape[-1]}
        v = v + conv(p, f"{name}.local_convs.{i}", v.flatten(3), **options).view(v.shape)
        sources.append((query, k, v))
    for query, k, v in sources:
        found = torch.empty_like(query)
        for i in range(H):
            for j in range(W):
                keys, values = (list(x.flatten(1, 2).unbind(1)) for x in (k, v))
                found[:, i, j] = softly(query[:, i, j], keys, values)
        out.append(found.flatten(3))
    return linear(p, f"{name}.proj", torch.cat(out, -1))


DIM, HEADS, DEPTHS, STRIDES, MLP, WINDOW = 16, (1, 2), (1, 2), (2, 1), (2, 1), 3


def shapes():
    """Names and shapes of a state dict of the authors' code."""
    found = {}
    for i, depth in enumerate(DEPTHS):
        dim, number = DIM * 2**i, i + 1
        patches = (dim, 3, 7, 7) if i == 0 else (dim, dim // 2, 3, 3)
        found |= layer(f"patch_embed{number}.proj", *patches)
        found |= layer(f"patch_embed{number}.norm", dim) | layer(f"norm{number}", dim)
        eighth, wide, hidden = dim // 8, 7 * dim // 8, dim * MLP[i]
        for j in range(depth):
            block, attn = f"block{number}.{j}", f"block{number}.{j}.attn"
            found |= layer(f"{block}.norm1", dim) | layer(f"{block}.norm2", dim)
            found |= layer(f"{attn}.q", dim, dim) | layer(f"{attn}.proj", dim, dim)
            found |= layer(f"{attn}.sr", eighth, eighth, STRIDES[i], STRIDES[i])
            found |= layer(f"{attn}.norm", eighth) | layer(f"{attn}.kv_g", 2 * eighth, eighth)
            found |= layer(f"{attn}.local_conv_g", eighth, 1, 3, 3)
            found |= layer(f"{attn}.kv_l.depth_conv", wide, 1, 3, 3)
            found |= layer(f"{attn}.kv_l.point_conv", wide, wide, 1, 1)
            groups = 1 if STRIDES[i] == 1 else 2
            fine, head = wide // groups, wide // groups // HEADS[i]
            for k in range(groups):
                found |= layer(f"{attn}.fcs.{k}", head, head)
                found |= layer(f"{attn}.single_heads.{k}", 2 * head, head)
                found |= layer(f"{attn}.local_convs.{k}", fine, 1, 3, 3)
            found |= layer(f"{block}.mlp.fc1", hidden, dim)
            found |= layer(f"{block}.mlp.dwconv.dwconv", hidden, 1, 3, 3)
            found |= layer(f"{block}.mlp.fc2", dim, hidden)
    return found | layer("head", CLASSES, dim)


def slow_favit(state, images):
    p = {name: x.double() for name, x in state.items()}
    x = images.double().permute(0, 2, 3, 1)
    for i, depth in enumerate(DEPTHS):
        patches = {"stride": 2, "padding": 1} if i else {"stride": 4, "padding": 3}
        x = conv(p, f"patch_embed{i + 1}.proj", x, **patches)
        x = norm(p, f"patch_embed{i + 1}.norm", x)
        for j in range(depth):
            block = f"block{i + 1}.{j}"
            y = norm(p, f"{block}.norm1", x, 1e-6)
            x = x + slow_factorized(p, f"{block}.attn", y, HEADS[i], STRIDES[i], WINDOW)
            y = linear(p, f"{block}.mlp.fc1", norm(p, f"{block}.norm2", x, 1e-6))
            y = conv(p, f"{block}.mlp.dwconv.dwconv", y, padding=1, groups=y.shape[-1])
            x = x + linear(p, f"{block}.mlp.fc2", F.gelu(y))
        x = norm(p, f"norm{i + 1}", x, 1e-6)
    return linear(p, "head", x.mean((1, 2)))


# maps of 6 x 3 and 3 x 2 cells, so one window and more; 5 x 7, where a patch is left over; one cell
@pytest.mark.parametrize("size", [(24, 12), (19, 28), (4, 3)])
@torch.no_grad()
def test_weights_of_the_released_code(size, tmp_path):
    state, images = draw(shapes()), torch.randn(2, 3, *size)
    options = {"embed_dim": DIM, "depths": DEPTHS, "num_heads": HEADS, "strides": STRIDES}
    options |= {"mlp_ratios": MLP, "window": WINDOW}
    model = load("favit_b0", {"model": state}, tmp_path, **options)
    assert_same(model, images, slow_favit(state, images))
    again = load("favit_b0", model.state_dict(), tmp_path, **options)
    torch.testing.assert_close(again.state_dict(), model.state_dict(), atol=0, rtol=0)


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
