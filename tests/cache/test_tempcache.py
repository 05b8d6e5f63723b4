"""Merged keys are what they stand for."""

import pytest
import torch
from torch.testing import assert_close

from tests.cache.policy_cases import TOKENS, B, D, H, site
from vidattn.cache import create_policy
from vidattn.streaming.attention import read
from vidattn.streaming.rotation import Rotation


def keys_of(frames: range, still: torch.Tensor, moving: torch.Tensor, rotation) -> torch.Tensor:
    """Keys of frames in which some tokens stay what they are, and others never do."""
    made = []
    for frame in frames:
        new = torch.randn(*still.shape, generator=torch.Generator().manual_seed(frame))
        made.append(rotation(torch.where(moving[:, None], new, still), frame))
    return torch.cat(made, 2)


def run(cache, num_chunks: int, moving: torch.Tensor):
    """Outputs of the clean passes, beside those of attention to everything."""
    layer = cache.site
    still = torch.randn(B, H, TOKENS, D)
    every_k, every_v, found, expected = [], [], [], []
    for chunk in range(num_chunks):
        frames = range(chunk * layer.chunk, (chunk + 1) * layer.chunk)
        k = keys_of(frames, still, moving, layer.rotation)
        q, v = torch.randn(2, *k.shape)
        every_k.append(k)
        every_v.append(v)
        parts = cache.append(q, k, v, frames)
        found.append(read(q, parts, H, None))
        cache.commit()
        keys, values = torch.cat(every_k, 2), torch.cat(every_v, 2)
        expected.append((q @ keys.mT / D**0.5).softmax(-1) @ values)
    return found, expected, parts[0]


STILL = torch.zeros(TOKENS, dtype=torch.bool)
SOME = torch.tensor([False, True, False, True, False])


@pytest.mark.parametrize("bits", [None, 24])
@pytest.mark.parametrize("moving", [STILL, SOME], ids=["still", "some"])
def test_equal_keys_that_became_one_are_read_as_all_of_them(moving, bits):
    # without a rotation, keys of successive frames are equal, not only nearly
    layer = site(rotation=Rotation(0))
    frames = 24
    options = {"similarity": 1.0, "sink": 1, "sink_at": "absolute", "bits": bits}
    cache = create_policy("tempcache", window=frames, **options).build(layer)
    found, expected, part = run(cache, 9, moving)
    assert_close(found, expected, rtol=1e-5, atol=1e-5)
    weight = part.weight[0, 0]
    assert weight.sum() == 18 * TOKENS
    # the sink, the last two chunks, and of the rest one key for each that stays
    assert (weight > 0).sum() == (5 + 13 * moving.sum() / TOKENS) * TOKENS + (~moving).sum()


def test_small_room_holds_a_long_still_video_exactly():
    layer = site(rotation=Rotation(0))
    cache = create_policy("tempcache", window=8, sink=1, similarity=1.0).build(layer)
    found, expected, part = run(cache, 15, STILL)
    assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert part.k.shape[2] <= 8 * TOKENS < part.weight[0, 0].sum() == 30 * TOKENS


@pytest.mark.parametrize("aligned", [True, False])
def test_keys_are_compared_in_one_frame(aligned):
    layer = site(rotation=Rotation(D))
    options = {"similarity": 0.999, "sink": 1, "aligned": aligned}
    cache = create_policy("tempcache", window=30, **options).build(layer)
    _, _, part = run(cache, 9, STILL)
    merged = int((part.weight[0, 0] > 1).sum())
    assert merged == (TOKENS if aligned else 0)
    if aligned:
        # of the newest frame that was merged, and as its keys are
        seen = part.frames[0, 0][part.weight[0, 0] > 1]
        assert (seen == 13).all()


def test_what_was_not_seen_for_longest_leaves():
    layer = site(rotation=Rotation(0))
    cache = create_policy("tempcache", window=8, sink=1, similarity=1.0).build(layer)
    _, _, part = run(cache, 12, SOME)
    weight, seen = part.weight[0, 0], part.frames[0, 0]
    merged = weight > 1
    # three still tokens stand for all frames between the sink and the last two chunks
    assert sorted(weight[merged].tolist()) == [24 - 1 - 4.0] * 3 and (seen[merged] == 19).all()
    single = seen[(weight == 1) & (seen > 0) & (seen < 20)]
    # room for 4 frames: the sink, three still tokens, and the newest of the moving ones
    assert sorted(set(single.tolist())) == list(range(20 - len(single) // 2, 20))
    assert len(single) == 4 * TOKENS - TOKENS - 3


def test_heads_merge_on_their_own():
    layer = site(rotation=Rotation(0), batch=1, heads=2)
    cache = create_policy("tempcache", window=30, sink=0, similarity=1.0).build(layer)
    still = torch.randn(1, 1, TOKENS, D)
    for chunk in range(6):
        k = torch.cat([still.repeat(1, 1, 2, 1), torch.randn(1, 1, 2 * TOKENS, D)], 1)
        frames = range(2 * chunk, 2 * chunk + 2)
        (part,) = cache.append(k, k, k, frames)
        cache.commit()
    assert (part.weight.sum(-1) == 12 * TOKENS).all()
    assert (part.weight[0] > 1).sum(-1).tolist() == [TOKENS, 0]


def test_tokens_that_share_a_key_stay_together():
    # all tokens of a frame are equal, so all of the next ones join one of them
    layer = site(rotation=Rotation(0))
    cache = create_policy("tempcache", window=30, sink=0, similarity=1.0).build(layer)
    key = torch.randn(B, H, 1, D).expand(-1, -1, 2 * TOKENS, -1)
    every = []
    for chunk in range(7):
        v = torch.randn(B, H, 2 * TOKENS, D)
        every.append(v)
        (part,) = cache.append(key, key, v, range(2 * chunk, 2 * chunk + 2))
        out = read(key, (part,), H, None)
        cache.commit()
        mean = torch.cat(every, 2).mean(2, keepdim=True)
        assert_close(out, mean.expand_as(out), rtol=1e-5, atol=1e-5)


def test_frames_with_others_missing_between_them_do_not_merge():
    # as when a prompt changes, and the past is computed anew as far as it is kept
    layer = site(rotation=Rotation(0))
    cache = create_policy("tempcache", window=30, sink=2, similarity=1.0).build(layer)
    key = torch.randn(B, H, TOKENS, D).repeat(1, 1, 2, 1)
    for first in (0, 10, 12, 20):
        (part,) = cache.append(key, key, key, range(first, first + 2))
        cache.commit()
    weight, frames = part.weight[0, 0], part.frames[0, 0]
    held = {frame: weight[frames == frame].sum().item() for frame in frames.unique().tolist()}
    # of 10 and 11 one key for each token, seen last in 11; the others are the sink and two chunks
    assert held[0] == held[1] == TOKENS and held[11] == 2 * TOKENS and 10 not in held
    assert all(held[frame] == TOKENS for frame in (12, 13, 20, 21))


def test_a_hash_finds_nearly_all_that_comparing_finds():
    tokens, similarity = 240, 0.9
    layer = site(rotation=Rotation(0), frame_tokens=tokens, head_dim=64, batch=1)
    torch.manual_seed(0)
    # keys of a head have much in common, and move a little from frame to frame
    common, own = 2 * torch.randn(1, H, 1, 64), torch.randn(1, H, tokens, 64)
    frames = [common + own + 0.5 * torch.randn(1, H, tokens, 64) for _ in range(4)]
    merged = {}
    for bits in (None, 8, 64):
        options = {"similarity": similarity, "sink": 0, "bits": bits}
        cache = create_policy("tempcache", window=20, **options).build(layer)
        for first in (0, 2):
            k = torch.cat(frames[first : first + 2], 2)
            cache.append(k, k, k, range(first, first + 2))
            cache.commit()
        k = k[:, :, :0]
        (part,) = cache.append(k, k, k, range(4, 4))
        # of the first two frames, which are merged now, those that joined another
        merged[bits] = 4 * tokens - (part.weight > 0).sum(-1)[0]
        assert (part.weight.sum(-1) == 4 * tokens).all()
    assert (merged[None] > 0.9 * tokens).all()
    share = {bits: merged[bits].sum() / merged[None].sum() for bits in (8, 64)}
    assert share[8] < share[64] <= 1 and share[64] > 0.9
