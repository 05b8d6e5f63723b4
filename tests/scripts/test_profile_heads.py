"""A profile of heads is made once, and read for every video after."""

import sys

import profile_heads
import pytest
import torch

import vidattn
from tests.pipelines.stream_cases import causal_pipe
from tests.pipelines.test_stream import PROMPT, latents_of
from vidattn.cache.head_classes import load_profile

WINDOW = "window=10,sink=1"


@pytest.fixture
def profile(tmp_path, monkeypatch):
    """A pipeline, and the file that the program made of it."""
    pipe, path = causal_pipe(), tmp_path / "heads.yaml"
    monkeypatch.setattr(profile_heads, "find_causal_model", lambda _: "")
    load = classmethod(lambda cls, _: pipe)
    monkeypatch.setattr(profile_heads.DiffusionPipeline, "from_pretrained", load)
    words = ["--out", str(path), "--chunks", "5", "--window", "10", "--sink", "1"]
    monkeypatch.setattr(sys, "argv", ["profile_heads.py", *words, "--prompts", PROMPT])
    profile_heads.main()
    return pipe, path


def test_heads_are_told_apart_from_the_first_chunk(profile):
    pipe, path = profile
    found = load_profile(path)
    assert (found.near, found.sink) == (1, 1) and [len(row) for row in found.shares] == [3, 3]
    shares = sorted(share for row in found.shares for share in row)
    between = (shares[2] + shares[3]) / 2
    policy = f"head_classes:{WINDOW},share={between:.6f},file={path}"
    video = vidattn.stream(pipe, policy, prompt=PROMPT, seed=5)
    latents_of(video, 5)
    far = [[i for i, x in enumerate(row) if x < between] for row in found.shares]
    for cache, heads in zip(video.caches, far):
        classes = [set(x) for x in cache.classes]
        assert set(heads) in classes or not heads
        for own, (_, held) in zip(classes, cache._classes):
            # eight frames of the past beside the chunk, or the sink and the last
            assert len(held.held) == (8 if own == set(heads) else 2)
    # as the first chunks of a video show it
    latents_of(fresh := vidattn.stream(pipe, f"head_classes:{WINDOW},profile=9", prompt=PROMPT), 5)
    assert (
        torch.tensor(fresh.caches[0].shares).sub(torch.tensor(found.shares[0])).abs().max() < 1e-3
    )


def test_a_profile_of_something_else_is_refused(profile, tmp_path):
    pipe, path = profile
    with pytest.raises(ValueError, match="made with near=1,sink=1, and this policy has near=2"):
        vidattn.stream(pipe, f"head_classes:{WINDOW},near=2,file={path}", prompt=PROMPT)
    other = causal_pipe()
    with torch.no_grad():
        other.transformer.blocks[1].attn1.norm_k.weight[0] += 0.5
    with pytest.raises(ValueError, match="profile of the heads of another model"):
        vidattn.stream(other, f"head_classes:{WINDOW},file={path}", prompt=PROMPT)
    # the same weights in fewer bits
    other = causal_pipe()
    other.transformer.to(torch.bfloat16)
    vidattn.stream(other, f"head_classes:{WINDOW},file={path}", prompt=PROMPT)
    short = tmp_path / "short.yaml"
    short.write_text("".join(path.read_text().partition("shares:")[:2]) + " [[0.5, 0.5, 0.5]]\n")
    with pytest.raises(ValueError, match="has 1 layers, and layer 1 of 3 heads"):
        vidattn.stream(pipe, f"head_classes:{WINDOW},file={short}", prompt=PROMPT)
    short.write_text("near: 1\n")
    with pytest.raises(ValueError, match="profile of heads .* lacks 'model'"):
        vidattn.stream(pipe, f"head_classes:{WINDOW},file={short}", prompt=PROMPT)
