"""vidattn simulate: the tables, the JSON report, and answers to mistakes."""

import json

import pytest

from vidattn.cli import main
from vidattn.simulation.gpus import list_gpus


def run(capfd, *argv):
    """Exit code, what was printed, and what was complained about."""
    code = main(["simulate", *map(str, argv)])
    captured = capfd.readouterr()
    return code, captured.out, captured.err


SMALL = ("--grid", "4x9x10", "--text", 3)


def test_a_method_on_a_grid(capfd):
    code, out, _ = run(capfd, "neighborhood", "--window", "3,5,5", *SMALL)
    assert code == 0 and all(name in out for name in list_gpus())
    assert "4x9x10 = 360 tokens and 3 of text, 24 heads of 128" in out
    assert "needed pairs" in out and "visited pairs" in out and "nothing was measured" in out
    assert "e2e\n" not in out and "break" in out


def test_a_method_on_a_model(capfd, tmp_path):
    path = tmp_path / "new" / "report.json"
    options = ("--model", "wan2.1-1.3b", "--size", "17x160x160", "--gpu", "h100", "--json", path)
    code, out, _ = run(capfd, "radial", "--density", 0.7, *options, "--dense-steps", 0.5)
    assert code == 0 and "of wan2.1-1.3b" in out and "e2e" in out and f"wrote {path}" in out
    assert "50% of the attention calls dense" in out
    (entry,) = json.loads(path.read_text())
    assert entry["kind"] == "bounds and a model, not measured"
    assert entry["gpu"] == "H100" and entry["method"] == "radial:density=0.7"
    assert entry["grid"] == {"t": 5, "h": 10, "w": 10, "text": 0, "text_first": False}
    assert entry["counts"]["needed_pairs"] == round(entry["counts"]["density"] * 500**2)
    assert entry["sparse_ms"] == entry["kernel_ms"] + sum(entry["overhead_ms"].values())
    assert entry["speedup"] == pytest.approx(entry["dense_ms"] / entry["sparse_ms"])
    assert 1 < entry["ideal_end_to_end"] < entry["ideal_speedup"]


def test_tiles_are_ranked(capfd):
    _, out, _ = run(capfd, "neighborhood", "--gpu", "A100", "--tiles", 3, *SMALL)
    lines = out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("tile "))
    rows = lines[first + 1 : lines.index("", first)]
    speeds = [float(line.split()[-1].rstrip("x")) for line in rows]
    assert len(rows) == 3 and speeds == sorted(speeds, reverse=True)
    assert "fastest on A100" in out
    # a tile that is set is not searched
    _, out, _ = run(capfd, "neighborhood", "--tile", "2,4,8", "--gpu", "A100", *SMALL)
    assert "tried" not in out and "with tile 2x4x8" in out


def test_several_methods(capfd, tmp_path):
    path = tmp_path / "report.json"
    words = ("dense", "neighborhood:window=3,5,5", "--gpu", "B200", "--heads", 2, "--head-dim", 32)
    assert run(capfd, *words, *SMALL, "--json", path)[0] == 0
    dense, window = json.loads(path.read_text())
    assert dense["speedup"] == 1 and dense["runs_dense"]
    assert (window["heads"], window["head_dim"], window["end_to_end"]) == (2, 32, None)


def test_figures_are_shown_with_their_sources(capfd):
    code, out, _ = run(capfd, "--figures")
    assert code == 0 and all(name in out for name in list_gpus())
    assert "FlashAttention-3" in out and "datasheet" in out and "assumed" in out


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "no method given"),
        ("radail", "did you mean 'radial'"),
        ("radial --denisty 0.3", "did you mean '--density'"),
        ("radial --gpu H1000", "unknown GPU 'H1000': did you mean 'H100'"),
        ("radial --model wan", "unknown model 'wan'"),
        ("radial --size 81x720", "--size must be three integers"),
        ("radial --size 80x720x1280", "4n + 1 frames"),
        ("radial --grid 5x7", "--grid must be three integers such as 21x45x80, got '5x7'"),
        ("radial --grid 5x7x9 --model mochi-1", "--model belongs to a model's video"),
        ("radial --grid 5x7x9 --dense-steps 3", "--dense-steps belongs to a model's video"),
        ("radial --heads 3", "--heads goes with --grid"),
        ("radial --tiles 0", "--tiles: must be at least 1"),
        ("radial --json {tmp}/a.txt", "--json must end in .json"),
        ("radial --json {tmp}", "--json must end in .json"),
        ("radial --text=-2", "Grid.text must be an integer of at least 0"),
    ],
)
def test_a_mistake_is_named(line, words, capfd, tmp_path):
    code, _, err = run(capfd, *(word.format(tmp=tmp_path) for word in line.split()))
    assert code != 0 and err.startswith("vidattn: ") and words in err
    assert list(tmp_path.iterdir()) == []
