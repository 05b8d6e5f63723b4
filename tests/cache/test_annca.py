"""A chunk reads the words that have its attention."""

import pytest
import torch
from torch.testing import assert_close

from vidattn.cache import create_policy
from vidattn.streaming.attention import read
from vidattn.streaming.cache import Part

B, H, S, L, D = 1, 2, 35, 23, 12


def words(weighted: bool) -> Part:
    k, v = torch.randn(2, B, H, L, D)
    weight = torch.ones(1, 1, L)
    weight[..., -1] = 40 if weighted else 1
    return Part(k, v, weight=weight if weighted else None)


@pytest.mark.parametrize("weighted", [True, False])
def test_all_words_are_all_attention(weighted):
    part, q = words(weighted), torch.randn(B, H, S, D)
    found = create_policy("annca", keep=1.0).choose(q, part, D**-0.5)
    assert_close(read(q, (found,), H, None), read(q, (part,), H, None), rtol=0, atol=0)


@pytest.mark.parametrize("weighted", [True, False])
def test_what_is_read_are_the_words_with_most_attention(weighted):
    part, q = words(weighted), 3 * torch.randn(B, H, S, D)
    found = create_policy("annca", keep=0.5, queries=S).choose(q, part, D**-0.5)
    assert found.k.shape == found.v.shape == (B, H, 12, D)
    scores = q @ part.k.mT * D**-0.5
    if weighted:
        scores = scores + part.weight.log()[:, :, None]
    mass = scores.softmax(-1).mean(2)
    for head in range(H):
        best = mass[0, head].topk(12).indices
        expected = (scores[0, head][:, best].softmax(-1)) @ part.v[0, head][best]
        assert_close(read(q, (found,), H, None)[0, head], expected, rtol=1e-5, atol=1e-6)
        if weighted:
            assert (found.weight[0, head] == 40).sum() == (best == L - 1).sum() == 1


def test_half_of_a_long_prompt_has_nearly_all_of_a_sharp_attention():
    # each query looks at a few words, which change little over a chunk
    k = torch.randn(B, H, 512, 64)
    q = 4 * k[:, :, torch.randint(100, (2000,))] + torch.randn(B, H, 2000, 64)
    part = Part(k, torch.eye(512)[:64].T.expand(B, H, -1, -1).contiguous())
    found = create_policy("annca").choose(q, part, 64**-0.5)
    mass = (q @ part.k.mT / 8).softmax(-1)
    kept = (found.k[:, :, :, None] == part.k[:, :, None]).all(-1).any(2)
    assert float((mass * kept[:, :, None]).sum(-1).mean()) > 0.98


def test_policies_are_combined_by_their_kind():
    from vidattn.pipelines.streaming.policies import find_policies

    found = find_policies("annca:keep=0.25", "rolling:window=21")
    assert found.label == "rolling:window=21+annca:keep=0.25"
    assert find_policies(["annca", create_policy("full")], "rolling").label == "full+annca"
    with pytest.raises(ValueError, match="full and rolling exclude each other: both decide what"):
        find_policies("full+rolling", "rolling")
    with pytest.raises(ValueError, match="keep must be above 0"):
        create_policy("annca", keep=0.0)
    with pytest.raises(ValueError, match="by its name or itself, got 3"):
        find_policies(3, "rolling")
