"""`vidattn stream` writes a video that can be watched, and says what it did."""

import json
import os
import signal

import imageio.v2 as imageio
import numpy as np
import pytest

from tests.commands.cli_cases import frames_of, run, tiny_wan
from vidattn.pipelines.streaming.recipe import Recipe
from vidattn.pipelines.streaming.stream import Stream
from vidattn.support.resources import resource

RECIPE = Recipe(chunk=2, times=(1000.0, 500.0), fps=8, size=(32, 48), policy="rolling:window=8")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a causal pipeline of random weights."""
    folder = tmp_path_factory.mktemp("causal")
    pipe = tiny_wan()
    pipe.transformer.register_to_config(**RECIPE.to_config())
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def make(model, tmp_path, capfd):
    """Runs the command."""

    def make(*words, output="x.mp4"):
        args = ("stream", "a red boot", "--model", model, "--output", tmp_path / output)
        return run(capfd, *args, *words)

    return make


def report_of(folder):
    return json.loads((folder / "x.json").read_text())


def test_a_stream_is_written_with_its_report(make, tmp_path):
    code, out, err = make("--duration", "2.4s", "--seed", 3)
    assert code == 0, err
    # 19.2 frames are 21 of whole chunks: 5 first, 8 then
    frames, meta = frames_of(tmp_path / "x.mp4")
    assert len(frames) == 21 and meta["fps"] == 8 and frames[0].shape == (32, 48, 3)
    assert "wrote 21 frames, 2.6 s" in out and "cache" in err and "fps" in err
    report = report_of(tmp_path)
    assert report["policy"] == RECIPE.policy and report["num_frames"] == 21
    assert report["chunks"]["num_frames"] == [5, 8, 8] and not report["stopped"]
    assert report["chunks"]["cache_tokens"] == [48, 96, 144]
    assert report["request"]["seed"] == 3 and report["recipe"]["chunk"] == 2


def test_a_prompt_changes_with_the_first_chunk_of_its_time(make, tmp_path):
    code, _, err = make("--duration", "3s", "--prompt-at", "1.7s=a boot", "--prompt-at", "1s=a red")
    assert code == 0, err
    # chunks begin at frames 0, 5, 13 and 21, which are 0.63, 1.63 and 2.63 s
    assert report_of(tmp_path)["prompts"] == [
        {"frame": 13, "prompt": "a red"},
        {"frame": 21, "prompt": "a boot"},
    ]


def test_a_policy_and_a_size_are_those_that_are_asked_for(make, tmp_path):
    words = ("--policy", "tempcache:window=9,sink=1", "--height", 48, "--width", 64)
    code, _, err = make("--duration", "1s", *words)
    assert code == 0, err
    assert report_of(tmp_path)["policy"] == "tempcache:window=9,sink=1"
    assert frames_of(tmp_path / "x.mp4")[0][0].shape == (48, 64, 3)


@pytest.mark.parametrize("ending", ["png", "mp4"])
def test_a_stream_begins_with_what_it_is_given(make, tmp_path, ending):
    start, pictures = tmp_path / f"start.{ending}", np.full((7, 40, 40, 3), 200, np.uint8)
    if ending == "png":
        imageio.imwrite(start, pictures[0])
    else:
        imageio.mimwrite(start, pictures, fps=8, macro_block_size=1)
    code, _, err = make("--duration", "1s", "--start", start)
    assert code == 0, err
    assert len(frames_of(tmp_path / "x.mp4")[0]) == 13


def test_the_shortest_stream_is_a_chunk(make, tmp_path):
    code, _, err = make("--duration", "0.01s")
    assert code == 0, err
    assert len(frames_of(tmp_path / "x.mp4")[0]) == report_of(tmp_path)["num_frames"] == 5


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_stream_plays(make, tmp_path, monkeypatch, kind):
    following, chunks = Stream.__next__, []

    def stop(self):
        chunks.append(1)
        if len(chunks) == 3:
            os.kill(os.getpid(), kind)
        return following(self)

    monkeypatch.setattr(Stream, "__next__", stop)
    before = signal.getsignal(signal.SIGTERM)
    code, out, err = make("--duration", "1h")
    assert code == 130, err
    assert len(frames_of(tmp_path / "x.mp4")[0]) == 13
    assert report_of(tmp_path)["stopped"] and "stopped after 13 frames" in out
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--policy", "tempcach"), "did you mean 'tempcache'"),
        (("--policy", "rolling:windw=3"), "did you mean 'window'"),
        (("--policy", "rolling:window=3"), "give window=6 or more"),
        (("--policy", "rolling:cap=30"), "the cache may hold 30 tokens"),
        (("--duration", "0s"), "must be a time above 0"),
        (("--duration", "long"), "must be a time above 0"),
        (("--prompt-at", "12s"), "must be a time and a prompt"),
        (("--prompt-at", "30s=x"), "is not before the end, at 20s"),
        (("--prompt-at", "3s=x", "--prompt-at", "3s=y"), "names one time twice"),
        (("--height", 32), "--height and --width go together"),
        (("--height", 30, "--width", 48), "nearest that does is"),
        (("--start", "nothing.png"), "is no file"),
        (("--recipe", "self-forced"), "did you mean 'self-forcing'"),
        (("--output", "x.gif"), "must end in .mp4"),
    ],
)
def test_what_cannot_be_is_said_before_weights_are_loaded(make, monkeypatch, words, said):
    def load(*_):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("vidattn.commands.stream.load_pipeline", load)
    code, _, err = make(*words)
    assert code == 2 and said in err


def test_a_model_that_is_not_causal_is_told_so(tmp_path, capfd):
    code, _, err = run(capfd, "stream", "a red boot", "--model", resource("assets/tiny-t2v"))
    assert code == 2 and "is bidirectional as far as its configuration says" in err
