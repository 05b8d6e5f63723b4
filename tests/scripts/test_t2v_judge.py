"""The judge, on clips whose truth is known, and its command line."""

import json
import subprocess
import sys
from pathlib import Path

import judge_t2v as judging
import numpy as np
import pytest
import torch
from t2v import data, measure

ROOT = Path(__file__).parents[2]


def moving_disc(velocity: tuple[float, float], colour: str = "blue", num_frames: int = 9):
    """A video (T, 71, 83, 3) of a disc on grey that starts in the middle."""
    y, x = np.mgrid[:71, :83]
    video = np.full((num_frames, 71, 83, 3), 0.6, np.float32)
    for t in range(num_frames):
        inside = (y - 35 - t * velocity[0]) ** 2 + (x - 41 - t * velocity[1]) ** 2 < 90
        video[t][inside] = data.COLOURS[colour]
    return video


@pytest.mark.parametrize(
    ("velocity", "expected"),
    [
        ((0, -1.5), "left"),
        ((0.4, 1.2), "right"),
        ((-2, 0.3), "up"),
        ((0.9, -0.5), "down"),
        ((0, 0), "none"),
        ((0.1, 0.1), "none"),
    ],
)
def test_direction(velocity, expected):
    video = moving_disc(velocity)
    np.testing.assert_allclose(measure.track(video), velocity, atol=0.1)
    assert measure.direction_of(video) == expected


@pytest.mark.parametrize("colour", data.COLOURS)
def test_colour(colour):
    assert measure.colour_of(moving_disc((0, 1), colour) * 0.8) == colour


def test_nothing_to_see():
    grey = np.full((5, 40, 40, 3), 0.3, np.float32)
    assert measure.direction_of(grey) == "none"
    assert measure.colour_of(grey) == "none"
    assert measure.Classifier().name(grey) == "none"


def test_small_specks_do_not_count():
    video = moving_disc((0, 1.5))
    video[:, 3:6, 3:6] = data.COLOURS["red"]
    assert measure.direction_of(video) == "right"
    assert measure.colour_of(video) == "blue"


def test_view_fills_28_pixels():
    frame = np.full((60, 90, 3), 0.5, np.float32)
    frame[20:32, 10:58] = data.COLOURS["red"]
    view = measure.view_of(frame)
    assert view.shape == (1, 28, 28)
    lit = view[0] > 0.5
    assert lit.any(0).sum() == 28 and 6 <= lit.any(1).sum() <= 8


def test_wilson_interval():
    low, high = judging.wilson(34, 40)
    torch.testing.assert_close(torch.tensor([low, high]), torch.tensor([0.7093, 0.9294]), **TIGHT)
    assert judging.wilson(40, 40)[1] == pytest.approx(1.0)
    assert judging.wilson(0, 40)[0] == pytest.approx(0.0)


TIGHT = {"rtol": 0, "atol": 2e-4}


def test_summary_counts_each_aspect():
    scenes = data.held_out_prompts(2)
    rows = [{a: getattr(s, a) for a in measure.ASPECTS} for s in scenes]
    rows[1]["item"] = "none"
    counted = judging.summary(rows, scenes, "clothes")
    assert counted["direction"]["right"] == 2 and counted["item"]["right"] == 1
    assert json.dumps(counted)


def test_sheet(tmp_path):
    videos = [moving_disc((0, 1)), moving_disc((1, 0)), moving_disc((1, 1))]
    judging.save_sheet(tmp_path / "deep" / "sheet.png", videos)
    assert (tmp_path / "deep" / "sheet.png").stat().st_size > 500


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such/folder"], "no model_index.json"),
        (["--prompts", "41"], "give 1 to 40"),
        (["--frames", "0"], "must be at least 1"),
    ],
)
def test_bad_arguments(arguments, message, monkeypatch, capsys, tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    given = ["judge_t2v.py", "--model", str(tmp_path), *arguments]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit) as stopped:
        judging.parse()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("program", ["train_t2v.py", "judge_t2v.py"])
def test_programs_explain_themselves(program):
    script = ROOT / "scripts" / program
    shown = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True)
    assert shown.returncode == 0 and "usage" in shown.stdout
