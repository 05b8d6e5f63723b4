"""Every policy of a cache keeps what it promises, on layers of an awkward size."""

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from tests.cache.policy_cases import CHUNK, TOKENS, Film, site
from vidattn.cache import create_policy, label, parse_policy, policy_class
from vidattn.catalog import list_policies
from vidattn.streaming.attention import read
from vidattn.streaming.codec import CODECS
from vidattn.streaming.policy import CachePolicy, WindowPolicy

CACHES = [name for name in list_policies() if issubclass(policy_class(name), CachePolicy)]
WINDOWS = [name for name in CACHES if issubclass(policy_class(name), WindowPolicy)]
# frames, of chunks of two: 3 chunks beside a sink of 3 and a frame more, whatever the policy needs
WINDOW = 10


def film(name: str, **options: object) -> Film:
    window = {"window": WINDOW} if name in WINDOWS else {}
    return Film(create_policy(name, **{**window, **options}).build(site()))


@pytest.mark.parametrize("name", CACHES)
def test_a_short_video_is_read_whole(name):
    video = film(name)
    for i in range(WINDOW // CHUNK - 1):
        out = video.step(noisy=2)
        assert_close(out, video.seen(list(range(CHUNK * (i + 1)))), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("quantise", CODECS)
def test_a_noisy_pass_leaves_no_trace(name, quantise):
    one, other = film(name, quantise=quantise), film(name, quantise=quantise)
    for _ in range(8):
        assert_close(one.step(noisy=0), other.step(noisy=3), rtol=0, atol=0)


@pytest.mark.parametrize("name", CACHES)
def test_a_reset_cache_is_a_new_one(name):
    used, new = film(name), film(name)
    for _ in range(7):
        used.step()
    used.cache.reset()
    used = Film(used.cache)
    for _ in range(8):
        assert_close(used.step(), new.step(), rtol=0, atol=0)


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize(
    ("limit", "quantise"),
    [
        ("window", "none"),
        ("window", "int4"),
        ("cap", "none"),
        ("cap_mib", "none"),
        ("cap_mib", "int8"),
    ],
)
def test_a_window_never_grows_past_its_limit(name, quantise, limit):
    cap = WINDOW * TOKENS
    options = {"quantise": quantise, "window": WINDOW if limit == "window" else 99}
    if limit == "cap":
        # no whole number of frames
        cap = options["cap"] = cap + 3
    if limit == "cap_mib":
        policy = create_policy(name, **options)
        size = (cap + 0.5) * policy.token_bytes(site()) + policy.fixed_bytes(site())
        options["cap_mib"] = size / 2**20
    video = film(name, **options)
    sizes = []
    for _ in range(12 + WINDOW // CHUNK):
        video.step()
        assert video.parts[0].k.shape[2] <= cap
        if limit == "cap_mib":
            assert 0 < video.cache.num_bytes <= size
        sizes.append((video.cache.num_tokens, video.cache.num_bytes))
    assert len(set(sizes[-10:])) == 1
    assert sizes[-1][0] > cap - (CHUNK + 1) * TOKENS - 3


@pytest.mark.parametrize("name", WINDOWS)
def test_the_sink_and_the_last_chunk_are_always_read_once(name):
    video = film(name, sink=3)
    for _ in range(12):
        video.step()
        for part in video.parts:
            weight = torch.ones(()) if part.weight is None else part.weight
            for frame in [0, 1, 2, *video.frames[-2 * CHUNK :]]:
                if frame < len(video.frames):
                    held = (weight * (part.frames == frame)).sum(-1)
                    assert_close(held, torch.full_like(held, TOKENS))


@pytest.mark.parametrize("name", CACHES)
def test_fewer_bits_take_less_memory_and_change_little(name):
    outs, sizes = {}, {}
    for quantise in CODECS:
        video = film(name, quantise=quantise)
        for _ in range(7):
            outs[quantise] = video.step()
        sizes[quantise] = video.cache.num_bytes
    assert sizes["none"] > sizes["int8"] > sizes["int4"]
    errors = {x: (outs[x] - outs["none"]).square().mean().sqrt() for x in ("int8", "int4")}
    scale = outs["none"].square().mean().sqrt()
    assert 0 < errors["int8"] < 0.01 * scale and errors["int8"] < errors["int4"] < 0.1 * scale


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cap": 3}, "the cache may hold 3 tokens .* and needs"),
        ({"cap_mib": 0.001}, "or cap_mib="),
        ({"window": 4}, "give window="),
        ({"window": 1}, "window must be at least 2"),
        ({"sink": -1}, "sink must be at least"),
        ({"sink_at": "behind"}, "sink_at must be"),
        ({"quantise": "int3"}, "quantise must be none or int8 or int4"),
        ({"windw": 4}, "did you mean 'window'"),
    ],
)
def test_what_cannot_be_is_refused(name, options, words):
    with pytest.raises(ValueError, match=words):
        create_policy(name, **options).build(site())


def test_full_ends_rather_than_passing_its_limit():
    video = film("full", cap=4 * TOKENS)
    for _ in range(2):
        video.step()
    with pytest.raises(ValueError, match="limit of 20 tokens .* rolling or tempcache"):
        video.step()


def visible(video: Film, sink: int, window: int) -> list[int]:
    """Frames that the last chunk of a rolling cache reads."""
    now = len(video.frames)
    return [f for f in range(now) if f < sink or f >= now - (window - sink)]


@pytest.mark.parametrize("sink_at", ["absolute", "relative", 4, 7])
def test_rolling_reads_its_frames_where_they_stand(sink_at):
    video = film("rolling", sink=3, sink_at=sink_at)
    for _ in range(9):
        out, frames = video.step(), visible(video, 3, WINDOW)
        oldest = min([f for f in frames if f >= 3], default=3)
        now = len(video.frames) - CHUNK
        offset = {"absolute": 0, "relative": max(0, oldest - 3)}.get(sink_at)
        if offset is None:
            offset = min(max(0, oldest - 3), max(0, now - sink_at))
        expected = video.seen(frames, lambda f, offset=offset: f + offset if f < 3 else f)
        assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_an_ema_sink_is_the_average_of_what_left():
    video = film("ema_sink", sink=2, alpha=0.75, sink_at="absolute")
    turn = site().rotation
    for _ in range(9):
        out = video.step()
        k, v = (torch.cat(x, 2).split(TOKENS, 2) for x in (video.k, video.v))
        gone = [f for f in range(2, len(v)) if f < len(v) - (WINDOW - 2)]
        keys, values = list(k[:2]), list(v[:2])
        for f in gone:
            i = f % 2
            keys[i] = 0.75 * keys[i] + 0.25 * turn(k[f], i - f)
            values[i] = 0.75 * values[i] + 0.25 * v[f]
        rest = slice(2 + len(gone), None)
        keys, values = torch.cat([*keys, *k[rest]], 2), torch.cat([*values, *v[rest]], 2)
        scores = video.q @ keys.mT / site().head_dim ** 0.5
        assert_close(out, scores.softmax(-1) @ values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CACHES)
def test_grouped_queries_read_the_heads_of_their_group(name):
    options = {"window": WINDOW} if name in WINDOWS else {}
    video = Film(create_policy(name, **options).build(site()), group=2)
    for _ in range(3):
        out = video.step()
    assert_close(out, video.seen(list(range(len(video.frames)))), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", list_policies())
def test_a_policy_is_what_its_label_says(name):
    policy = create_policy(name)
    assert label(policy) == name and parse_policy(name) == policy
    option = next(x for x in policy.options() if x in ("cap", "density", "keep"))
    changed = dataclasses.replace(policy, **{option: 900 if option == "cap" else 0.5})
    assert parse_policy(label(changed)) == changed


def test_an_unknown_policy_is_told_the_nearest():
    with pytest.raises(ValueError, match="unknown policy 'rollin': did you mean 'rolling'"):
        parse_policy("rollin")


def test_outputs_of_a_weighted_key_are_those_of_equal_ones():
    video = film("full")
    video.step()
    (part,) = video.parts
    counts = torch.tensor([1, 3, 0, 2, 5, 1, 0, 4, 2, 1])
    weighted = dataclasses.replace(part, weight=counts.float().expand(2, 3, -1))
    copies = counts.repeat_interleave(counts, output_size=int(counts.sum())) * 0
    index = torch.arange(10).repeat_interleave(counts) + copies
    repeated = dataclasses.replace(part, k=part.k[:, :, index], v=part.v[:, :, index])
    found, expected = (read(video.q, (x,), 3, None) for x in (weighted, repeated))
    assert_close(found, expected, rtol=1e-5, atol=1e-6)
