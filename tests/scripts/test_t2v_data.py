"""The captioned clips: what they show, that they repeat, and what is held out."""

import gzip
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from t2v import data, measure


def write_items(folder: Path, per_label: int = 3) -> Path:
    """A stand-in for the unpacked image package: one ellipse-like blob per label."""
    root = folder / data.INNER
    root.mkdir(parents=True)
    y, x = np.mgrid[:28, :28] - 13.5
    images, labels = [], []
    for label in range(10):
        blob = (y / (6 + 0.7 * label)) ** 2 + (x / (13 - 0.7 * label)) ** 2 < 1
        images += [(blob * (120 + 40 * i)).astype(np.uint8) for i in range(per_label)]
        labels += [label] * per_label
    for prefix in ("train", "t10k"):
        with gzip.open(root / f"{prefix}-images-idx3-ubyte.gz", "wb") as file:
            file.write(bytes(16) + np.stack(images).tobytes())
        with gzip.open(root / f"{prefix}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(bytes(8) + bytes(labels))
    return folder


@pytest.fixture
def clips(tmp_path):
    return data.Clips(write_items(tmp_path), 3)


def test_clip_repeats(clips):
    first, scene = clips.sample(5, (5, 48, 56))
    again, same = clips.sample(5, (5, 48, 56))
    other, _ = clips.sample(6, (5, 48, 56))
    assert first.shape == (3, 5, 48, 56) and scene == same
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert (first - other).abs().max() > 0.1
    assert -1 <= first.min() and first.max() <= 1


def test_seeds_differ(clips):
    first = clips.sample(0, (1, 32, 32))[0]
    clips.seed = 4
    assert (first - clips.sample(0, (1, 32, 32))[0]).abs().max() > 0.05


@pytest.mark.parametrize("direction", data.DIRECTIONS)
@pytest.mark.parametrize("background", data.BACKGROUNDS)
def test_item_moves_as_its_caption_says(clips, direction, background):
    scene = data.Scene("green", "bag", direction, background)
    clip, _ = clips.sample(11, (9, 80, 96), scene)
    velocity = measure.track((clip.permute(1, 2, 3, 0).numpy() + 1) / 2)
    expected = data.SPEED_PX * np.array(data.DIRECTIONS[direction])
    np.testing.assert_allclose(velocity, expected, atol=0.1)


@pytest.mark.parametrize("name", data.BACKGROUNDS)
def test_backgrounds_have_little_chroma(name):
    picture = data.paint_background(name, 37, 53, 0.02)
    assert picture.shape == (3, 37, 53)
    assert (picture.amax(0) - picture.amin(0)).max() < measure.MIN_CHROMA / 2


def test_held_out_scenes_are_never_trained(clips):
    held_out = set(data.held_out_scenes())
    assert len(held_out) == data.NUM_HELD_OUT
    assert not held_out & set(clips.scenes)
    assert len(held_out) + len(clips.scenes) == len(data.all_scenes()) == 8 * 7 * 4 * 6


def test_prompts_are_held_out_in_even_shares():
    prompts = data.held_out_prompts()
    assert len(set(prompts)) == 40 and set(prompts) <= set(data.held_out_scenes())
    assert set(Counter(s.direction for s in prompts).values()) == {10}
    assert set(Counter(s.item for s in prompts)) == set(data.ITEMS)
    assert max(Counter(s.item for s in prompts).values()) <= 6
    with pytest.raises(ValueError, match="give 1 to 40"):
        data.held_out_prompts(41)


def test_captions_vary_but_stay_true():
    scene = data.Scene("red", "boot", "left", "dotted")
    rng = np.random.default_rng(0)
    captions = Counter(data.vary_caption(scene, rng) for _ in range(300))
    assert captions.most_common(1)[0][0] == scene.caption
    assert len(captions) == 6 and all("boot" in c for c in captions)


def test_wrong_archive_is_refused(tmp_path):
    (tmp_path / data.FASHION_MNIST.file).write_bytes(b"not the package")
    with pytest.raises(ValueError, match="SHA-256"):
        data.fetch_items(tmp_path)
