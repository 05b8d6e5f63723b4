"""Clips as people have them: what is found, what is left out, and which frames are taken."""

import csv
import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from video_training import clips, frames, stretches

from tests.scripts import video_cases as cases

Footage, cut = frames.Footage, stretches.cut


def find(source, strict=False):
    problems = clips.Problems(strict)
    return clips.find_clips(str(source), problems), problems.found


def test_a_folder_has_its_captions_beside_the_clips(tmp_path):
    for name in ("b.mp4", "sub/a.png", "lonely.mov", "empty.mp4", ".hidden.mp4", "notes.md"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    for name, text in {"b": "two\n lines ", "sub/a": "\ufeffone", "empty": " ", "no": "x"}.items():
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    found, left_out = find(tmp_path)
    assert [(c.name, c.caption, c.is_picture) for c in found] == [
        ("b.mp4", "two lines", False),
        (str(Path("sub/a.png")), "one", True),
    ]
    assert left_out == {
        "no.txt": "a caption without a clip",
        "lonely.mov": "no caption: 'lonely.txt' is missing",
        "empty.mp4": "its caption is empty",
    }
    with pytest.raises(ValueError, match="'no.txt': a caption without a clip .data.strict"):
        find(tmp_path, strict=True)


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
@pytest.mark.parametrize("columns", [("path", "caption"), ("video_path", "text")])
def test_a_table_has_paths_from_its_own_folder(tmp_path, ending, columns):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.mp4").write_bytes(b"")
    rows = [("a.mp4", 'a "quoted", word'), ("a.mp4", "another"), ("gone.mp4", "x"), ("a.mp4", "")]
    rows += [rows[0], ("notes.md", "y")]
    table = tmp_path / "data" / f"set.{ending}"
    with table.open("w", newline="", encoding="utf-8") as file:
        if ending == "csv":
            csv.writer(file).writerows([columns, *rows])
        else:
            file.writelines(json.dumps(dict(zip(columns, row))) + "\n\n" for row in rows)
    found, left_out = find(table)
    assert [(c.path, c.caption) for c in found] == [
        (tmp_path / "data" / "a.mp4", 'a "quoted", word'),
        (tmp_path / "data" / "a.mp4", "another"),
    ]
    assert (
        left_out["gone.mp4"]
        == f"set.{ending}, row 3: a caption without a clip, there is no such file"
    )
    assert left_out["a.mp4"] == "its caption is empty"
    assert "neither a clip nor a picture" in left_out["notes.md"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", "{", "a.jsonl, line 1 is no JSON"),
        ("a.jsonl", "[1]", "line 1 must hold keys and values"),
        ("a.jsonl", '{"clip": "a.mp4"}', "row 1 has no path; a column must be called path or"),
        ("a.csv", "clip,caption\na.mp4,x", "row 1 has no path.*it has clip, caption"),
        ("a.json", "[]", "neither a folder nor a .jsonl or .csv file"),
        ("a.csv", "path,caption\ngone.mp4,x", "no clip with a caption.*\n.*gone.mp4: a.csv, row 1"),
    ],
)
def test_bad_tables_say_what_is_wrong(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        find(tmp_path / name)


@pytest.mark.parametrize(("name", "package"), [("decord",) * 2, ("av",) * 2, ("opencv", "cv2")])
def test_every_reader_gives_the_frames_that_were_written(tmp_path, name, package):
    pytest.importorskip(package)
    path, indices = tmp_path / "clip.mp4", [0, 3, 3, 11]
    written = cases.write_clip(path, frames=12)
    assert getattr(frames, f"_probe_{name}")(path) == Footage(12, 16.0, 72, 96)
    found = getattr(frames, f"_{name}")(path, indices)
    # H.264 is lossy
    assert np.abs(found.astype(int) - written[indices].astype(int)).mean() < 2
    # the square stands where it stood in that frame and in no other
    wrong = written[[5, 8, 8, 2]]
    assert np.abs(found.astype(int) - wrong.astype(int)).mean() > 5


@pytest.mark.parametrize("missing", [(), ("decord",), ("decord", "av")])
def test_another_reader_steps_in(tmp_path, monkeypatch, missing):
    path = tmp_path / "clip.mp4"
    cases.write_clip(path, frames=12)
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    assert frames.probe(path, False) == Footage(12, 16.0, 72, 96)
    assert frames.read_frames(path, [0, 3, 11], False).shape == (3, 72, 96, 3)
    with pytest.raises(ValueError, match="cannot be read: .*frames wanted can be read"):
        frames.read_frames(path, [0, 12], False)


@pytest.mark.parametrize("content", [b"", b"nothing of the kind"])
def test_what_cannot_be_read_says_so(tmp_path, content):
    for name in ("clip.mp4", "picture.png"):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read|no picture"):
            frames.probe(path, name.endswith("png"))


def test_a_clip_that_ends_early_is_not_made_up(tmp_path):
    path = tmp_path / "clip.mp4"
    cases.write_clip(path, frames=40)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="cannot be read"):
        frames.read_frames(path, list(range(40)), False)


def test_pictures_are_read_in_rgb(tmp_path):
    picture = np.zeros((4, 6, 3), np.uint8)
    picture[..., 2] = 200
    cv2.imwrite(str(tmp_path / "a ü.png"), picture) or (tmp_path / "a ü.png").write_bytes(
        cv2.imencode(".png", picture)[1].tobytes()
    )
    assert frames.read_picture(tmp_path / "a ü.png")[0, 0].tolist() == [200, 0, 0]
    assert frames.probe(tmp_path / "a ü.png", True) == Footage(1, None, 4, 6)


def test_frames_cover_their_size_and_keep_their_middle():
    picture = np.zeros((2, 40, 120, 3), np.uint8)
    picture[:, :, 40:80] = 255
    found = frames.fit(picture, 20, 20)
    assert found.shape == (2, 20, 20, 3) and found.min() == 255
    assert frames.fit(picture, 80, 240).shape == (2, 80, 240, 3)
    assert frames.fit(picture, 40, 120) is picture
    # wide to tall cuts the sides: never squeezes
    assert frames.fit(picture, 40, 80)[0, 0, :, 0].tolist() == [0] * 20 + [255] * 40 + [0] * 20


@pytest.mark.parametrize(
    ("count", "own", "fps", "expected"),
    [
        (5, 16.0, 16.0, [0, 1, 2, 3, 4]),
        (8, 16.0, None, list(range(8))),
        (8, 16.0, 8.0, [0, 2, 4, 6]),
        (4, 8.0, 16.0, [0, 1, 1, 2, 2, 3, 3, 3]),
        (10, 25.0, 16.0, [0, 2, 3, 5, 6, 8]),
        (1, None, 16.0, [0]),
    ],
)
def test_frames_are_taken_at_another_rate(count, own, fps, expected):
    assert stretches.resample(Footage(count, own, 8, 8), fps).tolist() == expected


def data(**given):
    return cases.settings.Data("x", **{"buckets": ((9, 64, 96), (5, 64, 96)), "fps": None} | given)


CLIP = clips.Clip(Path("a.mp4"), "a.mp4", "x")


@pytest.mark.parametrize(
    ("extract", "samples", "starts"),
    [
        ("head", 1, [0]),
        ("chunk", 1, [0, 9, 18]),
        ("uniform", 1, [10]),
        ("uniform", 3, [0, 10, 20]),
    ],
)
def test_stretches_of_a_clip(extract, samples, starts):
    found = cut(CLIP, Footage(29, 16.0, 64, 96), data(extract=extract, samples=samples), 0)
    assert [one.indices for one in found] == [tuple(range(s, s + 9)) for s in starts]


def test_random_stretches_are_drawn_once():
    one, again, other = (
        [s.indices for s in cut(CLIP, Footage(99, 16.0, 64, 96), given, seed)]
        for given, seed in ((data(extract="random", samples=4), x) for x in (0, 0, 1))
    )
    assert one == again != other and len(one) == 4
    assert all(i == tuple(range(i[0], i[0] + 9)) and i[-1] < 99 for i in one)


@pytest.mark.parametrize(
    ("footage", "expected"),
    [
        ((9, 16.0, 64, 96), (9, 64, 96)),
        ((8, 16.0, 64, 96), (5, 64, 96)),
        ((30, 16.0, 90, 60), (9, 96, 64)),
        ((1, None, 64, 100), (1, 64, 96)),
        ((30, 16.0, 50, 50), (9, 80, 80)),
    ],
)
def test_buckets_by_shape_and_then_by_length(footage, expected):
    buckets = ((5, 64, 96), (9, 64, 96), (9, 96, 64), (9, 80, 80), (1, 64, 96), (1, 80, 80))
    frames_, fps, height, width = footage
    assert stretches.choose_bucket(frames_, Footage(*footage), buckets) == expected


def test_what_no_bucket_takes():
    with pytest.raises(ValueError, match="too short: 4 frames at this rate.* takes 5"):
        cut(CLIP, Footage(4, 16.0, 64, 96), data(), 0)
    with pytest.raises(ValueError, match="a picture, and data.buckets has none of one frame"):
        cut(CLIP, Footage(1, None, 64, 96), data(), 0)


@pytest.mark.parametrize(
    ("bucket", "message"),
    [
        ((10, 64, 96), r"10 frames are not possible .* 4n \+ 1; the nearest are 9 and 13"),
        ((9, 60, 96), "a height of 60 .* multiples of 16; the nearest are 48 and 64"),
        ((9, 64, 8), "a width of 8 .* the nearest are 16 and 32"),
    ],
)
def test_sizes_that_the_model_does_not_take(bucket, message):
    with pytest.raises(ValueError, match=message):
        stretches.check_buckets([(9, 64, 96), bucket], 4, 16)
