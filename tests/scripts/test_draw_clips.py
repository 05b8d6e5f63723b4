"""The picture that moves: every prompt densely and sparsely, from left to right."""

import sys
from types import SimpleNamespace

import draw_clips
import numpy as np
import pytest
import torch
from PIL import Image

# the grey of a clip, by its prompt and method
GREYS = {("a boot", "dense"): 0.2, ("a boot", "topk"): 0.4, ("a bag", "dense"): 0.6}
GREYS[("a bag", "topk")] = 0.8


def test_dense_clips_stand_beside_sparse_ones_of_the_same_prompt(tmp_path, monkeypatch):
    def make_clip(pipe, request, choice, guards):
        assert (request.seed, guards.dense_steps) == (7, 0.5)
        frames = torch.full((5, 3, 16, 64), GREYS[request.prompt, choice.name])
        return SimpleNamespace(frames=frames)

    path = tmp_path / "clips.webp"
    words = ["a boot", "a bag", "--method", "topk:density=0.25", "--output", str(path)]
    words += ["--seed", "7", "--dense-steps", "0.5"]
    monkeypatch.setattr(sys, "argv", ["draw_clips.py", *words])
    monkeypatch.setattr(draw_clips, "load_pipeline", lambda args: None)
    monkeypatch.setattr(draw_clips, "resolve", lambda pipe, request: request)
    monkeypatch.setattr(draw_clips, "plan_density", lambda clip: 0.25)
    monkeypatch.setattr(draw_clips, "make_clip", make_clip)
    draw_clips.main()
    with Image.open(path) as picture:
        pixels = np.array(picture.convert("L"), dtype=float)
    # from captions that are dark on white to clips of one grey
    middle = pixels[80:-20].mean(0).reshape(4, -1)[:, 100:150].mean(1) / 255
    assert middle == pytest.approx(list(GREYS.values()), abs=0.02)
    assert pixels[:40].min() < 100


def test_what_is_no_video_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["draw_clips.py", "--output", str(tmp_path / "x.png")])
    with pytest.raises(ValueError, match=r"must end in \.webp or \.gif or \.mp4"):
        draw_clips.main()
