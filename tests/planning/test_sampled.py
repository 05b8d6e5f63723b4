"""Dense attention of a few queries against float64, in the dtypes that models run in."""

import pytest
import torch

from vidattn.grid import Grid
from vidattn.methods import plan
from vidattn.planning.sampled import sampled_attention
from vidattn.quality.fidelity import recall

GRID = Grid(3, 5, 7, text=4)


def given(dtype):
    """q of four heads, k of two, the queries to look at, and a mask of padded text."""
    q, k = (torch.randn(2, heads, GRID.num_tokens, 16).to(dtype) for heads in (4, 2))
    key_mask = torch.ones(2, GRID.num_tokens, dtype=torch.bool)
    key_mask[1, -2:] = False
    return q, k, torch.tensor([0, 7, 104, 108]), key_mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_products_are_not_rounded_to_the_inputs(dtype):
    q, k, queries, key_mask = given(dtype)
    found = sampled_attention(q, k, queries, scale=0.3, key_mask=key_mask)
    scores = 0.3 * q[:, :, queries].double() @ k.double().repeat_interleave(2, 1).mT
    scores = scores.masked_fill(~key_mask[:, None, None], -torch.inf)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found.double(), scores.softmax(-1), rtol=1e-5, atol=1e-7)


def test_recall_of_half_precision_is_that_of_its_numbers():
    q, k, queries, key_mask = given(torch.bfloat16)
    made = plan("radial", GRID, near=0, sink=False, tile=(1, 2, 4))
    kept = [recall(*x, made, queries, key_mask=key_mask) for x in ((q, k), (q.float(), k.float()))]
    torch.testing.assert_close(kept[0], kept[1], rtol=1e-6, atol=1e-7)
    assert kept[0].max() < 0.99
