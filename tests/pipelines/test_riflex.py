"""Slower rotation in time against tables made frame by frame from the definition."""

import math

import pytest
import torch

import vidattn
from tests.pipelines.tiny import TINY, build
from tests.pipelines.tiny_inputs import latents
from vidattn.pipelines.hooks.riflex import _slowed

SIZE, DIMS = (7, 2, 3), (12, 4, 4)


def tables(theta: float, slow: int | None = None, size=SIZE) -> tuple[torch.Tensor, torch.Tensor]:
    """(S, C) cosines and sines; of the pair ``slow`` in time a whole video is 0.9 of a turn."""
    t, h, w = size
    rows = []
    for place in ((i, j, k) for i in range(t) for j in range(h) for k in range(w)):
        row = []
        for axis, dim in enumerate(DIMS):
            for pair in range(dim // 2):
                speed = theta ** (-2 * pair / dim)
                if axis == 0 and pair == slow:
                    speed = 0.9 * 2 * math.pi / t
                row += [place[axis] * speed] * 2
        rows.append(row)
    angles = torch.tensor(rows, dtype=torch.float64)
    return angles.cos().float(), angles.sin().float()


@pytest.mark.parametrize(
    ("period", "slow"),
    # with theta 2 the periods of pairs in time are 6.28, 7.05, 7.9 and so on
    [(6, 0), (2 * math.pi, 0), (6.4, None), (7.2, None), (3, 0)],
)
def test_the_pair_with_the_period_is_slowed_in_longer_videos(period, slow):
    given = tables(2.0)
    found = _slowed(given, SIZE, period)
    for x, y in zip(found, tables(2.0, slow)):
        torch.testing.assert_close(x, y, atol=2e-6, rtol=0)
    if slow is None:
        assert found is given


def test_the_first_period_at_or_above_is_taken():
    size = (9, 2, 3)
    found = _slowed(tables(2.0, size=size), size, 6.5)
    for x, y in zip(found, tables(2.0, 1, size)):
        torch.testing.assert_close(x, y, atol=2e-6, rtol=0)


NAMES = ["WanTransformer3DModel", "HunyuanVideoTransformer3DModel", "SkyReelsV2Transformer3DModel"]


@pytest.mark.parametrize("name", NAMES)
def test_it_changes_long_videos_alone_and_comes_off(name):
    model = build(name)
    inputs = TINY[name].inputs() | {"hidden_states": latents(frames=9)}

    def run():
        with torch.no_grad():
            return model(**inputs, return_dict=False)[0]

    plain = run()
    with vidattn.patch(model, "dense", repeats_after=60):
        assert torch.equal(run(), plain)
    with vidattn.patch(model, "dense", repeats_after=3):
        assert (run() - plain).abs().max() > 1e-4
    assert not model.rope._forward_hooks and torch.equal(run(), plain)


def test_what_cannot_be_slowed_is_refused():
    model = build("CogVideoXTransformer3DModel")
    with pytest.raises(ValueError, match="repeats_after needs a transformer whose rope makes"):
        vidattn.patch(model, "dense", repeats_after=20)
    with pytest.raises(ValueError, match="not patched"):
        vidattn.unpatch(model)
    with pytest.raises(ValueError, match="at least 2 latent frames, got 0"):
        vidattn.patch(build(NAMES[0]), "dense", repeats_after=0)


@pytest.mark.parametrize(
    ("theta", "dim", "pair"), [(10000.0, 44, 5), (256.0, 16, 3)], ids=["Wan 2.1", "HunyuanVideo"]
)
def test_fifty_frames_are_the_pair_that_the_authors_slow(theta, dim, pair):
    """Their numbers 6 and 4, counted from 1."""
    speeds = theta ** (-torch.arange(dim // 2, dtype=torch.float64) * 2 / dim)
    angles = torch.arange(120)[:, None] * speeds.repeat_interleave(2)
    given = angles.cos().float(), angles.sin().float()
    found = _slowed(given, (120, 1, 1), 50)
    changed = [i for i in range(dim) if not torch.equal(found[0][:, i], given[0][:, i])]
    assert changed == [2 * pair, 2 * pair + 1]
