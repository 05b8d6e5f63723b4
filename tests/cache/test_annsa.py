"""Queries read the blocks of the past that have their attention, and their own chunk."""

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from vidattn.cache import create_policy
from vidattn.streaming.attention import read
from vidattn.streaming.cache import Part

B, H, D = 2, 3, 16
# awkward lengths: neither a whole number of blocks
CHUNK, PAST = 75, 340


def scene(sharp: float = 2.0, group: int = 1) -> tuple[torch.Tensor, Part]:
    """Queries and keys that stand for one of ten things; places near each other are alike."""
    things = torch.randn(10, D)
    of_key = torch.arange(PAST + CHUNK) // 35 % 10
    of_query = torch.arange(CHUNK) // 16 % 10
    k = things[of_key] + 0.3 * torch.randn(B, H, PAST + CHUNK, D)
    q = sharp * things[of_query] + 0.3 * torch.randn(B, H * group, CHUNK, D)
    return q, Part(k, torch.randn_like(k))


def shares(q: torch.Tensor, part: Part) -> torch.Tensor:
    scores = q.double() @ part.k.double().repeat_interleave(q.shape[1] // H, 1).mT * D**-0.5
    if part.weight is not None:
        scores = scores + part.weight.log()[:, :, None]
    return scores.softmax(-1)


@pytest.mark.parametrize("group", [1, 2])
def test_a_full_density_reads_everything(group):
    q, part = scene(group=group)
    policy = create_policy("annsa", density=1.0, block=16)
    found, expected = (read(q, (part,), H, policy=x) for x in (policy, None))
    assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
def test_what_is_read_is_that_of_the_plan(weighted):
    q, part = scene()
    if weighted:
        weight = torch.randint(0, 4, (B, H, PAST + CHUNK)).float()
        part = dataclasses.replace(part, weight=weight.index_fill(2, torch.tensor(PAST), 1))
    policy = create_policy("annsa", density=0.4, block=16)
    mask = policy.plan(q, part, D**-0.5).mask()
    mask = mask.expand(B, H, -1, -1)
    assert mask.shape == (B, H, CHUNK, PAST + CHUNK)
    # the chunk itself, in the blocks that it has a part in
    assert mask[..., PAST // 16 * 16 :].all()
    assert 0.25 < mask.double().mean() < 0.5
    weights = shares(q, part) * mask
    expected = (weights / weights.sum(-1, keepdim=True)) @ part.v.double()
    found = read(q, (part,), H, policy=policy)
    assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    assert (found - read(q, (part,), H)).abs().max() > 1e-3


def test_less_than_half_of_the_pairs_has_nearly_all_of_a_sharp_attention():
    q, part = scene(sharp=4.0)
    # the chunk itself is a fifth of them
    policy = create_policy("annsa", density=0.45, block=16)
    mask = policy.plan(q, part, D**-0.5).mask()
    assert float((shares(q, part) * mask).sum(-1).mean()) > 0.9
    chance = torch.rand(mask.shape[0], mask.shape[1], 1, mask.shape[3]) < mask.double().mean()
    assert float((shares(q, part) * chance).sum(-1).mean()) < 0.5


def test_the_chunk_is_read_whatever_the_density():
    q, part = scene()
    mask = create_policy("annsa", density=0.01, block=16).plan(q, part, 1.0).mask()
    own = mask[..., PAST // 16 * 16 :]
    assert own.all() and own.sum() == mask.sum()


def test_a_key_that_stands_for_many_is_found():
    q, part = torch.zeros(1, 1, 16, D), Part(*torch.randn(2, 1, 1, 176, D))
    weight = torch.ones(1, 1, 176)
    weight[..., 100] = 1000
    part = dataclasses.replace(part, weight=weight)
    mask = create_policy("annsa", density=0.2, block=16).plan(q, part, 1.0).mask()
    assert mask[..., 96:112].all() and mask.double().mean() < 0.3


@pytest.mark.parametrize(
    ("options", "words"),
    [({"density": 0.0}, "density must be above 0"), ({"block": 48}, "block must be 16")],
)
def test_what_cannot_be_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        create_policy("annsa", **options)
