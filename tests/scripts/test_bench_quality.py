"""The quality benchmark: a small run that resumes, its intervals, its table and its plot."""

import json
import sys
from pathlib import Path

import bench_quality as bench
import numpy as np
import pytest
import torch
from benchmarks import density_choices as choices
from benchmarks import quality_plot as plot
from benchmarks import quality_report as report

from tests.commands.cli_cases import tiny_wan
from vidattn.catalog import list_sparse_methods
from vidattn.grid import Grid
from vidattn.methods import plan

SMALL = ("--prompts", "2", "--seeds", "1", "--frames", "9", "--side", "64", "--steps", "2")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "wan"
    tiny_wan().save_pretrained(folder)
    return folder


class Pool:
    """Runs the jobs of a pool here and now."""

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, function, *args):
        function(*args)
        return self

    def result(self):
        pass


def run(model, folder, monkeypatch, *flags):
    argv = ["bench_quality.py", "--model", str(model), "--work", str(folder / "work")]
    argv += ["--out", str(folder), "--metrics", "psnr,ssim"]
    monkeypatch.setattr(sys, "argv", [*argv, *SMALL, *flags])
    monkeypatch.setattr(bench, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(bench, "print", lambda *words: None, raising=False)
    bench._pipeline.cache_clear()
    bench.main()
    return json.loads((folder / "quality.json").read_text())


def test_a_small_run_is_written_and_goes_on(model, tmp_path, monkeypatch):
    first = run(model, tmp_path, monkeypatch, "--methods", "topk", "--densities", "0.5")
    labels = ["topk:density=0.5,rectify=false", "topk:density=0.5,rectify=true"]
    assert [row["label"] for row in first["rows"]] == labels
    row = first["rows"][0]
    assert row["clips"] == [[0, 0], [1, 0]] and first["errors"] == {}
    assert 0 < row["density"] <= row["density_in_all"] <= 1 and 0 < row["recall"] <= 1
    low, high = row["psnr_db"]["interval"]
    assert 0 < low <= row["psnr_db"]["mean"] <= high
    assert [layer["layer"] for layer in row["layers"]] == [1, 2]

    lines = (tmp_path / "work" / "clips.jsonl").read_text()
    made = []
    make_clip = bench.make_clip
    monkeypatch.setattr(bench, "make_clip", lambda *args: made.append(args) or make_clip(*args))
    flags = ("--methods", "topk,paro", "--densities", "0.5")
    again = run(model, tmp_path, monkeypatch, *flags)
    assert [args[2].name for args in made] == ["paro"] * 2, "all else is there"
    assert (tmp_path / "work" / "clips.jsonl").read_text().startswith(lines)
    assert [again["rows"][i] for i in (0, 2)] == first["rows"] and len(again["rows"]) == 3
    text = (tmp_path / "quality.md").read_text()
    assert f"| {row['recall']:.3f} |" in text and "2 of 2 held-out prompts" in text
    plots = [tmp_path / "quality.png", tmp_path / "quality_methods.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in plots)

    for path in (tmp_path / "quality.md", *plots):
        path.unlink()
    monkeypatch.setattr(bench, "make_report", None)
    assert run(model, tmp_path, monkeypatch, "--redraw") == again
    assert (tmp_path / "quality.md").read_text() == text and all(map(Path.exists, plots))
    monkeypatch.undo()

    with pytest.raises(ValueError, match="another setting.*'steps': \\(2, 3\\)"):
        run(model, tmp_path, monkeypatch, "--steps", "3")


def test_a_schedule_stands_among_the_methods(model, tmp_path, monkeypatch):
    path = tmp_path / "tuned.yaml"
    path.write_text("rules:\n- {method: topk, options: {density: 0.5}}\n")
    flags = ("--methods", "topk", "--densities", "0.5", "--schedule", f"0.5={path}")
    rows = run(model, tmp_path, monkeypatch, *flags)["rows"]
    plain, schedule, _ = rows
    assert (schedule["label"], schedule["method"]) == (f"schedule:{path}", "schedule")
    assert schedule["psnr_db"]["mean"] == pytest.approx(plain["psnr_db"]["mean"], abs=1e-3)
    with pytest.raises(SystemExit):
        bench.parse(["--schedule", "0.5=missing.yaml"])


def test_time_that_is_up_ends_a_run(model, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "make_clip", None)
    flags = ("--methods", "topk", "--densities", "0.5", "--minutes", "1e-9")
    assert run(model, tmp_path, monkeypatch, *flags)["rows"] == []


def test_every_method_comes_at_every_density():
    grid = Grid(9, 16, 16)
    found = choices.choices_at((0.2, 0.5), grid)
    assert {choice.name for _, choice in found} == {*list_sparse_methods()}
    rectified = {choice.options["rectify"] for _, choice in found if choice.name == "topk"}
    assert rectified == {False, True}
    plain = choices.choices_at((0.2, 0.5), grid, plain=True)
    assert plain == [x for x in found if not x[1].options.get("rectify")]
    for density, choice in found:
        if choice.name == "neighborhood" and not choice.options["rectify"]:
            made = plan(choice.name, grid, **choice.options)
            assert made.density == pytest.approx(density, rel=0.25)


def test_an_interval_covers_the_mean_of_what_is_drawn():
    """Means of 12 prompts of unit variance: the interval has half a width of 1.96 / sqrt(12)."""
    rng = np.random.default_rng(0)
    covered, widths = 0, []
    for _ in range(60):
        low, high = report.interval(rng.standard_normal(12), np.arange(12))
        covered += low <= 0 <= high
        widths.append((high - low) / 2)
    assert covered >= 50 and np.mean(widths) == pytest.approx(1.96 / 12**0.5, rel=0.15)


def test_seeds_of_a_prompt_count_once():
    values = np.array([1.0, 3.0])
    alone = report.interval(values, np.array([0, 1]))
    assert report.interval(values.repeat(5), np.array([0, 1]).repeat(5)) == alone
    assert report.interval(np.array([1.0, 3.0]), np.array([4, 4])) is None


compared = report.Compared
SETTING = ("model", "frames", "side", "steps", "guidance", "dense_layers", "dense_steps")
FRAME = {
    "setting": dict.fromkeys(SETTING, 1),
    "hardware": {"cpu": "a CPU", "torch": "2"},
    "command": "python scripts/bench_quality.py",
}


def clip(label, prompt, seed, **figures):
    line = {"kind": "clip", "label": label, "prompt": prompt, "seed": seed, "method": label}
    return line | {"rectify": False, "density": 0.5, "density_in_all": 0.6} | figures


def test_only_clips_that_all_methods_have_are_compared():
    lines = [clip("a", i, 0, psnr_db=10.0 * i) for i in range(3)]
    lines += [clip("b", i, 0, psnr_db=1.0 * i) for i in range(2)]
    lines += [clip("c", 0, 0, error="too small"), clip("d", 0, 0, psnr_db=5.0)]
    lines += [clip("e", i, 0, psnr_db=3.0) for i in range(3)]
    asked = [compared(0.5, label) for label in "abc"] + [compared(0.2, "e")]
    found = report.summarize(lines, asked)
    assert found["errors"] == {"c": "too small"}
    rows = {row["label"]: row for row in found["rows"]}
    assert list(rows) == ["e", "a", "b"] and rows["e"]["asked"] == 0.2
    assert rows["a"]["clips"] == rows["b"]["clips"] == [[0, 0], [1, 0]]
    assert len(rows["e"]["clips"]) == 3
    assert [row["psnr_db"]["mean"] for row in rows.values()] == [3.0, 5.0, 0.5]


def test_rectified_clips_are_compared_with_the_same_plain_ones():
    lines = [clip("a", i, 0, psnr_db=10.0 * i) for i in range(4)]
    lines += [clip("a+", i, 0, psnr_db=10.0 * i + 2 + i) for i in range(2)]
    lines += [clip("b", i, 0, psnr_db=1.0) for i in range(4)]
    asked = [compared(0.5, "a"), compared(0.5, "a+", "a"), compared(0.5, "b")]
    found = report.summarize(lines, asked)["rows"]
    assert [len(row["clips"]) for row in found] == [4, 4, 2]
    gain = found[2]["gain"]
    assert gain["mean"] == 2.5 and gain["interval"] == [2.0, 3.0]
    text = report.to_markdown({"rows": found, "errors": {}, "asked": [4, 1]} | FRAME)
    assert "| `a+` | 0.500 | 0.600 | 7.50 (2.00 to 13.00) | +2.50 dB (+2.00 to +3.00) |" in text
    assert "Rectified: 2 clips of each method, of 2 of 4 held-out prompts" in text


def figure_row(method, asked, psnr, clips=((0, 0),), rectify=False):
    figure = {"mean": psnr, "interval": [psnr - 1, psnr + 1]}
    row = {"method": method, "asked": asked, "density": asked, "rectify": rectify}
    return row | {"clips": [list(x) for x in clips], "psnr_db": figure, "ssim": figure}


def test_the_best_of_each_kind_is_drawn_under_its_name():
    rows = [figure_row("topk", 0.2, 20), figure_row("adaspa", 0.2, 30), figure_row("svg", 0.4, 35)]
    rows += [figure_row("radial", 0.2, 25), figure_row("radial", 0.2, 28, rectify=True)]
    rows += [figure_row("schedule", 0.4, 40)]
    assert [row["method"] for row in plot.best(rows[:3], "psnr_db")] == ["adaspa", "svg"]
    panel = plot.draw_frontier({"rows": rows} | FRAME).axes[0]
    words = {text.get_text() for text in panel.texts}
    assert words == {
        "by content: adaspa and svg", "pattern of the grid: radial", "pattern, rectified: radial",
        "mixed by head: tuned schedule", "dense: no difference",
    }  # fmt: skip


@pytest.mark.parametrize("alike", [True, False])
def test_points_are_joined_where_they_are_of_the_same_clips(alike):
    rows = [figure_row("topk", 0.2, 20), figure_row("topk", 0.4, 30, [(0, 0 if alike else 1)])]
    figure = plot.draw_methods({"rows": rows} | FRAME)
    assert [panel.get_title("left") for panel in figure.axes] == ["topk"]
    lines = [line.get_xydata().tolist() for line in figure.axes[0].lines]
    others = lines.pop(0)
    assert others == [[0.2, 20], [0.4, 30]]
    assert ([[0.2, 20], [0.4, 30]] in lines) == alike
    assert [[0.2, 19], [0.2, 21]] in lines and [[0.4, 30]] in lines


def test_names_do_not_overlap():
    assert plot.spread([1, 5, 9], 1) == [1, 5, 9]
    assert plot.spread([1, 1, 2, 9], 2) == pytest.approx([-2 / 3, 4 / 3, 10 / 3, 9])
    assert plot.spread([0, 1.5, 1.5], 1) == pytest.approx([0, 1, 2])


def test_fvd_is_of_all_clips_together():
    features = torch.randn(2, 4, 6).tolist()
    lines = [
        clip("a", i, 0, features=x, dense_features=y) for i, (x, y) in enumerate(zip(*features))
    ]
    (row,) = report.summarize(lines, [compared(0.5, "a")])["rows"]
    expected = report.frechet_distance(*(torch.tensor(x) for x in features))
    assert row["fvd"] == {"mean": expected, "interval": None}


def test_lines_that_were_cut_are_made_again(tmp_path):
    (tmp_path / "clips.jsonl").write_text('{"kind": "clip"}\n{"kind": "cl')
    assert list(bench.read_lines(tmp_path)) == [{"kind": "clip"}]


def test_quick_is_small():
    args = bench.parse(["--quick"])
    assert (args.prompts, args.frames, args.densities) == (1, 9, (0.5,))
    assert bench.grid_of(args) == Grid(3, 8, 8)
    assert bench.parse(["--quick", "--steps", "5"]).steps == 5
