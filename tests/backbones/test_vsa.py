"""Varied-size windows against cells read one by one."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F

import vidattn.backbones  # noqa: F401
from vidattn.backbones.layers.window_attention import WindowAttention
from vidattn.backbones.vsa import VariedWindowAttention


def read(cells, row, column):
    """What lies between the cells of (H, W, C), by their distance; zero outside."""
    top, left = (math.floor(x.detach()) for x in (row, column))
    found = 0
    for i in (top, top + 1):
        for j in (left, left + 1):
            if 0 <= i < cells.shape[0] and 0 <= j < cells.shape[1]:
                found = found + cells[i, j] * (1 - abs(row - i)) * (1 - abs(column - j))
    return found + torch.zeros_like(cells[0, 0])


def slow_varied_windows(attn, x):
    """(H, W, C), like ``x``, by the equations of the paper."""
    height, width, channels = x.shape
    w, n, dim = attn.window, attn.num_heads, channels // attn.num_heads
    rows, columns = -(-height // w), -(-width // w)
    pad = (0, 0, 0, columns * w - width, 0, rows * w - height)
    whole = F.pad(x, pad)
    q, k, v = F.pad(attn.qkv(x), pad).chunk(3, -1)
    out = torch.zeros_like(whole)
    for a in range(rows):
        for b in range(columns):
            window = (slice(a * w, a * w + w), slice(b * w, b * w + w))
            mean = F.leaky_relu(whole[window].mean((0, 1)))[:, None, None]
            scale = attn.scales(mean).view(n, 2)
            offset = attn.offsets(mean).view(n, 2)
            for h in range(n):
                head = slice(h * dim, h * dim + dim)
                keys, values = [], []
                for i in range(w):
                    for j in range(w):
                        # an offset of 2 is the extent of the map over its whole windows
                        down = offset[h, 1] / (height // w) * (rows * w - 1) / 2
                        right = offset[h, 0] / (width // w) * (columns * w - 1) / 2
                        middle = (w - 1) / 2
                        row = a * w + middle + (i - middle) * (1 + scale[h, 1]) + down
                        column = b * w + middle + (j - middle) * (1 + scale[h, 0]) + right
                        keys.append(read(k[..., head], row, column))
                        values.append(read(v[..., head], row, column))
                scores = q[window][..., head] @ torch.stack(keys).T * dim**-0.5
                out[(*window, head)] = scores.softmax(-1) @ torch.stack(values)
    return attn.proj(out[:height, :width])


def test_windows_of_keys_are_scaled_and_moved():
    attn = VariedWindowAttention(4, 2, window=3).double()
    for x in (attn.scales.weight, attn.offsets.weight):
        torch.nn.init.normal_(x)
    x = torch.randn(5, 7, 4, dtype=torch.float64, requires_grad=True)
    inputs = [x, *attn.parameters()]
    found, answer = attn(x[None])[0], slow_varied_windows(attn, x)
    torch.testing.assert_close(found, answer)
    torch.testing.assert_close(
        torch.autograd.grad(found.square().sum(), inputs),
        torch.autograd.grad(answer.square().sum(), inputs),
    )


@torch.no_grad()
def test_windows_are_those_of_swin_at_the_outset():
    attn = VariedWindowAttention(8, 2, window=3)
    swin = WindowAttention(8, 2, (3, 3), (0, 0), has_bias=False)
    swin.load_state_dict(attn.state_dict(), strict=False)
    x = torch.randn(2, 6, 9, 8)
    torch.testing.assert_close(attn(x), swin(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (1, 1)}, "depths and num_heads must have one entry for each stage"),
        ({"window": 4}, "window must be odd, as that of its convolutions, got 4"),
        ({"num_heads": (5, 6, 12, 24)}, "dim must be a multiple of num_heads, got 96 and 5"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("vsa_swin_tiny", **options)
