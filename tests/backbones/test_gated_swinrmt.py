"""The attention of Gated-SwinRMT against its definition, head by head and axis by axis."""

import pytest
import timm
import torch
import torch.nn.functional as F

import vidattn.backbones  # noqa: F401
from vidattn.backbones.gated_swinrmt import GatedWindowAttention


def slow_axis(attn, q, k, v, shift):
    """Attention of (rows, L, C) along L, all pairs at once."""
    extent, n = q.shape[1], attn.num_heads
    side = min(extent, attn.window)
    shift = shift if extent > side else 0
    # cells before the first shifted window have one of their own
    window = torch.tensor([(i - shift) // side for i in range(extent)])
    out = []
    for h, (a, b, c) in enumerate(zip(*(x.chunk(n, -1) for x in (q, k, v)))):
        gamma = 1 - 2 ** -(2 + attn.decay_range * h / n)
        scores = a @ b.mT * a.shape[-1] ** -0.5
        distance = (torch.arange(extent)[:, None] - torch.arange(extent)).double()
        near = window[:, None] == window
        if attn.is_swat:
            slope = 2.0 ** -(1 + h % (n // 2)) * (-1 if h < n // 2 else 1)
            weights = torch.sigmoid(scores + slope * distance) * gamma ** distance.abs() * near
        else:
            weights = scores.exp() * gamma ** distance.abs() * near
            weights = weights / weights.sum(-1, keepdim=True)
        out.append(weights @ c)
    return torch.cat(out, -1)


def slow_attention(attn, x, shift):
    """(H, W, C), like ``x``."""
    height, width = x.shape[:2]
    down, right = [-n % min(n, attn.window) for n in (height, width)]
    whole = F.pad(x, (0, 0, 0, right, 0, down))
    q, k, v = attn.qkv(whole).chunk(3, -1)
    if attn.is_swat:
        v = v * F.silu(attn.gate(whole))
    local = attn.lepe(v[:height, :width].permute(2, 0, 1)).permute(1, 2, 0)
    out = slow_axis(attn, q, k, v, shift)
    out = slow_axis(attn, *(y.transpose(0, 1) for y in (q, k, out)), shift).transpose(0, 1)
    out = out[:height, :width] + local
    if attn.is_swat:
        return attn.proj(attn.norm(out))
    return attn.proj(out * torch.sigmoid(attn.gate(x)))


@pytest.mark.parametrize("kind", ["retention", "swat"])
@pytest.mark.parametrize(("size", "shift"), [((7, 5), 1), ((7, 5), 0), ((2, 9), 2)])
def test_attention(kind, size, shift):
    attn = GatedWindowAttention(8, 4, window=3, shift=shift, decay_range=6, kind=kind).double()
    x = torch.randn(*size, 8, dtype=torch.float64, requires_grad=True)
    inputs = [x, *attn.parameters()]
    found, answer = attn(x[None])[0], slow_attention(attn, x, shift)
    torch.testing.assert_close(found, answer)
    torch.testing.assert_close(
        torch.autograd.grad(found.square().sum(), inputs),
        torch.autograd.grad(answer.square().sum(), inputs),
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (1, 1)}, "depths, num_heads and decay_ranges must have one entry for each"),
        ({"kind": "softmax"}, "kind must be one of"),
        ({"num_heads": (3, 4, 8, 16)}, "dim must be a multiple of num_heads, got 64 and 3"),
        ({"num_heads": (1, 4, 8, 16)}, "num_heads must be even for swat, got 1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("gated_swinrmt_swat_tiny", **options)
