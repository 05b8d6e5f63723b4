"""Window attention as Swin defines it, on names in a state dict: everything masked, in one go."""

import itertools

import torch

from tests.backbones.slow_models import linear


def slow_window_attention(p, name, x, *, heads, window, shift, shrinks=True):
    """(B, ..., C), like ``x``: pad, shift around the edges, mask what was no neighbor before."""
    size = x.shape[1:-1]
    sides = [min(*pair) for pair in zip(window, size)] if shrinks else window
    shifts = [0 if n <= w else s for n, w, s in zip(size, window, shift)]
    padded = [-(-n // w) * w for n, w in zip(size, sides)]
    cells = list(itertools.product(*map(range, padded)))

    def window_of(cell):
        """Window of a cell once shifted, and whether the shift took it around the edge."""
        places = [(c - s) % n for c, s, n in zip(cell, shifts, padded)]
        return [(p // w, c < s) for p, w, c, s in zip(places, sides, cell, shifts)]

    windows = [window_of(cell) for cell in cells]
    apart = torch.tensor([[a != b for b in windows] for a in windows])
    whole = torch.zeros(len(x), *padded, x.shape[-1], dtype=x.dtype)
    whole[(slice(None), *map(slice, size))] = x
    qkv = linear(p, f"{name}.qkv", whole).reshape(len(x), len(cells), 3, heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if f"{name}.rpb" in p:
        place = torch.tensor(cells)
        index = 0
        for i, w in enumerate(window):
            distance = place[:, None, i] - place[:, i] + w - 1
            # what lies farther is masked
            index = index * (2 * w - 1) + distance.clamp(0, 2 * w - 2)
        scores = scores + p[f"{name}.rpb"][index].permute(2, 0, 1)
    out = scores.masked_fill(apart, float("-inf")).softmax(-1) @ v
    out = out.transpose(1, 2).reshape(len(x), *padded, -1)
    return linear(p, f"{name}.proj", out[(slice(None), *map(slice, size))])
