"""Windows of maps with one to four axes, against masked attention of the whole map."""

import itertools

import pytest
import torch

from tests.backbones.slow_windows import slow_window_attention
from vidattn.backbones.layers.window_attention import PatchMerging, WindowAttention


@pytest.mark.parametrize(
    ("size", "window", "shift"),
    [
        ((7,), (3,), (1,)),
        ((5, 3), (2, 4), (1, 2)),
        # windows longer than an axis, as long, ragged; an axis of one cell
        ((5, 3, 4), (2, 3, 3), (1, 1, 1)),
        ((1, 6, 3), (2, 3, 2), (1, 1, 0)),
        ((3, 2, 3, 4), (2, 2, 2, 2), (1, 1, 1, 1)),
        ((2, 3, 2, 3), (2, 2, 2, 2), (0, 0, 0, 0)),
    ],
)
@pytest.mark.parametrize("has_bias", [True, False])
def test_every_cell_reads_its_window(size, window, shift, has_bias):
    attn = WindowAttention(4, 2, window, shift, has_bias=has_bias, dtype=torch.float64)
    if has_bias:
        torch.nn.init.normal_(attn.rpb)
    x = torch.randn(2, *size, 4, dtype=torch.float64, requires_grad=True)
    inputs = [x, *attn.parameters()]
    state = {f"attn.{name}": tensor for name, tensor in attn.named_parameters()}
    answer = slow_window_attention(state, "attn", x, heads=2, window=window, shift=shift)
    found = attn(x)
    torch.testing.assert_close(found, answer)
    d_out = torch.randn_like(found)
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs, d_out), torch.autograd.grad(answer, inputs, d_out)
    )


@pytest.mark.parametrize("shift", [(0, 0), (1, 2)])
@torch.no_grad()
def test_a_map_is_padded_to_a_window_if_windows_do_not_shrink(shift):
    attn = WindowAttention(4, 2, (3, 5), shift, shrinks=False, dtype=torch.float64)
    torch.nn.init.normal_(attn.rpb)
    state = {f"attn.{name}": tensor for name, tensor in attn.named_parameters()}
    for size in ((2, 7), (4, 3), (1, 1)):
        x = torch.randn(2, *size, 4, dtype=torch.float64)
        options = {
            "heads": 2,
            "window": (3, 5),
            "shift": [0 if n <= w else s for n, w, s in zip(size, (3, 5), shift)],
        }
        answer = slow_window_attention(state, "attn", x, shrinks=False, **options)
        torch.testing.assert_close(attn(x), answer)


def test_merging_joins_neighbors():
    merging = PatchMerging(1, 3, (3, 1), dtype=torch.float64)
    x = torch.randn(2, 5, 2, 4, 1, dtype=torch.float64)
    whole = torch.cat([x, torch.zeros(2, 1, 2, 4, 1, dtype=torch.float64)], 1)
    joined = torch.empty(2, 3, 2, 2, 4, dtype=torch.float64)
    for i, (a, b) in enumerate(itertools.product(range(2), range(2))):
        joined[..., i] = whole[:, a::2, :, b::2, 0]
    torch.testing.assert_close(merging(x), merging.reduction(merging.norm(joined)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "dim must be a multiple of num_heads, got 8 and 3"),
        ({"shift": (1, 2)}, "shift must be from 0 to below window on each axis"),
        ({"shift": (1,)}, "shift must be from 0 to below window on each axis"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        WindowAttention(**{"dim": 8, "num_heads": 2, "window": (2, 2), "shift": (0, 0)} | options)
