"""vidattn look, on a pipeline of random weights."""

import pytest
import torch

from tests.commands.cli_cases import SMALL, frames_of, run
from vidattn.runs.heat import _tokens_of, over


def test_look_writes_the_video_beside_its_map(capfd, tmp_path, original):
    path = tmp_path / "look.mp4"
    argv = ("look", "boot", "a red boot", "--model", original, "--output", path, *SMALL)
    code, out, err = run(capfd, *argv, "--method", "neighborhood:window=3")
    assert code == 0, err
    assert f"wrote {path}" in out
    frames, _ = frames_of(path)
    height, width, _ = frames[0].shape
    assert len(frames) == 9 and width > 2 * 64 and height > 48


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("dog", "a red boot"), "the prompt has no word 'dog': it is 'a red boot'"),
        (("boot", "a boot", "--method", "dense", "--method", "exact"), "look takes one method"),
        (("boot", "a boot", "--output", "look.txt"), ".mp4 or .gif or .webp"),
    ],
)
def test_what_look_cannot_show_is_refused(capfd, tmp_path, original, words, message):
    code, _, err = run(capfd, "look", *words, "--model", original, *SMALL)
    assert code == 2 and message in err
    assert not list(tmp_path.iterdir())


def test_a_map_lies_over_its_frames():
    frames, heat = torch.zeros(9, 3, 8, 12), torch.zeros(3, 2, 3)
    heat[1, 0, 0] = 1.0
    shown = over(frames, heat)
    assert shown.shape == frames.shape and 0 <= shown.min() and shown.max() <= 1
    assert _tokens_of(9, 3).tolist() == [0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert _tokens_of(7, 3).tolist() == [0, 1, 1, 1, 2, 2, 2]
    assert _tokens_of(6, 3).tolist() == [0, 0, 1, 1, 2, 2]
    bright = shown.amax((1, 2, 3)) > 0.9
    assert bright.tolist() == [t == 1 for t in _tokens_of(9, 3).tolist()]
    assert shown[1, :, :4, :4].mean() > 10 * shown[1, :, 4:, 8:].mean()
    assert torch.isfinite(over(frames, torch.ones(3, 2, 3))).all()
